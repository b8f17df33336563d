"""nybble: QLoRA fine-tuning of LLaMA 2 and its kin."""

__version__ = "0.1.0"
