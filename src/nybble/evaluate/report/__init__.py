"""The before/after report."""
