"""The command line: what goes to stdout and stderr, exit codes, and the chat at a terminal."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import importlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_model import END, scripted
from small_tokenizers import encode
from tiny_models import write_tiny_model

import tritgguf
from tritgguf.cli import app, terminal
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.conversion.depths import DepthChoice, KeepRule
from tritgguf.conversion.report import ConvertReport
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.layer_errors import LayerError
from tritgguf.evaluation.verify import VerifyReport
from tritgguf.runtime.sampling import Sampler, SamplingOptions

LOADED_MODEL, CONVERT, VERIFY = (
    importlib.import_module(f"tritgguf.{name}")
    for name in ("runtime.loaded_model", "conversion.convert", "evaluation.verify")
)
TIMINGS = re.compile(r"load \d+\.\d\d s \| prompt \d+ tokens, [\d.]+ tokens/s \| decode \d+ tokens, [\d.]+ tokens/s\n")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that answers "The dog sleeps."; `loaded` holds what `load` was called with."""
    model = scripted("The dog sleeps.")
    model.loaded = None

    def load(path: Path, **options: Any) -> Any:
        model.loaded = (path, options)
        return model

    monkeypatch.setattr(LOADED_MODEL, "load", load)
    return model


def fails(capsys: Capture, *arguments: str) -> str:
    """Run a command that must fail with one line and exit code 1; return the line."""
    assert app.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)
    return captured.err


def record_sampling(monkeypatch: pytest.MonkeyPatch) -> list[SamplingOptions]:
    """Return a list that receives the options of every sampler from now on."""
    seen: list[SamplingOptions] = []

    def make(options: SamplingOptions) -> Sampler:
        seen.append(options)
        return Sampler(options)

    monkeypatch.setattr("tritgguf.runtime.sampling.Sampler", make)
    return seen


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


# -- help, version, usage


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
def test_mistakes_are_one_line(capsys: Capture, arguments: list[str]) -> None:
    fails(capsys, *arguments)


@pytest.mark.parametrize("depth", ["0", "5", "-1", "two"])
def test_a_depth_that_does_not_exist(capsys: Capture, tmp_path: Path, depth: str) -> None:
    source = write_tiny_model(tmp_path / "model")
    assert "depth" in fails(capsys, "convert", str(source), str(tmp_path / "out.gguf"), "--depth", depth)
    assert list(tmp_path.iterdir()) == [source]


# -- run


def test_run_prints_the_answer_and_the_timings(capsys: Capture, model: Any) -> None:
    assert app.main(["run", "model.gguf", "-p", "Hi"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The dog sleeps.\n"
    assert TIMINGS.fullmatch(captured.err)
    assert model.loaded == (
        Path("model.gguf"),
        {
            "context": None,
            "threads": None,
            "prefill_bits": 8,
            "exact": False,
            "cache_type": None,
            "on_compilation": terminal.print_compilation_note,
        },
    )


def test_run_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    seen = record_sampling(monkeypatch)
    arguments = "--temp 0.5 --top-k 7 --top-p 0.8 --min-p 0.1 --repeat-penalty 1.1 --repeat-last-n 9 -s 3 -c 99 -t 2"
    assert app.main(["run", "model.gguf", "-p", "Hi", *arguments.split()]) == 0
    assert seen == [SamplingOptions(0.5, 7, 0.8, 0.1, 1.1, 9, 3)]
    assert model.loaded[1]["context"] == 99
    assert model.loaded[1]["threads"] == 2


def test_defaults_are_llama_cpps(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    seen = record_sampling(monkeypatch)
    assert app.main(["run", "model.gguf", "-p", "Hi"]) == 0
    assert seen == [SamplingOptions(0.8, 40, 0.95, 0.05, 1.0, 64, -1)]


def test_run_json(capsys: Capture, model: Any) -> None:
    assert app.main(["run", "model.gguf", "-p", "Hi", "--json", "-s", "5", "-n", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] == encode(model.tokenizer, "The dog sleeps.")[:2]
    assert answer["text"] == model.tokenizer.decode(answer["tokens"])
    assert (answer["model"], answer["finish_reason"], answer["seed"]) == ("model.gguf", "length", 5)
    assert answer["timings"]["decode_tokens"] == 1
    assert set(answer["timings"]) >= {"load_seconds", "prompt_tokens_per_second", "decode_tokens_per_second"}


def test_the_prompt_from_a_file(model: Any, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"Hi \xff\n\n")
    assert app.main(["run", "model.gguf", "--raw", "-f", str(tmp_path / "prompt.txt")]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Hi \ufffd\n")


def test_the_system_message(model: Any) -> None:
    assert app.main(["run", "model.gguf", "-p", "Hi", "-sys", "Be brief."]) == 0
    text = model.tokenizer.decode(model.model.calls[0])
    assert text.startswith("system\nBe brief.\nuser\nHi")


def test_the_prompt_from_a_pipe(capsys: Capture, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    assert app.main(["run", "model.gguf", "--raw"]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Hi")
    assert capsys.readouterr().out == "The dog sleeps.\n"


def test_an_empty_pipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "no prompt" in fails(capsys, "run", "model.gguf")


def test_a_full_context_is_said(capsys: Capture, model: Any) -> None:
    model.model.context = 16
    model.model.script = [40] * 99
    assert app.main(["run", "model.gguf", "--raw", "-p", "The dog"]) == 0
    assert "the context of 16 tokens is full" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context(capsys: Capture, model: Any) -> None:
    model.model.context = 16
    assert "the context holds 16" in fails(capsys, "run", "model.gguf", "-p", "dog " * 50)


def test_ctrl_c_ends_a_single_answer(capsys: Capture, model: Any) -> None:
    model.model.interrupt_in_call = 3
    assert app.main(["run", "model.gguf", "-p", "Hi"]) == 130
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert captured.err == ""


# -- terminals


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stdin and stdout be a terminal's. (No fixture: pytest sets stdout anew when the test starts.)"""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)


def types(monkeypatch: pytest.MonkeyPatch, model: Any, turns: Sequence[tuple[Any, str]]) -> None:
    """Let somebody type lines, or press a key that raises, and the model answer each line."""
    remaining = iter(turns)

    def read(prompt: str = "") -> str:
        line, answer = next(remaining, (EOFError, ""))
        if isinstance(line, type):
            raise line
        model.model.script = [*encode(model.tokenizer, answer), END]
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_a_chat(monkeypatch: pytest.MonkeyPatch, capsys: Capture, model: Any) -> None:
    at_a_terminal(monkeypatch)
    types(monkeypatch, model, [("A color?", "Red."), ("", ""), ("Another?", "Blue.")])
    assert app.main(["run", "model.gguf", "-sys", "Be brief."]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Red.\nBlue.\n"
    assert TIMINGS.search(captured.err)
    said = model.tokenizer.decode(model.cached_tokens)
    assert said.startswith("system\nBe brief.\nuser\nA color?\nassistant\nRed.\nuser\nAnother?\nassistant\nBlue.")


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, model: Any
) -> None:
    at_a_terminal(monkeypatch)
    types(monkeypatch, model, [("A color?", "The dog sleeps."), (KeyboardInterrupt, ""), ("Another?", "Blue.")])
    model.model.interrupt_in_call = 3
    assert app.main(["run", "model.gguf"]) == 0
    stopped = capsys.readouterr().out.splitlines()[0]
    assert "The dog sleeps.".startswith(stopped)
    assert stopped
    assert f"assistant\n{stopped}\nuser\nAnother?" in model.tokenizer.decode(model.cached_tokens)


def test_clear_starts_a_new_chat(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    at_a_terminal(monkeypatch)
    types(monkeypatch, model, [("A color?", "Red."), ("/clear", ""), ("Another?", "Blue.")])
    assert app.main(["run", "model.gguf"]) == 0
    assert model.tokenizer.decode(model.cached_tokens).startswith("user\nAnother?\nassistant\nBlue.")


def test_a_message_without_room_is_an_error_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, model: Any
) -> None:
    at_a_terminal(monkeypatch)
    model.model.context = 40
    types(monkeypatch, model, [("dog " * 100, ""), ("Hi", "Red.")])
    assert app.main(["run", "model.gguf"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Red.\n"
    assert "error: the prompt has" in captured.err


@pytest.mark.parametrize("option", ["--raw", "--json"])
def test_without_a_prompt_there_is_nothing_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, option: str
) -> None:
    at_a_terminal(monkeypatch)
    assert app.main(["run", "model.gguf", option]) == 1
    assert f"{option} needs a prompt" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, is_terminal: bool
) -> None:
    text = "a\x1b[2J\x07\x9b\x7f\n\tb é"
    if is_terminal:
        at_a_terminal(monkeypatch)
    terminal.write_answer(text)
    assert capsys.readouterr().out == ("a[2J\n\tb é" if is_terminal else text)


def test_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    at_a_terminal(monkeypatch)
    terminal.print_table("a title", ("name", ">count"), [("[red]x[/red]\x1b[2J", "7")])
    out = capsys.readouterr().out
    assert "a title" in out
    assert "[red]x[/red][2J" in out


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with terminal.progress(in_bytes=True) as report:
        report("blk.0.x[/red]", 10**6, 10**7)
        report("blk.1.x", 10**7, 10**7)
    with terminal.progress(in_bytes=False) as report:
        report("runner", 0, 2)
        report("source", 2, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "blk.1.x" in captured.err
    assert "100%" in captured.err


# -- convert, verify, inspect


def conversion() -> ConvertReport:
    return ConvertReport(
        output=Path("out.gguf"),
        source="models/x",
        depth=2,
        encoder="v2",
        weights=1000,
        tensors_by_type={"TRIT2": 3, "F16": 1},
        bytes_by_type={"TRIT2": 61_300_000, "F16": 500},
        bits_per_weight_quantized=3.5,
        bits_per_weight_file=6.25,
        relative_error=0.1234,
        kept_unaligned=["blk.0.attn_q.weight"],
        warnings=["an unknown pre-tokenizer"],
        file_bytes=61_400_000,
        seconds=12.3,
        peak_memory_bytes=1_230_000_000,
    )


def test_convert(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    calls: list[Any] = []

    def fake(source: str, output: Path, *, progress: Any, **options: Any) -> ConvertReport:
        calls.append((source, output, options))
        for done in range(0, 101, 10):
            progress(ConvertProgress("blk.0.x", done * 10**6, 10**8))
        return conversion()

    monkeypatch.setattr(CONVERT, "convert", fake)
    arguments = [
        "--depth",
        "3",
        "--embedding-depth",
        "4",
        "-j",
        "2",
        "--overwrite",
        "--keep",
        "*.ffn_down=4",
        "--resume",
    ]
    assert app.main(["convert", "org/name", "out.gguf", *arguments]) == 0
    options: dict[str, Any] = {"depth": 3, "encoder": "auto", "threads": 2, "overwrite": True, "resume": True}
    options |= {"output_depth": None, "embedding_depth": 4, "importance": None, "windows": None}
    options |= {"choice": DepthChoice((KeepRule("*.ffn_down", 4),))}
    assert calls == [("org/name", Path("out.gguf"), options)]
    captured = capsys.readouterr()
    for text in ("TRIT2", "61.3 MB", "3.500", "6.250", "0.1234", "12.3 s", "1.23 GB"):
        assert text in captured.out
    assert re.search(r"^ 50 %  blk\.0\.x  [\d.]+ [kMG]?B/s  \d+ s left$", captured.err, re.MULTILINE)
    assert "blk.0.attn_q.weight" in captured.err
    assert "warning: an unknown pre-tokenizer" in captured.err


def test_convert_json(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(CONVERT, "convert", lambda *arguments, **options: conversion())
    assert app.main(["convert", "org/name", "out.gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == "out.gguf"
    assert report["bytes_by_type"] == {"TRIT2": 61_300_000, "F16": 500}


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (TritGgufError("x.gguf: tensor \x1b[31ma\nb is bad"), "error: x.gguf: tensor [31ma b is bad\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: Permission denied\n"),
        (MemoryError(), "error: not enough memory; close other programs or give a smaller --ctx-size\n"),
    ],
)
def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture, raised: Exception, line: str) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(CONVERT, "convert", fail)
    assert fails(capsys, "convert", "org/name", "out.gguf") == line


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CONVERT, "convert", interrupt)
    assert app.main(["convert", "org/name", "out.gguf"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def verification() -> VerifyReport:
    return VerifyReport("models/x", Path("x.gguf"), 500, 1, 2.5e-4, 3.5e-4, 1.5e-3, 0.576, 4.2, 0.691, 12.25, 7.5, 3.0)


def test_verify(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    calls: list[Any] = []

    def fake(source: str, files: list[Path], *, progress: Any, **options: Any) -> list[VerifyReport]:
        calls.append((source, files, options))
        for stage in ("runner", "source"):
            progress(stage, 0, 2)
            progress(stage, 2, 2)
        return [verification()]

    monkeypatch.setattr(VERIFY, "verify_files", fake)
    (tmp_path / "text.txt").write_text("Some text.\n")
    arguments = ["--text", str(tmp_path / "text.txt"), "--tokens", "50", "--layers"]
    assert app.main(["verify", "models/x", "x.gguf", *arguments]) == 0
    options = {"text": "Some text.\n", "tokens": 50, "layers": True, "threads": None}
    assert calls == [("models/x", [Path("x.gguf")], options)]
    captured = capsys.readouterr()
    for text in ("2.5e-04", "3.5e-04", "0.5760", "4.2000", "69.1%", "12.250", "7.500"):
        assert text in captured.out
    assert captured.err.splitlines()[0].endswith("runner")


def test_verify_json(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(VERIFY, "verify_files", lambda *arguments, **options: [verification()])
    assert app.main(["verify", "models/x", "x.gguf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runner"] == {"max_rel_logit_diff": 2.5e-4, "max_rel_logit_diff_int16": 3.5e-4, "kl_int8": 1.5e-3}
    assert report["tokens"] == 500


def test_verify_several_files(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    other = dataclasses.replace(verification(), file=Path("y.gguf"), kl_mean=0.125, layers=[LayerError(0, 0.25, 0.5)])
    monkeypatch.setattr(VERIFY, "verify_files", lambda *arguments, **options: [verification(), other])
    assert app.main(["verify", "models/x", "x.gguf", "y.gguf"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  x\.gguf +2\.5e-04 +3\.5e-04 +1\.5e-03$", out, re.MULTILINE)
    assert re.search(r"^  x\.gguf +0\.5760 +4\.2000 +69\.1% +12\.250$", out, re.MULTILINE)
    assert re.search(r"^  y\.gguf +0\.1250 +4\.2000 +69\.1% +12\.250$", out, re.MULTILINE)
    assert out.count("7.500") == 1  # the source's perplexity
    assert re.search(r"^  +0 +0\.2500 +0\.5000$", out, re.MULTILINE)
    assert app.main(["verify", "models/x", "x.gguf", "y.gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps([verification().as_dict(), other.as_dict()]))


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    convert(write_tiny_model(folder / "model"), folder / "model.gguf", depth=2)
    return folder / "model.gguf"


def test_inspect(capsys: Capture, tiny_file: Path) -> None:
    assert app.main(["inspect", str(tiny_file)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  blk\.0\.ffn_down\.weight +TRIT2 +128 x 192 +\d+  [\d.]+ \.\. [\d.]+$", out, re.MULTILINE)
    assert re.search(r"^  tokenizer\.ggml\.tokens +\[.*\.\.\.\] \(448 elements\)$", out, re.MULTILINE)
    assert re.search(r"^  bits per weight, quantized matrices +3\.500$", out, re.MULTILINE)


def test_inspect_json(capsys: Capture, tiny_file: Path) -> None:
    assert app.main(["inspect", str(tiny_file), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["metadata"]["tokenizer.ggml.tokens"]) == 448


def test_a_reader_that_leaves_early_is_no_error(tiny_file: Path) -> None:
    command = f"'{sys.executable}' -m tritgguf inspect '{tiny_file}' --json | head -c 10"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (len(result.stdout), result.stderr) == (10, "")


# -- the package


def test_importing_the_command_line_imports_little() -> None:
    heavy = ("numpy", "numba", "gguf", "tokenizers", "jinja2", "torch", "transformers", "huggingface_hub")
    code = f"import sys, tritgguf.cli.app; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    "first",
    ["tritgguf.cli.app", "tritgguf.conversion.convert", "tritgguf.runtime.generate", "tritgguf.evaluation.verify"],
)
def test_the_api_is_functions_whatever_was_imported_first(first: str) -> None:
    code = (
        f"import {first}, tritgguf; from tritgguf import *;"
        "print(all(callable(getattr(tritgguf, name)) for name in tritgguf.__all__), callable(convert))"
    )
    result = run_python("-c", code)
    assert result.stdout == "True True\n", result.stderr


def test_an_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        tritgguf.frobnicate  # noqa: B018


def test_python_m(tiny_file: Path) -> None:
    result = run_python("-m", "tritgguf", "inspect", str(tiny_file.with_name("missing.gguf")))
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*missing\.gguf: [^\n]+\n", result.stderr)


# -- the real one


@pytest.mark.real_model
def test_a_chat_at_a_real_terminal(smollm2_d2: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tritgguf", "run", str(smollm2_d2), "--temp", "0", "-n", "24"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    screen = ""

    def wait_for(pattern: str) -> None:
        nonlocal screen
        while not re.search(pattern, screen):
            ready, _, _ = select.select([ours], [], [], 120)
            assert ready, f"{pattern!r} did not come: {screen!r}"
            screen += os.read(ours, 4096).decode(errors="replace")

    def type_keys(keys: bytes) -> None:
        nonlocal screen
        screen = ""
        os.write(ours, keys)

    try:
        wait_for("> ")
        type_keys(b"Write a very long story about a dog.\n")
        wait_for(r"dog\.\s+\S+ \S+ \S+")
        os.kill(process.pid, signal.SIGINT)
        wait_for(r"\n\S*> ")
        type_keys(b"Hi\n")
        wait_for(r"Hi\s+\w[^>]*\n\S*> ")
        type_keys(b"\x04")
        wait_for(r"decode \d+ tokens")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.real_model
def test_the_same_seed_the_same_answer(smollm2_d2: Path) -> None:
    command = (
        "-m",
        "tritgguf",
        "run",
        str(smollm2_d2),
        "-p",
        "Once upon a time there was",
        "--raw",
        "-n",
        "12",
        "-c",
        "128",
        "-s",
        "11",
    )
    first, second = run_python(*command), run_python(*command)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert len(first.stdout) > 10
    assert TIMINGS.fullmatch(first.stderr)
