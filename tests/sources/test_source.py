"""Sources of a conversion: folders, hub ids, stock GGUF files, and their errors."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from source_checks import fails
from tiny_models import (
    CHAT_TEMPLATE,
    VARIANTS,
    edit_json,
    random_weights,
    read_config,
    to_bfloat16,
    write_shards,
    write_tiny_model,
)

from tritgguf.architectures import hf_to_gguf, tensor_names
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.sources.hf_folder import HfFolderSource
from tritgguf.sources.open import open_source
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY

UP = "model.layers.1.mlp.up_proj.weight"


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values rounded to a dtype."""
    if dtype == "BF16":
        return (to_bfloat16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permute the rows of Q or K with plain loops: halves of a head become pairs."""
    head = len(rows) // heads
    order = [
        start + i + half for start in range(0, len(rows), head) for i in range(head // 2) for half in (0, head // 2)
    ]
    return rows[order]


# ---- Hugging Face folders ----


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_reads_as_it_was_written(tmp_path: Path, variant: str) -> None:
    folder = write_tiny_model(tmp_path / "model", variant)
    config, dtype = read_config(folder), VARIANTS[variant].get("dtype", "F16")
    source = HfFolderSource(folder)
    expected = {
        str(tensor_names.gguf_tensor_name(source.architecture.gguf_name, name)): rounded(v, dtype)
        for name, v in random_weights(config).items()
    }
    if config["architectures"][0] != "Qwen2ForCausalLM":
        for layer in range(2):
            for kind, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                for suffix in ("weight", "bias"):
                    name = f"blk.{layer}.attn_{kind}.{suffix}"
                    if name in expected:
                        expected[name] = interleave(expected[name], config[heads])
    names = [tensor.name for tensor in source.tensors]
    assert sorted(set(names) - {ROPE_FREQS}) == sorted(expected)
    for tensor in source.tensors:
        array = source.read(tensor.name)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.shape == tensor.shape
        if tensor.name in expected:
            np.testing.assert_array_equal(array, expected[tensor.name], err_msg=tensor.name)
            assert tensor.stored_bytes == array.size * (4 if dtype == "F32" else 2)


def test_tensors_come_in_llama_cpps_order(tmp_path: Path) -> None:
    names = [tensor.name for tensor in open_source(write_tiny_model(tmp_path / "m", "llama3-rope")).tensors]
    layer = [
        "attn_norm",
        "ffn_down",
        "ffn_gate",
        "ffn_up",
        "ffn_norm",
        "attn_k",
        "attn_output",
        "attn_q",
        "attn_v",
    ]
    assert names == [
        "rope_freqs.weight",
        "output.weight",
        "token_embd.weight",
        *(f"blk.{index}.{name}.weight" for index in range(2) for name in layer),
        "output_norm.weight",
    ]


def test_rope_factors_are_a_tensor_of_their_own(tmp_path: Path) -> None:
    source = open_source(write_tiny_model(tmp_path / "m", "llama3-rope"))
    factors = source.read(ROPE_FREQS)
    np.testing.assert_array_equal(factors, hf_to_gguf.rope_factors(read_config(tmp_path / "m"))[ROPE_FREQS])
    factors[:] = 0
    assert source.read(ROPE_FREQS).all()


def test_metadata_is_what_llama_cpps_converter_writes(tmp_path: Path) -> None:
    metadata = open_source(write_tiny_model(tmp_path / "Tiny-Model-Instruct", "llama")).metadata
    values = {key: value.value for key, value in metadata.items()}
    assert list(values)[:4] == ["general.architecture", "general.type", "general.name", "general.finetune"]
    assert values["general.name"] == "Tiny Model Instruct"
    assert values["general.finetune"] == "Instruct"
    assert values["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert list(values)[-1] == HUGGINGFACE_JSON_KEY
    places = [
        next(i for i, key in enumerate(values) if key.startswith(p)) for p in ("general.", "llama.", "tokenizer.")
    ]
    assert places == sorted(places)
    assert not {"general.file_type", "general.quantization_version"} & set(values)
    assert values["llama.vocab_size"] == len(values["tokenizer.ggml.tokens"]) == 448


def test_size_and_licence_come_from_the_folder(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n")
    values = {key: value.value for key, value in open_source(folder).metadata.items()}
    assert (values["general.size_label"], values["general.license"]) == ("361K", "apache-2.0")
    assert values["general.languages"] == ["en"]


@pytest.mark.parametrize(
    "card",
    [
        "---\n: [\n---\n",
        "---\nlicense: {a: 1}\ntags: [1, 2]\nname: 7\n---\n",
        "---\nname: x\nbase_model: [{name: 3}]\n---\n",
    ],
)
def test_a_senseless_model_card_is_no_reason_to_stop(tmp_path: Path, card: str) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "README.md").write_text(card)
    for key, value in open_source(folder).metadata.items():
        if value.type == gguf.GGUFValueType.STRING:
            assert isinstance(value.value, str), key


def test_senseless_sampling_options_are_left_out(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    options = {"temperature": 0.5, "top_k": "many", "top_p": 1e300}
    (folder / "generation_config.json").write_text(json.dumps(options))
    sampling = {k: v.value for k, v in open_source(folder).metadata.items() if "sampling" in k}
    assert sampling == {"general.sampling.temp": 0.5}


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole = open_source(write_tiny_model(tmp_path / "whole", "llama"))
    parts = open_source(write_tiny_model(tmp_path / "parts", "llama-sharded"))
    (tmp_path / "parts" / "model.safetensors.index.json").unlink()
    without_index = open_source(tmp_path / "parts")
    names = {tensor.name for tensor in whole.tensors}
    for source in (parts, without_index):
        assert {tensor.name for tensor in source.tensors} == names
        for name in names:
            np.testing.assert_array_equal(source.read(name), whole.read(name))


def test_a_checkpoint_of_the_model_without_its_head(tmp_path: Path) -> None:
    """Its names lack `model.`; transformers loads it as a causal model, so it is one here too."""
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "model", "llama-tied")
    whole = {tensor.name: open_source(folder).read(tensor.name) for tensor in open_source(folder).tensors}
    weights = random_weights(read_config(folder))
    write_shards(folder, {name.removeprefix("model."): array for name, array in weights.items()}, "BF16")
    source = open_source(folder)
    assert {tensor.name for tensor in source.tensors} == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(source.read(name), array)
    theirs = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    np.testing.assert_array_equal(source.read("token_embd.weight"), theirs.detach().float().numpy())


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    weights = random_weights(read_config(folder))
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    write_shards(folder, weights, "F16")
    assert len(open_source(folder).tensors) == len(weights) - 1


def test_a_tied_head_that_is_stored_is_left_out(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-tied")
    weights = random_weights(read_config(folder))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_shards(folder, weights, "F16")
    assert "output.weight" not in {tensor.name for tensor in open_source(folder).tensors}
    # transformers keeps a head that differs from the embedding, even if config.json says that they are tied.
    weights["lm_head.weight"] = weights["lm_head.weight"].copy()
    weights["lm_head.weight"][447, 127] += 1
    write_shards(folder, weights, "F16")
    source = open_source(folder)
    np.testing.assert_array_equal(source.read("output.weight"), rounded(weights["lm_head.weight"], "F16"))


def test_reading_keeps_one_matrix_in_memory(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama", hidden_size=512, intermediate_size=4096, dtype="BF16")
    source = open_source(folder)
    tracemalloc.start()
    for tensor in source.tensors:
        source.read(tensor.name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(tensor.stored_bytes for tensor in source.tensors)  # two bytes a weight
    assert peak < 3.2 * largest  # the float32 matrix and what it is read from


def test_a_sliding_window_is_a_key(tmp_path: Path) -> None:
    key = "llama.attention.sliding_window"
    folder = write_tiny_model(tmp_path / "model", "mistral")
    assert key not in open_source(folder).metadata
    edit_json(folder / "config.json", sliding_window=64)
    assert open_source(folder).metadata[key].value == 64
    for variant in ("llama", "qwen2"):  # without a window unless use_sliding_window is set
        other = write_tiny_model(tmp_path / variant, variant, sliding_window=64)
        assert not any("sliding" in name for name in open_source(other).metadata)


def test_dynamic_rope_scaling_is_said_to_be_left_out(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", rope_scaling={"type": "dynamic", "factor": 2.0})
    (warning,) = open_source(folder).warnings
    assert warning.endswith("its dynamic rope scaling is left out; it changes texts of more than 256 tokens")


# ---- locations and the hub ----


@pytest.mark.parametrize("location", ["no/such/folder", "model.gguf", "org/model.gguf", "", "a b/c", "./org/name"])
def test_a_location_that_is_nothing(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if location:
        fails(location, "no such file or folder, and no hub id")
    else:
        fails(location, "config.json: no such file")  # the empty path is this folder


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"hello" * 10)
    fails(tmp_path / "model.gguf", "not a GGUF file")


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = write_tiny_model(tmp_path / "0123456789abcdef0123456789abcdef01234567")
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    source = open_source("some-org/Tiny-1B-Instruct", revision="v2")
    assert isinstance(source, HfFolderSource)
    assert (asked["repository"], asked["revision"]) == ("some-org/Tiny-1B-Instruct", "v2")
    assert {"*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".py")) or pattern == "*" for pattern in asked["allow_patterns"])
    assert asked["ignore_patterns"] == ["*/*", "consolidated*"]
    assert source.name == "some-org/Tiny-1B-Instruct"
    values = {key: value.value for key, value in source.metadata.items()}
    assert (values["general.name"], values["general.organization"]) == ("Tiny-1B-Instruct", "some-org")


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    error = getattr(errors, name)
    built: Exception = error.__new__(error, f"{name} happened\nwith a second line")
    built.args = (f"{name} happened\nwith a second line",)
    return built


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: hub_error("GatedRepoError"), "access is gated"),
        (lambda: hub_error("RepositoryNotFoundError"), "no such model on the hub"),
        (lambda: hub_error("RevisionNotFoundError"), "no revision"),
        (lambda: hub_error("LocalEntryNotFoundError"), "the hub cannot be reached"),
        (lambda: hub_error("OfflineModeIsEnabled"), "the hub cannot be reached"),
        (lambda: OSError("No space left on device\nat all"), r"failed \(No space left on device\)"),
        (lambda: RuntimeError(""), r"failed \(RuntimeError\)"),
    ],
)
def test_errors_of_the_hub_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    fails("org/name", message)


# ---- the real SmolLM2 ----


def test_smollm2s_folder_and_file_agree(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    file, folder = open_source(smollm2_gguf), open_source(smollm2_folder)
    assert [(t.name, t.shape) for t in file.tensors] != []
    assert {(t.name, t.shape) for t in file.tensors} == {(t.name, t.shape) for t in folder.tensors}
    for name in (
        "blk.0.attn_q.weight",
        "blk.29.attn_k.weight",
        "blk.7.ffn_down.weight",
        "output_norm.weight",
    ):
        np.testing.assert_allclose(folder.read(name), file.read(name), rtol=1e-3, atol=1e-6)
    ours, theirs = folder.metadata, file.metadata
    # The stock file was made by an older converter, which left these two out.
    newer = {"llama.attention.key_length", "llama.attention.value_length"}
    model_keys = [key for key in theirs if key.startswith("llama.")]
    assert [key for key in ours if key.startswith("llama.") and key not in newer] == model_keys
    for key in model_keys:
        assert ours[key].type == theirs[key].type
        assert ours[key].value == pytest.approx(theirs[key].value)
