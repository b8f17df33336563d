"""What can be checked before a run: the machine and the data."""
