"""Every reliance on a private part, or on undocumented behaviour, of a library: what, where, what breaks, what notices."""
