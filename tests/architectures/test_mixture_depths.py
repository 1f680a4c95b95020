"""Mixtures of experts whose matrices have depths 1, 3 and 4, against transformers; 2 is that of all other tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sequences import open_sequence

pytest.importorskip("torch")

from tools.models import families
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, parse_rules
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

# More than a window. With the seed 4, two experts of gpt-oss with YaRN are equal to 1e-5, and 16 bits swap them.
TOKENS = np.random.default_rng(5).integers(0, 256, 64).tolist()
DEPTHS = {"ffn_gate_exps": (1, 3, 4), "ffn_up_exps": (3, 4, 1), "ffn_down_exps": (4, 1, 3)}


def rules() -> str:
    """Return rules that give each kind of an expert's matrices every depth, in different layers."""
    return ",".join(
        f"blk.{layer}.{name}*={of_layers[layer % 3]}" for name, of_layers in DEPTHS.items() for layer in range(6)
    )


@pytest.mark.parametrize("name", families.MIXTURES)
def test_logits_at_every_depth(tmp_path: Path, name: str) -> None:
    """A prompt at once and token by token: exact, and with activations of 16 bits."""
    folder = families.write_random_family(tmp_path / "model", name)
    choice = DepthChoice(keep=tuple(parse_rules(rules())))
    convert(folder, tmp_path / "model.gguf", encoder="v2", choice=choice)
    file = GgufFile(tmp_path / "model.gguf")
    types = {file.tensors[f"blk.{layer}.ffn_up_exps.weight"].type_name for layer in range(3)}
    assert types == {"TRIT1", "TRIT3", "TRIT4"}
    reference = ReferenceModel.open(open_source(str(folder)))
    reference.load_file(file)
    expected = reference.logits(TOKENS)
    largest = np.abs(expected).max()
    sequence = open_sequence(file, context=len(TOKENS), exact=True, cache_type="f32")
    assert np.abs(sequence.forward(TOKENS, all_logits=True) - expected).max() < 1e-5 * largest
    sequence = open_sequence(file, context=len(TOKENS), prefill_bits=16, cache_type="f32")
    assert np.abs(sequence.forward(TOKENS, all_logits=True) - expected).max() < 1e-3 * largest
    sequence.truncate(0)
    found = np.array([sequence.forward([token]) for token in TOKENS])
    assert np.abs(found - expected).max() < 1e-3 * largest
