"""The class of an error tells its cause: the caller, the file or the installation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_model import scripted
from tiny_models import CHAT_TEMPLATE, edit_json, write_tiny_model

import tritgguf
from tritgguf.calibration.text import windows_of_text
from tritgguf.errors import BadRequestError, ContextFullError, DamagedFileError, MissingExtraError, TritGgufError
from tritgguf.formats.durable_output import check_output
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.prompt import prompt_tokens
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.reference.model import require_torch
from tritgguf.sources.open import open_source
from tritgguf.tokenization.tokenizer import Tokenizer

REFUSING = "{{ raise_exception('only two roles') }}"


def _written(folder: Path, data: bytes) -> Path:
    (folder / "file").write_bytes(data)
    return folder / "file"


def _source_with_heads(folder: Path, heads: Any) -> Any:
    edit_json(write_tiny_model(folder / "model") / "config.json", num_attention_heads=heads)
    return open_source(str(folder / "model"))


def _short_text(folder: Path) -> Any:
    return windows_of_text(open_source(str(write_tiny_model(folder / "model"))), "short", 512)


@pytest.mark.parametrize(
    ("kind", "provoke"),
    [
        (BadRequestError, lambda folder: SamplingOptions(top_p=2)),
        (BadRequestError, lambda folder: prompt_tokens(scripted("a"), None)),
        (BadRequestError, lambda folder: prompt_tokens(scripted("a"), "a", system="b", raw=True)),
        (BadRequestError, lambda folder: prompt_tokens(scripted("a", template=None), "a")),
        (BadRequestError, lambda folder: prompt_tokens(scripted("a", template=REFUSING), "a")),
        (BadRequestError, lambda folder: check_output(_written(folder, b""), overwrite=False)),
        (BadRequestError, lambda folder: open_source(str(folder / "nothing" / "of" / "this name"))),
        (BadRequestError, _short_text),
        (DamagedFileError, lambda folder: prompt_tokens(scripted("a", template="{% for"), "a")),
        (DamagedFileError, lambda folder: GgufFile(_written(folder, b"GGUF" + bytes(9)))),
        (DamagedFileError, lambda folder: GgufFile(_written(folder, b"GGUF\3\0\0\0" + b"\xff" * 99))),
        (DamagedFileError, lambda folder: _source_with_heads(folder, None)),
        (DamagedFileError, lambda folder: Tokenizer({})),
        (DamagedFileError, lambda folder: Sampler(SamplingOptions()).sample(np.full(9, np.nan, np.float32))),
        (TritGgufError, lambda folder: GgufFile(folder / "nothing.gguf")),
    ],
)
def test_the_kind_of_an_error(kind: type[TritGgufError], provoke: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(TritGgufError) as caught:
        provoke(tmp_path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"transformers.*pip install torch transformers accelerate"):
        require_torch()


def test_a_chat_error_names_the_file() -> None:
    with pytest.raises(BadRequestError, match=r"model\.gguf: .*only two roles"):
        prompt_tokens(scripted("a", template=REFUSING), "a")
    assert prompt_tokens(scripted("a", template=CHAT_TEMPLATE), "a")


@pytest.mark.parametrize("kind", [BadRequestError, ContextFullError, DamagedFileError, MissingExtraError])
def test_kinds_are_public(kind: type[TritGgufError]) -> None:
    assert getattr(tritgguf, kind.__name__) is kind
    assert kind.__name__ in tritgguf.__all__
    assert issubclass(kind, TritGgufError)
    assert str(kind("two\nlines")) == "two lines"
