"""The fuzzer: it notices every kind of finding, repeats a case, and runs a few cases of every target."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_bytes import trit_bytes

from tools.fuzz import fuzzer
from tools.fuzz.mutations import MarkedBytes, mark_gguf, mutate_bytes, mutate_json
from tritgguf.errors import TritGgufError

ROOT = Path(__file__).parents[3]


def findings(run: Callable[[random.Random], object], *, cases: int = 5, first: int = 0) -> list[str]:
    result = fuzzer.Result("test")
    fuzzer.fuzz(lambda: run, result, seed=1, first=first, cases=cases, seconds=60)
    assert result.cases == cases
    return result.findings


def only_the_third(action: Callable[[], object]) -> Callable[[random.Random], object]:
    """Return a target that does something in its third case only."""
    third = random.Random("1 2").random()
    return lambda chance: action() if chance.random() == third else None


def test_nothing_is_found_where_nothing_is() -> None:
    assert findings(lambda chance: None) == []


def test_short_cases_are_not_taken_for_ones_that_hang() -> None:
    assert findings(lambda chance: None, cases=100_000) == []


def test_an_exception_is_a_finding() -> None:
    (finding,) = findings(only_the_third(lambda: struct.unpack("<Q", b"")))
    assert finding.startswith("test seed 1 case 2: error: ")
    assert "test_fuzzer.py" in finding


def test_a_crash_is_a_finding_and_the_rest_is_run() -> None:
    (finding,) = findings(only_the_third(lambda: os.kill(os.getpid(), signal.SIGSEGV)))
    assert finding == "test seed 1 case 2: dies of SIGSEGV"


def test_the_end_of_the_process_is_a_finding() -> None:
    (finding,) = findings(only_the_third(lambda: os._exit(3)))
    assert finding == "test seed 1 case 2: ends the process"


def test_a_hang_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzer, "MOST_SECONDS_PER_CASE", 1.0)
    (finding,) = findings(only_the_third(lambda: time.sleep(30)))
    assert finding.startswith("test seed 1 case 2: takes more than")


def test_a_read_outside_of_the_memory_is_a_crash() -> None:
    """Reading past the end of a guarded buffer crashes the process."""
    import ctypes

    import numpy as np

    from tools.fuzz.targets import _guarded

    def read_on(chance: random.Random) -> None:
        with _guarded(np.zeros(100, np.uint8)) as data:
            ctypes.string_at(data.ctypes.data, 101 if chance.random() < 2 else 100)

    assert findings(read_on, cases=1) == ["test seed 1 case 0: dies of SIGSEGV"]


def test_a_case_can_be_repeated() -> None:
    def note(chance: random.Random) -> None:
        raise TritGgufError(str(chance.random()))

    again = findings(note, cases=1, first=3)
    assert findings(note, cases=5)[3] == again[0]


def test_the_fields_of_a_header_are_marked(tmp_path: Path) -> None:
    path = trit_bytes().write(tmp_path / "a.gguf")
    marked = mark_gguf(str(path))
    assert bytes(marked.data) == path.read_bytes()
    values = [int.from_bytes(marked.data[start : start + size], "little") for start, size in marked.integers]
    assert values[:3] == [3, 2, 3]  # version, tensors, keys
    texts = [bytes(marked.data[start : start + size]) for start, size in marked.texts]
    assert texts[:2] == [b"general.architecture", b"llama"]
    assert {b"w", b"v"} <= set(texts)
    assert 10002 in values


def test_mutations_change_something_and_repeat_themselves() -> None:
    marked = MarkedBytes()
    for number in range(20):
        marked.integer(number, 8)
        marked.string("name")
    some = [mutate_bytes(marked, random.Random(number)) for number in range(200)]
    assert some == [mutate_bytes(marked, random.Random(number)) for number in range(200)]
    assert sum(data == bytes(marked.data) for data in some) < 20
    value = {"a": [1, 2, {"b": "text"}], "c": None}
    changed = [mutate_json(value, random.Random(number)) for number in range(200)]
    assert value == {"a": [1, 2, {"b": "text"}], "c": None}
    assert sum(repr(part) == repr(value) for part in changed) < 40


@pytest.mark.slow
def test_every_target_gets_through() -> None:
    """In a separate process: a fork of one with torch's threads would wait for them."""
    pytest.importorskip("torch")
    command = [sys.executable, "-m", fuzzer.__name__, "--cases", "20", "--seed", "7", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    results = json.loads(ended.stdout)
    assert [result["target"] for result in results] == list(fuzzer.TARGETS)
    for result in results:
        assert result["findings"] == []
        assert result["cases"] == 20
    assert ended.returncode == 0
