"""The comparison with llama.cpp: choice of ratios, turns and the command, without building or timing anything."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import typer

from cpu_kernels.simd import instruction_set, variants
from tools.llama_cpp import binaries
from tools.models.random_model import write_random_model
from tools.speed import compare_llama_cpp, narrower_processor
from tools.speed.compare_llama_cpp import (
    Comparison,
    Measured,
    in_groups,
    measure,
    select_ratios,
    variant_options,
)
from tools.speed.compared_files import check_types, our_program
from tools.speed.quiet_machine import Patience
from tools.speed.ratios import GOALS, Ratio, Samples, Side, read_result
from tritgguf.architectures.dimensions import Dimensions
from tritgguf.errors import TritGgufError

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
        "batch4.trit2/q4_0",
        "batch8.trit2/q4_0",
        "convert.v2/q4_0",
        "decode.trit2/read_bandwidth",
        "decode.trit2.context4096/context0",
        "decode.trit2.avx2/avx512",
        "prefill.trit2.avx2/avx512",
    ]


def test_instruction_sets_that_are_not_here_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_set, "supported", lambda: [variants.PORTABLE, variants.AVX2])
    alone = [name for name in GOALS if "avx" not in name]
    assert names(select_ratios(QWEN, None)) == alone
    monkeypatch.setattr(instruction_set, "supported", lambda: list(variants.NAMES.values()))
    assert names(select_ratios(QWEN, None, "avx2")) == alone


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
    """Returns given measurements, and records the calls."""

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


def test_several_sequences_are_measured_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours runs in the environment of the narrower processor, theirs is llama-batched-bench."""
    commands: list[tuple[Sequence[str], Any]] = []

    def run_json(command: Sequence[str], environment: Any = None) -> Any:
        commands.append((command, environment))
        return {"4": 12.5} if environment else {"speed_tg": 10.0, "pl": 4}

    monkeypatch.setattr(binaries, "run_json", run_json)
    comparison = Comparison(tmp_path, tmp_path, 2, {"TRITGGUF_ISA": "avx2"})
    monkeypatch.setattr(comparison, "_file", lambda side: tmp_path / f"{side.file}.gguf")
    ratio = Ratio.parse("batch4.trit2/q4_0", QWEN)
    assert [comparison.measure(ratio.test, side).rate for side in (ratio.ours, ratio.theirs)] == [12.5, 10.0]
    (ours, environment), (theirs, nothing) = commands
    assert environment == {"TRITGGUF_ISA": "avx2"}
    assert nothing is None
    assert ours[ours.index("--sequences") + 1] == theirs[theirs.index("-npl") + 1] == "4"
    assert ours[ours.index("--tokens") + 1] == theirs[theirs.index("-ntg") + 1]
    assert Path(theirs[0]).name == "llama-batched-bench"


def test_our_programs_start_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = our_program("tools.speed.batched_decode", "typer.run(main)")
    printed = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--sequences" in printed


def test_a_narrower_processor() -> None:
    assert narrower_processor.environment(None) == os.environ
    changed = narrower_processor.environment("avx2")
    assert changed["TRITGGUF_ISA"] == "avx2"
    assert "-avx512f" in changed["NUMBA_CPU_FEATURES"]
    assert changed["PATH"] == os.environ["PATH"]
    flags = {"avx2", "fma", "avx512f", "avx512_vnni"}
    assert narrower_processor.llama_cpp_flags(flags, "avx2") == {"avx2", "fma"}
    assert narrower_processor.llama_cpp_flags(flags, None) == flags


# -- the command


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedComparison:
    """Let the command measure without programs and files."""
    comparison = ScriptedComparison()
    monkeypatch.setattr(compare_llama_cpp, "Comparison", lambda *arguments: comparison)
    monkeypatch.setattr(binaries, "build_llama_cpp", lambda cache, flags: cache)
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


@pytest.mark.usefixtures("scripted")
def test_a_folder_has_a_file_for_each_instruction_set(tmp_path: Path) -> None:
    for isa in (None, "avx2"):
        compare_llama_cpp.main(only="decode.trit2/q4_0", output=tmp_path, quick=True, threads=2, isa=isa)
    best = variants.name_of(len(instruction_set.chosen(None)))
    assert {path.name for path in tmp_path.iterdir()} == {f"speed-{best}.json", "speed-avx2.json"}
    assert read_result(tmp_path / "speed-avx2.json")["absolute"]["instructions"] == "avx2"


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
        ({"isa": "avx2"}, "another instruction set"),
        ({"isa": "avx512"}, "--isa avx512 is not possible here; choose from avx2"),
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


def test_types_are_checked(tmp_path: Path) -> None:
    write_random_model(tmp_path / "f16.gguf", "llama", Dimensions(2, 300, 128, 192, 4, 2, 32))
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
