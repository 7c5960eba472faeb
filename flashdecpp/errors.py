"""Errors that a user can act on: one clean line each, raised before any long work."""

LONGEST = 2000  # characters of a message


class ModelError(ValueError):
    """A checkpoint, a prompt or a setting that the runner can't work with.

    The message stays one line of a bearable length whatever a file's names and values have in them.
    """

    def __init__(self, message: str) -> None:
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)


class OutOfMemory(ModelError):
    """The weights or the KV cache don't fit the memory that is free."""
