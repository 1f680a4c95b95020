"""tools/compare_llama_cpp.py and what it stands on, without building or timing anything."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare_llama_cpp
import gguf
import llama_cpp
import numpy as np
import pytest
from compare_llama_cpp import (
    KEYS,
    QUIET,
    Key,
    Patience,
    ProcessorSeconds,
    Samples,
    as_json,
    check_types,
    measure,
    select_keys,
    share_of_others,
)
from random_model import SHAPES, byte_tokens, write_random_model

from tritgguf.architectures import Dimensions
from tritgguf.bench import bench
from tritgguf.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import GgufFile
from tritgguf.tokenizer import Tokenizer

TINY = {
    "qwen2": Dimensions(2, 300, 128, 192, 4, 2, 32, frozenset({"attn_q", "attn_k", "attn_v"})),
    "llama": Dimensions(2, 300, 128, 192, 4, 2, 32),
}


# -- names and ratios


def test_keys_in_parts() -> None:
    key = Key.parse("decode.trit1/tq2_0")
    assert (key.test, key.ours, key.theirs) == ("decode", "trit1", "tq2_0")
    assert len({Key.parse(name) for name in KEYS}) == 11
    with pytest.raises(TritGgufError, match=r"decode\.trit9/q4_0 is no ratio"):
        Key.parse("decode.trit9/q4_0")


def test_selection() -> None:
    assert [key.name for key in select_keys("qwen2.5-1.5b", None)] == list(KEYS)
    assert [key.name for key in select_keys("qwen2.5-1.5b", "convert.v2/q4_0, decode.trit2/q4_0")] == [
        "convert.v2/q4_0",
        "decode.trit2/q4_0",
    ]
    # 576 columns are no multiple of the 256 that the K types need.
    assert {key.theirs for key in select_keys("smollm2-135m", None)} == {"q4_0", "read_bandwidth"}


def test_the_ratio_is_of_medians() -> None:
    samples = Samples("tokens/s")
    for ours, theirs in ((30, 1), (10, 5), (20, 100)):
        samples.add(ours, theirs, 0.25)
    assert samples.ratio == 4
    assert samples.as_dict()["ours"] == 20
    assert samples.as_dict()["theirs_samples"] == [1, 5, 100]


def test_the_share_of_other_programs() -> None:
    cores = os.cpu_count() or 1
    start = ProcessorSeconds(0, 0, 0)
    assert share_of_others(start, ProcessorSeconds(10, 4 * cores + 1, 1)) == pytest.approx(0.4)
    assert share_of_others(start, ProcessorSeconds(10, 1, 2)) == 0
    assert share_of_others(start, start) == 0


def test_patience_repeats_disturbed_turns_until_it_is_over() -> None:
    patience = Patience(100)
    assert patience.accepts(QUIET, 60)
    assert not patience.accepts(QUIET + 0.01, 60)
    assert not patience.accepts(QUIET + 0.01, 60)
    assert patience.accepts(QUIET + 0.01, 60)


def test_patience_waits_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbances = [0.9, 0.5, 0.0]
    slept: list[float] = []
    monkeypatch.setattr(compare_llama_cpp, "share_of_others", lambda before, after: disturbances.pop(0))
    monkeypatch.setattr("time.sleep", slept.append)
    Patience(0).wait()
    assert slept == []
    Patience(100).wait()
    assert (len(slept), disturbances) == (3, [])
    disturbances += [0.9] * 9
    Patience(2 * slept[0]).wait()
    assert len(slept) == 5


class ScriptedComparison:
    """Measures what it was told, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.kept: list[frozenset[str]] = []

    def make_files(self, key: Key) -> None:
        self.asked.append(f"files of {key.name}")

    def turn(self, key: Key) -> tuple[float, float]:
        self.asked.append(key.name)
        return 10.0 * len(self.asked), 5.0 * len(self.asked)

    def remove_files(self, keep: frozenset[str] = frozenset()) -> None:
        self.kept.append(keep)


def test_turns_and_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    comparison: Any = ScriptedComparison()
    names = ("decode.trit2/q4_0", "convert.v2/q4_0", "decode.trit2/read_bandwidth")
    results = measure(comparison, [Key.parse(name) for name in names], 2, Patience(0))
    assert comparison.asked == [text for name in names for text in (f"files of {name}", name, name)]
    assert comparison.kept == [{"v2", "q4_0", "trit2", "read_bandwidth"}, {"trit2", "read_bandwidth"}, frozenset()]
    result = json.loads(json.dumps(as_json("qwen2.5-1.5b", 2, 2, results)))
    assert result["ratios"] == dict.fromkeys(names, 2.0)
    assert set(result["absolute"]) == {"processor", "llama.cpp", *names}
    assert [result["absolute"][name]["unit"] for name in names] == ["tokens/s", "weights/s", "bytes/s"]
    compare_llama_cpp.print_results(result)
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_disturbed_turns_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbances = [0.5, 0.0, 0.5, 0.05]
    monkeypatch.setattr(compare_llama_cpp, "share_of_others", lambda before, after: disturbances.pop(0))
    patience = Patience(100)
    monkeypatch.setattr(patience, "wait", lambda: None)
    comparison: Any = ScriptedComparison()
    samples = measure(comparison, [Key.parse("decode.trit2/q4_0")], 2, patience)["decode.trit2/q4_0"]
    assert samples.ours == [30, 50]  # the second and the fourth turn; the first call made the files
    assert samples.other_programs == [0.0, 0.05]


# -- the random model


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_random_model_converts_and_runs(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritgguf.bench.read_bandwidth", lambda crew, repetitions: 1e9)
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


def distribution() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        root = f"llama_cpp_python-{llama_cpp.VERSION}"
        for name in (f"{root}/setup.py", f"{root}/vendor/llama.cpp/CMakeLists.txt", f"{root}/vendor/other/x"):
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


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
