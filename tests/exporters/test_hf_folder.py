"""Hugging Face folders: transformers loads the same model that the trit file holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward_strings import awkward_strings
from reference_decoding import decode
from tiny_models import VARIANTS, edit_json, read_config, write_tiny_model

from tritgguf import convert, export
from tritgguf.architectures.rope import ROPE_FREQS
from tritgguf.architectures.tensor_names import hf_tensor_name, to_hf
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.safetensors_reader import open_shards
from tritgguf.formats.trit_types import is_trit_type
from tritgguf.reference.model import ReferenceModel
from tritgguf.reference.process_settings import silent_transformers
from tritgguf.sources.open import open_source

CHAT = [
    {"role": "user", "content": "Say <|im_end|> \u2581 twice."},
    {"role": "assistant", "content": " No.\n"},
    {"role": "user", "content": ""},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """Return a cached function from a variant to its source, trit file and export."""
    root = tmp_path_factory.mktemp("exported")

    def make(variant: str) -> tuple[Path, Path, Path]:
        source, file, folder = (root / f"{variant}{suffix}" for suffix in ("", ".gguf", "-hf"))
        if not folder.exists():
            convert(write_tiny_model(source, variant), file, depth=2)
            export(file, folder, to="hf")
        return source, file, folder

    return make


def reference_float16(file: GgufFile) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a trit file's tensors by Hugging Face name, decoded by the reference decoder and rounded to float16."""
    arch = file.metadata["general.architecture"]
    heads, kv_heads = (file.metadata[f"{arch}.attention.{key}"] for key in ("head_count", "head_count_kv"))
    for name, info in file.tensors.items():
        if name == ROPE_FREQS:
            continue
        if is_trit_type(info.type_id):
            depth = int(info.type_name[-1])
            weights = decode(file.raw(name), info.shape[-1], depth, file.codebook(name)).reshape(info.shape)
        else:
            weights = file.read_float32(name)
        yield hf_tensor_name(arch, name), to_hf(arch, name, weights, heads, kv_heads).astype(np.float16)


def assert_weights(folder: Path, file: GgufFile) -> None:
    """Assert that a folder has exactly the file's weights, bit for bit."""
    stored = open_shards(folder)
    expected = dict(reference_float16(file))
    assert stored.keys() == expected.keys()
    for name, halves in expected.items():
        assert stored[name].dtype == "F16"
        found = stored[name].read().astype(np.float16)
        np.testing.assert_array_equal(found.view(np.uint16), halves.view(np.uint16))


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with silent_transformers():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same_tokenizer(source: Path, folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), load_tokenizer(source)
    for text in awkward_strings(theirs.all_special_tokens):
        for special in (False, True):
            ids = ours(text, add_special_tokens=special).input_ids
            assert ids == theirs(text, add_special_tokens=special).input_ids
            assert ours.decode(ids) == theirs.decode(ids)
    for prompt in (False, True):
        rendered = [
            tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
            for tokenizer in (ours, theirs)
        ]
        assert rendered[0] == rendered[1]
    stated = json.loads((source / "tokenizer_config.json").read_text())
    for attribute in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, attribute) == stated.get(attribute)


def logits_of(folder: Path) -> np.ndarray:
    return ReferenceModel.open(open_source(folder)).logits(range(3, 60))


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights(exported: Callable[[str], tuple[Path, Path, Path]], variant: str) -> None:
    _, path, folder = exported(variant)
    assert_weights(folder, GgufFile(path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(exported: Callable[[str], tuple[Path, Path, Path]], variant: str) -> None:
    """The source's config with the file's rounded weights gives the same logits as the folder."""
    source, path, folder = exported(variant)
    file = GgufFile(path)
    reference = ReferenceModel.open(open_source(source))
    with silent_transformers():
        reference.load_tensors(
            file.metadata,
            list(file.tensors),
            lambda name: file.read_float32(name).astype(np.float16).astype(np.float32),
            str(path),
        )
    expected = reference.logits(range(3, 60))
    np.testing.assert_allclose(logits_of(folder), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("variant", ["llama", "llama-sentencepiece", "llama3-rope", "mistral", "qwen2"])
def test_tokenizer(exported: Callable[[str], tuple[Path, Path, Path]], variant: str) -> None:
    source, _, folder = exported(variant)
    assert_same_tokenizer(source, folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_converting_again(exported: Callable[[str], tuple[Path, Path, Path]], tmp_path: Path, variant: str) -> None:
    """The folder is a valid source with the same metadata."""
    _, path, folder = exported(variant)
    convert(folder, tmp_path / "again.gguf", depth=2)
    first, again = GgufFile(path), GgufFile(tmp_path / "again.gguf")
    assert first.tensors.keys() == again.tensors.keys()
    own = ("general.", "trit.")
    kept = [key for key in first.metadata if not key.startswith(own)]
    assert kept == [key for key in again.metadata if not key.startswith(own)]
    for key in kept:
        assert again.metadata[key] == first.metadata[key], key


def test_packed_embeddings_and_head(tmp_path: Path) -> None:
    convert(write_tiny_model(tmp_path / "model"), tmp_path / "d2.gguf", output_depth=3, embedding_depth=4)
    file = GgufFile(tmp_path / "d2.gguf")
    assert {file.tensors[name].type_name for name in ("token_embd.weight", "output.weight")} == {"TRIT3", "TRIT4"}
    export(file.path, tmp_path / "out", to="hf")
    assert_weights(tmp_path / "out", file)
    assert "mixed d=2, 3, 4" in (tmp_path / "out" / "README.md").read_text()


def test_shards(exported: Callable[[str], tuple[Path, Path, Path]], tmp_path: Path) -> None:
    _, path, whole = exported("llama")
    report = export(path, tmp_path / "out", to="hf", max_shard_size="150KB")
    assert_weights(tmp_path / "out", GgufFile(path))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert report.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    np.testing.assert_array_equal(logits_of(tmp_path / "out"), logits_of(whole))


def test_the_safetensors_library_reads_it(exported: Callable[[str], tuple[Path, Path, Path]]) -> None:
    from safetensors.numpy import load_file

    _, path, folder = exported("qwen2")
    loaded = load_file(folder / "model.safetensors")
    for name, halves in reference_float16(GgufFile(path)):
        np.testing.assert_array_equal(loaded[name], halves)


def test_config(exported: Callable[[str], tuple[Path, Path, Path]]) -> None:
    from transformers import AutoConfig

    for variant in VARIANTS:
        source, _, folder = exported(variant)
        ours, theirs = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, source))
        theirs["rope_parameters"].pop("type", None)  # the old name of rope_type
        names_of_the_file = {"_name_or_path", "dtype"}
        if variant == "mistral":  # GGUF has one architecture for both classes
            names_of_the_file |= {"architectures", "model_type"} | (ours.keys() ^ theirs.keys())
        different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        # Special tokens come from the tokenizer's files; the tiny configs lack some of them.
        assert different <= names_of_the_file | {"pad_token_id", "unk_token_id", "attention_bias"}, variant
        assert read_config(folder)["torch_dtype"] == "float16"


def test_the_small_files(exported: Callable[[str], tuple[Path, Path, Path]]) -> None:
    source, _, folder = exported("qwen2")
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((folder / "special_tokens_map.json").read_text()) == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [2, 0]}
    assert (folder / "README.md").read_text().startswith("---\n")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_recommended_sampling_settings(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model", "qwen2")
    (source / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.8, "top_k": 20}')
    convert(source, tmp_path / "d2.gguf")
    export(tmp_path / "d2.gguf", tmp_path / "out", to="hf")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation.items() >= {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}.items()


def test_named_chat_templates(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    edit_json(source / "tokenizer_config.json", chat_template=templates)
    convert(source, tmp_path / "d2.gguf")
    export(tmp_path / "d2.gguf", tmp_path / "out", to="hf")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}


def test_a_weight_that_float16_cannot_hold(tmp_path: Path) -> None:
    from converted_models import damaged_model

    source = damaged_model(tmp_path / "model", "model.layers.1.mlp.up_proj.weight", 70000.0)
    convert(source, tmp_path / "d2.gguf")
    with pytest.raises(TritGgufError, match=r"blk\.1\.ffn_up\.weight has a weight of 7e\+04, which F16 cannot hold"):
        export(tmp_path / "d2.gguf", tmp_path / "out", to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d2.gguf", "model"]
    export(tmp_path / "d2.gguf", tmp_path / "bf16.gguf", to="bf16")
    largest = GgufFile(tmp_path / "bf16.gguf").read_float32("blk.1.ffn_up.weight").max()
    assert largest == pytest.approx(70000.0, rel=2**-8)


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2(smollm2_folder: Path, smollm2_d3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(smollm2_d3, folder, to="hf", max_shard_size="100MB")
    file = GgufFile(smollm2_d3)
    assert_weights(folder, file)
    assert_same_tokenizer(smollm2_folder, folder)
    reference = ReferenceModel.open(open_source(smollm2_folder))
    reference.load_file(file)
    expected, found = reference.logits(range(3, 60)), logits_of(folder)
    # Rounding to float16 moves them: the reference has the decoder's float32 numbers.
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
    with silent_transformers():
        for parameter in reference.module.parameters():
            parameter.data = parameter.data.half().float()
    np.testing.assert_allclose(found, reference.logits(range(3, 60)), rtol=0, atol=1e-5 * np.abs(expected).max())
