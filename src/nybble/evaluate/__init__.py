"""Base against tuned: what improved, and what got worse."""
