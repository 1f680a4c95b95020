"""LongRoPE: Phi-3's two sets of frequency factors, in files and in use."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted_models import as_stock_gguf, assert_no_number_differs
from model_keys import values_of
from sequences import open_sequence
from tiny_mixtures import mixture_config, write_tiny_mixture
from tiny_models import edit_json, tiny_config

from tritgguf.architectures import hf_to_gguf
from tritgguf.architectures.rope import LONG_FACTORS, SHORT_FACTORS
from tritgguf.cli import app
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources.gguf import GgufSource
from tritgguf.sources.open import open_source

SHORT, LONG = [1.0 + pair / 10 for pair in range(16)], [2.0 + pair for pair in range(16)]
ORIGINAL = 512  # the longest text with the short factors, of the family below


def phi3_config(**scaling: Any) -> dict[str, Any]:
    """Return a config.json in the layout of Phi-3's checkpoints: four times as long as at first."""
    scaling = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, **scaling}
    lengths = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
    return tiny_config("Phi3ForCausalLM", rope_scaling=scaling, **lengths)


def phimoe_scaling(**scaling: Any) -> dict[str, Any]:
    """Return entries of config.json in the layout of Phi-3.5-MoE's checkpoint: four times as long as at first."""
    of_phi3 = phi3_config(short_mscale=1.25, long_mscale=1.25, original_max_position_embeddings=64, **scaling)
    return {name: of_phi3[name] for name in ("rope_scaling", "original_max_position_embeddings")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 whose context is four times ORIGINAL."""
    pytest.importorskip("torch")
    from tools.models.families import write_random_family

    return write_random_family(tmp_path_factory.mktemp("phi3") / "model", "phi3, short factors")


@pytest.fixture(scope="module")
def file(folder: Path) -> GgufFile:
    """The model's trit file."""
    from tritgguf.conversion.convert import convert

    convert(folder, folder.with_suffix(".gguf"), depth=2)
    return GgufFile(folder.with_suffix(".gguf"))


def test_keys_and_tensors_are_llama_cpps() -> None:
    keys, tensors = values_of(phi3_config()), hf_to_gguf.rope_factors(phi3_config())
    scaling = {key: value for key, value in keys.items() if "scaling" in key}
    assert scaling == {
        "phi3.rope.scaling.original_context_length": 64,
        "phi3.rope.scaling.attn_factor": pytest.approx(math.sqrt(1 + math.log(4) / math.log(64))),
    }
    assert list(tensors) == [LONG_FACTORS, SHORT_FACTORS]
    np.testing.assert_array_equal(tensors[LONG_FACTORS], np.array(LONG, np.float32))
    np.testing.assert_array_equal(tensors[SHORT_FACTORS], np.array(SHORT, np.float32))


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_all_layouts_mean_the_same(name: str) -> None:
    expected = values_of(phi3_config())
    assert values_of(phi3_config(type=name)) == expected
    config = phi3_config()
    scaling = config.pop("rope_scaling") | {"rope_type": name, "rope_theta": config.pop("rope_theta")}
    assert values_of({**config, "rope_parameters": scaling}) == expected


def test_a_factor_of_the_checkpoint_comes_first() -> None:
    key = "phi3.rope.scaling.attn_factor"
    assert values_of(phi3_config(attention_factor=1.25))[key] == 1.25
    assert values_of(phi3_config(factor=8.0))[key] == pytest.approx(math.sqrt(1 + math.log(8) / math.log(64)))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"short_factor": SHORT[1:]}, "short_factor of the rope scaling is no list of 16 numbers"),
        ({"long_factor": None}, "long_factor of the rope scaling is no list"),
        ({"long_factor": [0.0, *LONG[1:]]}, "long_factor is 0.0, which is not a positive number"),
        ({"attention_factor": -1}, "attention_factor is -1"),
        ({"partial_rotary_factor": 0.75}, "only a part of each head"),
    ],
)
def test_bad_scalings_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(TritGgufError, match=message):
        values_of(phi3_config(**scaling))


@pytest.mark.parametrize("length", [100, ORIGINAL + 8])
def test_the_context_chooses_the_factors(folder: Path, file: GgufFile, length: int) -> None:
    """In a context as long as the text, the logits are those of transformers, which goes by the text."""
    from tritgguf.reference.model import ReferenceModel

    reference = ReferenceModel.open(open_source(str(folder)))
    reference.load_file(file)
    tokens = np.random.default_rng(0).integers(0, 256, length).tolist()
    expected = reference.logits(tokens)
    limit = 1e-5 * np.abs(expected).max()
    sequence = open_sequence(file, context=length, exact=True)
    assert np.abs(sequence.forward(tokens, all_logits=True) - expected).max() < limit
    sequence.truncate(length - 6)
    one_by_one = np.array([sequence.forward([token]) for token in tokens[-6:]])
    assert np.abs(one_by_one - expected[-6:]).max() < limit


def test_the_edge_is_the_original_length(file: GgufFile) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 40).tolist()
    few, most, more, all_of_it = (
        open_sequence(file, context=context).forward(tokens) for context in (64, ORIGINAL, ORIGINAL + 1, None)
    )
    np.testing.assert_array_equal(most, few)
    np.testing.assert_array_equal(all_of_it, more)
    assert np.abs(more - most).max() > 0.01 * np.abs(most).max()


def test_run_says_that_it_takes_the_long_factors(file: GgufFile, capsys: pytest.CaptureFixture[str]) -> None:
    for context in (ORIGINAL, ORIGINAL + 1):
        assert app.main(["run", str(file.path), "--raw", "-p", "a", "-n", "1", "-c", str(context)]) == 0
        is_said = f"a context of {context} tokens takes this model's frequencies for long" in capsys.readouterr().err
        assert is_said == (context > ORIGINAL)


@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_no_number_differs_after_a_round_trip(folder: Path, tmp_path: Path, attention_factor: float | None) -> None:
    model = tmp_path / "model"
    model.symlink_to(folder) if attention_factor is None else _with_factor(folder, model, attention_factor)
    assert_no_number_differs(model, tmp_path)
    keys = ["original_max_position_embeddings", "max_position_embeddings", "rope_scaling"]
    stored, exported = (json.loads((tmp_path / name / "config.json").read_text("utf-8")) for name in ("model", "hf"))
    scaling = {name: stored["rope_parameters"][name] for name in ("long_factor", "short_factor")}
    scaling |= {} if attention_factor is None else {"attention_factor": attention_factor}
    assert [exported[key] for key in keys] == [ORIGINAL, 4 * ORIGINAL, {"type": "longrope", **scaling}]


def test_scales_of_phimoe_lead_back(tmp_path: Path) -> None:
    model = write_tiny_mixture(tmp_path / "model", "phimoe", **phimoe_scaling())
    assert_no_number_differs(model, tmp_path)
    keys = values_of(json.loads((model / "config.json").read_text("utf-8")))
    scaling = {key: value for key, value in keys.items() if "scaling" in key}
    assert scaling == {"phimoe.rope.scaling.original_context_length": 64, "phimoe.rope.scaling.attn_factor": 1.25}
    exported = json.loads((tmp_path / "hf/config.json").read_text("utf-8"))
    stored = phimoe_scaling()
    del stored["rope_scaling"]["original_max_position_embeddings"]  # it is beside the scaling too
    assert {name: exported[name] for name in stored} == stored


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"long_mscale": 1.5}, "another long_mscale than short_mscale"),
        ({"short_mscale": None}, "short_mscale is None, which is not a positive number"),
        ({"long_mscale": [1.25]}, "long_mscale is "),
        ({"type": "linear", "factor": 2.0}, "rope type linear is not supported \\(default and longrope are\\)"),
        ({"type": "yarn", "factor": 2.0}, "rope type yarn is not supported"),
    ],
)
def test_bad_scales_of_phimoe_are_refused(scaling: dict[str, Any], message: str) -> None:
    entries = phimoe_scaling()
    entries["rope_scaling"] |= scaling
    with pytest.raises(TritGgufError, match=message):
        values_of(mixture_config("phimoe", **entries))


def _with_factor(folder: Path, copy: Path, attention_factor: float) -> None:
    shutil.copytree(folder, copy)
    parameters = json.loads((folder / "config.json").read_text("utf-8"))["rope_parameters"]
    edit_json(copy / "config.json", rope_parameters={**parameters, "attention_factor": attention_factor})


def test_a_file_with_one_set_of_factors_is_refused(folder: Path, file: GgufFile, tmp_path: Path) -> None:
    from tritgguf.runtime.config import ModelConfig

    source = open_source(str(folder))
    source.tensors[:] = [tensor for tensor in source.tensors if tensor.name != SHORT_FACTORS]
    with pytest.raises(TritGgufError, match="has only one of the tensors"):
        GgufSource(as_stock_gguf(source, tmp_path / "stock.gguf"))
    damaged = GgufFile(file.path)
    del damaged.tensors[SHORT_FACTORS]
    with pytest.raises(TritGgufError, match="has only one of the tensors"):
        ModelConfig.from_file(damaged)
    damaged = GgufFile(file.path)
    del damaged.tensors[LONG_FACTORS]
    with pytest.raises(TritGgufError, match="has only one of the tensors"):
        ModelConfig.from_file(damaged)
