"""Recipes, and targets for the whole file: what becomes of the embeddings and the output head."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tools.recovery.differing_numbers import tensors
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.conversion.depths import DepthChoice
from tritgguf.conversion.recipes import BALANCED, PUBLISHED, RECIPES, SMALL, parse_recipe
from tritgguf.errors import TritGgufError
from tritgguf.exporters.export import export
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.trit_types import DEPTHS
from tritgguf.sources.open import open_source

EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
WINDOWS = np.random.default_rng(0).integers(3, 400, (3, 32)).tolist()


def types(path: Path) -> list[str]:
    """Return the types of the embeddings and, if it is a separate tensor, of the output head."""
    tensors = GgufFile(path).tensors
    return [tensors[name].type_name for name in (EMBEDDINGS, HEAD) if name in tensors]


def type_name(depth: int) -> str:
    return f"TRIT{depth}" if depth else "F16"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("recipes") / "model")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_the_recipe_sets_embeddings_and_head(tmp_path: Path, recipe: Any, variant: str) -> None:
    source = write_tiny_model(tmp_path / "model", variant)
    for depth in DEPTHS:
        convert(source, tmp_path / "out.gguf", depth=depth, recipe=recipe.name, overwrite=True)
        if variant == "llama":
            assert types(tmp_path / "out.gguf") == [type_name(recipe.embeddings[depth]), type_name(recipe.head[depth])]
        else:
            assert types(tmp_path / "out.gguf") == [type_name(recipe.head[depth])]
        assert GgufFile(tmp_path / "out.gguf").tensors["blk.1.ffn_up.weight"].type_name == f"TRIT{depth}"


def test_each_recipe_packs_at_least_as_much_as_the_one_before() -> None:
    def bits(depth: int) -> int:
        return depth or 5

    assert [*PUBLISHED.embeddings.values(), *PUBLISHED.head.values()] == [0] * 8
    for depth in DEPTHS:
        for smaller, larger in ((SMALL, BALANCED), (BALANCED, PUBLISHED)):
            assert bits(smaller.embeddings[depth]) <= bits(larger.embeddings[depth])
            assert bits(smaller.head[depth]) <= bits(larger.head[depth])


def test_balanced_is_the_default(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "default.gguf", depth=2)
    convert(llama, tmp_path / "balanced.gguf", depth=2, recipe="balanced")
    assert (tmp_path / "default.gguf").read_bytes() == (tmp_path / "balanced.gguf").read_bytes()


def test_options_override_the_recipe(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "out.gguf", depth=2, recipe="published", output_depth=1)
    assert types(tmp_path / "out.gguf") == ["F16", "TRIT1"]
    convert(llama, tmp_path / "other.gguf", depth=2, embedding_depth=0)
    assert types(tmp_path / "other.gguf") == ["F16", "TRIT4"]


def test_a_recipe_that_does_not_exist(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(TritGgufError, match=r"^recipe large does not exist; choose from published, balanced, small$"):
        parse_recipe("large")
    with pytest.raises(TritGgufError, match="recipe large does not exist"):
        convert(llama, tmp_path / "out.gguf", recipe="large")


def test_a_trit_file_keeps_its_types(tmp_path: Path, llama: Path) -> None:
    convert(llama, tmp_path / "deep.gguf", depth=4, output_depth=3, embedding_depth=0)
    convert(tmp_path / "deep.gguf", tmp_path / "out.gguf", depth=2)
    assert types(tmp_path / "out.gguf") == ["F16", "TRIT3"]
    convert(tmp_path / "deep.gguf", tmp_path / "published.gguf", depth=4, recipe="published")
    assert types(tmp_path / "published.gguf") == ["F16", "F16"]


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied"])
def test_an_export_is_recovered_exactly(tmp_path: Path, variant: str) -> None:
    convert(write_tiny_model(tmp_path / "model", variant), tmp_path / "first.gguf", depth=2)
    export(tmp_path / "first.gguf", tmp_path / "hf", to="hf")
    report = convert(tmp_path / "hf", tmp_path / "second.gguf")
    assert (report.encoder, report.warnings) == ("recover", [])
    assert types(tmp_path / "second.gguf") == types(tmp_path / "first.gguf")
    assert "F16" not in types(tmp_path / "second.gguf")
    export(tmp_path / "second.gguf", tmp_path / "again", to="hf")
    for (name, first), (other_name, second) in zip(tensors(tmp_path / "hf"), tensors(tmp_path / "again"), strict=True):
        assert name == other_name
        np.testing.assert_array_equal(first, second)


def test_recovery_leaves_other_embeddings_as_they_are(tmp_path: Path) -> None:
    """The convention of published checkpoints: trits in the layers, FP16 elsewhere."""
    convert(write_tiny_model(tmp_path / "model"), tmp_path / "first.gguf", depth=2, recipe="published")
    export(tmp_path / "first.gguf", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "exact.gguf")
    convert(tmp_path / "hf", tmp_path / "balanced.gguf", recipe="balanced")
    assert types(tmp_path / "exact.gguf") == ["F16", "F16"]
    assert types(tmp_path / "balanced.gguf") == [type_name(BALANCED.embeddings[2]), type_name(BALANCED.head[2])]
    source = open_source(tmp_path / "hf")
    for name in (EMBEDDINGS, HEAD):
        np.testing.assert_array_equal(GgufFile(tmp_path / "exact.gguf").read_float32(name), source.read(name))


@pytest.mark.parametrize(("variant", "size"), [("llama", 170_000), ("llama-tied", 120_000), ("llama", 230_000)])
def test_a_target_chooses_every_depth(tmp_path: Path, variant: str, size: int) -> None:
    pytest.importorskip("torch")
    source, out = write_tiny_model(tmp_path / "model", variant), tmp_path / "out.gguf"
    report = convert(source, out, encoder="v2", windows=WINDOWS, choice=DepthChoice(target_bytes=size))
    assert 0.97 * size < report.file_bytes == out.stat().st_size <= size
    assert GgufFile(out).metadata["trit.depths"] == f"target {size} bytes"
    assert any(name != "F16" for name in types(out))


def test_measuring_costs_is_a_part_of_the_progress(tmp_path: Path, llama: Path) -> None:
    pytest.importorskip("torch")
    steps: list[ConvertProgress] = []
    choice = DepthChoice(target_bytes=170_000)
    convert(llama, tmp_path / "out.gguf", encoder="v2", windows=WINDOWS, choice=choice, progress=steps.append)
    blocks = open_source(llama).metadata["llama.block_count"].value
    assert [step.tensor for step in steps[: blocks + 1]].count("choosing depths") == blocks
    assert len({step.bytes_total for step in steps}) == 1
    assert all(0 < first.bytes_done < second.bytes_done for first, second in pairwise(steps))
    assert steps[-1].bytes_done == steps[-1].bytes_total


def test_a_target_leaves_what_the_recipe_sets(tmp_path: Path, llama: Path) -> None:
    pytest.importorskip("torch")
    choice = DepthChoice(target_bytes=200_000)
    report = convert(
        llama, tmp_path / "out.gguf", encoder="v2", windows=WINDOWS, choice=choice, recipe="small", output_depth=4
    )
    assert types(tmp_path / "out.gguf") == [type_name(SMALL.embeddings[2]), "TRIT4"]
    assert report.file_bytes <= 200_000


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied"])
def test_a_calibrated_head_is_encoded_for_its_inputs(tmp_path: Path, variant: str) -> None:
    pytest.importorskip("torch")
    from tritgguf.calibration.importance import summed_squares

    folder, head = write_tiny_model(tmp_path / "model", variant), HEAD if variant == "llama" else EMBEDDINGS
    source = open_source(folder)
    importance = summed_squares(source, WINDOWS)[0][head]
    for encoder, windows in (("v2", None), ("calibrated", WINDOWS)):
        convert(folder, tmp_path / f"{encoder}.gguf", depth=2, encoder=encoder, windows=windows, output_depth=2)
    files = [GgufFile(tmp_path / f"{encoder}.gguf") for encoder in ("v2", "calibrated")]
    errors = [(np.square(file.read_float32(head) - source.read(head)) @ importance).sum() for file in files]
    assert errors[1] < 0.95 * errors[0]
    assert list(files[1].tensors)[-1] == head  # after the blocks, which determine its inputs


def test_a_head_is_encoded_the_same_after_an_interruption(tmp_path: Path, llama: Path) -> None:
    pytest.importorskip("torch")
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"

    def interrupt(step: ConvertProgress) -> None:
        if step.tensor == "blk.1.ffn_norm.weight":
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"depth": 1, "encoder": "calibrated", "windows": WINDOWS, "threads": 2}
    convert(llama, whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        convert(llama, out, progress=interrupt, **settings)
    assert not out.exists()
    convert(llama, out, resume=True, **settings)
    assert out.read_bytes() == whole.read_bytes()
