"""The decoder: one step of many rows at a time, each at a place of its own in a paged cache."""
