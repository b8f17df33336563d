"""`nybble plan`: what a recipe takes, told before anything is downloaded."""
