"""tools/compare_llama_cpp.py and what it stands on, without building or timing anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare_llama_cpp
import gguf
import llama_cpp
import numpy as np
import pytest
import typer
from compare_llama_cpp import Measured, check_types, in_groups, measure, select_ratios, variant_options
from quiet_machine import Patience
from random_model import SHAPES, byte_tokens, write_random_model
from source_distribution import distribution
from speed_ratios import GOALS, Ratio, Samples, Side, read_result

from cpu_kernels.simd import instruction_set, variants
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.conversion.convert import convert
from tritgguf.diagnostics.bench import bench
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.tokenization.tokenizer import Tokenizer

TINY = {
    "qwen2": Dimensions(2, 300, 128, 192, 4, 2, 32, frozenset({"attn_q", "attn_k", "attn_v"})),
    "llama": Dimensions(2, 300, 128, 192, 4, 2, 32),
}
QWEN = "qwen2.5-1.5b"


def names(ratios: Sequence[Ratio]) -> list[str]:
    return [ratio.name for ratio in ratios]


# -- the choice of ratios, and turns


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_set, "supported", lambda: list(variants.NAMES.values()))
    assert names(select_ratios(QWEN, None)) == list(GOALS)
    chosen = ["convert.v2/q4_0", "decode.trit2/q4_0"]
    assert names(select_ratios(QWEN, ", ".join(chosen))) == chosen
    # 576 columns are no multiple of the 256 that the K types need.
    assert names(select_ratios("smollm2-135m", None)) == [
        "decode.trit2/q4_0",
        "prefill.trit2/q4_0",
        "convert.v2/q4_0",
        "decode.trit2/read_bandwidth",
        "decode.trit2.context4096/context0",
        "decode.trit2.avx2/avx512",
        "prefill.trit2.avx2/avx512",
    ]


def test_instruction_sets_that_are_not_here_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_set, "supported", lambda: [variants.PORTABLE, variants.AVX2])
    assert names(select_ratios(QWEN, None)) == [name for name in GOALS if "avx" not in name]


def test_options_of_a_variant() -> None:
    assert variant_options("") == []
    assert variant_options("avx2") == ["--isa", "avx2"]
    assert variant_options("context4096") == ["--n-depth", "4096"]


def test_groups_share_a_numerator_and_conversions_come_first() -> None:
    ratios = [Ratio.parse(name, QWEN) for name in GOALS]
    groups = in_groups(ratios)
    assert names(groups[0]) == ["convert.v2/q4_0", "convert.v2/q3_k_s"]
    assert ["decode.trit2/q4_0", "decode.trit2/q3_k_s", "decode.trit2/read_bandwidth"] in [*map(names, groups)]
    assert all(len({(ratio.test, ratio.ours) for ratio in group}) == 1 for group in groups)
    assert sorted(name for group in groups for name in names(group)) == sorted(GOALS)


class ScriptedComparison:
    """Measures what it was told, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.kept: list[frozenset[tuple[str, str]]] = []

    def make_files(self, ratios: Sequence[Ratio]) -> None:
        self.asked.append(f"files of {ratios[0].ours.file}")

    def measure(self, test: str, side: Side) -> Measured:
        self.asked.append(side.file)
        report = {"decode": {"bytes_per_second": 3e9}, "read_bandwidth": 4e9}
        return Measured(10.0 * len(self.asked), report if side.file == "trit2" else None)

    def remove_files(self, keep: frozenset[tuple[str, str]] = frozenset()) -> None:
        self.kept.append(keep)


def test_turns() -> None:
    comparison: Any = ScriptedComparison()
    chosen = ("decode.trit2/q4_0", "convert.v2/q4_0", "decode.trit2/read_bandwidth")
    kept: dict[str, Samples] = {}
    measure(comparison, [Ratio.parse(name, QWEN) for name in chosen], 2, Patience(0), kept.__setitem__)
    assert comparison.asked == ["files of v2", *["v2", "q4_0"] * 2, "files of trit2", *["trit2", "q4_0"] * 2]
    assert comparison.kept == [{(QWEN, "trit2"), (QWEN, "q4_0")}, frozenset()]
    assert {name: (samples.ours, samples.theirs) for name, samples in kept.items()} == {
        "convert.v2/q4_0": ([20, 40], [30, 50]),
        "decode.trit2/q4_0": ([70, 90], [80, 100]),
        "decode.trit2/read_bandwidth": ([3e9, 3e9], [4e9, 4e9]),
    }
    assert [samples.unit for samples in kept.values()] == ["weights/s", "tokens/s", "bytes/s"]


def test_disturbed_turns_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbances = [0.5, 0.0, 0.5, 0.05]
    monkeypatch.setattr(compare_llama_cpp, "share_of_others", lambda before, after: disturbances.pop(0))
    patience = Patience(100)
    monkeypatch.setattr(patience, "wait", lambda: None)
    comparison: Any = ScriptedComparison()
    kept: dict[str, Samples] = {}
    measure(comparison, [Ratio.parse("decode.trit2/q4_0", QWEN)], 2, patience, kept.__setitem__)
    samples = kept["decode.trit2/q4_0"]
    assert samples.ours == [40, 80]  # the second and the fourth turn; the first call made the files
    assert samples.other_programs == [0.0, 0.05]


# -- the command


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedComparison:
    """Let the command measure without programs and files."""
    comparison = ScriptedComparison()
    monkeypatch.setattr(compare_llama_cpp, "Comparison", lambda folder, programs, threads: comparison)
    monkeypatch.setattr(llama_cpp, "build_llama_cpp", lambda cache: cache)
    return comparison


@pytest.mark.usefixtures("scripted")
def test_the_command_keeps_every_ratio_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "speed.json", tmp_path / "speed.svg"

    compare_llama_cpp.main(only="decode.trit2/q4_0", output=output, quick=True, threads=2, print_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text())
    compare_llama_cpp.main(only="convert.v2/q4_0", output=output, quick=True, threads=2)
    out = capsys.readouterr().out
    assert "decode.trit2/q4_0" in out
    assert "fail" in out
    result = read_result(output)
    assert list(result["ratios"]) == ["decode.trit2/q4_0", "convert.v2/q4_0"]
    assert result["absolute"]["convert.v2/q4_0"]["revision"] == compare_llama_cpp.git_revision()
    compare_llama_cpp.main(source=output, print_markdown=True, plot=plot)
    assert capsys.readouterr().out.startswith("| ours over theirs |")
    assert plot.read_text().startswith("<svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.svg"]


def test_what_was_measured_survives_an_interrupt(
    tmp_path: Path, scripted: ScriptedComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(test: str, side: Side) -> Measured:
        if side.file == "trit2":
            raise KeyboardInterrupt
        return Measured(1.0)

    monkeypatch.setattr(scripted, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_llama_cpp.main(
            only="decode.trit1/tq2_0,decode.trit2/q4_0", output=tmp_path / "speed.json", quick=True, threads=2
        )
    assert read_result(tmp_path / "speed.json")["ratios"] == {"decode.trit1/tq2_0": 1.0}
    assert scripted.kept[-1] == frozenset()


@pytest.mark.usefixtures("scripted")
def test_errors_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "speed.json"
    compare_llama_cpp.main(only="decode.trit2/q4_0", output=output, quick=True, threads=2)
    before = output.read_bytes()
    common: dict[str, Any] = {"only": "decode.trit2/q4_0", "output": output, "threads": 2}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shape": "gpt-5"}, "shape gpt-5 is not known"),
        ({"only": "decode.trit9/q4_0"}, "decode.trit9/q4_0 is no ratio"),
        ({"threads": 3}, "another number of threads (2, now 3)"),
        ({"source": tmp_path / "none.json"}, "none.json: cannot be read"),
    ]
    for arguments, message in cases:
        capsys.readouterr()
        with pytest.raises(typer.Exit):
            compare_llama_cpp.main(**(common | arguments))
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert output.read_bytes() == before


# -- the random model


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_random_model_converts_and_runs(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.diagnostics.bench.read_bandwidth", lambda crew, repetitions: 1e9)
    source, output = tmp_path / "f16.gguf", tmp_path / "trit3.gguf"
    write_random_model(source, architecture, TINY[architecture])
    assert [path.name for path in tmp_path.iterdir()] == ["f16.gguf"]
    convert(source, output, depth=3)
    check_types(output, "trit3")
    assert bench(output, prompt_tokens=4, generated_tokens=2, repetitions=1).types == "TRIT3"
    tokenizer = Tokenizer(GgufFile(output).metadata, name="random")
    tokens = tokenizer.encode("to the café\n", add_special=False, parse_special=False)
    assert tokenizer.decode(tokens) == "to the café\n"
    assert 256 in tokens  # the only merge


def test_the_random_model_is_always_the_same(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        write_random_model(tmp_path / name, "qwen2", TINY["qwen2"])
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    weights = GgufFile(tmp_path / "one.gguf").read_float32("blk.1.ffn_down.weight")
    assert np.std(weights) == pytest.approx(192**-0.5, rel=0.02)


def test_types_are_checked(tmp_path: Path) -> None:
    write_random_model(tmp_path / "f16.gguf", "llama", TINY["llama"])
    with pytest.raises(TritGgufError, match=r"attn_q\.weight is F16, not Q3_K"):
        check_types(tmp_path / "f16.gguf", "q3_k_s")
    writer = gguf.GGUFWriter(tmp_path / "f32.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TritGgufError, match=r"token_embd\.weight is F32, not F16"):
        check_types(tmp_path / "f32.gguf", "q4_0")


@pytest.mark.parametrize("vocabulary", [300, SHAPES["qwen2.5-1.5b"][1].vocabulary])
def test_the_vocabulary_has_every_byte_and_no_token_twice(vocabulary: int) -> None:
    tokens, types = byte_tokens(vocabulary)
    assert len(tokens) == len(types) == len(set(tokens)) == vocabulary
    assert {"a", "é", "\u0120", "\u0120t"} <= set(tokens)


def test_parameters_of_the_shape() -> None:
    shapes = SHAPES["qwen2.5-1.5b"][1].shapes()
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    assert weights - int(np.prod(shapes["output.weight"])) == 1_543_714_304  # Qwen2.5-1.5B's, which ties its head


# -- llama.cpp


def test_cmake_options() -> None:
    options = llama_cpp.cmake_options({"avx2", "fma", "f16c", "bmi2", "avx512f", "amx_int8"})
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_AVX512=ON", "-DGGML_AVX512_VNNI=OFF"} <= set(options)
    assert not any("AMX" in option for option in options)
    assert "-DGGML_NATIVE=ON" in llama_cpp.cmake_options(set())


def test_the_rate_of_llama_bench() -> None:
    assert llama_cpp.rate_of_test([{"avg_ts": 12.5, "n_gen": 32}]) == 12.5
    wrong: list[Any] = [[], [{}], {"avg_ts": 1}, [{"avg_ts": 1}, {"avg_ts": 2}]]
    for printed in wrong:
        with pytest.raises(TritGgufError, match="no single test"):
            llama_cpp.rate_of_test(printed)


def test_a_failing_command_is_one_line(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(TritGgufError, match="failed: no such model"):
        llama_cpp.run_json(failing)
    with pytest.raises(TritGgufError, match=r"exit code 1; .*a\.log says why"):
        llama_cpp.run_logged(failing, tmp_path / "a.log")
    assert "no such model" in (tmp_path / "a.log").read_text()


def build_with(monkeypatch: pytest.MonkeyPatch, downloaded: bytes) -> list[Sequence[str]]:
    """Let pip bring these bytes and cmake make empty programs; return the list of the commands that are run."""
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], log: Path) -> None:
        commands.append(command)
        if "pip" in command:
            target = Path(command[command.index("--dest") + 1])
            (target / f"llama_cpp_python-{llama_cpp.VERSION}.tar.gz").write_bytes(downloaded)
        elif "--build" in command:
            folder = Path(command[command.index("--build") + 1]) / "bin"
            folder.mkdir(parents=True)
            for name in llama_cpp.PROGRAMS:
                (folder / name).touch()
        else:
            assert (Path(command[command.index("-S") + 1]) / "CMakeLists.txt").exists()

    monkeypatch.setattr(llama_cpp, "run_logged", run)
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    return commands


def test_llama_cpp_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = build_with(monkeypatch, distribution())
    monkeypatch.setattr(llama_cpp, "file_sha256", lambda path: llama_cpp.SOURCE_SHA256)
    folder = llama_cpp.build_llama_cpp(tmp_path)
    assert len(commands) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["cmake_options.txt", *llama_cpp.PROGRAMS]
    assert llama_cpp.build_llama_cpp(tmp_path) == folder
    assert len(commands) == 3
    monkeypatch.setattr(llama_cpp, "processor_flags", lambda: {"avx2"})
    monkeypatch.setattr(llama_cpp, "_OPTIONS", ("-DOTHER=ON",))
    llama_cpp.build_llama_cpp(tmp_path)
    assert len(commands) == 6


def test_another_source_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_with(monkeypatch, distribution())
    with pytest.raises(TritGgufError, match=r"its SHA-256 is .*pinned is"):
        llama_cpp.build_llama_cpp(tmp_path)


def test_without_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(TritGgufError, match="cmake is not here"):
        llama_cpp.build_llama_cpp(tmp_path)
