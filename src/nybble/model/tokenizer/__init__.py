"""Tokenizers, loaded as their own files describe them."""
