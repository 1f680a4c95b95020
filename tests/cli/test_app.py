"""The command line as a whole: help, usage errors, imports, and starting it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import Capture, fails, run_python
from tiny_models import write_tiny_model

import tritgguf
from tritgguf.cli import app


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
        ["run", "x.gguf", "-t", "0", "-p", "x"],
        ["run", "x.gguf", "--temp", "-1", "-p", "x"],
        ["run", "x.gguf", "-p", "x", "-f", "y"],
        ["run", "missing.gguf", "-p", "x"],
        ["run", "missing.gguf", "-f", "missing.txt"],
        ["run", "x.gguf", "-f", "."],
        ["convert", "somewhere"],
        ["verify", "one"],
        ["inspect", "missing.gguf"],
    ],
)
def test_usage_errors_are_one_line(capsys: Capture, arguments: list[str]) -> None:
    fails(capsys, *arguments)


@pytest.mark.parametrize("depth", ["0", "5", "-1", "two"])
def test_a_depth_that_does_not_exist(capsys: Capture, tmp_path: Path, depth: str) -> None:
    source = write_tiny_model(tmp_path / "model")
    assert "depth" in fails(capsys, "convert", str(source), str(tmp_path / "out.gguf"), "--depth", depth)
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
