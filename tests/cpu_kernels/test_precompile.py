"""All kernels are compiled once, before anything needs them: nothing is compiled afterwards, whatever runs."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

import cpu_kernels
from cpu_kernels import precompile
from cpu_kernels.all_kernels import all_kernels
from cpu_kernels.compilation import kernel_cache, loader
from cpu_kernels.compilation.kernel import Kernel
from cpu_kernels.simd import instruction_set
from cpu_kernels.simd.variants import PORTABLE, as_type, name_of

# Runs commands in one process and prints the kernels that were compiled there.
_PROGRAM = """
import sys
from cpu_kernels.compilation import kernel
from tritgguf.cli import app

compile_kernel = kernel.Kernel.compile

def compile_and_tell(self, types):
    print("numba compiles", self.py_func.__name__, types)
    return compile_kernel(self, types)

kernel.Kernel.compile = compile_and_tell
for command in sys.argv[1:]:
    code = app.main(command.split())
    assert code == 0, (command, code)
"""


def run_commands(*commands: str) -> tuple[str, str]:
    """Run commands with kernels compiled up front; return what was printed on stdout and stderr."""
    environment = {**os.environ}
    environment.pop(precompile.LAZY_VARIABLE, None)
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *commands], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_use(tmp_path: Path) -> None:
    source, text = write_tiny_model(tmp_path / "source", "llama"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    file = tmp_path / "d2.gguf"
    run_commands(f"convert {source} {file} --depth 2 --encoder v2")
    printed, errors = run_commands(
        *(f"convert {source} {tmp_path}/{depth}.gguf --depth {depth}" for depth in (1, 3, 4)),
        f"convert {source} {tmp_path}/best.gguf --depth 2 --encoder best",
        f"convert {source} {tmp_path}/calibrated.gguf --depth 2 --encoder calibrated --text {text} --tokens 64",
        f"run {file} -p hello -n 4",
        f"run {file} -p hello -n 4 --exact",
        f"run {file} -p hello -n 4 --prefill-bits 16",
        f"run {file} -p hello -n 4 --lookup",
        f"bench {file} -p 8 -n 2 -r 1",
        f"check {file}",
        f"export {file} {tmp_path}/folder --to hf",
        f"export {file} {tmp_path}/q8_0.gguf --to q8_0",
    )
    assert "numba compiles" not in printed
    assert "compiling" not in errors


def test_every_kernel_is_listed_with_its_arguments() -> None:
    listed = all_kernels(as_type(PORTABLE))
    for kernel, signatures in listed.items():
        arguments = len(inspect.signature(kernel.py_func).parameters)
        assert {len(signature) for signature in signatures} == {arguments}, kernel.__name__
    modules = pkgutil.walk_packages(cpu_kernels.__path__, "cpu_kernels.")
    names = [vars(importlib.import_module(module.name)) for module in modules]
    kernels = {value for module in names for value in module.values() if isinstance(value, Kernel)}
    assert {kernel.py_func.__name__ for kernel in kernels} == {kernel.py_func.__name__ for kernel in listed}


def test_a_lazy_process_compiles_nothing_up_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(precompile.LAZY_VARIABLE, "1")

    def fail() -> object:
        raise AssertionError("the compilation is shown, although there is none")

    assert not precompile.precompile(None, fail)  # type: ignore[arg-type]


def test_a_process_that_waits_for_another_one_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "folder", lambda: tmp_path)
    monkeypatch.delenv(precompile.LAZY_VARIABLE, raising=False)
    other = contextlib.ExitStack()

    @contextlib.contextmanager
    def display() -> Iterator[precompile.Progress]:
        (lock,) = tmp_path.glob("all-*.lock")
        lock.with_suffix(".complete").touch()
        other.close()
        yield lambda done, total: None

    name = kernel_cache.file_name("all", name_of(instruction_set.choose(None)))
    other.enter_context(precompile.locked((tmp_path / name).with_suffix(".lock")))
    assert precompile.precompile(None, display)
    assert not precompile.precompile(None, display)


def test_an_unknown_instruction_set_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(precompile.LAZY_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="sse9"):
        precompile.precompile("sse9", lambda: pytest.fail("nothing is compiled"))


def test_a_dying_worker_leaves_the_kernels_to_their_first_use(tmp_path: Path) -> None:
    """Kernels are compiled when they are needed if the processes for it cannot work."""
    program = (
        "import contextlib, sys\nfrom cpu_kernels import precompile\n"
        "sys.executable = '/bin/false'\n"
        "show = lambda: contextlib.nullcontext(lambda done, total: print(done))\n"
        "print(precompile.precompile('portable', show))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment.pop(precompile.LAZY_VARIABLE, None)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["0", "True"]
    assert not list(tmp_path.rglob("*.complete"))


@pytest.mark.slow
def test_every_shared_kernel_that_is_called_is_listed() -> None:
    kernels = all_kernels(instruction_set.chosen())
    listed = {kernel.symbol(types) for kernel, versions in kernels.items() for types in versions}
    for kernel, versions in kernels.items():
        for types in versions:
            content = kernel_cache.read(kernel.file_name(types)) or kernel.compile(types)
            called = loader.shared_symbols(content)
            assert set(called) <= listed, (kernel.__name__, called)
