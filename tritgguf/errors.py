"""The exceptions that reach the user."""

from __future__ import annotations


class TritGgufError(Exception):
    """Something the user can act on.

    Its message is one line that names the file, the tensor where there is one, and the remedy.
    The command line prints it to stderr and exits with code 1. The classes below tell programs whose fault it is; an
    error of none of them comes from the machine: a disk, the network, another program.
    """

    def __init__(self, message: str) -> None:
        """Take the message, in one line: names and values of a damaged file, which it quotes, may hold line ends."""
        super().__init__(" ".join(message.splitlines()))


class BadRequestError(TritGgufError):
    """What was asked for cannot be: an impossible option, an empty prompt, an output that exists."""


class ContextFullError(TritGgufError):
    """A prompt is longer than the model's context."""


class DamagedFileError(TritGgufError):
    """A file is damaged or incomplete, or holds what is not supported."""


class MissingExtraError(TritGgufError):
    """A package that only some commands need is not installed."""
