"""The one exception that reaches the user."""

from __future__ import annotations


class TritGgufError(Exception):
    """Something the user can act on.

    Its message is one line that names the file, the tensor where there is one, and the remedy.
    The command line prints it to stderr and exits with code 1.
    """

    def __init__(self, message: str) -> None:
        """Take the message, in one line: names and values of a damaged file, which it quotes, may hold line ends."""
        super().__init__(" ".join(message.splitlines()))
