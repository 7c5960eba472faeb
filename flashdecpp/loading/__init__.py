"""Loads checkpoints and tokenizers of every supported format."""
