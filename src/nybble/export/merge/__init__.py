"""A base with an adapter added."""
