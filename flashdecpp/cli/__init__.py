"""The command line, `flashdecpp` or `python -m flashdecpp`."""

from .app import main as main
