"""`tritgguf serve` as a process: its options, signals, and what it says where it cannot start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import Capture, fails, run_python
from serving import MOST_SECONDS

from tritgguf.cli import app
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.serving import server
from tritgguf.serving.address import listening_socket


@contextmanager
def process(file: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server; yield its process and its URL."""
    command = [sys.executable, "-m", "tritgguf", "serve", str(file), "--port", "0", "-t", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        watchdog = threading.Timer(300, started.kill)
        watchdog.start()
        try:
            assert started.stderr is not None
            for line in started.stderr:
                if found := re.match(r"(http://127\.0\.0\.1:\d+) ", line):
                    yield started, found[1]
                    break
            else:
                pytest.fail("the server has not started")
        finally:
            started.kill()
            watchdog.cancel()


def test_a_server_starts_answers_and_ends(tiny_trit_file: Callable[..., GgufFile], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\n second \n", "utf-8")
    options = ("--api-key-file", str(keys), "--alias", "mine", "-c", "300", "--parallel", "2", "--no-page")
    with process(tiny_trit_file("qwen2", 2).path, *options) as (running, url):
        client = httpx.Client(base_url=url, headers={"Authorization": "Bearer second"}, timeout=MOST_SECONDS)
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        assert httpx.get(f"{url}/v1/models", timeout=MOST_SECONDS).status_code == 401
        assert client.get("/").status_code == 404
        props = client.get("/props").json()
        assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (2, 300)
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 40, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert running.wait(MOST_SECONDS) == 0
        assert running.stderr is not None
        assert running.stderr.read() == ""


def test_ctrl_c_ends_an_idle_server_and_a_killed_one_starts_again(tiny_trit_file: Callable[..., GgufFile]) -> None:
    file = tiny_trit_file("qwen2", 2).path
    with process(file) as (running, url):
        port = url.rpartition(":")[2]
        assert httpx.get(f"{url}/health", timeout=MOST_SECONDS).status_code == 200
        running.kill()
        running.wait()
    with process(file, "--port", port) as (running, url):
        assert httpx.get(f"{url}/health", timeout=MOST_SECONDS).status_code == 200
        os.kill(running.pid, signal.SIGINT)
        assert running.wait(MOST_SECONDS) == 0


def test_what_prevents_a_start(capsys: Capture, tmp_path: Path) -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port}: Address already in use" in fails(capsys, "serve", "any.gguf", "--port", port)
    assert "no name of a host" in fails(capsys, "serve", "any.gguf", "--host", "a" * 64)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfd")
    assert "binary" in fails(capsys, "serve", "any.gguf", "--api-key-file", str(binary))
    empty = tmp_path / "keys"
    empty.write_text("\n", "utf-8")
    assert "no key in it" in fails(capsys, "serve", "any.gguf", "--api-key-file", str(empty))
    assert "must not be empty" in fails(capsys, "serve", "any.gguf", "--api-key", "")
    assert "any.gguf" in fails(capsys, "serve", "any.gguf", "--port", "0")
    assert "cannot listen on nowhere.invalid" in fails(capsys, "serve", "any.gguf", "--host", "nowhere.invalid")


def test_the_second_of_two_that_start_together_says_why(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, serving_model: Any
) -> None:
    """Both can bind the address, because neither listens before its model is loaded."""
    monkeypatch.setattr("tritgguf.generation.loaded_model.load", lambda *_, **__: serving_model)
    with listening_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        second = listening_socket("127.0.0.1", port)
        first.listen()
        monkeypatch.setattr("tritgguf.serving.address.listening_socket", lambda *_: second)
        with second:
            assert app.main(["serve", "any.gguf", "--port", str(port)]) == 1
    assert f"error: cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_one_line_names_it(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from tritgguf.cli import app; sys.exit(app.main())"
    result = run_python("-c", code, "serve", "any.gguf")
    assert result.returncode == 1
    packages = "fastapi uvicorn prometheus_client llguidance"
    assert result.stderr == f"error: serve needs more packages: pip install {packages}\n"


def test_the_other_commands_do_not_import_the_server() -> None:
    code = "import sys, tritgguf.cli.app; assert not {'fastapi', 'uvicorn', 'tritgguf.serving'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_for_everybody_says_so(capsys: Capture, monkeypatch: pytest.MonkeyPatch, serving_model: Any) -> None:
    monkeypatch.setattr("tritgguf.generation.loaded_model.load", lambda *_, **__: serving_model)
    monkeypatch.setattr(server, "serve", lambda *_: None)
    assert app.main(["serve", "any.gguf", "--host", "0.0.0.0", "--port", "0"]) == 0
    assert "--api-key" in capsys.readouterr().err
    assert app.main(["serve", "any.gguf", "--port", "0"]) == 0
    assert "--api-key" not in capsys.readouterr().err
