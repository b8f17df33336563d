"""What leaves the tool: adapter, merged model, GGUF; each answers like the run it came from, or is not written."""
