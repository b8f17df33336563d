"""Frozen weights and active adapters, read from bitsandbytes and PEFT."""
