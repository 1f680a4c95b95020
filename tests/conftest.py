"""Fixtures for all tests: the real models, and conversions of models that are made once."""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from real_models import MODELS
from tiny_models import write_tiny_model

from cpu_kernels import precompile
from cpu_kernels.compilation.kernel import compilation_listeners
from cpu_kernels.simd import instruction_set, variants
from cpu_kernels.threads import thread_pool
from cpu_kernels.threads.cores import physical_cores
from tritgguf.formats.gguf_file import GgufFile

if TYPE_CHECKING:
    from serving import RunningServer

    from tritgguf.generation.loaded_model import LoadedModel

settings.register_profile(
    "tritgguf",
    deadline=None,
    max_examples=30,
    derandomize=bool(os.environ.get("CI")),
    # The fixtures that property tests use (paths, environment variables) may be shared by their examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tritgguf")

# Tests start some hundred programs; each would compile all sources again where an environment says so, as in images.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Whoever starts this in the background may make it ignore Ctrl-C or a hangup, and with it all programs of the tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No test asks the Hugging Face hub: those of downloads have a hub of their own (`loopback_hub`).
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor does any keep logits on this machine, unless in a folder of its own.
os.environ["TRITGGUF_LOGITS"] = "0"

# Files of tests that take the longest. They begin first, so that the workers of pytest-xdist end together.
LONGEST = (
    "evaluation/test_verify.py",
    "serving/test_langchain.py",
    "architectures/test_families.py",
    "referee/test_against_llama_cpp.py",
    "runtime/test_model.py",
    "cpu_kernels/transformer/test_gemv_batch.py",
    "exporters/test_hf_folder.py",
    "tools/fuzz/test_fuzzer.py",
    "cpu_kernels/transformer/test_attention.py",
    "serving/test_page.py",
    "serving/test_openapi.py",
    "test_packaging.py",
    "generation/test_json_schemas.py",
    "tools/quality/test_compare_encoders.py",
    "cli/test_faults.py",
    "cli/test_chat_at_a_terminal.py",
    "cpu_kernels/transformer/test_gemm.py",
    "serving/test_lm_eval.py",
    "lm_eval/test_evaluate.py",
    "serving/test_scheduling.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Share the processors among the workers of pytest-xdist; compile the kernels meanwhile.

    Programs with a thread for every processor would wait for one another's threads, two or three times as long.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        number, workers = os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"), os.environ["PYTEST_XDIST_WORKER_COUNT"]
        if hasattr(os, "sched_setaffinity") and (share := sorted(os.sched_getaffinity(0))[int(number) :: int(workers)]):
            os.sched_setaffinity(0, share)
    elif config.getoption("numprocesses", None):
        program, silent = Path(__file__).parent / "support" / "compile_kernels.py", subprocess.DEVNULL
        command = [sys.executable, str(program)]
        compiling = subprocess.Popen(command, cwd=config.rootpath, stdin=silent, stdout=silent, stderr=silent)
        config.add_cleanup(compiling.kill)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Let `-n auto` use both processors of a small machine, hyperthreads or not, and no more cores than it may use."""
    return max(physical_cores(), min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take the longest."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Keep the collector of garbage away from what the tests are made of, and from tests that compile.

    Each takes a tenth of the time of those that compile.
    """
    gc.collect()
    gc.freeze()
    compilation_listeners.append(gc.disable)


def pytest_runtest_teardown() -> None:
    """Let the collector work again."""
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine, as other people's suites have them."""
    if not inspect.iscoroutinefunction(pyfuncitem.function):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    _event_loop().run_until_complete(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all such tests: clients that they share keep connections in it."""
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


def _fetched(name: str) -> Path:
    """Return a path in models/; if it is missing, skip the test, or fail it in CI."""
    path = MODELS / name
    if not path.exists():
        message = f"models/{name} is not here; fetch it with `make fetch`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def _variants() -> Iterator[Any]:
    """Return this processor's instruction-set variants; kernels of all but the one in use are compiled by the tests."""
    in_use = instruction_set.choose()
    for name, isa in variants.NAMES.items():
        if isa in instruction_set.supported():
            yield pytest.param(name, marks=() if isa == in_use else pytest.mark.slow)


@pytest.fixture(params=_variants())
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test once with each instruction-set variant that this processor has, also in pools of earlier tests."""
    monkeypatch.setenv(instruction_set.ENVIRONMENT_VARIABLE, request.param)
    monkeypatch.setenv(precompile.LAZY_VARIABLE, "1")  # a test needs few kernels of each variant
    _let_pools_choose_again()
    yield str(request.param)
    _let_pools_choose_again()


def _let_pools_choose_again() -> None:
    """Let thread pools forget the instruction set that they chose, which the environment may have named."""
    for pool in list(thread_pool._POOLS):
        vars(pool).pop("isa", None)


@pytest.fixture(scope="session")
def referee_library() -> Path:
    """The library that calls llama.cpp; if it is not built, skip the test, or fail it in CI if it can be built."""
    from tools.llama_cpp.binaries import cache_folder
    from tools.llama_cpp.referee import find_referee, missing_programs

    found = find_referee(cache_folder())
    if found is None:
        message = "llama.cpp's library is not built; build it with `make referee`"
        if os.environ.get("CI") and not missing_programs():
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct in FP16."""
    return _fetched("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Stock GGUF file of SmolLM2-135M-Instruct, the same weights."""
    return _fetched("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def trit_file(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function from a depth to SmolLM2 packed at it; each file is made once, so do not change it."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.mktemp("smollm2")

    def convert_once(depth: int) -> Path:
        from tritgguf.conversion.convert import convert

        output = folder / f"smollm2-d{depth}.gguf"
        with precompile.locked(output.with_suffix(".lock")):
            if not output.exists():
                convert(smollm2_folder, output, depth=depth, recipe="published")
        return output

    return convert_once


@pytest.fixture(scope="session")
def smollm2_d2(trit_file: Callable[[int], Path]) -> Path:
    """SmolLM2 packed at depth 2."""
    return trit_file(2)


@pytest.fixture(scope="session")
def smollm2_d3(trit_file: Callable[[int], Path]) -> Path:
    """SmolLM2 packed at depth 3."""
    return trit_file(3)


@pytest.fixture(scope="session")
def tiny_trit_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., GgufFile]:
    """Return a function from a variant of `tiny_models` and a depth to an open trit file; each is made once."""
    folder, files = tmp_path_factory.mktemp("tiny"), dict[tuple[str, int], GgufFile]()

    def open_file(variant: str = "llama", depth: int = 2) -> GgufFile:
        from tritgguf.conversion.convert import convert

        if (variant, depth) not in files:
            output, source = folder / f"{variant}-{depth}.gguf", folder / variant
            convert(
                source if source.exists() else write_tiny_model(source, variant),
                output,
                depth=depth,
                recipe="published",
            )
            files[variant, depth] = GgufFile(output)
        return files[variant, depth]

    return open_file


@pytest.fixture(scope="session")
def tiny_lfm2_file(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    """A tiny model with short convolutions; see `tiny_convolutions`."""
    from tiny_convolutions import write_tiny_lfm2

    from tritgguf.conversion.convert import convert

    folder = tmp_path_factory.mktemp("lfm2")
    convert(write_tiny_lfm2(folder / "source"), folder / "lfm2.gguf", depth=2, recipe="published")
    return GgufFile(folder / "lfm2.gguf")


@pytest.fixture(scope="session")
def tiny_qwen35_file(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    """A tiny model with states; see `tiny_states`."""
    from tiny_states import write_tiny_qwen35

    from tritgguf.conversion.convert import convert

    folder = tmp_path_factory.mktemp("qwen35")
    convert(write_tiny_qwen35(folder / "source"), folder / "qwen35.gguf", depth=2, recipe="published")
    return GgufFile(folder / "qwen35.gguf")


@pytest.fixture(scope="session")
def serving_model(tiny_trit_file: Callable[..., GgufFile]) -> LoadedModel:
    """A tiny model for several requests at once; its context is 640 tokens."""
    from tritgguf.generation.loaded_model import load

    return load(tiny_trit_file("qwen2", 2).path, context=640, parallel=4)


@pytest.fixture(scope="session")
def server(serving_model: LoadedModel) -> Iterator[RunningServer]:
    """A server of the tiny model, named tiny."""
    from serving import running_server

    with running_server(serving_model, alias="tiny", queue=1000) as running:
        yield running
