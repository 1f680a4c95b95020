"""The sandbox of generated code: what it can do, what it cannot, and that nothing runs without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tritgguf.errors import TritGgufError
from tritgguf.lm_eval import sandbox, sandbox_worker
from tritgguf.lm_eval.sandbox import runs_to_its_end

linux = pytest.mark.skipif(sys.platform != "linux", reason="code is confined on Linux only")

# A program that ends only if the system refuses the statement in it.
REFUSED = """
try:
    {statement}
except (PermissionError, RuntimeError):
    pass
else:
    raise SystemExit("it was allowed")
"""


@linux
def test_a_program_computes_and_imports_the_standard_library() -> None:
    program = "import collections, hashlib, math, random, re\nprint('nobody reads this')\nassert math.gcd(4, 6) == 2"
    assert runs_to_its_end(program)


@linux
@pytest.mark.parametrize(
    "program", ["assert 0", "1 /", "import sys; sys.exit(0)", "import os; os._exit(0)", "raise KeyboardInterrupt"]
)
def test_a_program_that_does_not_reach_its_end_fails(program: str) -> None:
    assert not runs_to_its_end(program)


@linux
@pytest.mark.parametrize(
    "statement",
    [
        "import socket; socket.socket()",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import threading; threading.Thread(target=print).start()",
        "import os; os.kill(os.getppid(), 0)",
        "open('file', 'w')",
        "open({path!r}, 'a')",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'other')",
        "import os; os.mkdir('folder')",
        "import os; os.symlink('a', 'b')",
        "import os; os.chmod({path!r}, 0o777)",
        "import os; os.truncate({path!r}, 0)",
    ],
)
def test_a_program_reaches_nothing_outside(statement: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("kept", "utf-8")
    assert runs_to_its_end(REFUSED.format(statement=statement.format(path=str(kept))))
    assert kept.read_text("utf-8") == "kept"
    assert list(tmp_path.iterdir()) == [kept]


@linux
def test_a_program_sees_no_variables_and_no_packages() -> None:
    assert runs_to_its_end("import os; assert not {*os.environ} - {'LC_CTYPE'}")
    assert runs_to_its_end("try:\n    import numpy\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit(1)")
    assert runs_to_its_end("import os; assert os.listdir() == []")


@linux
def test_time_and_memory_have_a_limit() -> None:
    assert not runs_to_its_end("while True: pass", seconds=1)
    assert runs_to_its_end(
        "try:\n    bytearray(1 << 31)\nexcept MemoryError:\n    pass\nelse:\n    raise SystemExit(1)"
    )


@linux
def test_a_program_cannot_be_unprotected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = (
        Path(sandbox_worker.__file__)
        .read_text("utf-8")
        .replace("_SET_SECCOMP, _FILTER = 38, 22,", "_SET_SECCOMP, _FILTER = 38, 9999,")
    )
    changed = tmp_path / "worker.py"
    changed.write_text(worker, "utf-8")
    monkeypatch.setattr(sandbox, "_WORKER", changed)
    with pytest.raises(TritGgufError, match="nothing was run"):
        runs_to_its_end("pass")


@pytest.mark.parametrize(("platform", "machine"), [("win32", "AMD64"), ("darwin", "arm64"), ("linux", "riscv64")])
def test_other_systems_are_refused(platform: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(TritGgufError, match="can only be confined on Linux"):
        runs_to_its_end("pass")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_only_what_it_names(machine: str) -> None:
    """An interpreter of the filter's instructions gives the verdict on every system call."""
    audit, openat, allowed = sandbox_worker._PROCESSORS[machine]
    program = sandbox_worker.filter_program(machine)
    assert {number for number in range(600) if verdict(program, audit, number, 0)} == {*allowed, openat}
    for flags in (1, 2, 0o100, 0o1000, 0o2000001):
        assert not verdict(program, audit, openat, flags)
    assert verdict(program, audit, openat, 0o2000000)  # O_CLOEXEC
    assert not verdict(program, audit, 0x40000000 + allowed[0], 0)
    assert not verdict(program, audit ^ 1, allowed[0], 0)


def verdict(program: bytes, audit: int, number: int, third_argument: int) -> bool:
    """Return whether the filter lets a system call through."""
    data = {0: number, 4: audit, 32: third_argument}
    steps = [
        (int.from_bytes(program[at : at + 2], sys.byteorder), program[at + 2], program[at + 3],
         int.from_bytes(program[at + 4 : at + 8], sys.byteorder))
        for at in range(0, len(program), 8)
    ]  # fmt: skip
    place = value = 0
    while True:
        code, jump_true, jump_false, operand = steps[place]
        place += 1
        if code == 0x20:
            value = data[operand]
        elif code == 0x54:
            value &= operand
        elif code == 0x06:
            return operand == 0x7FFF0000
        else:
            holds = value == operand if code == 0x15 else value >= operand
            place += jump_true if holds else jump_false
