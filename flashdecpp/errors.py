"""Errors that users can act on: one line each, raised before any long work."""

MAX_CHARACTERS = 2000


class ModelError(ValueError):
    """A checkpoint, prompt or setting that the runner cannot use.

    The message is a single line of bounded length, whatever names and values of a file it quotes.
    """

    def __init__(self, message: str) -> None:
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)
        if len(line) > MAX_CHARACTERS:
            line = f"{line[: MAX_CHARACTERS // 2]} ... {line[-MAX_CHARACTERS // 2 :]}"
        super().__init__(line)


class OutOfMemory(ModelError):
    """The weights or the KV cache do not fit into the free memory."""
