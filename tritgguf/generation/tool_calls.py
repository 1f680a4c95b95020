"""From the text of an answer, as it comes, to its content, its thoughts and its tool calls."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from tritgguf.generation.call_reader import CallReader
from tritgguf.generation.chat_format import ChatFormat
from tritgguf.generation.stop_strings import overlap


@dataclass(frozen=True)
class ContentDelta:
    """More of what the user reads."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call begins; calls are numbered from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the arguments of a call, a JSON text."""

    index: int
    text: str


Delta: TypeAlias = "ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta"
_Mode: TypeAlias = "Callable[[], bool]"

_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_LONGEST_HEADER = 400
_BARE_CALL = re.compile(r"\s*(?:```(?:json)?\s*)?")
_FENCE = "```json"
_HARMONY_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class AnswerParser:
    """Splits an answer into deltas; no part of a marker gets into them, wherever the pieces of text are cut.

    What looks like a call and is none becomes content. A call that the end of the answer cuts before its name is
    complete is left out, and so is a marker behind a call that the end cuts.

    Attributes:
        calls: how many calls have begun.

    """

    def __init__(
        self,
        chat_format: ChatFormat,
        *,
        tools: bool = True,
        names: Collection[str] = (),
        in_thoughts: bool = False,
    ) -> None:
        """Begin.

        Args:
            chat_format: how the model writes.
            tools: whether it may call tools; if not, what looks like a call is content.
            names: those of the tools. An answer that begins with the JSON object of a call to one of them, in a block
                of code perhaps, is that call: small models forget the tags.
            in_thoughts: whether the prompt has begun its thoughts.

        """
        self.calls = 0
        self._format, self._tools, self._names = chat_format, tools, names
        self._rest = ""
        self._deltas: list[Delta] = []
        self._at_start = True  # of the content: white space there says nothing
        self._kinds: set[type[ContentDelta] | type[ReasoningDelta]] = set()  # of text that has been told
        self._marker = self._closing = ""  # in front of the call that is being read, and behind it
        self._reader: CallReader | None = None
        self._begun = False  # whether that call's start has been told
        self._final = False
        if chat_format.tools == "harmony":
            self._mode: _Mode = self._harmony_header
        else:
            self._mode = self._thoughts if in_thoughts else self._content

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text; return what it tells."""
        self._rest += text
        while self._mode():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """Return what was held back, at the end of the answer."""
        self._final = True
        deltas = self.feed("")
        if self._reader is not None:
            self._give_up_call()
            deltas += self.feed("")
        if not self.calls:  # behind a call, it is the beginning of what would close it or open another
            self._emit(ContentDelta, self._rest)
        self._rest = ""
        return deltas + self._take()

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _emit(self, kind: type[ContentDelta] | type[ReasoningDelta], text: str) -> None:
        if self._at_start:
            text = text.lstrip()
        if text:
            if self._at_start and self._format.tools == "harmony" and kind in self._kinds:
                text = f"\n\n{text}"  # another message of this channel
            self._at_start = False
            self._kinds.add(kind)
            self._deltas.append(kind(text))

    # -- text up to a marker

    def _content(self) -> bool:
        modes: dict[str, _Mode] = {}
        if self._format.thinks:
            modes["<think>"] = self._thoughts
        if self._tools:
            opening = self._format.markers[0]
            modes[opening] = self._mistral_header if self._format.tools == "mistral-args" else self._call
            if self._at_start and not self.calls and (self._format.tools == "llama" or self._names):
                opening = _BARE_CALL.match(self._rest)[0]  # type: ignore[index]
                if self._rest[len(opening) :].startswith("{"):
                    self._rest = self._rest[len(opening) :]
                    self._begin_call(opening, closing="```" if "`" in opening else "")
                    return True
                if not self._final and _FENCE.startswith(self._rest.strip()):
                    return False  # a block of code may begin
        return self._text_until(modes, ContentDelta)

    def _thoughts(self) -> bool:
        return self._text_until({"</think>": self._content}, ReasoningDelta)

    def _text_until(self, modes: Mapping[str, _Mode], kind: type[ContentDelta] | type[ReasoningDelta]) -> bool:
        """Emit text up to the first of the markers, and go on in its mode; hold back what may be one's beginning."""
        found = [(place, marker) for marker in modes if (place := self._rest.find(marker)) >= 0]
        if found:
            place, marker = min(found)
            self._emit(kind, self._rest[:place].rstrip())
            self._rest = self._rest[place + len(marker) :]
            self._at_start, self._mode = True, modes[marker]
            if self._mode == self._call:
                self._begin_call(marker, closing=self._format.markers[1] if self._format.tools == "hermes" else "")
            return True
        held = max((overlap(self._rest, marker) for marker in modes), default=0)
        if self._final and not self.calls:
            held = 0  # the answer ends with what is no marker
        ready = self._rest[: len(self._rest) - held]
        if modes and not (self._final and not self.calls):  # white space in front of a marker says nothing
            ready = ready.rstrip()
        self._emit(kind, ready)
        self._rest = self._rest[len(ready) :]
        return False

    # -- calls

    def _begin_call(self, marker: str, name: str | None = None, closing: str = "") -> None:
        self._marker, self._closing, self._reader, self._begun = marker, closing, CallReader(name), False
        self._mode = self._call

    def _call(self) -> bool:
        """Read a JSON object, behind the `[` of a list perhaps."""
        reader = self._reader
        assert reader is not None
        if not reader.text:
            self._rest = self._rest.lstrip(" \t\r\n[" if self._format.tools != "llama" else " \t\r\n")
        self._rest = reader.feed(self._rest)
        if not self._begun and reader.name is not None and not reader.has_failed:
            is_marked = bool(self._marker.strip("` \t\r\njson")) or self._format.tools in ("llama", "harmony")
            if not (is_marked or self.calls or reader.name in self._names):
                self._give_up_call()
                return True
            self._begun = True
            self._deltas.append(ToolCallStart(self.calls, reader.call_id or self._new_id(), reader.name))
            self.calls += 1
        if self._begun and (arguments := reader.take_arguments()):
            self._deltas.append(ArgumentsDelta(self.calls - 1, arguments))
        if reader.has_failed or (reader.is_complete and not self._begun):
            self._give_up_call()
            return True
        if reader.is_complete:
            self._reader, self._mode = None, self._after_call
            return True
        return False

    def _give_up_call(self) -> None:
        """Take for content what was no call; the arguments of one that has begun stay as they are."""
        assert self._reader is not None
        was_cut = self._final and self._marker in self._format.markers and not self._reader.has_failed
        raw = "" if self._begun or was_cut else self._marker + self._reader.raw()
        self._reader, self._at_start = None, self._at_start and not raw
        if raw:
            self._deltas.append(ContentDelta(raw))
        self._mode = self._harmony_rest if self._format.tools == "harmony" else self._content

    def _after_call(self) -> bool:
        """Skip what closes a call; another may follow at once."""
        if self._format.tools == "harmony":
            self._mode = self._harmony_rest
            return True
        self._rest = self._rest.lstrip(" \t\r\n,;]")
        closing = self._closing
        if self._rest.startswith("{") and self._format.tools != "mistral-args":
            self._begin_call("", closing=closing)
        elif closing and self._rest.startswith(closing):
            self._rest = self._rest[len(closing) :]
        elif closing.startswith(self._rest):  # may go on, unless the answer is cut here
            return False
        else:
            self._at_start, self._mode = True, self._content
        return True

    def _mistral_header(self) -> bool:
        """Read the name of a function up to its arguments."""
        place = self._rest.find("{")
        if place < 0:
            return False
        name = re.split(r"\[ARGS\]|\[CALL_ID\]", self._rest[:place])[0].strip()
        self._rest = self._rest[place:]
        self._begin_call(f"[TOOL_CALLS]{name}", name)
        return True

    # -- the channels of gpt-oss

    def _harmony_header(self) -> bool:
        place = self._rest.find("<|message|>")
        if place < 0:
            if self._final or len(self._rest) > _LONGEST_HEADER:
                self._mode = self._harmony_content
                return bool(self._rest)
            return False
        header, self._rest = self._rest[:place], self._rest[place + len("<|message|>") :]
        recipient = _RECIPIENT.search(header)
        self._at_start = True
        if recipient is not None and self._tools:
            self._begin_call("", recipient[1])
        elif "analysis" in header:
            self._mode = self._harmony_thoughts
        else:
            self._mode = self._harmony_content
        return True

    def _harmony_content(self) -> bool:
        return self._text_until(dict.fromkeys(_HARMONY_ENDS, self._harmony_header), ContentDelta)

    def _harmony_thoughts(self) -> bool:
        return self._text_until(dict.fromkeys(_HARMONY_ENDS, self._harmony_header), ReasoningDelta)

    def _harmony_rest(self) -> bool:
        """Skip what stands behind the arguments of a call."""
        found = [(place, end) for end in _HARMONY_ENDS if (place := self._rest.find(end)) >= 0]
        if not found:
            self._rest = "" if self._final else self._rest[-len("<|return|>") :]
            return False
        place, end = min(found)
        self._rest, self._mode = self._rest[place + len(end) :], self._harmony_header
        return True

    def _new_id(self) -> str:
        if self._format.tools.startswith("mistral"):  # its template takes nine letters and digits
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
