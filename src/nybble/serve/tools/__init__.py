"""Calls of functions: the fields that ask for them, the prompt that names them, the grammar and the reader of answers."""
