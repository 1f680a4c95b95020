"""Refusing a prompt that is too long before a model is loaded, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from tritgguf.formats.gguf_file import open_trit_file
from tritgguf.generation.prompt import prompt_tokens
from tritgguf.generation.prompt_format import PromptFormat
from tritgguf.generation.request import check_prompt_length

_TEMPLATE_TOKENS = 256  # more than a chat template adds to a prompt
_SMALLEST_TRAINED_CONTEXT = 1024


def check_prompt_fits(path: str | Path, prompt: str, *, system: str | None, raw: bool, context: int | None) -> None:
    """Raise ContextFullError if a prompt is longer than the context; None is the one that the model was trained for.

    A token takes a byte at least, so most prompts fit for sure and the file need not be opened. Raises TritGgufError
    also for a file that cannot be read and a prompt that its chat template refuses.
    """
    most = len(prompt.encode(errors="replace")) + len((system or "").encode(errors="replace"))
    most += 0 if raw else _TEMPLATE_TOKENS
    if most <= (context or _SMALLEST_TRAINED_CONTEXT):
        return
    file = open_trit_file(path)
    size = context or file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    if isinstance(size, int) and most > size:  # a file without a context length is refused when it is loaded
        check_prompt_length(len(prompt_tokens(PromptFormat.of(file), prompt, system=system, raw=raw)), size)
