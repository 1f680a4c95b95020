"""config.json and its like from the keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted_models import as_stock_gguf
from gguf import GGUFValue, GGUFValueType
from tiny_models import tiny_config, write_tiny_model

from tritgguf.architectures import gguf_to_hf, hf_to_gguf, rope_keys
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source
from tritgguf.tokenization.hf_folder_files import special_ids

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(file: GgufFile) -> dict[str, Any]:
    """Return the config.json of a file's model."""
    return gguf_to_hf.model_config(file, special_ids(file.metadata))


@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [
        (128, {}),  # Llama 3.1
        (64, {"factor": 32.0}),  # Llama 3.2
        (64, {"high_freq_factor": 8.0}),
        (256, {"factor": 3.5, "original_max_position_embeddings": 4096}),
        (32, {"original_max_position_embeddings": 64}),
        (128, {"original_max_position_embeddings": 131072}),
    ],
)
def test_llama3s_scaling_is_read_back(head_dim: int, changes: dict[str, Any]) -> None:
    scaling = {**LLAMA3, **changes}
    config = tiny_config(head_dim=head_dim, rope_scaling=scaling)
    config["rope_theta"] = 500000.0
    factors = hf_to_gguf.rope_factors(config)
    assert factors is not None
    assert rope_keys.llama3_scaling(factors, config, "here") == scaling


def test_any_unit_of_llama3s_scaling_is_as_good(tmp_path: Path) -> None:
    """Original context, low and high have a common factor that the frequencies do not show."""
    scaling = {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 16384}
    config = tiny_config(head_dim=128, rope_scaling=scaling)
    config["rope_theta"] = 500000.0
    factors = hf_to_gguf.rope_factors(config)
    assert factors is not None
    assert rope_keys.llama3_scaling(factors, config, "here") == LLAMA3


@pytest.mark.parametrize("kind", ["random", "all equal", "one", "two steps"])
def test_factors_that_are_not_llama3s(kind: str) -> None:
    factors = {
        "random": np.random.default_rng(0).uniform(1, 8, 64),
        "all equal": np.full(64, 4.0),
        "one": np.ones(64),
        "two steps": np.repeat([1.0, 2.0, 3.0, 8.0], 16),
    }[kind].astype(np.float32)
    config = tiny_config(head_dim=128)
    with pytest.raises(TritGgufError, match=r"no words for tensor rope_freqs\.weight"):
        rope_keys.llama3_scaling(factors, config, "here")


def test_numbers_are_those_of_the_source(tiny_trit_file: Callable[..., GgufFile]) -> None:
    """Keys are float32; 1e-05 comes back as 1e-05, not as 9.999999747378752e-06."""
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
    """A source with tensors left out or renamed, and keys replaced."""

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
    factors = hf_to_gguf.rope_factors(config_of(file))
    assert factors is not None
    np.testing.assert_allclose(factors, file.read_float32(ROPE_FREQS), rtol=1e-6)
