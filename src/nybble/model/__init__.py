"""Load and quantise a base model, attach and verify a LoRA adapter."""
