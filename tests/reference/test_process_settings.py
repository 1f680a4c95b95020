"""What torch and transformers keep for the whole process is put back, whatever happens."""

from __future__ import annotations

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
from tritgguf.reference.process_settings import ProcessSetting, fast_products, silent_transformers, torch_threads
from tritgguf.sources.open import open_source

WINDOWS = [[3, 4, 5, 6]] * 2
OTHER_THREADS = torch.get_num_threads() + 3


def state() -> tuple[Any, ...]:
    """All that we change of the process."""
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
def test_computing_leaves_the_process_as_it_was(
    compute: Callable[[Any, Path], object], source: Any, tmp_path: Path
) -> None:
    before = state()
    compute(source, tmp_path)
    assert state() == before


def test_our_own_computation_has_the_threads_that_were_asked_for(source: Any) -> None:
    seen: list[int] = []

    def look(*anything: Any) -> None:
        seen.append(torch.get_num_threads())

    model = ReferenceModel.open(source, threads=OTHER_THREADS)
    model.module.register_forward_hook(look)
    model.logits([3, 4])
    blocks = DecoderBlocks(source, threads=OTHER_THREADS)
    hidden = blocks.embed(WINDOWS)
    with blocks.block(0) as block:
        look()
        block.forward(hidden, {"blk.0.ffn_up.weight": look})
    assert seen == [OTHER_THREADS] * 3


@pytest.mark.parametrize("setting", [lambda: torch_threads(OTHER_THREADS), fast_products, silent_transformers])
def test_a_setting_ends_with_its_block(setting: Callable[[], AbstractContextManager[None]]) -> None:
    before = state()
    with pytest.raises(KeyError), setting():
        assert state() != before
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("setting", [lambda: torch_threads(OTHER_THREADS), fast_products, silent_transformers])
def test_blocks_that_overlap(setting: Callable[[], AbstractContextManager[None]]) -> None:
    before = state()
    first, second = setting(), setting()
    first.__enter__()
    inside = state()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() == inside
    second.__exit__(None, None, None)
    assert state() == before


def test_no_number_of_threads_leaves_it_to_torch() -> None:
    before = state()
    with torch_threads(None):
        assert state() == before


def test_blocks_with_values_of_their_own() -> None:
    value = [0]
    setting = ProcessSetting(lambda: value[0], lambda new: value.__setitem__(0, new))
    with setting.held(1):
        with setting.held(2):
            assert value == [2]
        assert value == [1]
    assert value == [0]


def test_a_value_that_is_refused() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), torch_threads(-1):
        pass
    assert torch.get_num_threads() == before


def test_blocks_of_many_threads() -> None:
    value = [0]
    setting = ProcessSetting(lambda: value[0], lambda new: value.__setitem__(0, new))

    def work() -> None:
        for _ in range(1000):
            with setting.held(7):
                assert value == [7]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value == [0]


def test_the_environment_is_left_alone() -> None:
    script = (
        "import os\nfrom tritgguf.reference.model import require_torch\n"
        "before = dict(os.environ)\nrequire_torch()\nprint(dict(os.environ) == before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "True"
