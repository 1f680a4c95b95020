"""The small mixture that is trained: it learns, it converts, and its experts are computed as in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.models.train_mixture import experts_forward, train_mixture
from tools.quality.mixture import reached_experts
from tritgguf.conversion.convert import convert
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source
from tritgguf.tokenization.tokenizer import Tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 4}
TEXT = "\n\n".join(f"The cat number {number} sat on the mat, and the dog ran after it." for number in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    train_mixture(folder, TEXT, steps=4, sizes=SIZES)
    return folder


def test_it_learns_and_converts(model: Path, tmp_path: Path) -> None:
    report = convert(model, tmp_path / "out.gguf", encoder="v2")
    assert report.warnings == []
    source = open_source(model)
    tokens = Tokenizer({key: value.value for key, value in source.metadata.items()}).encode(
        TEXT[:200], add_special=False, parse_special=False
    )
    logits = torch.from_numpy(ReferenceModel.open(source).logits(tokens)[:-1])
    loss = float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:])))
    assert loss < np.log(2048) - 0.5


def test_the_same_seed_gives_the_same_weights(model: Path, tmp_path: Path) -> None:
    train_mixture(tmp_path / "again", TEXT, steps=4, sizes=SIZES)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_experts_are_computed_as_in_transformers(model: Path) -> None:
    experts = ReferenceModel.open(open_source(model)).module.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 64, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(24)])
    scores = torch.rand(24, 2, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(experts_forward(experts, inputs, chosen, scores), experts(inputs, chosen, scores))


def test_tokens_of_the_experts_are_counted(model: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 500, (3, 40)).tolist()
    reached = reached_experts(model, windows, threads=1)
    assert len(reached.tokens) == 2 * 4
    assert reached.tokens.sum() == 2 * 2 * 3 * 40  # layers, experts of a token, windows, tokens
    assert reached.without_text == (reached.tokens < 32).sum()
