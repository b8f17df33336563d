"""The generator in a process of its own: token ids go in and tokens come out; text, templates and HTTP stay with the server."""
