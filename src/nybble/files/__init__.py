"""Reading and writing files: paths, atomic writes, locks, digests, the cache."""
