"""Converting mixtures of experts: a codebook for each expert, the same bytes from every layout, resuming, recovery."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from converted_models import as_stock_gguf, assert_no_number_differs
from dequantized_trits import dequantized
from gguf import GGUFValue, GGUFValueType
from reference_decoding import decode
from tiny_mixtures import EXPERTS, KINDS, mixture_config, mixture_weights, random_experts, write_tiny_mixture
from tiny_models import write_shards

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.cli import app
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.conversion.depths import DepthChoice, DepthOptions, parse_rules
from tritgguf.conversion.encoders import parse_encoder
from tritgguf.conversion.importance_file import importance_of
from tritgguf.conversion.plan import check_conversion
from tritgguf.errors import TritGgufError
from tritgguf.exporters.export import export
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.gguf_writer import StreamingWriter
from tritgguf.formats.imatrix import write_importance
from tritgguf.formats.integrity import check
from tritgguf.formats.matrix_rows import MatrixRows
from tritgguf.formats.trit_types import TritType
from tritgguf.quantization.scale_search import quantize_searched
from tritgguf.quantization.v2 import quantize
from tritgguf.sources.open import open_source

STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 mixture."""
    return write_tiny_mixture(tmp_path_factory.mktemp("mixture") / "model")


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_each_expert_is_quantized_by_itself(model: Path, tmp_path: Path, depth: int) -> None:
    convert(model, tmp_path / "out.gguf", depth=depth)
    file = GgufFile(tmp_path / "out.gguf")
    assert check(tmp_path / "out.gguf").checksums == len(file.tensors)
    for layer in range(2):
        for name, weights in random_experts(mixture_config("qwen3"), layer).items():
            tensor = f"blk.{layer}.{name}.weight"
            info = file.tensors[tensor]
            assert (info.type_name, info.shape) == (f"TRIT{depth}", weights.shape)
            books = file.codebooks(tensor)
            assert books.shape == (EXPERTS, 27)
            packed = file.raw(tensor).reshape(EXPERTS, weights.shape[1], -1)
            for expert in range(EXPERTS):
                expected = quantize(weights[expert].astype(np.float16), depth)
                np.testing.assert_array_equal(books[expert], expected.codebook)
                np.testing.assert_array_equal(packed[expert], expected.pack())
            decoded = decode(file.raw(tensor), info.shape[-1], depth, books.reshape(-1)).reshape(info.shape)
            np.testing.assert_array_equal(file.read_float32(tensor), decoded)
            np.testing.assert_array_equal(file.read_rows(tensor, 60, 200), decoded.reshape(-1, info.shape[-1])[60:200])
    assert file.tensors["blk.0.ffn_gate_inp.weight"].type_name == "F32"


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_file(tmp_path: Path, kind: str) -> None:
    tensors = []
    for fused in (False, True):
        folder = write_tiny_mixture(tmp_path / f"model-{fused}", kind, fused=fused)
        convert(folder, tmp_path / f"{fused}.gguf")
        file = GgufFile(tmp_path / f"{fused}.gguf")
        tensors.append({name: (file.raw(name).tobytes(), file.tensors[name].shape) for name in file.tensors})
    assert tensors[0] == tensors[1]
    stock = as_stock_gguf(open_source(tmp_path / "model-True"), tmp_path / "stock.gguf")
    convert(stock, tmp_path / "from-stock.gguf")
    again = GgufFile(tmp_path / "from-stock.gguf")
    assert {name: again.raw(name).tobytes() for name in again.tensors if "exps" in name} == {
        name: content for name, (content, _) in tensors[0].items() if "exps" in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_differs_after_a_round_trip(tmp_path: Path, kind: str) -> None:
    assert_no_number_differs(write_tiny_mixture(tmp_path / "model", kind), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "is_refused"),
    [
        ("expert_weights_scale", GGUFValue(2.5, GGUFValueType.FLOAT32), True),
        ("expert_weights_scale", GGUFValue(1.0, GGUFValueType.FLOAT32), False),
        ("expert_gating_func", GGUFValue(2, GGUFValueType.UINT32), True),
        ("expert_gating_func", GGUFValue(1, GGUFValueType.UINT32), False),
    ],
)
def test_weights_of_experts_that_transformers_lacks(
    tmp_path: Path, key: str, value: GGUFValue, is_refused: bool
) -> None:
    """What a stock file says of the weights of experts is run, and refused where it would be lost."""
    keys = {f"qwen3moe.{key}": value}
    stock = as_stock_gguf(open_source(write_tiny_mixture(tmp_path / "model")), tmp_path / "stock.gguf", keys)
    convert(stock, tmp_path / "out.gguf")
    export(tmp_path / "out.gguf", tmp_path / "f16.gguf", to="f16")
    assert GgufFile(tmp_path / "f16.gguf").metadata[f"qwen3moe.{key}"] == value.value
    if is_refused:
        message = f"qwen3moe.{key} is {value.value}, which transformers' Qwen3MoeForCausalLM does not have"
        with pytest.raises(TritGgufError, match=message):
            export(tmp_path / "out.gguf", tmp_path / "hf", to="hf")
    else:
        export(tmp_path / "out.gguf", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf").exists() == (not is_refused)


@pytest.mark.parametrize("entry", [("expert_weights_scale", 0), ("expert_gating_func", 4), ("expert_used_count", 5)])
def test_keys_that_cannot_be_run_are_not_converted(tmp_path: Path, entry: tuple[str, int]) -> None:
    keys = {f"qwen3moe.{entry[0]}": GGUFValue(entry[1], GGUFValueType.UINT32)}
    stock = as_stock_gguf(open_source(write_tiny_mixture(tmp_path / "model")), tmp_path / "stock.gguf", keys)
    with pytest.raises(TritGgufError, match=rf"stock\.gguf: qwen3moe\.{entry[0]} is "):
        convert(stock, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_experts_of_one_stack_have_one_depth(tmp_path: Path) -> None:
    """An expert that would fit at a lesser depth is stored at that of the others, and still exactly."""
    folder = write_tiny_mixture(tmp_path / "model")
    weights = mixture_weights("qwen3", mixture_config("qwen3"))
    for number, name in enumerate(name for name in weights if "_proj.weight" in name):
        weights[name] = dequantized(weights[name].shape, 1 if ".experts.2." in name else 2, "float16", number)
    weights["model.layers.0.mlp.experts.1.up_proj.weight"][:] = 0
    write_shards(folder, weights, "F16")
    assert convert(folder, tmp_path / "out.gguf").encoder == "recover"
    file = GgufFile(tmp_path / "out.gguf")
    for layer in range(2):
        for name, part in zip(STACKS, ("gate", "up", "down"), strict=True):
            tensor = f"blk.{layer}.{name}.weight"
            assert file.tensors[tensor].type_name == "TRIT2"
            for expert, found in enumerate(file.read_float32(tensor)):
                stored = weights[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]
                np.testing.assert_array_equal(found.astype(np.float16), stored.astype(np.float16))


def test_an_expert_without_a_fit_is_named(tmp_path: Path) -> None:
    folder = write_tiny_mixture(tmp_path / "model")
    weights = mixture_weights("qwen3", mixture_config("qwen3"))
    for number, name in enumerate(name for name in weights if "_proj.weight" in name):
        if "layers.1.mlp.experts.2.up" not in name:
            weights[name] = dequantized(weights[name].shape, 2, "float16", number)
    write_shards(folder, weights, "F16")
    with pytest.raises(TritGgufError, match=r"1 of \d+ matrices .* tensor blk\.1\.ffn_up_exps\.weight\[2\] "):
        convert(folder, tmp_path / "out.gguf")
    report = convert(folder, tmp_path / "out.gguf", encoder="recover+best")
    assert "blk.1.ffn_up_exps.weight[2]" in report.warnings[0]
    found = GgufFile(tmp_path / "out.gguf").read_float32("blk.1.ffn_up_exps.weight")
    for expert in (0, 1, 3):
        stored = weights[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        np.testing.assert_array_equal(found[expert].astype(np.float16), stored.astype(np.float16))


def test_importance_is_that_of_each_expert(model: Path, tmp_path: Path) -> None:
    tensor, generator = "blk.0.ffn_down_exps.weight", np.random.default_rng(0)
    columns = 64
    importance = {f"{tensor}[{expert}]": generator.random(columns, np.float32) for expert in (0, 3)}
    report = convert(model, tmp_path / "out.gguf", encoder="imatrix", importance=importance)
    assert "importance matrix has nothing for" in report.warnings[-1]
    file = GgufFile(tmp_path / "out.gguf")
    weights = random_experts(mixture_config("qwen3"), 0)["ffn_down_exps"].astype(np.float16)
    for expert in range(EXPERTS):
        expected = quantize_searched(
            MatrixRows.of(weights[expert]), 2, ThreadPool(1), importance=importance.get(f"{tensor}[{expert}]")
        )
        np.testing.assert_array_equal(file.codebooks(tensor)[expert], expected.codebook)
        (part,) = expected.parts
        np.testing.assert_array_equal(file.raw(tensor).reshape(EXPERTS, 128, -1)[expert], part.pack())


def test_an_importance_matrix_is_read_for_every_expert(model: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    write_importance(tmp_path / "a.gguf", {name: np.ones(128)}, {name: 1}, datasets=["x"], chunk_size=1, chunks=1)
    importance, warnings = importance_of(model, tmp_path / "a.gguf")
    assert list(importance) == [name]
    assert warnings == []


def interrupt_after(name: str) -> Callable[[ConvertProgress], None]:
    def listen(step: ConvertProgress) -> None:
        if step.tensor == name:
            raise KeyboardInterrupt

    return listen


@pytest.mark.parametrize(
    "last", ["blk.0.ffn_down_exps.weight[0]", "blk.1.ffn_up_exps.weight[2]", "blk.1.attn_q.weight"]
)
def test_resuming_within_a_stack(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    expected = convert(model, tmp_path / "whole.gguf", depth=3)
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, depth=3, progress=interrupt_after(last))
    in_journal = Path(f"{out}.part.journal").read_text().count('"name"')
    written: list[str] = []
    end = StreamingWriter.end

    def note(self: StreamingWriter, *arguments: object) -> int:
        written.append("")
        return end(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamingWriter, "end", note)
    report = convert(model, out, depth=3, resume=True)
    matrices = sum(len(tensor.matrices) for tensor in open_source(model).tensors)
    assert len(written) == matrices - in_journal
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert report.relative_error == expected.relative_error


def test_a_packed_mixture_is_copied(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "a.gguf", depth=2)
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", depth=2)
    assert GgufFile(tmp_path / "a.gguf").codebooks("blk.0.ffn_up_exps.weight").tolist() == (
        GgufFile(tmp_path / "b.gguf").codebooks("blk.0.ffn_up_exps.weight").tolist()
    )
    report = convert(tmp_path / "a.gguf", tmp_path / "c.gguf", depth=4)
    assert "are packed already (depth 2)" in report.warnings[0]
    found, before = GgufFile(tmp_path / "c.gguf"), GgufFile(tmp_path / "a.gguf")
    error = found.read_float32("blk.1.ffn_up_exps.weight") - before.read_float32("blk.1.ffn_up_exps.weight")
    assert np.abs(error).max() < 0.02


@pytest.mark.parametrize("target", ["bits", "size", "sensitivity"])
def test_depths_are_chosen_for_whole_stacks(model: Path, tmp_path: Path, target: str) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out.gguf"
    sizes = [convert(model, tmp_path / f"{depth}.gguf", depth=depth, recipe="published").file_bytes for depth in (2, 3)]
    windows = np.random.default_rng(0).integers(3, 400, (3, 32)).tolist()
    choice = {
        "bits": DepthChoice(target_bpw=3.0),
        "size": DepthChoice(target_bytes=sum(sizes) // 2),
        "sensitivity": DepthChoice(sensitivity=0.0015),  # of the matrices, about half are below
    }[target]
    settings = {"encoder": "v2", "recipe": "published", "windows": windows}
    report = convert(model, out, depth=3, choice=choice, **settings)
    file = GgufFile(out)
    depths = {name: TritType(tensor.type_id).depth for name, tensor in file.tensors.items() if quantized_tensor(name)}
    assert len(depths) == 2 * (4 + len(STACKS))
    assert len(set(depths.values())) > 1
    if target == "bits":
        assert 2.4 < report.bits_per_weight_quantized <= 3.0
    if target == "size":
        assert sizes[0] < report.file_bytes <= sum(sizes) // 2
    assert check(out).checksums == len(file.tensors)


def test_inspect_shows_the_chosen_depths(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran to the cat\n" * 60, "utf-8")
    out = str(tmp_path / "out.gguf")
    options = ["--target-bpw", "2.8", "--text", str(tmp_path / "text.txt"), "--tokens", "256", "--encoder", "best"]
    assert app.main(["convert", str(model), out, *options]) == 0
    capsys.readouterr()
    assert app.main(["inspect", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["trit.depths"] == "target 2.8 bits per weight"
    types = {tensor["name"]: tensor["type"] for tensor in found["tensors"]}
    assert {types[f"blk.{layer}.{name}.weight"] for layer in range(2) for name in STACKS} <= set(TritType.__members__)
    assert len({kind for name, kind in types.items() if quantized_tensor(name)}) > 1


def test_experts_that_would_be_trained_are_refused_at_once(model: Path) -> None:
    source = open_source(str(model))
    with pytest.raises(TritGgufError, match="the experts of a mixture cannot be tuned"):
        check_conversion(source, DepthOptions(depth=2), parse_encoder("tuned-end-to-end"))
    kept = DepthOptions(depth=2, choice=DepthChoice(tuple(parse_rules("*_exps*=0"))))
    check_conversion(source, kept, parse_encoder("tuned-end-to-end"))
    check_conversion(source, DepthOptions(depth=2), parse_encoder("calibrated"))
