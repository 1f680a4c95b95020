"""Measure the KL of constants of error feedback: one row for each setting, all on the same texts.

The calibration text is package descriptions and docstrings. The columns are the KL on other such text, on the text that
ships with `tritgguf verify`, which has mixed subjects, and on exam questions, which no constant is chosen by.

    python -m tools.quality.feedback_constants models/SmolLM2-135M-Instruct --depth 2 damping=0.05 windows=96

`windows` is the length of the calibration text, `tune=1` also trains each block, `whole_stream=0` leaves the stream's
error alone; all others are constants of `ErrorFeedback`.

Without settings, it measures the default constants and each of them changed.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before importing torch: else page faults take half of the time

import numpy as np
from tokenizers import Tokenizer

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.quality import package_texts
from tools.quality.three_texts import HEADER, ThreeTexts, columns
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.block_quantizer import BlockQuantizer
from tritgguf.calibration.error_feedback import ErrorFeedback
from tritgguf.calibration.tuning import Tuning
from tritgguf.conversion.plan import block_index
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source
from tritgguf.sources.source import Source

SETTINGS = (
    *("", "damping=0.05", "damping=0.2", "few_inputs_damping=0"),
    *("correction=0", "whole_stream=0", "act_order=0", "sweeps=0", "sweeps=3", "windows=96"),
)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="HF folder or hub id")
    parser.add_argument(
        "settings", nargs="*", help="NAME=VALUE; several, separated by commas, for one row", default=SETTINGS
    )
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=1 << 30, help="quantize only the first N blocks (default all)")
    parser.add_argument("--evaluate", type=int, default=12, help="windows of 512 tokens, of each text (default 12)")
    options = parser.parse_intermixed_args()  # settings may follow options

    source = open_source(options.source)
    tokenizer = Tokenizer.from_str(source.metadata["tokenizer.huggingface.json"].value)
    depths = dict.fromkeys(quantized_names(source, options.blocks), options.depth)
    calibration = package_texts.texts()[0]
    texts = ThreeTexts(source, [options.evaluate] * 3)
    print(f"{HEADER}  seconds", flush=True)
    for setting in options.settings:
        values = dict(parsed(part) for part in setting.split(",") if part)
        some = package_texts.windows_of(calibration, tokenizer, values.pop("windows", 32))
        started = time.perf_counter()
        quantize(source, depths, some, values, texts.model)
        seconds = time.perf_counter() - started
        print(f"{setting or 'as it is':40}{columns(texts.compare())}  {seconds:7.0f}", flush=True)


def parsed(setting: str) -> tuple[str, Any]:
    """Return the name and the number of NAME=VALUE."""
    name, _, value = setting.partition("=")
    return name, int(value) if value.isdigit() else float(value)


def quantized_names(source: Source, blocks: int) -> list[str]:
    """Return the matrices of the first blocks, in their order."""
    names = (tensor.name for tensor in source.tensors if quantized_tensor(tensor.name))
    return sorted((name for name in names if block_index(name) < blocks), key=block_index)


def quantize(
    source: Source, depths: dict[str, int], windows: list[list[int]], settings: dict[str, Any], model: ReferenceModel
) -> None:
    """Load the model with matrices quantized with these settings of `ErrorFeedback`, and the others as they are."""
    options: dict[str, Any] = {"whole_stream": bool(settings.pop("whole_stream", True))}
    options["tuning"] = Tuning() if settings.pop("tune", False) else None
    options["feedback"] = partial(ErrorFeedback, **settings)
    quantizer = BlockQuantizer(source, depths, windows, ThreadPool(None), **options)
    decoded = {name: quantizer.quantize(name).decoded() for name in depths}

    def read(name: str) -> np.ndarray:
        return decoded[name] if name in decoded else source.read(name)

    metadata = {key: value.value for key, value in source.metadata.items()}
    model.load_tensors(metadata, [tensor.name for tensor in source.tensors], read, source.name)


if __name__ == "__main__":
    main()
