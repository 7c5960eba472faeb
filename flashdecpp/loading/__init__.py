"""Checkpoints and tokenizers, from every format that is read, into the decoder's parts."""
