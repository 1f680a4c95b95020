"""The chat of `run` at a terminal."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from tritgguf.cli import terminal
from tritgguf.cli.answer import AnswerWriter, print_context_note, print_timings
from tritgguf.cli.chat_commands import ChatCommands
from tritgguf.cli.line_editor import LineEditor
from tritgguf.errors import ContextFullError, TritGgufError

if TYPE_CHECKING:
    from tritgguf.generation.loaded_model import LoadedModel
    from tritgguf.generation.sampling import SamplingOptions
    from tritgguf.generation.text_stream import TextStream


def chat_at_terminal(
    model: LoadedModel, system: str | None, sampling: SamplingOptions, max_tokens: int, **rules: Any
) -> None:
    """Chat until the user leaves."""
    from tritgguf.generation.chat import Chat

    chat = Chat(model, system=system, sampling=sampling, max_tokens=max_tokens, **rules)
    commands = ChatCommands(chat)
    editor = LineEditor(commands.names)
    terminal.note("Ctrl-C stops an answer, Ctrl-D leaves, /help shows what else there is.")
    while not commands.has_ended and (text := editor.read()) is not None:
        try:
            if not text.strip():
                continue
            stream = commands.run(text) if commands.is_command(text) else chat.ask(text)
            if stream is not None:
                _show(stream, model, editor)
        except ContextFullError as error:
            terminal.error(f"{error}; /clear starts a new chat")
        except TritGgufError as error:  # the template refuses the message, for example: the chat can go on
            terminal.error(str(error))


def _show(stream: TextStream, model: LoadedModel, editor: LineEditor) -> None:
    """Show an answer as it comes; Ctrl-C ends it."""
    writer = AnswerWriter()
    with editor.keeping_keys():
        try:
            with contextlib.suppress(KeyboardInterrupt):
                stream.finish(writer.write)
            stream.close()
        finally:
            writer.end()
    answer = stream.result()
    print_context_note(model, answer)
    print_timings(answer.timings, with_load=False)
