"""Rotary embedding in config.json and in GGUF's keys, and Llama 3's factors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from model_keys import config_of, values_of
from tiny_models import VARIANTS, tiny_config

from tritgguf.architectures import hf_to_gguf, rope_keys
from tritgguf.errors import TritGgufError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors_of(config: dict[str, Any]) -> np.ndarray:
    """Return the tensor of Llama 3's scaling, the only one that its config.json makes."""
    ((name, factors),) = hf_to_gguf.rope_factors(config).items()
    assert name == "rope_freqs.weight"
    return factors


def test_keys_of_rope_scaling_stand_before_the_base() -> None:
    linear = values_of(config_of("linear-rope"))
    assert list(linear)[7:10] == [
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "llama.rope.freq_base",
    ]
    assert (linear["llama.rope.scaling.type"], linear["llama.rope.scaling.factor"]) == ("linear", 2.0)
    yarn = values_of(config_of("yarn-rope"))
    assert yarn["llama.rope.scaling.type"] == "yarn"
    assert yarn["llama.rope.scaling.original_context_length"] == 64
    assert not any("scaling" in key for key in values_of(config_of("llama3-rope")))


def test_both_layouts_of_the_rope_parameters_mean_the_same() -> None:
    scaling = VARIANTS["llama3-rope"]["rope_scaling"]
    old = config_of("llama", rope_theta=500000.0, rope_scaling=scaling)
    new = config_of("llama", rope_parameters={**scaling, "rope_theta": 500000.0})
    assert values_of(old) == values_of(new)
    np.testing.assert_array_equal(llama3_factors_of(old), llama3_factors_of(new))


def test_llama_3_rope_factors_follow_its_formula() -> None:
    config = config_of("llama", head_dim=64, rope_theta=500000.0)
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = []
    for i in range(0, 64, 2):
        frequency = 500000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(1.0)
        elif wavelength > 8192 / 1:
            expected.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            slowed = (1 - smooth) * frequency / 32.0 + smooth * frequency
            expected.append(frequency / slowed)
    factors = llama3_factors_of(config)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, expected, rtol=1e-5)
    assert 1.0 < sorted(set(expected))[1] < 32.0  # this case has a factor between the two limits


def test_other_models_have_no_rope_factors() -> None:
    assert hf_to_gguf.rope_factors(config_of("llama")) == {}
    assert hf_to_gguf.rope_factors(config_of("linear-rope")) == {}


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
    factors = llama3_factors_of(config)
    assert rope_keys.llama3_scaling(factors, config, "here") == scaling


def test_any_unit_of_llama3s_scaling_is_as_good() -> None:
    """The frequencies determine original context, low and high only up to a common factor."""
    scaling = {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 16384}
    config = tiny_config(head_dim=128, rope_scaling=scaling)
    config["rope_theta"] = 500000.0
    factors = llama3_factors_of(config)
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
    with pytest.raises(TritGgufError, match=r"cannot express tensor rope_freqs\.weight"):
        rope_keys.llama3_scaling(factors, config, "here")
