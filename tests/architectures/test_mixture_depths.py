"""Mixtures of experts whose matrices have depths 1, 3 and 4, against transformers; 2 is that of all other tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from reference_logits import check_logits

from tools.models import families
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, parse_rules
from tritgguf.formats.gguf_file import GgufFile

DEPTHS = {"ffn_gate_exps": (1, 3, 4), "ffn_up_exps": (3, 4, 1), "ffn_down_exps": (4, 1, 3)}


def rules(first: int) -> str:
    """Return rules that give each kind of an expert's matrices every depth, in different layers from `first` on."""
    return ",".join(
        f"blk.{layer}.{name}*={of_layers[layer % 3]}" for name, of_layers in DEPTHS.items() for layer in range(first, 6)
    )


@pytest.mark.parametrize("name", families.MIXTURES)
def test_logits_at_every_depth(tmp_path: Path, name: str) -> None:
    """A prompt at once and token by token: exact, and with activations of 16 bits."""
    folder = families.write_random_family(tmp_path / "model", name)
    first = families.FAMILIES[name][1].get("num_dense_layers", 0)
    choice = DepthChoice(keep=tuple(parse_rules(rules(first))))
    convert(folder, tmp_path / "model.gguf", encoder="v2", choice=choice)
    file = GgufFile(tmp_path / "model.gguf")
    types = {file.tensors[f"blk.{layer}.ffn_up_exps.weight"].type_name for layer in range(first, first + 3)}
    assert types == {"TRIT1", "TRIT3", "TRIT4"}
    check_logits(folder, file)
