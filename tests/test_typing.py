"""The types of the public interface, as a user's mypy sees the installed package."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """\
from pathlib import Path

import tritgguf

report = tritgguf.convert("folder", "model.gguf", depth=3)
reveal_type(report)  # tritgguf.conversion.report.ConvertReport
model = tritgguf.load(Path("model.gguf"), context=2048, parallel=4, cache_type="f32")
reveal_type(model)  # tritgguf.generation.loaded_model.LoadedModel
reveal_type(tritgguf.generate(model, "a"))  # tritgguf.generation.result.Generation
reveal_type(tritgguf.generate("model.gguf", "a").text)  # str
reveal_type(tritgguf.generate(model, ["a"]))  # list[tritgguf.generation.result.Generation]
reveal_type(tritgguf.generate(model, "a", stream=True))  # tritgguf.generation.text_stream.TextStream
reveal_type(tritgguf.generate(model, "a", stream=False, on_text=print))  # tritgguf.generation.result.Generation
reveal_type(tritgguf.generate(model, [{"role": "user", "content": "a"}]))  # tritgguf.generation.result.Generation
chats = tritgguf.generate(model, [[{"role": "user", "content": "a"}], "a"])
reveal_type(chats)  # list[tritgguf.generation.result.Generation]
reveal_type(tritgguf.generate(model, messages=[{"role": "user", "content": "a"}]).tokens)  # list[int]
answer = tritgguf.generate(
    model, "a", system="b", max_tokens=9, stop=["c", "d"], sampling=tritgguf.SamplingOptions(seed=1), temperature=0,
    top_k=40, top_p=0.9, min_p=0.1, repeat_penalty=1.1, repeat_last_n=64, seed=3,
    presence_penalty=0.1, frequency_penalty=0.1, logit_bias={5: -100},
)
reveal_type(answer.finish_reason)  # Literal['stop'] | Literal['length'] | Literal['context'] | Literal['interrupted']
for piece in tritgguf.generate(model, "a", raw=True, stop="c", stream=True):
    reveal_type(piece)  # str
chat = tritgguf.Chat(model, system="a", temperature=0, stop="b", max_tokens=5)
reveal_type(chat.ask("a").finish())  # tritgguf.generation.result.Generation
reveal_type(chat.messages[0]["content"])  # str
reveal_type(model.logits([1, 2]).shape)  # tuple[Any, ...]
reveal_type(model.score("a", "b").log_probability)  # float
reveal_type(model.embed("a", pooling="last").tolist())  # Any
reveal_type(tritgguf.verify("folder", "model.gguf"))  # tritgguf.evaluation.verify.VerifyReport
reveal_type(tritgguf.export("model.gguf", "out.gguf", to="q8_0"))  # tritgguf.exporters.export.ExportReport
"""
MISTAKES = """\
import tritgguf

model = tritgguf.load("model.gguf", contxt=5)  # contxt
tritgguf.generate(model, "a", temprature=0)  # temprature
tritgguf.generate(model, "a", temperature="hot")  # No overload
tritgguf.generate(model, ["a"], stream=True)  # No overload
tritgguf.generate(model, 5)  # No overload
tritgguf.Chat(model, temprature=0)  # temprature
model.embed("a", pooling="max")  # pooling
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter for which the package and what it needs are installed."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    Path(paths["purelib"], "installed.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n", "utf-8")
    return Path(paths["scripts"], "python.exe" if os.name == "nt" else "python")


def check(program: str, python: Path, folder: Path) -> list[str]:
    """Return what mypy prints about a user's program."""
    (folder / "program.py").write_text(program, "utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    # Without these two, whose types the interface does not have, it takes two seconds instead of twenty.
    skipped = "[mypy-torch.*,transformers.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n"
    settings = folder / "mypy.ini"
    settings.write_text(f"[mypy]\nstrict = True\n{skipped}", "utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--no-error-summary"]
    command += ["--python-executable", str(python)]
    cache = python.parents[1] / "cache"
    done = subprocess.run(
        [*command, "--cache-dir", str(cache), "program.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def comments(program: str) -> dict[int, str]:
    return {number: line.rpartition("  # ")[2] for number, line in enumerate(program.splitlines(), 1) if "  # " in line}


@pytest.mark.slow
def test_a_program_has_the_types_that_are_promised(python: Path, tmp_path: Path) -> None:
    printed = check(PROGRAM, python, tmp_path)
    revealed = {}
    for line in printed:
        _, number, kind, message = line.split(":", 3)
        assert kind == " note", line
        revealed[int(number)] = message.split('"')[1]
    assert revealed == comments(PROGRAM)


@pytest.mark.slow
def test_mistakes_are_found(python: Path, tmp_path: Path) -> None:
    errors = dict[int, str]()
    for line in check(MISTAKES, python, tmp_path):
        _, number, kind, message = line.split(":", 3)
        if kind == " error":
            errors[int(number)] = errors.get(int(number), "") + message
    expected = comments(MISTAKES)
    assert errors.keys() == expected.keys()
    assert all(words in errors[place] for place, words in expected.items())


def test_the_package_says_that_it_has_types() -> None:
    assert (ROOT / "tritgguf" / "py.typed").exists()
    assert "py.typed" in (ROOT / "pyproject.toml").read_text("utf-8")
