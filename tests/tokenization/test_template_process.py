"""The process that renders chat templates: its limits do not affect the parent, and it is replaced when it ends."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tritgguf.errors import BadRequestError, DamagedFileError, TritGgufError
from tritgguf.tokenization import template_process
from tritgguf.tokenization.template_process import Renderer

resource = pytest.importorskip("resource")

ECHO = "{{ text }}"
ENDLESS = 3 * "{% for a in range(9999) %}" + 3 * "{% endfor %}"
GREEDY = "{{ 'a' * 1000000000 }}"
# Compares 2**60 pairs in one operation, which signals cannot interrupt.
UNINTERRUPTIBLE = (
    "{% set n = namespace(a=[0], b=[0]) %}"
    "{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"
)


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Renderer]:
    monkeypatch.setattr(template_process, "MOST_SECONDS", 1.0)
    renderer = Renderer()
    yield renderer
    renderer.stop()


def child(renderer: Renderer) -> subprocess.Popen[bytes]:
    assert renderer._process is not None
    return renderer._process


def run_script(script: str) -> str:
    """Run a program from stdin, as if typed; return its output."""
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.strip()


def has_ended(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_ended(process_id: int) -> None:
    deadline = time.monotonic() + 60
    while not has_ended(process_id):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_several_threads_at_once(renderer: Renderer) -> None:
    texts = [f"{number} é \ud800 \n" * number for number in range(1, 200)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda text: renderer.render(ECHO, {"text": text}), texts)) == texts


@pytest.mark.parametrize("template", [ENDLESS, GREEDY, UNINTERRUPTIBLE])
def test_a_hostile_template_only_makes_other_threads_wait(renderer: Renderer, template: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        hostile = threads.submit(renderer.render, template, {})
        others = [threads.submit(renderer.render, ECHO, {"text": str(number)}) for number in range(20)]
        assert [other.result() for other in others] == [str(number) for number in range(20)]
        with pytest.raises(DamagedFileError, match=r"more than 1 seconds|too much memory"):
            hostile.result()


@pytest.mark.parametrize("template", [ECHO, ENDLESS, GREEDY])
def test_this_process_stays_unlimited(renderer: Renderer, template: str) -> None:
    def state() -> tuple[Any, ...]:
        return resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM), signal.getitimer(0)

    before = state()
    with ThreadPoolExecutor(1) as threads:
        rendering = threads.submit(renderer.render, template, {"text": "a"})
        while not rendering.done():
            assert state() == before
            time.sleep(0.001)
    assert state() == before
    with pytest.raises(DamagedFileError) if template != ECHO else threading.Lock():
        renderer.render(template, {"text": "a"})  # on the main thread
    assert state() == before


def test_a_killed_child_is_replaced(renderer: Renderer) -> None:
    for _ in range(3):
        assert renderer.render(ECHO, {"text": "a"}) == "a"
        child(renderer).kill()


def test_a_child_that_is_killed_at_work_is_replaced(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is tried twice."""
    asked: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    exchange = template_process._exchange

    def announced(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
        asked.put(process)
        return exchange(process, request, seconds)

    monkeypatch.setattr(template_process, "MOST_SECONDS", 60.0)
    monkeypatch.setattr(template_process, "_exchange", announced)
    with ThreadPoolExecutor(1) as threads:
        rendering = threads.submit(renderer.render, ENDLESS, {})
        first = asked.get(timeout=60)
        time.sleep(0.1)  # so that it works; it need not
        first.kill()
        second = asked.get(timeout=60)
        assert second is not first
        second.kill()
        with pytest.raises(DamagedFileError, match="the process that renders it ends"):
            rendering.result()


def test_a_child_that_cannot_work(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_CODE", "raise SystemExit(7)")
    with pytest.raises(TritGgufError, match="the process that renders it ends with code 7"):
        renderer.render(ECHO, {"text": "a"})


@pytest.mark.parametrize("executable", ["", "/nowhere/python"])
def test_no_interpreter_to_start(renderer: Renderer, monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    renderer.start()
    with pytest.raises(TritGgufError, match="--raw"):
        renderer.render(ECHO, {"text": "a"})


def test_a_frozen_program_does_not_start_itself(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(TritGgufError, match="need a Python interpreter"):
        renderer.render(ECHO, {"text": "a"})


def test_an_interrupted_wait_leaves_no_answer_behind(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
        assert process.stdin is not None
        process.stdin.write(request)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(template_process, "_exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            renderer.render(ECHO, {"text": "old"})
    assert renderer.render(ECHO, {"text": "new"}) == "new"


def test_ctrl_c_is_not_for_the_child(renderer: Renderer) -> None:
    renderer.render(ECHO, {"text": "a"})
    started = child(renderer)
    started.send_signal(signal.SIGINT)
    assert renderer.render(ECHO, {"text": "b"}) == "b"
    assert child(renderer) is started


def test_it_can_be_started_early(renderer: Renderer) -> None:
    renderer.start()
    started = child(renderer)
    renderer.start()
    assert renderer.render(ECHO, {"text": "a"}) == "a"
    assert child(renderer) is started


def test_stopping_ends_the_child(renderer: Renderer) -> None:
    renderer.render(ECHO, {"text": "a"})
    started = child(renderer)
    renderer.stop()
    assert started.returncode is not None
    assert renderer.render(ECHO, {"text": "a"}) == "a"


def test_values_that_json_cannot_hold(renderer: Renderer) -> None:
    with pytest.raises(BadRequestError, match="these messages"):
        renderer.render(ECHO, {"text": object()})


SCRIPT = """
import os, threading, time
from tritgguf.tokenization import template_process
from tritgguf.tokenization.template_process import _renderer, render_in_child

def echo(text):
    return render_in_child("{{ text }}", {"text": text})

assert echo("a") == "a"
print(_renderer._process.pid, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("last_words", ["", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_child_ends_with_its_parent(last_words: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT + last_words], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    wait_until_ended(int(parent.stdout.readline()))
    parent.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_busy_child_ends_soon_after_its_parent() -> None:
    busy = (
        f"template_process.MOST_SECONDS = 1.0\n"
        f"threading.Thread(target=render_in_child, args=({ENDLESS!r}, {{}})).start()\n"
        f"time.sleep(0.1)\nos.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT + busy], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    wait_until_ended(int(parent.stdout.readline()))
    parent.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_a_child_of_its_own() -> None:
    forked = """
with _renderer._lock:  # as if another thread were rendering
    fork = os.fork()
first = _renderer._process
for number in range(100):
    assert echo(f"{fork} {number}") == f"{fork} {number}"
if fork == 0:
    print("forked", first is None, flush=True)
    os._exit(0)
assert os.waitpid(fork, 0)[1] == 0
assert echo("b") == "b" and _renderer._process is first
print("whole")
"""
    assert run_script(SCRIPT + forked).splitlines()[1:] == ["forked True", "whole"]


def test_the_child_imports_little() -> None:
    heavy = "numpy numba tokenizers typer gguf tritgguf.tokenization.tokenizer"
    found = run_script(
        "import sys, tritgguf.tokenization.template_worker\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    assert found == "[]"
