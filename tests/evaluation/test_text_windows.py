"""Windows of a text for several files: the tokenizer that they share is made once, and different ones are an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.text_windows import common_windows, shipped_text, tokenized_windows
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.tokenization.tokenizer import Tokenizer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose tokenizers are made."""
    names: list[str] = []
    original = Tokenizer.__init__

    def count(tokenizer: Tokenizer, metadata: dict[str, object], *, name: str = "") -> None:
        names.append(name)
        original(tokenizer, metadata, name=name)

    monkeypatch.setattr(Tokenizer, "__init__", count)
    return names


def test_files_with_the_same_tokenizer(tiny_trit_file: Callable[..., GgufFile], made: list[str]) -> None:
    files = [tiny_trit_file("llama", depth) for depth in (1, 2, 3)]
    made.clear()
    windows = common_windows(files, shipped_text(), 100)
    assert made == [str(files[0].path)]
    assert windows == tokenized_windows(files[2], shipped_text(), 100)


def test_files_with_other_tokenizers_or_contexts(
    tiny_trit_file: Callable[..., GgufFile], tmp_path: Path, made: list[str]
) -> None:
    first = tiny_trit_file("llama", 2)
    other = tiny_trit_file("qwen2", 2)
    with pytest.raises(TritGgufError, match=r"qwen2-2\.gguf splits the text into other tokens or windows than .*llama"):
        common_windows([first, other], shipped_text(), 100)
    short = write_tiny_model(tmp_path / "short", max_position_embeddings=50)
    convert(short, tmp_path / "short.gguf", depth=2)
    with pytest.raises(TritGgufError, match=r"short\.gguf splits the text into other tokens or windows"):
        common_windows([first, GgufFile(tmp_path / "short.gguf")], shipped_text(), 100)
