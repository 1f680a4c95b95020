"""The library that calls llama.cpp: when it is built, and its errors for bad files and templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from source_distribution import distribution

from tools.llama_cpp import binaries, referee
from tools.llama_cpp.referee import Referee, build_referee, find_referee, render
from tritgguf.errors import TritGgufError


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Let pip download an empty source and cmake build an empty library; return the list of commands that are run."""
    run: list[Sequence[str]] = []

    def run_logged(command: Sequence[str], log: Path) -> None:
        run.append(command)
        if "pip" in command:
            folder = Path(command[command.index("--dest") + 1])
            (folder / f"llama_cpp_python-{binaries.VERSION}.tar.gz").write_bytes(distribution())
        elif "--build" in command:
            (Path(command[command.index("--build") + 1]) / "libreferee.so").touch()
        else:
            Path(command[command.index("-B") + 1]).mkdir()

    monkeypatch.setattr(binaries, "run_logged", run_logged)
    monkeypatch.setattr(binaries, "file_sha256", lambda path: binaries.SOURCE_SHA256)
    monkeypatch.setattr("shutil.which", lambda program: f"/bin/{program}")
    return run


def test_it_is_built_once_for_a_processor(
    tmp_path: Path, commands: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_referee(tmp_path) is None
    library = build_referee(tmp_path)
    assert len(commands) == 3
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    assert find_referee(tmp_path) == build_referee(tmp_path) == library
    assert len(commands) == 3
    monkeypatch.setattr(binaries, "processor_flags", lambda: {"another"})
    assert build_referee(tmp_path) != library
    assert len(commands) == 6


def test_another_source_of_ours_is_another_library(
    tmp_path: Path, commands: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_referee(tmp_path)
    project = tmp_path / "project"
    project.mkdir()
    (project / "referee.cpp").write_text("// changed")
    monkeypatch.setattr(referee, "_PROJECT", project)
    assert find_referee(tmp_path) is None


@pytest.mark.parametrize("missing", ["cmake", "c++"])
def test_without_the_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None if program == missing else program)
    with pytest.raises(TritGgufError, match=rf"{missing.replace('+', '.')} is not here"):
        build_referee(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_llama_cpp_does_not_open(referee_library: Path, tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"no")
    with pytest.raises(TritGgufError, match=r"no\.gguf: llama\.cpp does not open it"):
        Referee(referee_library, tmp_path / "no.gguf")


@pytest.mark.parametrize(
    ("template", "reason"), [("{% for", "Unexpected EOF"), ("{{ raise_exception('no way') }}", "no way")]
)
def test_a_template_that_fails(referee_library: Path, template: str, reason: str) -> None:
    with pytest.raises(TritGgufError, match=reason):
        render(referee_library, template, {})


def test_what_came_from_a_variable(referee_library: Path) -> None:
    assert render(referee_library, "a{{ x }}b", {"x": "\u00e9"}) == [("a", False), ("\u00e9", True), ("b", False)]
