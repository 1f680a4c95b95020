"""Converting checkpoints of dequantized trits: recognition, errors, and that no weight changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from converted_models import as_stock_gguf
from dequantized_trits import dequantized
from gguf import GGMLQuantizationType
from tiny_models import random_weights, read_config, write_shards, write_tiny_model

from tools.recovery.recover_roundtrip import reference_halves
from tritgguf.architectures.tensor_names import gguf_tensor_name, quantized_tensor, to_hf
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.conversion.depths import DepthChoice, parse_rules
from tritgguf.conversion.encoders import V2, ScaleSearch
from tritgguf.conversion.report import ConvertReport
from tritgguf.errors import TritGgufError
from tritgguf.formats.dtypes import to_float32
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.trit_types import DEPTHS, TritType, is_trit_type
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source

Names = Callable[[str], bool]  # selects tensors by GGUF name


def write_model(folder: Path, *, dtype: str = "F16", is_changed: Names = lambda name: False) -> Path:
    """Write a tiny model whose matrices are dequantized trits of alternating depths, except the changed ones."""
    write_tiny_model(folder)
    weights = random_weights(read_config(folder))
    for number, (hf_name, tensor) in enumerate(weights.items()):
        name = gguf_tensor_name("llama", hf_name) or ""
        if quantized_tensor(name) and not is_changed(name):
            half = "bfloat16" if dtype == "BF16" else "float16"
            weights[hf_name] = dequantized(tensor.shape, DEPTHS[number % 4], half, number)
    write_shards(folder, weights, dtype)
    return folder


def differing_numbers(source: Path, output: Path) -> int:
    """Decode a file's trit tensors with the reference decoder and count weights that differ from the source."""
    opened, file = open_source(source), GgufFile(output)
    count = 0
    for name, info in file.tensors.items():
        if is_trit_type(info.type_id):
            stored, depth = opened.rows(name).whole(), TritType(info.type_id).depth
            rows = file.raw(name).reshape(len(stored), -1)
            decoded = reference_halves(rows, info.shape[-1], depth, file.codebook(name), stored.dtype)
            count += int(np.count_nonzero(to_float32(decoded) != to_float32(stored)))
    return count


def refused(source: Path, folder: Path, **options: object) -> str:
    """Return the one-line error of a conversion, which must leave no file."""
    (folder / "outputs").mkdir()
    with pytest.raises(TritGgufError) as caught:
        convert(source, folder / "outputs" / "out.gguf", **options)  # type: ignore[arg-type]
    assert not list((folder / "outputs").iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of dequantized trits in float16."""
    return write_model(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two matrices that were never quantized."""
    return write_model(
        tmp_path_factory.mktemp("damaged") / "model", is_changed=lambda name: name.endswith("attn_k.weight")
    )


@pytest.mark.parametrize("encoder", ["auto", "recover", "recover+v2"])
def test_mixed_depths(tmp_path: Path, published: Path, encoder: str) -> None:
    report = convert(published, tmp_path / "out.gguf", encoder=encoder)
    assert [report.tensors_by_type[f"TRIT{depth}"] for depth in DEPTHS] == [3, 3, 4, 4]
    assert (report.encoder, report.depth, report.warnings) == ("recover", 4, [])
    assert 0 < report.relative_error < 3e-4
    assert differing_numbers(published, tmp_path / "out.gguf") == 0
    assert GgufFile(tmp_path / "out.gguf").metadata["trit.encoder"] == "recover"


def test_bfloat16(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", dtype="BF16")
    assert convert(source, tmp_path / "out.gguf").encoder == "recover"
    assert differing_numbers(source, tmp_path / "out.gguf") == 0


def test_progress_counts_what_is_read_twice(tmp_path: Path, published: Path) -> None:
    steps: list[ConvertProgress] = []
    convert(published, tmp_path / "out.gguf", progress=steps.append)
    assert [step.bytes_done for step in steps] == sorted(step.bytes_done for step in steps)
    shares = [step.bytes_done / step.bytes_total for step in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_models_are_quantized(tmp_path: Path, dtype: str) -> None:
    source = write_tiny_model(tmp_path / "model", dtype=dtype)
    report = convert(source, tmp_path / "automatic.gguf", depth=3)
    assert (report.encoder, report.depth, report.warnings) == ("v2", 3, [])
    convert(source, tmp_path / "v2.gguf", depth=3, encoder="v2")
    assert (tmp_path / "automatic.gguf").read_bytes() == (tmp_path / "v2.gguf").read_bytes()


def test_some_accidental_fits(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", is_changed=lambda name: not name.startswith("blk.0.attn"))
    report = convert(source, tmp_path / "out.gguf")
    assert (report.encoder, report.tensors_by_type["TRIT2"]) == ("v2", 14)


def test_zero_matrices_do_not_count_as_trits(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    weights = random_weights(read_config(source))
    write_shards(source, {name: 0 * tensor for name, tensor in weights.items()}, "F16")
    assert convert(source, tmp_path / "out.gguf").encoder == "v2"


@pytest.mark.parametrize("encoder", ["auto", "recover"])
def test_matrices_without_a_fit_are_named(tmp_path: Path, damaged: Path, encoder: str) -> None:
    message = refused(damaged, tmp_path, encoder=encoder)
    assert f"{damaged}: 2 of 14 matrices cannot be recovered exactly: tensor blk.0.attn_k.weight has a group" in message
    assert "tensor blk.1.attn_k.weight" in message
    assert "--encoder recover+v2 quantizes those again, --encoder v2 all of them" in message


def test_matrices_without_a_fit_are_quantized_when_asked(tmp_path: Path, damaged: Path) -> None:
    report = convert(damaged, tmp_path / "out.gguf", encoder="recover+v2")
    assert report.encoder == "recover+v2"
    assert len(report.warnings) == 1
    assert "blk.0.attn_k.weight" in report.warnings[0]
    assert report.warnings[0].endswith("; quantized by v2")
    convert(damaged, tmp_path / "v2.gguf", encoder="v2", depth=2)
    quantized, both = GgufFile(tmp_path / "v2.gguf"), GgufFile(tmp_path / "out.gguf")
    np.testing.assert_array_equal(both.raw("blk.0.attn_k.weight"), quantized.raw("blk.0.attn_k.weight"))


def test_recover_needs_trits(tmp_path: Path) -> None:
    message = refused(write_tiny_model(tmp_path / "model"), tmp_path, encoder="recover")
    assert "14 of 14 matrices" in message
    assert "and 11 more" in message


def test_recover_needs_float16(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model", dtype="F32")
    assert "is stored as float32, and its numbers are no halves" in refused(source, tmp_path, encoder="recover")


def test_a_float32_checkpoint_of_halves(tmp_path: Path, published: Path) -> None:
    wide = write_tiny_model(tmp_path / "model")
    source = open_source(published)
    write_shards(wide, {source.label(tensor.name): _hf(source, tensor.name) for tensor in source.tensors}, "F32")
    assert convert(wide, tmp_path / "wide.gguf").encoder == "recover"
    convert(published, tmp_path / "halves.gguf")
    assert matrices(tmp_path / "wide.gguf") == matrices(tmp_path / "halves.gguf")


def _hf(source: Source, name: str) -> np.ndarray:
    """Return a tensor of a tiny Llama in Hugging Face's order."""
    return to_hf("llama", name, source.read(name), 4, 2)


def matrices(path: Path) -> dict[str, tuple[int, bytes, bytes]]:
    """Return name -> type, bytes and codebook of a file's trit tensors."""
    file = GgufFile(path)
    packed = [info for info in file.tensors.values() if is_trit_type(info.type_id)]
    return {
        info.name: (info.type_id, file.raw(info.name).tobytes(), file.codebook(info.name).tobytes()) for info in packed
    }


@pytest.mark.parametrize("stock_type", [GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0])
def test_llama_cpps_ternary_types(tmp_path: Path, stock_type: GGMLQuantizationType) -> None:
    """They give what the F16 file of the same weights gives: one trit, exactly."""
    folder = write_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=256, head_dim=64)
    generator, weights = np.random.default_rng(0), random_weights(read_config(folder))
    for number, (name, tensor) in enumerate(weights.items()):
        if "proj" in name:
            scale = np.float16(0.02 + 0.001 * number)
            weights[name] = scale * generator.integers(-1, 2, tensor.shape).astype(np.float32)
            weights[name][:, ::256] = scale  # no block is without the scale
    write_shards(folder, weights, "F16")
    stock = as_stock_gguf(open_source(folder), tmp_path / "stock.gguf", matrices=stock_type)
    assert convert(stock, tmp_path / "stock-trits.gguf").encoder == "recover"
    convert(folder, tmp_path / "trits.gguf")
    found = matrices(tmp_path / "stock-trits.gguf")
    assert found == matrices(tmp_path / "trits.gguf")
    assert {type_id for type_id, _, _ in found.values()} == {TritType.TRIT1}
    assert len(found) == 14


def kept(rules: str) -> DepthChoice:
    return DepthChoice(tuple(parse_rules(rules)))


def test_matrices_that_are_kept_in_f16_are_not_recovered(tmp_path: Path, published: Path) -> None:
    rule = kept("*=0")
    report = convert(published, tmp_path / "f16.gguf", choice=rule, recipe="published")
    assert (report.encoder, report.tensors_by_type["F16"]) == ("v2", 16)
    source, file = open_source(published), GgufFile(tmp_path / "f16.gguf")
    for tensor in source.tensors:
        np.testing.assert_array_equal(file.read_float32(tensor.name), source.read(tensor.name))
    report = convert(published, tmp_path / "some.gguf", choice=kept("blk.0.*=0"))
    assert report.encoder == "recover"
    assert sorted(matrices(tmp_path / "some.gguf")) == sorted(
        name for name in matrices_of(published) if "blk.1" in name
    )


def matrices_of(folder: Path) -> list[str]:
    return [tensor.name for tensor in open_source(folder).tensors if quantized_tensor(tensor.name)]


def test_a_rule_is_the_maximum_of_a_recovered_matrix(tmp_path: Path, published: Path) -> None:
    convert(published, tmp_path / "any.gguf")
    convert(published, tmp_path / "out.gguf", choice=kept("*=2"))
    free, limited = matrices(tmp_path / "any.gguf"), matrices(tmp_path / "out.gguf")
    for name, (type_id, _, _) in free.items():
        assert limited[name][0] == min(type_id, TritType.TRIT2)
        assert (limited[name] == free[name]) == (type_id <= TritType.TRIT2)


def test_what_a_rule_does_to_recovered_matrices_is_said(tmp_path: Path, published: Path) -> None:
    convert(published, tmp_path / "any.gguf")
    name = next(name for name, (kind, _, _) in matrices(tmp_path / "any.gguf").items() if kind == TritType.TRIT3)
    assert "sets fewer trits than these matrices hold" in refused(
        published, tmp_path, encoder="recover", choice=kept(f"{name}=2")
    )
    report = convert(published, tmp_path / "less.gguf", choice=kept(f"{name}=2"))
    assert report.encoder == "recover+v2"
    assert f"--keep sets fewer trits than these matrices hold: {name}; quantized by v2" in report.warnings[0]
    assert depths_key(tmp_path / "less.gguf") == f"{name}=2, depth 2, recovered trits as they are"
    report = convert(published, tmp_path / "more.gguf", choice=kept(f"{name}=4"))
    assert report.encoder == "recover"
    assert report.warnings == [f"fewer trits than --keep sets are exact, and stay: {name}"]
    assert depths_key(tmp_path / "more.gguf") is None
    assert (
        convert(published, tmp_path / "none.gguf", choice=kept("*=1"), encoder="recover+best").encoder == "recover+best"
    )


def depths_key(file: Path) -> object:
    return GgufFile(file).metadata.get("trit.depths")


def test_a_kept_matrix_without_a_fit_is_no_hindrance(tmp_path: Path, damaged: Path) -> None:
    report = convert(damaged, tmp_path / "out.gguf", encoder="recover", choice=kept("*.attn_k=0"))
    assert (report.encoder, len(matrices(tmp_path / "out.gguf"))) == ("recover", 12)


def test_recover_needs_matrices(tmp_path: Path, published: Path) -> None:
    convert(published, tmp_path / "packed.gguf")
    assert "has no matrix to recover trits from" in refused(tmp_path / "packed.gguf", tmp_path, encoder="recover")


def test_a_given_depth_is_the_maximum(tmp_path: Path, published: Path) -> None:
    assert "8 of 14 matrices" in refused(published, tmp_path, encoder="recover", depth=2)
    report: ConvertReport = convert(published, tmp_path / "smaller.gguf", depth=1)
    assert (report.encoder, report.tensors_by_type["TRIT1"]) == ("v2", 14)
    convert(published, tmp_path / "same.gguf", depth=4)
    convert(published, tmp_path / "any.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "any.gguf").read_bytes()


def test_every_quantizer_can_be_the_fallback(tmp_path: Path, damaged: Path) -> None:
    for name in (V2.name, ScaleSearch.name):
        assert convert(damaged, tmp_path / f"{name}.gguf", encoder=f"recover+{name}").encoder == f"recover+{name}"
