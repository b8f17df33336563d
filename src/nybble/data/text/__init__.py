"""From conversations to text and token ids."""
