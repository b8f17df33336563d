"""Base models: found, checked, loaded, quantised, kept."""
