"""Base models: found, checked, loaded, quantised, cached."""
