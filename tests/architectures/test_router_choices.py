"""Which experts the tokens of a text go to: the choices of transformers, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sequences import open_sequence

pytest.importorskip("torch")

from tools.models import families
from tritgguf.conversion.convert import convert
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import ReferenceModel
from tritgguf.runtime.expert_pass import ExpertPass
from tritgguf.sources.open import open_source

TOKENS = np.random.default_rng(3).integers(0, 256, 256).tolist()


Choices = list[tuple[np.ndarray, np.ndarray]]
"""Of each layer: the experts, int [tokens, chosen], and their weights, float32."""


def choices_of_transformers(folder: Path, file: GgufFile) -> Choices:
    """Return the choices with the file's weights."""
    reference = ReferenceModel.open(open_source(str(folder)))
    reference.load_file(file)
    found: Choices = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        found.append((output[2].numpy(), output[1].numpy()))  # scores, weights, experts

    routers = [module for module in reference.module.modules() if type(module).__name__.endswith("Router")]
    for router in routers:
        router.register_forward_hook(record)
    reference.logits(TOKENS)
    assert len(found) == len(routers) > 0
    return found


def our_choices(file: GgufFile, monkeypatch: pytest.MonkeyPatch) -> Choices:
    found: Choices = []
    route = ExpertPass._route

    def recorded(self: ExpertPass, *arguments: Any) -> Any:
        result = route(self, *arguments)
        found.append(result[:2])
        return result

    monkeypatch.setattr(ExpertPass, "_route", recorded)
    open_sequence(file, context=256, exact=True, cache_type="f32").forward(TOKENS)
    return found


@pytest.mark.parametrize("name", families.MIXTURES)
def test_choices_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = families.write_random_family(tmp_path / "model", name)
    convert(folder, tmp_path / "model.gguf", depth=2)
    file = GgufFile(tmp_path / "model.gguf")
    expected, found = choices_of_transformers(folder, file), our_choices(file, monkeypatch)
    assert len(found) == len(expected)
    np.testing.assert_array_equal([experts for experts, _ in found], [experts for experts, _ in expected])
    assert len(np.unique(expected[0][0])) > 4  # the router decides
    if name == "phimoe":
        _check_weights_of_sparse_mixer(expected, found)


def _check_weights_of_sparse_mixer(expected: Choices, found: Choices) -> None:
    """Each of the two experts has a weight of 1 where no other is near it, and less elsewhere; both are frequent."""
    theirs, ours = (np.array([weights for _, weights in choices]) for choices in (expected, found))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    are_one = (theirs == 1).mean(axis=(0, 1))
    assert ((are_one > 0.1) & (are_one < 0.9)).all()
