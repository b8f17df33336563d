"""Memory predicted from shapes."""
