"""Memory and time of a run, reckoned from sizes."""
