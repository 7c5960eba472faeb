"""Generates text: requests, their batch, the KV cache's blocks and the choice of tokens."""
