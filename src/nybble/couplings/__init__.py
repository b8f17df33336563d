"""The register of every reliance on private parts or undocumented behaviour of libraries: what breaks, and what notices."""
