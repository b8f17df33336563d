"""A run's memory and time, computed from sizes."""
