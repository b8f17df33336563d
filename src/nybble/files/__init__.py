"""What is read from the disk and written to it."""
