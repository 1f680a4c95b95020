"""What machines do to programs: signals, full disks, many processes at once. The other faults: `test_resume` (kills,
two conversions into one file), `test_hf_files` (sources that shrink), `test_kernel_cache` (folders that cannot be
written to), `test_cli` (closed pipes).
"""

from __future__ import annotations

import filecmp
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import load
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.kv_pool import KVPool, page_bytes, pages_of

Files = Callable[..., GgufFile]
MOST_SECONDS = 300  # a hang, on any machine


def start(*arguments: str, program: Sequence[str] = ("-m", "tritgguf"), **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, *program, *arguments]
    # A process in the background may ignore Ctrl-C, and a child would inherit that.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, and fail if it never is."""
    deadline = time.monotonic() + MOST_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# `tritgguf`, whose conversion says that it has written tensors, and waits then.
WAITING_CONVERSION = """
import contextlib, itertools, sys, time
from tritgguf.cli import app, terminal

@contextlib.contextmanager
def progress(*, in_bytes):
    calls = itertools.count(1)
    def report(name, done, total):
        if next(calls) == 50:
            print("waiting", flush=True)
            time.sleep(300)
    yield report

terminal.progress = progress
sys.exit(app.main(sys.argv[1:]))
"""


@pytest.mark.real_model
@pytest.mark.slow
def test_a_terminated_conversion_can_be_resumed(tmp_path: Path, smollm2_folder: Path, smollm2_d2: Path) -> None:
    out = tmp_path / "out.gguf"
    command = ["convert", str(smollm2_folder), str(out), "--depth", "2", "--encoder", "v2", "--recipe", "published"]
    process = start(*command, program=["-c", WAITING_CONVERSION])
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=MOST_SECONDS)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert errors.endswith(f"interrupted; the same command with --resume goes on ({out}.part is kept for it)\n")
    assert names(tmp_path) == ["out.gguf.part", "out.gguf.part.journal"]
    assert app.main([*command, "--resume"]) == 0
    assert names(tmp_path) == ["out.gguf"]
    assert filecmp.cmp(out, smollm2_d2, shallow=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of a child process")
def test_a_full_disk_that_has_space_again(tmp_path: Path) -> None:
    import resource

    source, out = write_tiny_model(tmp_path / "model"), tmp_path / "files" / "out.gguf"
    out.parent.mkdir()
    assert app.main(["convert", str(source), str(tmp_path / "whole.gguf"), "--depth", "3"]) == 0
    limit = (tmp_path / "whole.gguf").stat().st_size - 40_000

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start("convert", str(source), str(out), "--depth", "3", preexec_fn=small_disk)
    _, errors = process.communicate(timeout=MOST_SECONDS)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "out.gguf" in line
    assert not out.exists()
    assert app.main(["convert", str(source), str(out), "--depth", "3", "--resume"]) == 0
    assert names(out.parent) == ["out.gguf"]
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.real_model
@pytest.mark.parametrize("moment", ["during imports", "during the answer"])
def test_ctrl_c_ends_an_answer(smollm2_d2: Path, moment: str) -> None:
    process = start("run", str(smollm2_d2), "-p", "Write a very long story.", "-n", "4000", "--temp", "0")
    assert process.stdout is not None
    assert process.stderr is not None
    if moment == "during the answer":
        assert process.stdout.read(10)
    elif (maps := Path(f"/proc/{process.pid}/maps")).exists():
        wait_until(lambda: "numpy" in maps.read_text())
    else:
        time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=MOST_SECONDS)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_ctrl_c_in_the_exec_of_a_string_ends_with_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        """
import sys, types

def main():
    try:
        exec("raise KeyboardInterrupt")
    except KeyboardInterrupt:
        return 130

sys.modules["tritgguf.cli.app"] = types.SimpleNamespace(main=main)
"""
    )
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    process = start(env={**os.environ, "PYTHONPATH": path})
    assert process.communicate(timeout=MOST_SECONDS) == ("", "")
    assert process.returncode == 130


# -- memory


def test_page_bytes_match_the_allocation(tiny_trit_file: Files) -> None:
    config = ModelConfig.from_file(tiny_trit_file())
    for cache_type in ("f16", "f32"):
        pool = KVPool(config, pages=2, sequences=1, context=300, cache_type=cache_type)
        pool.reserve(pool.allocate(), 300)
        assert sum(page.nbytes for page in pool._storage.values()) == 2 * page_bytes(config, cache_type)


def test_a_context_beyond_memory_is_refused_before_anything_is_allocated(tiny_trit_file: Files) -> None:
    file = tiny_trit_file()
    needed = pages_of(10**12) * page_bytes(ModelConfig.from_file(file))
    with pytest.raises(TritGgufError, match=r"a context of 10+ tokens needs [\d,]+ bytes") as caught:
        load(file.path, context=10**12)
    for part in (file.path.name, f"{needed:,}", "--ctx-size"):
        assert part in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("command", "closed", "code"),
    [
        (["run", "a.gguf", "-p", "hi", "-n", "2"], "2>&-", 0),
        (["inspect", "a.gguf"], ">&-", 0),
        (["export", "a.gguf", "b.gguf", "--to", "f16"], "<&- >&- 2>&-", 0),
        (["inspect", "missing.gguf"], "<&- >&-", 1),
        (["--version"], "<&- >&- 2>&-", 0),
    ],
)
def test_closed_standard_streams(
    tmp_path: Path, tiny_trit_file: Files, command: list[str], closed: str, code: int
) -> None:
    """Services and cron close them; nothing fails, and nothing that is printed gets into a file."""
    (tmp_path / "a.gguf").symlink_to(tiny_trit_file().path)
    line = shlex.join([sys.executable, "-m", "tritgguf", *command])
    done = subprocess.run(
        f"{line} {closed}", shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=MOST_SECONDS
    )
    assert done.returncode == code, done.stderr
    assert (done.stdout == "") == (command[0] != "run")
    assert done.stderr == ("" if code == 0 else "error: missing.gguf: cannot be read (No such file or directory)\n")
    for path in tmp_path.glob("*.gguf"):
        GgufFile(path)
    assert not list(tmp_path.glob("*.part*"))
