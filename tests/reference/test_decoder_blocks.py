"""Decoder blocks, run one at a time, compute what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VARIANTS, write_tiny_model

from tools.models.families import write_random_family
from tritgguf.exporters.export import export
from tritgguf.reference.decoder_blocks import DecoderBlocks
from tritgguf.reference.model import ReferenceModel
from tritgguf.reference.process_settings import bfloat16_matmul
from tritgguf.sources.open import open_source

WINDOWS = np.random.default_rng(0).integers(3, 400, (5, 24)).tolist()
NAMES = [name for name in VARIANTS if name != "unaligned"]


def last_hidden(model: ReferenceModel) -> torch.Tensor:
    """Return the output of the whole model's last block for the windows."""
    seen = []
    last = model.module.model.layers[-1]
    last.register_forward_hook(lambda module, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for window in WINDOWS:
        model.logits(window)
    return torch.cat([hidden.reshape(1, *hidden.shape[-2:]) for hidden in seen])


def run_all(blocks: DecoderBlocks) -> torch.Tensor:
    hidden = blocks.embed(WINDOWS)
    for index in range(blocks.count):
        with blocks.block(index) as block:
            hidden = block.forward(hidden)
    return hidden


@pytest.mark.parametrize("variant", NAMES)
def test_blocks_compute_what_the_model_computes(tmp_path: Path, variant: str) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model", variant)))
    expected = last_hidden(ReferenceModel.open(source))
    found = run_all(DecoderBlocks(source))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_gguf_file(tmp_path: Path) -> None:
    from tritgguf.conversion.convert import convert

    folder = write_tiny_model(tmp_path / "model", "llama3-rope")
    convert(folder, tmp_path / "trits.gguf", depth=4)
    export(tmp_path / "trits.gguf", tmp_path / "stock.gguf", to="f16")
    source = open_source(str(tmp_path / "stock.gguf"))
    expected = last_hidden(ReferenceModel.open(source))
    torch.testing.assert_close(run_all(DecoderBlocks(source)), expected, rtol=1e-4, atol=1e-5)


def test_matrices_that_share_an_input(tmp_path: Path) -> None:
    blocks = DecoderBlocks(open_source(str(write_tiny_model(tmp_path / "model"))))
    with blocks.block(1) as block:
        groups = block.input_groups(blocks.embed(WINDOWS))
    names = [tuple(name.split(".")[2] for name in group) for group in groups]
    assert names == [("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",)]


def test_observing_stops_after_the_last_matrix(tmp_path: Path) -> None:
    blocks = DecoderBlocks(open_source(str(write_tiny_model(tmp_path / "model"))))
    hidden = blocks.embed(WINDOWS)
    with blocks.block(0) as block:
        everything: dict[str, list[torch.Tensor]] = {name: [] for name in block.matrices}
        block.forward(hidden, {name: seen.append for name, seen in everything.items()})
        some: dict[str, list[torch.Tensor]] = {name: [] for name in block.matrices}
        last = "blk.0.attn_output.weight"
        block.observe_inputs(hidden, {name: seen.append for name, seen in some.items()}, last=last)
    for name, seen in some.items():
        assert bool(seen) == ("attn" in name)
        for found, expected in zip(seen, everything[name], strict=False):
            torch.testing.assert_close(found, expected)
    assert torch.cat(some[last]).shape == (5, 24, 128)


@pytest.mark.parametrize("variant", NAMES)
def test_cached_products_skip_the_rest_of_their_module(tmp_path: Path, variant: str) -> None:
    blocks = DecoderBlocks(open_source(str(write_tiny_model(tmp_path / "model", variant))))
    hidden = blocks.embed(WINDOWS)
    output, last = "blk.0.attn_output.weight", "blk.0.ffn_down.weight"
    with blocks.block(0) as block:
        projections = block.output_projections(hidden)
        assert projections.keys() == {output, last}
        kept: dict[str, list[torch.Tensor]] = {output: [], last: []}
        expected = block.forward(hidden, {name: seen.append for name, seen in kept.items()})
        cached = {projections[name]: block.products(projections[name], torch.cat(seen)) for name, seen in kept.items()}
        block.set("blk.0.attn_v.weight", np.zeros_like(block.get("blk.0.attn_v.weight")))
        again: list[torch.Tensor] = []
        of_attention = {projections[output]: cached[projections[output]]}
        block.observe_inputs(hidden, {last: again.append}, last=last, cached=of_attention)
        assert torch.equal(torch.cat(again), torch.cat(kept[last]))
        assert torch.equal(block.forward(hidden, cached=cached), expected)
        assert not torch.equal(block.forward(hidden), expected)


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"])
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_a_weight_is_replaced_and_read_back(tmp_path: Path, variant: str, name: str) -> None:
    source = open_source(str(write_tiny_model(tmp_path / "model", variant)))
    blocks = DecoderBlocks(source)
    hidden = blocks.embed(WINDOWS)
    with blocks.block(0) as block:
        np.testing.assert_array_equal(block.get(name), source.read(name))
        kept = block.get(name)
        before = block.forward(hidden)
        weights = np.random.default_rng(0).standard_normal(block.get(name).shape).astype(np.float32)
        block.set(name, weights)
        np.testing.assert_array_equal(block.get(name), weights)
        np.testing.assert_array_equal(kept, source.read(name))  # `get` returned a copy
        assert not torch.equal(block.forward(hidden), before)
    with blocks.block(0) as block:
        torch.testing.assert_close(block.forward(hidden), before)


def test_a_closed_block_takes_no_memory(tmp_path: Path) -> None:
    blocks = DecoderBlocks(open_source(str(write_tiny_model(tmp_path / "model"))))
    with blocks.block(0) as block:
        assert all(parameter.device.type == "cpu" for parameter in block.matrices.values())
    assert all(parameter.is_meta for layer in blocks._layers for parameter in layer.parameters())
    assert all(parameter.is_meta for parameter in blocks._module.parameters())


def test_bfloat16_matmul_ends_with_its_context() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), bfloat16_matmul():
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("family", "has_streams"), [("llama", True), ("qwen3", True), ("gemma2", False), ("granite", False)]
)
def test_the_residual_streams_are_those_that_a_product_is_added_to(
    tmp_path: Path, family: str, has_streams: bool
) -> None:
    """Gemma normalizes the products first, Granite scales them."""
    blocks = DecoderBlocks(open_source(str(write_random_family(tmp_path / "model", family))))
    with blocks.block(0) as block:
        found = block.residual_streams(blocks.embed((np.asarray(WINDOWS) % 200).tolist()))
    norm = "blk.0.ffn_norm.weight"
    expected = {"blk.0.attn_output.weight": (None, norm), "blk.0.ffn_down.weight": (norm, None)}
    assert found == (expected if has_streams else {})


def test_texts_are_embedded_one_after_the_other(tmp_path: Path) -> None:
    """Gemma scales its embeddings by a buffer, which the first text must leave where it is."""
    blocks = DecoderBlocks(open_source(str(write_random_family(tmp_path / "model", "gemma3"))))
    windows = [list(range(24))]
    torch.testing.assert_close(blocks.embed(windows), blocks.embed(windows))
