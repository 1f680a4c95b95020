"""The command line as a whole: help, usage errors, imports, and starting it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Capture, fails, run_python
from tiny_models import write_tiny_model

import tritgguf
from tritgguf.cli import app
from tritgguf.formats.gguf_file import GgufFile


def test_version(capsys: Capture) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tritgguf {tritgguf.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(capsys: Capture, arguments: list[str]) -> None:
    assert app.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("convert", "export", "run", "verify", "inspect"))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("export", "--to --max-shard-size --base-model --threads -t --overwrite --json"),
        ("convert", "--depth --output-depth --embedding-depth --encoder --threads -j --overwrite --json"),
        (
            "run",
            "--prompt -p --file -f --system-prompt -sys --predict -n --ctx-size -c --threads -t --temp"
            " --top-k --top-p --min-p --repeat-penalty --repeat-last-n --seed -s --raw --json",
        ),
        ("verify", "--text --tokens --threads --json"),
        ("inspect", "--json"),
    ],
)
def test_help_shows_every_option_and_an_example(capsys: Capture, command: str, options: str) -> None:
    assert app.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example: tritgguf {command} " in out
    assert all(re.search(rf"(^|[\s,]){option}\b", out, re.MULTILINE) for option in options.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["run"],
        ["run", "x.gguf", "--frobnicate"],
        ["run", "x.gguf", "--top-k", "many"],
        ["run", "x.gguf", "-c", "-5", "-p", "x"],
        ["run", "x.gguf", "-n", "-5", "-p", "x"],
        ["run", "x.gguf", "--prefill-bits", "7", "-p", "x"],
        ["run", "x.gguf", "-ctk", "q8_0", "-p", "x"],
        ["serve", "x.gguf", "-ctk", "q8_0", "-ctv", "f16"],
        ["bench", "x.gguf", "--cache-type", "f16", "-ctk", "q8_0", "-ctv", "q8_0"],
        ["evaluate", "x.gguf", "--tasks", "x", "-ctv", "q8_0"],
        ["convert", "somewhere"],
        ["convert", "somewhere", "x.gguf", "--self", "--text", "x.txt"],
        ["verify", "one"],
    ],
)
def test_usage_errors_are_one_line(capsys: Capture, arguments: list[str]) -> None:
    assert "(see --help)" in fails(capsys, *arguments, code=2)


def test_keys_and_values_of_different_types_are_refused(capsys: Capture) -> None:
    message = fails(capsys, "run", "x.gguf", "-ctk", "q8_0", "-ctv", "f16", code=2)
    assert "-ctk q8_0, -ctv f16: keys and values are kept in one type" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "x.gguf", "--temp", "nan", "-p", "x"],
        ["run", "x.gguf", "--top-k", "-3", "-p", "x"],
        ["run", "x.gguf", "-p", "x", "-f", "y"],
        ["run", "missing.gguf", "-p", "x"],
        ["run", "missing.gguf", "-f", "missing.txt"],
        ["run", "x.gguf", "-f", "."],
        ["run", "x.gguf", "-f", "/dev/null"],
        ["inspect", "missing.gguf"],
    ],
)
def test_other_errors_are_one_line(capsys: Capture, arguments: list[str]) -> None:
    fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["inspect", "missing.gguf"], "TritGgufError", 1),
        (["run", "missing.gguf", "-p", "x", "--top-k", "-3"], "BadRequestError", 1),
        (["convert", "missing", "x.gguf"], "BadRequestError", 1),
        (["run", "x.gguf", "-p", "x", "--frobnicate"], "UsageError", 2),
        (["run", "x.gguf", "-p", "x", "-n", "-5"], "UsageError", 2),
        (["frobnicate"], "UsageError", 2),
    ],
)
def test_with_json_an_error_is_an_object_on_stdout_too(
    capsys: Capture, arguments: list[str], kind: str, code: int
) -> None:
    assert app.main([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["type"] == kind
    assert captured.err == f"error: {error['message']}\n"


@pytest.mark.parametrize("depth", ["0", "5", "-1", "two"])
def test_a_depth_that_does_not_exist(capsys: Capture, tmp_path: Path, depth: str) -> None:
    source = write_tiny_model(tmp_path / "model")
    assert "depth" in fails(
        capsys, "convert", str(source), str(tmp_path / "out.gguf"), "--depth", depth, code=2 if depth == "two" else 1
    )
    assert list(tmp_path.iterdir()) == [source]


def test_importing_the_command_line_imports_little() -> None:
    heavy = ("numpy", "numba", "gguf", "tokenizers", "jinja2", "torch", "transformers", "huggingface_hub")
    code = f"import sys, tritgguf.cli.app; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    "first",
    ["tritgguf.cli.app", "tritgguf.conversion.convert", "tritgguf.generation.generate", "tritgguf.evaluation.verify"],
)
def test_the_api_has_functions_whatever_is_imported_first(first: str) -> None:
    code = (
        f"import {first}, tritgguf; from tritgguf import *;"
        "print(all(callable(getattr(tritgguf, name)) for name in tritgguf.__all__), callable(convert))"
    )
    result = run_python("-c", code)
    assert result.stdout == "True True\n", result.stderr


def test_an_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        tritgguf.frobnicate  # noqa: B018


def test_python_m(tmp_path: Path) -> None:
    result = run_python("-m", "tritgguf", "inspect", str(tmp_path / "missing.gguf"))
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*missing\.gguf: [^\n]+\n", result.stderr)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"NUMBA_DISABLE_JIT": "1"}, r"error: NUMBA_DISABLE_JIT is set.*unset it\n"),
        ({"NUMBA_NUM_THREADS": "0"}, r"error: Numba fails \(.*must be > 0.*\); unset NUMBA_NUM_THREADS\n"),
    ],
)
def test_settings_that_numba_does_not_survive(
    tiny_trit_file: Callable[..., GgufFile], settings: dict[str, str], line: str
) -> None:
    """Commands that need no kernels work nevertheless."""
    assert run_python("-m", "tritgguf", "--version", env={**os.environ, **settings}).returncode == 0
    command = ("-m", "tritgguf", "run", str(tiny_trit_file().path), "--raw", "-p", "a", "-n", "1")
    result = run_python(*command, env={**os.environ, **settings}, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert re.fullmatch(line, result.stderr)


@pytest.mark.parametrize("threads", ["0", "-1"])
def test_threads_of_0_and_less_are_the_default(monkeypatch: pytest.MonkeyPatch, capsys: Capture, threads: str) -> None:
    seen: list[Any] = []
    integrity = importlib.import_module("tritgguf.formats.integrity")

    def check(file: Path, *, threads: int | None, progress: Any) -> Any:
        seen.append(threads)
        return SimpleNamespace(stock=True)

    monkeypatch.setattr(integrity, "check", check)
    monkeypatch.setattr("tritgguf.cli.check.print_check", lambda report: None)
    assert app.main(["check", "x.gguf", "-t", threads]) == 0
    assert seen == [None]
    assert capsys.readouterr().err == ""


def test_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    for threads, warned in (("2", False), ("3", True)):
        assert app.main(["check", "missing.gguf", "-t", threads]) == 1
        assert (f"warning: {threads} threads on 2 processors" in capsys.readouterr().err) == warned


def test_an_output_that_lacks_characters(tiny_trit_file: Callable[..., GgufFile]) -> None:
    """A Windows console may have cp1252: what it lacks becomes question marks."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    result = run_python("-m", "tritgguf", "inspect", str(tiny_trit_file().path), env=environment, encoding="cp1252")
    assert result.returncode == 0
    assert "['? t'" in result.stdout.replace('"', "'")  # the space of byte-level BPE is \u0120
    assert result.stderr == ""
