"""The local API: what OpenAI's clients speak, in front of an engine that makes tokens."""
