"""Damaged and hostile Hugging Face folders: each gives a one-line error."""

from __future__ import annotations

import codecs
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_checks import fails
from tiny_models import (
    edit_json,
    random_weights,
    read_config,
    write_safetensors,
    write_safetensors_parts,
    write_shards,
    write_tiny_model,
)

from tritgguf.errors import TritGgufError
from tritgguf.formats.safetensors_reader import open_shards
from tritgguf.sources.open import open_source

UP = "model.layers.1.mlp.up_proj.weight"


def edit_config(folder: Path, **entries: Any) -> None:
    edit_json(folder / "config.json", **entries)


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = random_weights(read_config(folder))
        del weights[name]
        write_shards(folder, weights, "F16")

    return damage


def replaced(name: str, array: np.ndarray) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write_shards(folder, {**random_weights(read_config(folder)), name: array}, "F16")

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_dtype(folder: Path) -> None:
    header = {UP: {"dtype": "F64", "shape": [2, 2], "data_offsets": [0, 32]}}
    write_safetensors_parts(folder / "model.safetensors", header, bytes(32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: is not valid JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 100000), r"config\.json: is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: holds no JSON object"),
        (
            lambda folder: edit_config(folder, architectures=["BertModel"]),
            "architecture BertModel is not supported",
        ),
        (
            lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
            r"quantized \(gptq\)",
        ),
        (lambda folder: edit_config(folder, quantization_config=["fp8"]), "already quantized"),
        (lambda folder: edit_config(folder, hidden_size=64), r"tensor [\w.]+ has shape"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), r"layers\.2\.\S+ is missing"),
        (
            lambda folder: edit_config(folder, num_hidden_layers=1),
            r"layers\.1\.\S+ does not belong",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "nothing to convert"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer\.json"),
        (without("lm_head.weight"), r"tensor lm_head\.weight is missing"),
        (without(UP), r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (
            replaced(UP, np.ones((128, 192), np.float32)),
            r"up_proj\.weight has shape \(128, 192\).*\(192, 128\)",
        ),
        (replaced("model.layers.0.self_attn.q_proj.bias", np.ones(128, np.float32)), "does not belong"),
        (
            replaced("model.layers.0.mlp.experts.0.weight", np.ones(3, np.float32)),
            r"experts\.0\.weight does not belong",
        ),
        (
            replaced("model.layers.0.mlp.down_proj.SCB", np.ones(128, np.float32)),
            r"down_proj\.SCB belongs to quantized weights; convert the original",
        ),
        (cut, r"model\.safetensors: truncated or damaged"),
        (cut_header, r"model\.safetensors: truncated or damaged"),
        (only_pickled, r"only pickled weights \(pytorch_model\.bin\)"),
        (other_dtype, f"{UP} has dtype F64"),
    ],
)
def test_a_damaged_folder_gives_one_clear_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_tiny_model(tmp_path / "model")
    open_source(folder)
    damage(folder)
    fails(folder, message)


def edit_weight_map(folder: Path, name: str, shard: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


SECOND = "model-00002-of-00003.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SECOND).unlink(), f"{SECOND}: this shard is missing"),
        (lambda folder: (folder / SECOND).write_bytes(b""), f"{SECOND}: truncated or damaged"),
        (
            lambda folder: edit_weight_map(folder, UP, "../other/model.safetensors"),
            "not the name of a safetensors file",
        ),
        (lambda folder: edit_weight_map(folder, UP, "/etc/passwd"), "not the name of a safetensors file"),
        (lambda folder: edit_weight_map(folder, UP, "..safetensors"), "not the name of a safetensors file"),
        (lambda folder: edit_weight_map(folder, UP, "model.bin"), "not the name of a safetensors file"),
        (lambda folder: edit_weight_map(folder, UP, 3), "not the name of a safetensors file"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no `weight_map`"),
    ],
)
def test_damaged_shards_give_one_clear_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-sharded")
    damage(folder)
    fails(folder, message)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-sharded")
    write_safetensors(folder / SECOND, random_weights(read_config(folder)), "F16")
    fails(folder, r"is also in model-00001-of-00003\.safetensors|places tensor")
    (folder / "model.safetensors.index.json").unlink()
    fails(folder, r"is also in model-00001-of-00003\.safetensors")


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-sharded")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[UP])
    edit_weight_map(folder, UP, other)
    fails(folder, f"places tensor {UP} in another shard")


def test_an_index_that_lists_the_head_of_a_tied_model(tmp_path: Path) -> None:
    """Transformers loads such a folder: the index only says which shards there are."""
    folder = write_tiny_model(tmp_path / "model", "llama-sharded", tie_word_embeddings=True)
    edit_weight_map(folder, "lm_head.weight", SECOND)
    edit_weight_map(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", SECOND)
    assert "output.weight" not in {tensor.name for tensor in open_source(folder).tensors}


def test_an_index_that_lists_what_a_model_needs_and_no_shard_has(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-sharded")
    (folder / SECOND).unlink()
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {
        name: shard if shard != SECOND else "model-00001-of-00003.safetensors" for name, shard in weight_map.items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))
    fails(folder, r"tensor \S+ is missing")


def test_an_index_that_lists_less_than_the_shards_hold(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][UP]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert UP in open_shards(folder)


def linked_model(folder: Path) -> Path:
    """Write a folder whose files are links to another folder, as some download managers make them."""
    stored = write_tiny_model(folder / "stored", "llama-sharded")
    linked = folder / "linked"
    linked.mkdir()
    for path in stored.iterdir():
        (linked / path.name).symlink_to(path)
    return linked


def test_linked_files_behind_a_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = linked_model(tmp_path)
    fails(folder, "config.json: is a link to .*; if you trust it, set TRITGGUF_FOLLOW_LINKS=1")
    monkeypatch.setenv("TRITGGUF_FOLLOW_LINKS", "0")
    fails(folder, "config.json: is a link to")
    monkeypatch.setenv("TRITGGUF_FOLLOW_LINKS", "1")
    names = {tensor.name for tensor in open_source(folder).tensors}
    assert names == {tensor.name for tensor in open_source(tmp_path / "stored").tensors}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", POINTER, r"model\.safetensors: is a Git LFS pointer.*`git lfs pull`"),
        ("tokenizer.json", POINTER, r"tokenizer\.json: is a Git LFS pointer.*`git lfs pull`"),
        ("config.json", b"<!DOCTYPE html><html></html>", r"config\.json: is a web page"),
        ("model.safetensors", b"PK\3\4" + bytes(60), r"model\.safetensors: is a ZIP archive or pickled"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / name).write_bytes(content)
    fails(folder, message)


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-sharded")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    plain = open_source(folder).metadata
    for path in folder.iterdir():
        if path.suffix in (".json", ".md"):
            path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    marked = open_source(folder).metadata
    assert {key: value.value for key, value in marked.items()} == {key: value.value for key, value in plain.items()}
    assert (plain["general.license"].value, plain["general.sampling.temp"].value) == ("mit", 0.5)


def test_a_lora_adapter_is_no_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert any("LoRA adapter" in warning for warning in open_source(folder).warnings)
    (folder / "config.json").unlink()
    fails(folder, r"is a LoRA adapter of org/base, not a model; merge it first \(in peft: merge_and_unload")


def test_missing_parts_are_noticed_without_an_index(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama-sharded")
    (folder / "model.safetensors.index.json").unlink()
    (folder / SECOND).unlink()
    fails(folder, "has 2 shards that are not the parts 1 to 3")


def test_a_shard_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    source = open_source(write_tiny_model(tmp_path / "model"))
    last = max(source.tensors, key=lambda tensor: tensor.name == "output_norm.weight")
    cut(tmp_path / "model")
    with pytest.raises(TritGgufError, match=r"ends inside tensor model\.norm\.weight"):
        source.read(last.name)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(TritGgufError, match="cannot be read"):
        source.read(last.name)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    folder = write_tiny_model(tmp_path / "model")
    only_pickled(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    fails(folder, "can run code when they are loaded")
    assert not sprung.exists()


def test_stored_tensors_are_equal_by_dtype_shape_and_bytes(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [8, 16]},
        "c": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
        "d": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [24, 32]},
        "e": {"dtype": "F16", "shape": [2, 2], "data_offsets": [32, 40]},
    }
    write_safetensors_parts(tmp_path / "model.safetensors", header, b"12345678" * 4 + b"12345670")
    tensors = open_shards(tmp_path)
    assert [name for name, tensor in tensors.items() if tensor.equals(tensors["a"])] == ["a", "b"]
