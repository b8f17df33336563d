"""What is trained towards, and measured."""
