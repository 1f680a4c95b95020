"""pull, list, rm, and names on the hub in place of a file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, at_a_terminal, fails, run_python
from loopback_hub import LoopbackHub, loopback_hub, use_hub

from tritgguf.cli import app
from tritgguf.formats.gguf_file import GgufFile


@pytest.fixture
def hub(tiny_trit_file: Callable[..., GgufFile]) -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        files = {depth: tiny_trit_file("llama", depth).path for depth in (2, 3)}
        hub.models["org/tiny"] = {f"tiny-d{depth}.gguf": path.read_bytes() for depth, path in files.items()}
        yield hub


@pytest.fixture
def used_hub(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LoopbackHub:
    """The hub of this process, whose cache is empty."""
    use_hub(monkeypatch, hub, tmp_path)
    return hub


def program(hub: LoopbackHub, home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(home, **settings)
    return run_python("-m", "tritgguf", *arguments, env=environment, stdin=subprocess.DEVNULL)


def test_a_name_is_fetched_and_run_and_then_needs_no_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    command = ("run", "org/tiny:d2", "--raw", "-p", "The dog", "-n", "3", "--temp", "0")
    first = program(hub, tmp_path, *command)
    assert first.returncode == 0, first.stderr
    assert hub.downloads() == [""]
    asked = len(hub.asked)
    second = program(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr
    assert len(hub.asked) == asked
    other = program(hub, tmp_path, *command[:1], "org/tiny:d3", *command[2:], HF_HUB_OFFLINE="1")
    assert other.returncode == 1
    assert re.fullmatch(r"error: org/tiny: the hub cannot be reached, because HF_HUB_OFFLINE .*\n", other.stderr)


def test_a_broken_download_is_resumed_by_the_next_command(hub: LoopbackHub, tmp_path: Path) -> None:
    content = hub.models["org/tiny"]["tiny-d2.gguf"]
    pieces = iter([content[:200_000], b"", b"", b""])
    hub.sent = lambda content: next(pieces)
    broken = program(hub, tmp_path, "pull", "org/tiny:d2")
    assert broken.returncode == 1
    assert re.fullmatch(r"( +\d+ % .*\n)*error: org/tiny: the connection to the hub broke .*\n", broken.stderr)
    assert list(tmp_path.rglob("*.gguf")) == []
    hub.sent = lambda content: content
    whole = program(hub, tmp_path, "pull", "org/tiny:d2")
    assert whole.returncode == 0, whole.stderr
    assert Path(whole.stdout.strip()).read_bytes() == content
    assert hub.downloads()[-1] == "bytes=200000-"


def test_a_source_on_the_hub_is_converted(hub: LoopbackHub, tiny_source: dict[str, bytes], tmp_path: Path) -> None:
    hub.models["org/source"] = tiny_source
    output = str(tmp_path / "out.gguf")
    result = program(hub, tmp_path, "convert", "org/source", output, "--encoder", "v2", "--recipe", "published")
    assert result.returncode == 0, result.stderr
    assert GgufFile(output).metadata["general.name"] == "source"


@pytest.fixture
def tiny_source(tmp_path: Path) -> dict[str, bytes]:
    """The files of a tiny model that is no trit file."""
    from tiny_models import write_tiny_model

    return {path.name: path.read_bytes() for path in write_tiny_model(tmp_path / "source").iterdir()}


@pytest.mark.usefixtures("used_hub")
def test_pull_list_and_rm(capsys: Capture, tmp_path: Path) -> None:
    assert app.main(["list"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "there is no trit file in" in captured.err
    assert app.main(["pull", "org/tiny:d3"]) == 0
    location = Path(capsys.readouterr().out.strip())
    assert location.name == "tiny-d3.gguf"
    assert app.main(["list"]) == 0
    assert re.search(r"^  org/tiny +3 +\d+\.\d kB  v2$", capsys.readouterr().out, re.MULTILINE)
    assert app.main(["pull", "org/tiny:d2", "--json"]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert app.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [file["name"] for file in listed] == ["org/tiny:d2", "org/tiny:d3"]
    assert listed[0] == {"name": "org/tiny:d2", **pulled}
    assert pulled["bytes"] == Path(pulled["path"]).stat().st_size
    assert app.main(["inspect", "org/tiny:d2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == pulled["path"]
    assert app.main(["rm", "org/tiny:d2", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == pulled["bytes"]
    assert not Path(pulled["path"]).exists()
    assert location.exists()


def cut(location: Path) -> None:
    """Cut a file to half of its header."""
    content = location.resolve()
    content.write_bytes(content.read_bytes()[:1000])


@pytest.mark.usefixtures("used_hub")
@pytest.mark.parametrize(
    ("damage", "fault", "freed"), [(cut, "", 1000), (lambda link: link.resolve().unlink(), "is a link to nothing", 0)]
)
def test_a_damaged_file_is_shown_and_can_be_removed(
    damage: Callable[[Path], None], fault: str, freed: int, capsys: Capture
) -> None:
    assert app.main(["pull", "org/tiny:d3"]) == 0
    location = Path(capsys.readouterr().out.strip())
    damage(location)
    assert app.main(["list"]) == 0
    captured = capsys.readouterr()
    assert "there is no trit file in" in captured.err and captured.out == ""
    assert re.match(rf"warning: .*{fault}.*; to remove it: tritgguf rm org/tiny:tiny-d3.gguf\n", captured.err)
    if freed:  # instead of what cannot be read, it would not be fetched
        assert "; to remove it: tritgguf rm org/tiny:tiny-d3.gguf" in fails(capsys, "inspect", "org/tiny:d3")
    assert app.main(["rm", "org/tiny:d3", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == freed
    assert not location.is_symlink()
    assert app.main(["pull", "org/tiny:d3"]) == 0


@pytest.mark.usefixtures("used_hub")
@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_rm_asks(monkeypatch: pytest.MonkeyPatch, capsys: Capture, answer: str, gone: bool) -> None:
    assert app.main(["pull", "org/tiny:d2"]) == 0
    location = Path(capsys.readouterr().out.strip())
    at_a_terminal(monkeypatch)
    stdin: Any = sys.stdin
    stdin.write(answer)
    stdin.seek(0)
    assert app.main(["rm", "org/tiny"]) == (0 if gone else 130)
    assert "Remove tiny-d2.gguf of org/tiny" in capsys.readouterr().err
    assert location.exists() != gone


@pytest.mark.usefixtures("used_hub")
def test_rm_of_what_is_not_there(capsys: Capture) -> None:
    assert "is no trit file in the cache" in fails(capsys, "rm", "org/tiny", "--yes")
    assert app.main(["pull", "org/tiny:d2"]) == 0
    capsys.readouterr()
    assert "--yes answers" in fails(capsys, "rm", "org/tiny", code=2)


@pytest.mark.parametrize("command", ["pull", "rm"])
@pytest.mark.parametrize("name", ["name", "org/name:", "./org/name", "model.gguf"])
def test_what_is_no_name(capsys: Capture, command: str, name: str) -> None:
    assert "is no name on the hub" in fails(capsys, command, name, code=2)


def test_a_path_that_exists_wins(
    used_hub: LoopbackHub, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "org/tiny: is a folder" in fails(capsys, "inspect", "org/tiny")
    assert used_hub.asked == []
