"""An interrupted conversion resumes and gives the same bytes."""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.conversion.convert import ConvertProgress, convert
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter

WINDOWS = np.random.default_rng(0).integers(3, 400, (8, 64)).tolist()
LAST = ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_down.weight"]


def interrupt_after(name: str) -> Callable[[ConvertProgress], None]:
    def listen(step: ConvertProgress) -> None:
        if step.tensor == name:
            raise KeyboardInterrupt

    return listen


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("calibrated", [False, True])
def test_resuming_gives_the_same_file(tmp_path: Path, last: str, calibrated: bool) -> None:
    source, out = write_tiny_model(tmp_path / "model"), tmp_path / "files" / "out.gguf"
    out.parent.mkdir()
    windows = WINDOWS if calibrated else None
    expected = convert(source, tmp_path / "whole.gguf", depth=3, windows=windows)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, depth=3, windows=windows, progress=interrupt_after(last))
    assert names(out.parent) == ["out.gguf.part", "out.gguf.part.journal"]
    seen: list[str] = []
    report = convert(source, out, depth=3, windows=windows, resume=True, progress=lambda step: seen.append(step.tensor))
    assert names(out.parent) == ["out.gguf"]
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert report.relative_error == expected.relative_error
    assert last in seen, "what was there already counts as progress too"


def test_written_tensors_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_tiny_model(tmp_path / "model"), tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt_after("blk.1.attn_k.weight"))
    done = len(Path(f"{out}.part.journal").read_text().splitlines()) - 1
    assert done >= 1
    begun: list[str] = []
    begin = StreamingWriter.begin

    def note(self: StreamingWriter, tensor: PlannedTensor) -> None:
        begun.append(tensor.name)
        begin(self, tensor)

    monkeypatch.setattr(StreamingWriter, "begin", note)
    convert(source, out, resume=True)
    assert len(begun) == 21 - done


def test_without_resume_it_starts_over(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "model"), tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, depth=1, progress=interrupt_after(LAST[2]))
    convert(source, out, depth=2)
    convert(source, tmp_path / "whole.gguf", depth=2)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not Path(f"{out}.part.journal").exists()


def test_resume_without_an_interrupted_run(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    convert(source, tmp_path / "a.gguf", resume=True)
    convert(source, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_another_job_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "model"), tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, depth=2, progress=interrupt_after(LAST[2]))
    part, journal = Path(f"{out}.part"), Path(f"{out}.part.journal")
    before = journal.read_bytes()
    with pytest.raises(TritGgufError, match=r"journal: the journal is of another conversion.*without --resume"):
        convert(source, out, depth=3, resume=True)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(TritGgufError, match="is of another conversion"):
        convert(source, out, depth=2, resume=True)
    assert journal.read_bytes() == before
    assert part.exists()


def test_damaged_journals(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "model"), tmp_path / "out.gguf"
    convert(source, tmp_path / "whole.gguf")
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt_after(LAST[2]))
    part, journal = Path(f"{out}.part"), Path(f"{out}.part.journal")
    content, lines = part.read_bytes(), journal.read_text().splitlines(keepends=True)
    for bad in ("{}\n", '"text"\n', "[1]\n", "{\n", json.dumps({**json.loads(lines[1]), "extra": 1}) + "\n"):
        journal.write_text("".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(TritGgufError, match="start over without --resume"):
            convert(source, out, resume=True)
    journal.write_text("".join([lines[0], *lines[2:]]))  # a tensor is missing
    with pytest.raises(TritGgufError, match="does not match its journal"):
        convert(source, out, resume=True)
    journal.write_text("".join(lines))
    end = json.loads(lines[2])["end"]  # of the second matrix
    part.write_bytes(content[: end - 40] + bytes([content[end - 40] ^ 1]) + content[end - 39 :])
    with pytest.raises(TritGgufError, match="does not match its journal"):
        convert(source, out, resume=True)
    part.write_bytes(content[:4000])
    with pytest.raises(TritGgufError, match="does not match its journal"):
        convert(source, out, resume=True)
    part.write_bytes(content)
    journal.write_text("".join(lines) + '{"name": "torn')  # the last line was being written
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, resume=True, progress=interrupt_after(LAST[3]))
    assert journal.read_text().startswith("".join(lines))
    assert len(journal.read_text().splitlines()) > len(lines)
    convert(source, out, resume=True)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_two_conversions_into_one_output(tmp_path: Path) -> None:
    source, out = write_tiny_model(tmp_path / "model"), tmp_path / "out.gguf"
    messages: list[str] = []

    def second(step: ConvertProgress) -> None:
        if not messages:
            messages.append("")
            with pytest.raises(TritGgufError, match="another conversion is writing it") as caught:
                convert(source, out)
            messages.append(str(caught.value))

    convert(source, out, progress=second)
    assert "out.gguf: another conversion is writing it; wait for it" in messages[1]
    assert sorted(names(tmp_path)) == ["model", "out.gguf"]


def kill_and_resume(source: Path, out: Path, delay: float) -> bool:
    """Kill a conversion after some seconds and resume it; return whether it was killed before its end."""
    command = [sys.executable, "-m", "tritgguf", "convert", str(source), str(out), "--depth", "2", "--encoder", "v2"]
    command += ["--recipe", "published"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    was_running = not out.exists()
    assert app.main([*command[3:], "--resume"] if was_running else ["check", str(out)]) == 0
    return was_running


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.real_model
@pytest.mark.slow
def test_kills(tmp_path: Path, smollm2_folder: Path, smollm2_d2: Path) -> None:
    chooser = random.Random(0)
    for number in range(int(os.environ.get("TRITGGUF_KILLS", "3"))):
        out = tmp_path / f"{number}.gguf"
        kill_and_resume(smollm2_folder, out, chooser.uniform(0.3, 2.5))
        assert filecmp.cmp(out, smollm2_d2, shallow=False)
        assert not list(tmp_path.glob("*.part*"))
        out.unlink()
