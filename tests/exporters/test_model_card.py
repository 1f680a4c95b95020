"""The model card: valid YAML front matter, and figures from the file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from tiny_models import write_tiny_model

from tritgguf import convert
from tritgguf.exporters.model_card import model_card
from tritgguf.formats.gguf_file import GgufFile


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = yaml.safe_load(match[1])
    return found


def facts(card: str) -> dict[str, str]:
    """Return the rows of the table."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize(
    ("depth", "levels", "trits", "bits"),
    [(1, 3, 1.88, 2.0), (2, 9, 3.47, 3.5), (3, 27, 5.05, 5.25), (4, 81, 6.64, 6.75)],
)
def test_facts(tiny_trit_file: Callable[..., GgufFile], depth: int, levels: int, trits: float, bits: float) -> None:
    file = tiny_trit_file("llama", depth)
    card = model_card(file.path, base_model="Org/Model", weight_bytes=123_400_000)
    table = facts(card)
    assert table["Source model"] == "[Org/Model](https://huggingface.co/Org/Model)"
    assert table[f"Depth d={depth}"].startswith(f"{levels} levels per weight; matrices: 14, weights: 0.2 million")
    assert table["Bits per weight"].startswith(f"{trits:.2f} ")
    assert table["Bits per weight in the GGUF file"].startswith(f"{bits:.2f}, ")
    assert table["Group size"].startswith("16 ")
    assert table["Scale codebook"].startswith("27 entries")
    assert table["Codec, encoder"] == "tritllm-v2, v2"
    assert "token\\_embd.weight" in table["Not quantized"]
    assert "output.weight" in table["Not quantized"]
    assert "ffn\\_down.weight" in table["Quantized"]
    assert table["Size of the weights here"] == "123.4 MB, float16"
    assert front_matter(card)["base_model_relation"] == "quantized"
    assert f"uniform d={depth}" in card


def test_front_matter_from_the_source(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, 'no']\ntags: [chat, 'a: \"b\"']\n---\n# Model\n", encoding="utf-8"
    )
    convert(source, tmp_path / "d2.gguf")
    entries = front_matter(model_card(tmp_path / "d2.gguf", base_model=None, weight_bytes=1))
    assert "base_model" not in entries
    assert (entries["license"], entries["language"]) == ("apache-2.0", ["en", "no"])
    assert (entries["library_name"], entries["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"tritgguf", "chat", 'a: "b"'} <= set(entries["tags"])


def test_nothing_to_quantize(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model", "unaligned", intermediate_size=160)
    convert(source, tmp_path / "d2.gguf")
    table = facts(model_card(tmp_path / "d2.gguf", base_model=None, weight_bytes=1))
    assert table["Quantized"].endswith(" weights: none")
    assert "Bits per weight" not in table
