"""Tokenizers, as their own files say."""
