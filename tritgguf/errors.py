"""The exceptions that reach the user."""

from __future__ import annotations


class TritGgufError(Exception):
    """An error that the user can fix.

    Its message is one line that names the file, the tensor if there is one, and the remedy. The command line prints it
    to stderr and exits with code 1. The subclasses below name the cause; an error without a subclass comes from the
    machine: a disk, the network, another program.
    """

    def __init__(self, message: str) -> None:
        """Store the message as one line: names and values quoted from a damaged file may contain line breaks."""
        super().__init__(" ".join(message.splitlines()))


class BadRequestError(TritGgufError):
    """The request is invalid: an impossible option, an empty prompt, an output that exists."""


class ContextFullError(TritGgufError):
    """A prompt is longer than the model's context."""


class DamagedFileError(TritGgufError):
    """A file is damaged or incomplete, or contains something that is not supported."""


class MissingExtraError(TritGgufError):
    """An optional dependency, which only some commands need, is not installed."""
