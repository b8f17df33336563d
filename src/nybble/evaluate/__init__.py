"""Did it get better, at what, at what price."""
