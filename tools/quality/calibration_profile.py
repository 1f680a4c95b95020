"""Show where calibration's processor time goes: a few blocks of a model on a few windows, with one thread.

    python -m tools.quality.calibration_profile models/SmolLM2-135M-Instruct --windows 8 --blocks 3

Processor time of one thread hardly depends on what else runs. To see a machine without AVX-512, set
ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Iterable

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tokenizers import Tokenizer

from cpu_kernels.threads.thread_pool import ThreadPool
from tools.quality import package_texts
from tools.quality.feedback_constants import quantized_names
from tritgguf.calibration.block_quantizer import BlockQuantizer
from tritgguf.conversion.plan import block_index
from tritgguf.sources.open import open_source


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="HF folder or hub id")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens (default 8)")
    parser.add_argument("--blocks", type=int, default=3, help="how many are measured, after one to warm up (default 3)")
    parser.add_argument("--lines", type=int, default=20, help="functions to show (default 20)")
    options = parser.parse_args()

    source = open_source(options.source)
    tokenizer = Tokenizer.from_str(source.metadata["tokenizer.huggingface.json"].value)
    windows = package_texts.windows_of(package_texts.texts()[0], tokenizer, options.windows)
    names = quantized_names(source, 1 + options.blocks)
    quantizer = BlockQuantizer(source, dict.fromkeys(names, options.depth), windows, ThreadPool(1))
    _quantize(quantizer, [name for name in names if block_index(name) == 0])  # loads libraries and kernels
    profile = cProfile.Profile(time.process_time)
    started = time.process_time()
    profile.runcall(_quantize, quantizer, [name for name in names if block_index(name) > 0])
    print(f"{(time.process_time() - started) / options.blocks:.2f} s of one processor for a block")
    pstats.Stats(profile).sort_stats("tottime").print_stats(options.lines)


def _quantize(quantizer: BlockQuantizer, names: Iterable[str]) -> None:
    for name in names:
        quantizer.quantize(name)


if __name__ == "__main__":
    main()
