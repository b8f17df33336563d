"""Sweeps: many short trainings on one base, to find settings by their held-out loss."""
