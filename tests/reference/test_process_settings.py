"""Process-wide settings of torch and transformers are always restored."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_model
from transformers.utils import logging

from cpu_kernels.threads.thread_pool import ThreadPool
from tritgguf.calibration.importance import summed_squares
from tritgguf.calibration.sensitivity import measure_sensitivities
from tritgguf.conversion.convert import convert
from tritgguf.evaluation.layer_errors import layer_errors
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.decoder_blocks import DecoderBlocks
from tritgguf.reference.model import ReferenceModel
from tritgguf.reference.process_settings import ProcessSetting, bfloat16_matmul, silent_transformers, torch_threads
from tritgguf.sources.open import open_source

WINDOWS = [[3, 4, 5, 6]] * 2
OTHER_THREADS = torch.get_num_threads() + 3


def state() -> tuple[Any, ...]:
    """Return every process-wide setting that the package changes."""
    return (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.random.initial_seed(),
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        list(warnings.filters),
        {name: value for name, value in os.environ.items() if not name.startswith("TORCH")},  # torch sets its own
    )


@pytest.fixture
def source(tmp_path: Path) -> Any:
    return open_source(str(write_tiny_model(tmp_path / "model")))


def _calibrated(source: Any, folder: Path) -> None:
    convert(
        folder / "model", folder / "out.gguf", depth=2, encoder="calibrated", windows=WINDOWS, threads=OTHER_THREADS
    )


def _layer_errors(source: Any, folder: Path) -> None:
    convert(folder / "model", folder / "out.gguf", depth=2)
    layer_errors(source, GgufFile(folder / "out.gguf"), WINDOWS, threads=OTHER_THREADS)


@pytest.mark.parametrize(
    "compute",
    [
        lambda source, folder: ReferenceModel.open(source, threads=OTHER_THREADS).logits([3, 4]),
        lambda source, folder: ReferenceModel.open(source, threads=OTHER_THREADS).greedy([3, 4], 2),
        lambda source, folder: DecoderBlocks(source, threads=OTHER_THREADS).embed(WINDOWS),
        lambda source, folder: summed_squares(source, WINDOWS, threads=OTHER_THREADS),
        lambda source, folder: measure_sensitivities(
            source, ["blk.0.ffn_up.weight"], [2], WINDOWS, ThreadPool(OTHER_THREADS)
        ),
        _calibrated,
        _layer_errors,
    ],
)
def test_computing_restores_all_settings(compute: Callable[[Any, Path], object], source: Any, tmp_path: Path) -> None:
    before = state()
    compute(source, tmp_path)
    assert state() == before


def test_computing_uses_the_requested_threads(source: Any) -> None:
    seen: list[int] = []

    def record(*anything: Any) -> None:
        seen.append(torch.get_num_threads())

    model = ReferenceModel.open(source, threads=OTHER_THREADS)
    model.module.register_forward_hook(record)
    model.logits([3, 4])
    blocks = DecoderBlocks(source, threads=OTHER_THREADS)
    hidden = blocks.embed(WINDOWS)
    with blocks.block(0) as block:
        record()
        block.forward(hidden, {"blk.0.ffn_up.weight": record})
    assert seen == [OTHER_THREADS] * 3


@pytest.mark.parametrize("setting", [lambda: torch_threads(OTHER_THREADS), bfloat16_matmul, silent_transformers])
def test_a_setting_ends_with_its_context(setting: Callable[[], AbstractContextManager[None]]) -> None:
    before = state()
    with pytest.raises(KeyError), setting():
        assert state() != before
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("setting", [lambda: torch_threads(OTHER_THREADS), bfloat16_matmul, silent_transformers])
def test_overlapping_contexts(setting: Callable[[], AbstractContextManager[None]]) -> None:
    before = state()
    first, second = setting(), setting()
    first.__enter__()
    inside = state()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() == inside
    second.__exit__(None, None, None)
    assert state() == before


def test_threads_of_none_keep_torchs_setting() -> None:
    before = state()
    with torch_threads(None):
        assert state() == before


def test_nested_contexts_with_different_values() -> None:
    value = [0]
    setting = ProcessSetting(lambda: value[0], lambda new: value.__setitem__(0, new))
    with setting.set_to(1):
        with setting.set_to(2):
            assert value == [2]
        assert value == [1]
    assert value == [0]


def test_a_rejected_value() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), torch_threads(-1):
        pass
    assert torch.get_num_threads() == before


def test_contexts_in_many_threads() -> None:
    value = [0]
    setting = ProcessSetting(lambda: value[0], lambda new: value.__setitem__(0, new))

    def work() -> None:
        for _ in range(1000):
            with setting.set_to(7):
                assert value == [7]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value == [0]


def test_the_environment_is_restored() -> None:
    script = (
        "import os\nfrom tritgguf.reference.model import require_torch\n"
        "before = dict(os.environ)\nrequire_torch()\nprint(dict(os.environ) == before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_much_freed_memory_is_returned_and_a_little_is_kept() -> None:
    script = (
        "import numpy as np\n"
        "from tritgguf.machine import resident_bytes\n"
        "from tritgguf.reference import process_settings\n"
        "process_settings.import_torch()\n"
        "arrays = [np.ones(8 << 20, np.uint8) for _ in range(32)]\n"
        "last = np.ones(1 << 20, np.uint8)  # above the others: the heap cannot shrink\n"
        "del arrays\n"
        "for limit in (1 << 29, 1 << 26):\n"
        "    process_settings._MOST_FREED_BYTES, before = limit, resident_bytes()[0]\n"
        "    process_settings.return_freed_memory()\n"
        "    print(before - resident_bytes()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    kept, returned = map(int, done.stdout.split())
    assert kept < 1 << 24
    assert returned > 1 << 27
