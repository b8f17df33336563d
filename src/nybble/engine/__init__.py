"""The fused engine: decoder layers of the Llama architecture computed leaner and faster, adapters left to PEFT."""
