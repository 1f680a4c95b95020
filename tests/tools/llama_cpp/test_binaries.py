"""Building and running llama.cpp's programs, without doing so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from source_distribution import distribution

from tools.llama_cpp import binaries
from tritgguf.errors import TritGgufError


def test_cmake_options() -> None:
    options = binaries.cmake_options({"avx2", "fma", "f16c", "bmi2", "avx512f", "amx_int8"})
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_AVX512=ON", "-DGGML_AVX512_VNNI=OFF"} <= set(options)
    assert not any("AMX" in option for option in options)
    assert "-DGGML_NATIVE=ON" in binaries.cmake_options(set())


def test_the_rate_of_llama_bench() -> None:
    assert binaries.rate_of_test([{"avg_ts": 12.5, "n_gen": 32}]) == 12.5
    wrong: list[Any] = [[], [{}], {"avg_ts": 1}, [{"avg_ts": 1}, {"avg_ts": 2}]]
    for printed in wrong:
        with pytest.raises(TritGgufError, match="no single test"):
            binaries.rate_of_test(printed)


def test_the_rate_of_several_sequences(tmp_path: Path) -> None:
    """The program gets a context that holds all sequences; it prints its figures between empty lines."""
    program = tmp_path / "llama-batched-bench"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\na = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "full = int(a['-c']) == int(a['-npl']) * (int(a['-npp']) + int(a['-ntg']))\n"
        "print('\\n' + json.dumps({'speed_tg': 12.5 if full else 0, 'pl': a['-npl']}) + '\\n')\n"
    )
    program.chmod(0o755)
    assert binaries.batched_tokens_per_second(tmp_path, tmp_path / "a.gguf", 4, 24, 2) == 12.5


def test_a_failing_command_is_one_line(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(TritGgufError, match="failed: no such model"):
        binaries.run_json(failing)
    with pytest.raises(TritGgufError, match=r"exit code 1; .*a\.log says why"):
        binaries.run_logged(failing, tmp_path / "a.log")
    assert "no such model" in (tmp_path / "a.log").read_text()


def build_with(monkeypatch: pytest.MonkeyPatch, downloaded: bytes) -> list[Sequence[str]]:
    """Let pip download these bytes and cmake build empty programs; return the list of commands that are run."""
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], log: Path) -> None:
        commands.append(command)
        if "pip" in command:
            target = Path(command[command.index("--dest") + 1])
            (target / f"llama_cpp_python-{binaries.VERSION}.tar.gz").write_bytes(downloaded)
        elif "--build" in command:
            folder = Path(command[command.index("--build") + 1]) / "bin"
            folder.mkdir(parents=True)
            for name in binaries.PROGRAMS:
                (folder / name).touch()
        else:
            assert (Path(command[command.index("-S") + 1]) / "CMakeLists.txt").exists()

    monkeypatch.setattr(binaries, "run_logged", run)
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    return commands


def test_llama_cpp_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = build_with(monkeypatch, distribution())
    monkeypatch.setattr(binaries, "file_sha256", lambda path: binaries.SOURCE_SHA256)
    folder = binaries.build_llama_cpp(tmp_path)
    assert len(commands) == 3
    assert sorted(path.name for path in folder.iterdir()) == sorted(["cmake_options.txt", *binaries.PROGRAMS])
    assert binaries.build_llama_cpp(tmp_path) == folder
    assert len(commands) == 3
    monkeypatch.setattr(binaries, "processor_flags", lambda: {"avx2"})
    monkeypatch.setattr(binaries, "_OPTIONS", ("-DOTHER=ON",))
    binaries.build_llama_cpp(tmp_path)
    assert len(commands) == 6
    narrower = binaries.build_llama_cpp(tmp_path, set())
    assert narrower != folder
    assert len(commands) == 9


def test_another_source_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_with(monkeypatch, distribution())
    with pytest.raises(TritGgufError, match=r"its SHA-256 is .*pinned is"):
        binaries.build_llama_cpp(tmp_path)


def test_without_cmake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(TritGgufError, match="cmake is not here"):
        binaries.build_llama_cpp(tmp_path)
