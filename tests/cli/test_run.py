"""`run`: answer and timings, options, sources of the prompt, and the chat on a terminal."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, at_a_terminal, fails, run_python
from scripted_model import END, scripted, set_context
from small_tokenizers import encode

from tritgguf.cli import app, terminal
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.engine import Engine
from tritgguf.generation.lookup import Lookup
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.generation.speculation import Speculation

LOADED_MODEL = importlib.import_module("tritgguf.generation.loaded_model")
TIMINGS = re.compile(r"load \d+\.\d\d s \| prompt \d+ tokens, [\d.]+ tokens/s \| decode \d+ tokens, [\d.]+ tokens/s\n")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that answers "The dog sleeps."; `loaded` holds the arguments of `load`."""
    model = scripted("The dog sleeps.")
    model.loaded = None

    def load(path: Path, **options: Any) -> Any:
        model.loaded = (path, options)
        return model

    monkeypatch.setattr(LOADED_MODEL, "load", load)
    return model


def record_sampling(monkeypatch: pytest.MonkeyPatch) -> list[SamplingOptions]:
    """Return a list to which the options of every new sampler are appended."""
    seen: list[SamplingOptions] = []

    def make(options: SamplingOptions, **settings: Any) -> Sampler:
        seen.append(options)
        return Sampler(options)

    monkeypatch.setattr("tritgguf.generation.sampling.Sampler", make)
    return seen


def test_run_prints_the_answer_and_the_timings(capsys: Capture, model: Any) -> None:
    assert app.main(["run", "model.gguf", "-p", "Hi"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The dog sleeps.\n"
    assert TIMINGS.fullmatch(captured.err)
    assert model.loaded == (
        Path("model.gguf"),
        {
            "context": None,
            "parallel": 1,
            "threads": None,
            "prefill_bits": 8,
            "exact": False,
            "cache_type": None,
            "isa": None,
            "lookup": False,
            "draft": None,
            "draft_max": 16,
            "on_compilation": terminal.print_compilation_note,
        },
    )


def test_run_says_how_many_guesses_were_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guessing = scripted("the dog the dog the dog the dog the dog the dog")
    speculation = Speculation(Lookup(), 16)
    guessing.engine = Engine(guessing.model, context=512, parallel=1, speculation=speculation)
    monkeypatch.setattr(LOADED_MODEL, "load", lambda file, **settings: guessing)
    assert app.main(["run", "model.gguf", "-p", "Hi", "--lookup", "--temp", "0"]) == 0
    found = re.search(r"tokens/s \| drafts (\d+) tokens, (\d+)% accepted\n$", capsys.readouterr().err)
    assert found is not None and int(found[1]) > 0 and 0 < int(found[2]) <= 100


def test_run_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    seen = record_sampling(monkeypatch)
    arguments = "--temp 0.5 --top-k 7 --top-p 0.8 --min-p 0.1 --repeat-penalty 1.1 --repeat-last-n 9 -s 3 -c 999 -t 2"
    penalties = "--presence-penalty 0.3 --frequency-penalty -0.2"
    assert app.main(["run", "model.gguf", "-p", "Hi", *arguments.split(), *penalties.split()]) == 0
    assert seen == [SamplingOptions(0.5, 7, 0.8, 0.1, 1.1, 9, 3, 0.3, -0.2)]
    assert model.loaded[1]["context"] == 999
    assert model.loaded[1]["threads"] == 2


@pytest.mark.parametrize(
    "options", ["--cache-type q8_0", "-ctk q8_0 -ctv q8_0", "--cache-type-k q8_0 --cache-type-v=q8_0 --cache-type q8_0"]
)
def test_one_type_for_keys_and_values(model: Any, options: str) -> None:
    assert app.main(["run", "model.gguf", "-p", "Hi", *options.split()]) == 0
    assert model.loaded[1]["cache_type"] == "q8_0"


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


def test_an_answer_follows_the_schema_or_grammar_of_a_file(capsys: Capture, model: Any, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"const": [1]}', "utf-8")
    (tmp_path / "rules.gbnf").write_text('root ::= "dog"', "utf-8")
    run = ["run", "model.gguf", "-p", "Hi"]
    assert app.main([*run, "--json-schema", str(tmp_path / "schema.json")]) == 0
    assert json.loads(capsys.readouterr().out) == [1]
    assert app.main([*run, "--grammar", str(tmp_path / "rules.gbnf")]) == 0
    assert capsys.readouterr().out == "dog\n"
    assert app.main([*run, "--json-schema", str(tmp_path / "rules.gbnf")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.match(r"error: .*rules.gbnf: is no JSON", err)


def test_the_prompt_from_a_file(model: Any, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Hi \u00e9\n\n", encoding="utf-16")
    assert app.main(["run", "model.gguf", "--raw", "-f", str(tmp_path / "prompt.txt")]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Hi \u00e9\n")


def test_a_prompt_that_is_no_text(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"Hi \xff\n")
    line = fails(capsys, "run", "model.gguf", "-f", str(tmp_path / "prompt.txt"))
    assert "prompt.txt: is not UTF-8 text: byte 0xFF at offset 3" in line


def test_the_system_message(model: Any) -> None:
    assert app.main(["run", "model.gguf", "-p", "Hi", "-sys", "Be brief."]) == 0
    text = model.tokenizer.decode(model.model.calls[0])
    assert text.startswith("system\nBe brief.\nuser\nHi")


def test_the_prompt_from_a_pipe(capsys: Capture, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    assert app.main(["run", "model.gguf", "--raw"]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Hi")
    assert capsys.readouterr().out == "The dog sleeps.\n"


@pytest.mark.parametrize("stdin", [io.TextIOWrapper(io.BytesIO(b"")), None], ids=["empty", "closed"])
def test_an_empty_pipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch, stdin: Any) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert "no prompt" in fails(capsys, "run", "model.gguf", code=2)


def piped(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Make stdin a pipe that holds a text."""
    reader, writer = os.pipe()
    os.write(writer, text)
    os.close(writer)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader, encoding="utf-8"))


@pytest.mark.parametrize("options", [["-p", "Summarize:"], ["-p", "Summarize:", "-f", "-"]])
def test_a_pipe_follows_the_prompt(model: Any, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    piped(monkeypatch, b"The dog\nsleeps.\n")
    assert app.main(["run", "model.gguf", "--raw", *options]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Summarize:\n\nThe dog\nsleeps.")


def test_a_file_follows_the_prompt(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    piped(monkeypatch, b"ignored, because the file is named\n")
    (tmp_path / "text.txt").write_text("The dog\n")
    assert app.main(["run", "model.gguf", "--raw", "-p", "Say:", "-f", str(tmp_path / "text.txt")]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Say:\n\nThe dog")


@pytest.mark.parametrize("stdin", ["/dev/null", "empty", "terminal", "closed"])
def test_a_prompt_alone(model: Any, monkeypatch: pytest.MonkeyPatch, stdin: str) -> None:
    """A service's stdin is /dev/null or closed; neither is waited for, and an empty pipe adds nothing."""
    if stdin == "terminal":
        at_a_terminal(monkeypatch)
    elif stdin == "empty":
        piped(monkeypatch, b"")
    else:
        monkeypatch.setattr(sys, "stdin", open("/dev/null") if stdin == "/dev/null" else None)  # noqa: SIM115
    assert app.main(["run", "model.gguf", "--raw", "-p", "Hi"]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Hi")


@pytest.mark.parametrize("comes", [True, False])
def test_a_pipe_that_stays_open(model: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture, comes: bool) -> None:
    """Programs that start others leave a pipe of their own open: it is waited for, but not for long."""
    monkeypatch.setattr("tritgguf.cli.prompt_source._SECONDS_BEFORE_NOTE", 0.05)
    monkeypatch.setattr("tritgguf.cli.prompt_source._SECONDS_BEFORE_END", 60.0 if comes else 0.1)
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader, encoding="utf-8"))

    note = terminal.note

    def write_when_it_waits(message: str, **options: bool) -> None:
        note(message, **options)
        if comes and "waiting" in message:
            os.write(writer, b"The dog")
            os.close(writer)

    monkeypatch.setattr(terminal, "note", write_when_it_waits)
    assert app.main(["run", "model.gguf", "--raw", "-p", "Hi"]) == 0
    assert model.model.calls[0] == encode(model.tokenizer, "Hi\n\nThe dog" if comes else "Hi")
    errors = capsys.readouterr().err
    assert "note: waiting for the text on standard input that follows the prompt; </dev/null leaves it out" in errors
    assert ("note: nothing came" in errors) != comes
    if not comes:
        os.close(writer)


def test_options_mean_what_they_mean_in_llama_cpp(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Temperature below 0 is greedy, -n -2 and -1 are no limit, -s -1 draws a seed, --repeat-last-n -1 is all."""
    seen = record_sampling(monkeypatch)
    arguments = "--temp -1 -n -2 -s -1 --repeat-last-n -1 --top-k -1 -t -1"
    assert app.main(["run", "model.gguf", "-p", "Hi", *arguments.split()]) == 0
    assert seen == [SamplingOptions(temperature=0, repeat_last_n=-1, seed=-1, top_k=-1)]
    assert model.loaded[1]["threads"] is None


def test_a_context_beyond_the_training(monkeypatch: pytest.MonkeyPatch, capsys: Capture, model: Any) -> None:
    for context, warned in ((64, False), (65, True)):
        set_context(model, context)
        model.model.config.context_length = 64
        assert app.main(["run", "model.gguf", "-p", "Hi"]) == 0
        assert ("trained for 64 tokens, the context has 65" in capsys.readouterr().err) == warned


def test_a_full_context_prints_a_note(capsys: Capture, model: Any) -> None:
    set_context(model, 16)
    model.model.script = [40] * 99
    assert app.main(["run", "model.gguf", "--raw", "-p", "The dog"]) == 0
    assert "the context of 16 tokens is full" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context(capsys: Capture, model: Any) -> None:
    set_context(model, 16)
    assert "the context holds 16" in fails(capsys, "run", "model.gguf", "-p", "dog " * 50)


def test_ctrl_c_ends_a_single_answer(capsys: Capture, model: Any) -> None:
    model.model.interrupt_in_call = 3
    assert app.main(["run", "model.gguf", "-p", "Hi"]) == 130
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert captured.err == ""


# -- the chat


def types(monkeypatch: pytest.MonkeyPatch, model: Any, turns: Sequence[tuple[Any, str]]) -> None:
    """Simulate a user who types lines, or presses a key that raises, and a model that answers each line."""
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
    assert len(re.findall(r"decode \d+ tokens", captured.err)) == 2
    said = model.tokenizer.decode(model.model.text)
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
    assert f"assistant\n{stopped}\nuser\nAnother?" in model.tokenizer.decode(model.model.text)


def test_clear_starts_a_new_chat(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    at_a_terminal(monkeypatch)
    types(monkeypatch, model, [("A color?", "Red."), ("/clear", ""), ("Another?", "Blue.")])
    assert app.main(["run", "model.gguf"]) == 0
    assert model.tokenizer.decode(model.model.text).startswith("user\nAnother?\nassistant\nBlue.")


def test_a_message_without_room_is_an_error_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, model: Any
) -> None:
    at_a_terminal(monkeypatch)
    set_context(model, 40)
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
    assert app.main(["run", "model.gguf", option]) == 2
    assert f"{option} needs a prompt" in capsys.readouterr().err


# -- the real model


@pytest.mark.real_model
def test_a_chat_at_a_real_terminal(smollm2_d2: Path) -> None:
    pytest.importorskip("pty")
    from pseudo_terminal import CTRL_C, CTRL_D, PseudoTerminal

    command = [sys.executable, "-m", "tritgguf", "run", str(smollm2_d2), "--temp", "0"]
    with PseudoTerminal(command) as terminal:
        terminal.wait_for("> $")
        terminal.press(b"Write a very long story about a dog.\r")
        terminal.wait_for(r"dog\.\s+\S+ \S+ \S+")
        terminal.press(CTRL_C)
        shown = terminal.wait_for(r"decode \d+ tokens, [^>]*\n> $")
        assert "note:" not in shown  # the model repeats itself: without Ctrl-C it ends where the context is full
        terminal.press(b"/set n 24\r")
        terminal.wait_for("\n> $")
        terminal.press(b"Hi\r")
        terminal.wait_for(r"Hi\s+\w[^>]*decode \d+ tokens, [^>]*\n> $")
        terminal.press(CTRL_D)
        assert terminal.wait_for_end() == 0


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


def test_a_run_with_compiled_kernels_imports_no_compiler(tiny_trit_file: Callable[..., GgufFile]) -> None:
    heavy = ("numba", "scipy", "torch", "transformers", "gguf", "jinja2", "huggingface_hub", "fastapi", "llguidance")
    arguments = ["run", str(tiny_trit_file().path), "--raw", "-p", "a", "-n", "2", "--temp", "0"]
    code = (
        f"import sys; from tritgguf.cli import app; assert app.main({arguments!r}) == 0;"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    for _ in range(2):  # the first run may compile kernels
        result = run_python("-c", code, stdin=subprocess.DEVNULL)
        assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
