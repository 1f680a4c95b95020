"""Gradients of a decoder block, compared with changes of its output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.models.families import write_random_family
from tritgguf.reference.block_gradients import block_gradients
from tritgguf.reference.decoder_blocks import DecoderBlocks
from tritgguf.sources.open import open_source

WINDOWS = np.random.default_rng(0).integers(3, 200, (5, 24)).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3, sliding window", "qwen3.5"])
def test_gradients_are_those_of_the_output(tmp_path: Path, family: str) -> None:
    """The output changes along a direction as the gradients say.

    In GGUF, Llama's Q has another order of rows, Gemma's norms have an offset, and Phi's matrices are halves of one;
    value heads of Qwen3.5 have another order, also in columns.
    """
    blocks = DecoderBlocks(open_source(str(write_random_family(tmp_path / "model", family))), threads=1)
    hidden, random = blocks.embed(WINDOWS), np.random.default_rng(0)
    weighting = torch.from_numpy(random.normal(size=hidden.shape).astype(np.float32))
    with blocks.block(0) as block:
        of_input, gradients = block_gradients(block, hidden, weighting)
        assert of_input.shape == hidden.shape
        others = {f"blk.0.{name}.weight" for name in ("ssm_alpha", "ssm_beta", "ssm_conv1d") if family == "qwen3.5"}
        assert set(gradients) == {*block.matrices, *block.vectors, *others}
        for name, gradient in gradients.items():
            start = block.get(name)
            direction = np.sign(gradient) * random.random(start.shape).astype(np.float32)
            step = np.float32(0.01 * np.abs(start).mean() + 1e-4)
            outputs = []
            for sign in (1, -1):
                block.set(name, start + sign * step * direction)
                outputs.append(block.forward(hidden))
            block.set(name, start)
            found = ((outputs[0] - outputs[1]) * weighting).double().sum().item() / (2 * step)
            np.testing.assert_allclose(found, (gradient * direction).sum(dtype=np.float64), rtol=0.02, err_msg=name)
