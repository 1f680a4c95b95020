"""config.json from the keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted_models import as_stock_gguf
from gguf import GGUFValue, GGUFValueType
from model_keys import values_of
from tiny_models import tiny_config, write_tiny_model

from tritgguf.architectures import gguf_to_hf, hf_to_gguf
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source
from tritgguf.tokenization.hf_folder_files import special_ids


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the config.json of a file's model."""
    return gguf_to_hf.model_config(file, special_ids(file.metadata))


def test_numbers_are_those_of_the_source(tiny_trit_file: Callable[..., GgufFile]) -> None:
    """Keys are float32; 1e-05 becomes 1e-05 again, not 9.999999747378752e-06."""
    config = config_of(tiny_trit_file("qwen2"))
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 1000000.0)
    assert "head_dim" not in config
    assert config_of(tiny_trit_file("llama"))["head_dim"] == 32


@pytest.mark.parametrize("variant", ["llama", "llama-biases", "llama3-rope", "linear-rope", "qwen2-tied"])
def test_the_config_gives_the_files_keys(tiny_trit_file: Callable[..., GgufFile], variant: str) -> None:
    file = tiny_trit_file(variant)
    config = config_of(file)
    for key, value in hf_to_gguf.gguf_metadata(config).items():
        expected = np.float32(value.value) if isinstance(value.value, float) else value.value
        assert file.metadata[key] == expected, key


def test_yarns_own_numbers(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 30.0}
    source = write_tiny_model(tmp_path / "model", rope_theta=10000.0, rope_scaling={**rope, "attention_factor": 1.1})
    metadata = {key: value.value for key, value in open_source(source).metadata.items()}
    entries = gguf_to_hf.config_entries(metadata, {"token_embd.weight": (448, 128)}, "here")
    assert entries["rope_parameters"] == {**rope, "attention_factor": 1.1, "rope_theta": 10000.0}


class Changed:
    """A source with tensors removed or renamed, and keys replaced."""

    def __init__(self, source: Source, names: dict[str, str | None], keys: dict[str, GGUFValue]) -> None:
        self.metadata = {**source.metadata, **keys}
        self.names = {names.get(tensor.name, tensor.name): tensor.name for tensor in source.tensors}
        self.tensors = [
            type(tensor)(new, tensor.shape, tensor.stored_bytes)
            for tensor in source.tensors
            if (new := names.get(tensor.name, tensor.name)) is not None
        ]
        self.read = lambda name: source.read(self.names[name] or "")


@pytest.mark.parametrize(
    ("variant", "names", "keys", "message"),
    [
        ("llama", {"blk.1.ffn_up.weight": None}, {}, r"tensor blk\.1\.ffn_up\.weight is missing"),
        ("llama", {"blk.1.ffn_up.weight": "odd"}, {}, r"ffn_up\.weight is missing"),
        ("llama-biases", {"blk.0.attn_output.bias": None}, {}, r"tensor blk\.0\.attn_output\.bias is missing"),
        ("llama-biases", {"blk.0.attn_q.bias": None}, {}, r"attn_k\.bias has shape .* no such tensor"),
        ("llama", {}, {"llama.block_count": 3}, r"tensor blk\.2\.attn_norm\.weight is missing"),
        ("llama", {}, {"llama.feed_forward_length": 64}, r"ffn_gate\.weight has shape \(192, 128\), .*\(64, 128\)"),
    ],
)
def test_tensors_and_keys_that_disagree(
    tmp_path: Path, variant: str, names: dict[str, str | None], keys: dict[str, int], message: str
) -> None:
    source: Any = Changed(
        open_source(write_tiny_model(tmp_path / "model", variant)),
        names,
        {key: GGUFValue(value, GGUFValueType.UINT32) for key, value in keys.items()},
    )
    with pytest.raises(TritGgufError, match=message) as caught:
        config_of(GgufFile(as_stock_gguf(source, tmp_path / "stock.gguf")))
    assert "\n" not in str(caught.value)


def test_rope_factors_of_a_file(tiny_trit_file: Callable[..., GgufFile]) -> None:
    file = tiny_trit_file("llama3-rope")
    factors = hf_to_gguf.rope_factors(config_of(file))[ROPE_FREQS]
    assert factors is not None
    np.testing.assert_allclose(factors, file.read_float32(ROPE_FREQS), rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count", 0, r"llama\.attention\.head_count is 0, which is not an integer"),
        ("embedding_length", "128", r"llama\.embedding_length is '128'"),
        ("context_length", None, r"the key llama\.context_length is missing"),
        ("attention.layer_norm_rms_epsilon", None, r"the key llama\.attention\.layer_norm_rms_epsilon is missing"),
        ("attention.layer_norm_rms_epsilon", -1.0, r"rms_epsilon is -1\.0, which is not a positive number"),
        ("rope.freq_base", "x", r"llama\.rope\.freq_base is 'x', which is not a positive number"),
        ("rope.scaling.type", "longrope", r"rope scaling longrope is not supported"),
        ("rope.scaling.type", "linear", r"the key llama\.rope\.scaling\.factor is missing"),
        ("attention.sliding_window", [64], r"sliding_window is \[64\], which is not an integer"),
    ],
)
def test_bad_keys_are_named(key: str, value: object, message: str) -> None:
    metadata = {**values_of(tiny_config()), f"llama.{key}": value}
    with pytest.raises(TritGgufError, match=message) as caught:
        gguf_to_hf.config_entries(metadata, {"token_embd.weight": (448, 128)}, "model.gguf")
    assert str(caught.value).startswith("model.gguf: ")
    assert "\n" not in str(caught.value)
