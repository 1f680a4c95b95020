"""Stop strings: texts that end a generation, wherever the borders of tokens are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tritgguf.errors import BadRequestError


def stop_list(stop: str | Sequence[str] | None) -> list[str]:
    """Return one stop string, several or none as a list; BadRequestError for anything else."""
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else [stop]
    for text in stops:
        if not isinstance(text, str):
            raise BadRequestError(f"a stop string is a text, not {text!r:.60}")
    return stops


class StopStrings:
    """Lets text through until a stop string begins; holds back what may be the beginning of one.

    Of several, the one that is complete first counts, and of those that end together the longest: so it does not matter
    in which pieces the text comes.

    Attributes:
        found: whether a stop string has come; nothing is let through from then on.

    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Take the next piece of text; return what can be shown of the text so far."""
        if self.found:
            return ""
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what is still held back, at the end of the text."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
