"""What turns texts and messages into a model's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritgguf.formats.gguf_file import GgufFile


@dataclass(eq=False)
class PromptFormat:
    """What turns texts and messages into a model's tokens.

    Attributes:
        path: the model's file.
        tokenizer: its tokenizer.
        chat_template: the Jinja template of its chats; None where the file has none.

    """

    path: Path
    tokenizer: Tokenizer
    chat_template: str | None = field(repr=False)

    @classmethod
    def of(cls, file: GgufFile) -> PromptFormat:
        """Return the format of a model's file; TritGgufError if its tokenizer is missing or damaged."""
        template = file.metadata.get("tokenizer.chat_template")
        tokenizer = Tokenizer(file.metadata, name=str(file.path))
        return PromptFormat(file.path, tokenizer, template if isinstance(template, str) else None)
