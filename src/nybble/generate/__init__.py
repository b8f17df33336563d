"""Token generation: token ids in, tokens out through a sink. No text, no template, no event loop, no HTTP."""
