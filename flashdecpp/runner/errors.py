"""Errors that a user can act on: one clean line each, raised before any long work."""


class ModelError(ValueError):
    """A checkpoint, a prompt or a setting that the runner can't work with."""


class OutOfMemory(ModelError):
    """The weights or the KV cache don't fit the memory that is free."""
