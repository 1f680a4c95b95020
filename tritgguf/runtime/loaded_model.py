"""Loading a model and its tokenizer from a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tritgguf.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tritgguf.runtime.model import Model


@dataclass
class LoadedModel:
    """A model ready to generate; `cached_tokens` are those whose keys and values its cache holds."""

    path: Path
    model: Model
    tokenizer: Tokenizer
    chat_template: str | None
    load_seconds: float
    cached_tokens: list[int] = field(default_factory=list, repr=False)


def load(
    path: str | Path,
    *,
    context: int | None = None,
    threads: int | None = None,
    prefill_bits: int = 8,
    exact: bool = False,
    cache_type: str | None = None,
    on_compilation: Callable[[], None] | None = None,
) -> LoadedModel:
    """Open a trit GGUF file for generation.

    `context` is the room for prompt and answer, in tokens (None: what the model was trained for), `threads`
    the number of threads (None: all cores). `prefill_bits`, `exact` and `cache_type` say how exactly activations are
    multiplied and kept, see `Model`. `on_compilation` is called if the kernels have to be compiled first,
    which takes about half a minute on a machine's first run. Raises TritGgufError when the file is damaged or of
    an unknown kind.
    """
    start = time.perf_counter()
    from tritgguf.formats.gguf_file import GgufFile
    from tritgguf.runtime.model import Model

    file = GgufFile(path)
    tokenizer = Tokenizer(file.metadata, name=str(path))
    template = file.metadata.get("tokenizer.chat_template")
    model = Model(file, context=context, threads=threads, prefill_bits=prefill_bits, exact=exact, cache_type=cache_type)
    model.compile(on_compilation or (lambda: None))
    return LoadedModel(
        path=Path(path),
        model=model,
        tokenizer=tokenizer,
        chat_template=template if isinstance(template, str) else None,
        load_seconds=time.perf_counter() - start,
    )
