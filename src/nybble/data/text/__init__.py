"""Conversations to text and token ids."""
