"""What a user of the chat can do besides asking: lines such as `/clear` and `/set temp 0.2`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritgguf.cli import terminal
from tritgguf.cli.options import check_predict
from tritgguf.errors import BadRequestError

if TYPE_CHECKING:
    from tritgguf.generation.chat import Chat
    from tritgguf.generation.text_stream import TextStream

_NAME = re.compile(r"/[A-Za-z?]+(?=\s|$)")
_HELP = (
    ("/clear", "start a new chat"),
    ("/regenerate", "answer the last message again"),
    ("/set", "show the settings"),
    ("/set NAME VALUE", "change one, such as /set temp 0.2 or /set system Be brief."),
    ("/save FILE", "save the chat as JSON"),
    ("/load FILE", "go on with a saved chat"),
    ("/exit", "leave, as /bye, /quit and Ctrl-D do"),
)
_MORE_HELP = (
    'Ctrl-C stops an answer. For a message of several lines paste it, end lines with \\, or write """ before and after'
    " it. A space before / makes a command a message."
)

# Settings of `/set` that are not named like a field of SamplingOptions.
_SHORT_NAMES = {"temp": "temperature"}
_MAX_TOKENS_NAMES = ("predict", "n-predict", "n")


class ChatCommands:
    """The commands of one chat.

    Attributes:
        has_ended: whether the user wants to leave.

    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._own_files: set[Path] = set()  # saved or loaded in this session, so /save may replace them
        self.has_ended = False
        self._handlers: dict[str, Callable[[str], TextStream | None]] = {
            **dict.fromkeys(("/help", "/?"), self._help),
            **dict.fromkeys(("/exit", "/bye", "/quit"), self._exit),
            "/clear": self._clear,
            "/regenerate": self._regenerate,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
        }

    @property
    def names(self) -> list[str]:
        """The names of the commands, with their slash."""
        return sorted(self._handlers)

    @staticmethod
    def is_command(text: str) -> bool:
        """Tell whether a message is a command: one line that begins with a slash and one word, and no path."""
        return _NAME.match(text) is not None and "\n" not in text

    def run(self, line: str) -> TextStream | None:
        """Run a command and return the answer that it starts, if any; TritGgufError if it cannot be run."""
        name, _, rest = line.strip().partition(" ")
        if name not in self._handlers:
            raise BadRequestError(f"there is no command {name}; /help lists them, and a space before it makes it text")
        return self._handlers[name](rest.strip())

    def _help(self, rest: str) -> None:
        terminal.note_pairs(_HELP)
        terminal.note(f"\n{_MORE_HELP}")

    def _exit(self, rest: str) -> None:
        self.has_ended = True

    def _clear(self, rest: str) -> None:
        self._chat.clear()
        terminal.note("A new chat begins.")

    def _regenerate(self, rest: str) -> TextStream:
        return self._chat.regenerate()

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name, value = name.lower().replace("_", "-"), value.strip()
        if not name:
            terminal.note_pairs([(name, str(value)) for name, value in self._settings().items()])
        elif name == "system":
            self._chat.system = value or None
        elif name in _MAX_TOKENS_NAMES:
            self._chat.max_tokens = check_predict(int(_number(name, value, int)))
        else:
            self._set_sampling(name, value)

    def _settings(self) -> dict[str, object]:
        options = {_shown_name(name): value for name, value in self._sampling_fields().items()}
        return {"system": self._chat.system or "", "predict": self._chat.max_tokens, **options}

    def _sampling_fields(self) -> dict[str, object]:
        """Return the settings that are a number, by the name of their field."""
        options = self._chat.sampling
        return {
            field.name: getattr(options, field.name)
            for field in dataclasses.fields(options)
            if field.type in ("int", "float")
        }

    def _set_sampling(self, name: str, value: str) -> None:
        from tritgguf.generation.sampling import SamplingOptions

        field = _SHORT_NAMES.get(name, name).replace("-", "_")
        kinds = {option.name: option.type for option in dataclasses.fields(SamplingOptions)}
        if field not in self._sampling_fields():
            raise BadRequestError(f"there is no setting {name}; /set shows them")
        number: Any = _number(name, value, int if kinds[field] == "int" else float)
        self._chat.sampling = dataclasses.replace(self._chat.sampling, **{field: number})

    def _save(self, rest: str) -> None:
        from tritgguf.generation.saved_chat import save_messages

        path = _path("save", rest)
        if path.exists() and path.resolve() not in self._own_files:
            raise BadRequestError(f"{path}: exists already; name another file")
        save_messages(path, self._chat.messages)
        self._own_files.add(path.resolve())
        terminal.note(f"{_count(len(self._chat.messages))} saved in {path}")

    def _load(self, rest: str) -> None:
        from tritgguf.generation.saved_chat import load_messages

        path = _path("load", rest)
        messages = load_messages(path)
        self._chat.clear()
        self._chat.messages = messages
        self._own_files.add(path.resolve())
        terminal.note(f"{_count(len(messages))} loaded from {path}")


def _shown_name(field: str) -> str:
    shown = {long: short for short, long in _SHORT_NAMES.items()}
    return shown.get(field, field).replace("_", "-")


def _number(name: str, value: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise BadRequestError(f"{name} must be {what}, not {value!r:.60}; such as /set {name} 1") from None


def _path(command: str, name: str) -> Path:
    if not name:
        raise BadRequestError(f"/{command} needs the name of a file")
    return Path(name).expanduser()


def _count(messages: int) -> str:
    return f"{messages} message{'' if messages == 1 else 's'}"
