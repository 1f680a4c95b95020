"""Where should encoder v2's codebook begin? KL for several quantiles of the wanted scales.

    python tools/lowest_scale.py models/SmolLM2-135M-Instruct --depths 2,3 --windows 12

The published codec does not say how the lowest entry is chosen; `tritgguf/codec.py` takes the quantile that
came out best here (docs/quality.md). The text is the METADATA files of the installed packages, spread evenly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.metadata import distributions

import numpy as np
from divergence import divergence
from tokenizers import Tokenizer

from cpu_kernels.unpack import dequantize
from tritgguf import codec
from tritgguf.architectures import quantized_tensor
from tritgguf.checkpoint import Source, open_source
from tritgguf.reference_model import ReferenceModel
from tritgguf.verify import Comparison, split_windows

WINDOW_TOKENS = 512


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="HF folder or hub id")
    parser.add_argument("--depths", default="2,3", help="depths, separated by commas (default 2,3)")
    parser.add_argument("--quantiles", default="0,0.0005,0.005,0.02,0.05", help="separated by commas")
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens (default 12)")
    options = parser.parse_args()

    source = open_source(options.source)
    windows = list(evaluation_windows(source, options.windows))
    reference = ReferenceModel.open(source)
    expected = [reference.logits(window) for window in windows]
    print("depth  quantile      KL  top-1  perplexity", flush=True)
    for depth in map(int, options.depths.split(",")):
        for quantile in map(float, options.quantiles.split(",")):
            codec.LOWEST_QUANTILE = quantile
            result = evaluate(source, depth, reference, windows, expected)
            print(
                f"{depth:5}  {quantile:8}  {result.kl_mean:6.4f}  {result.top1_agreement:5.3f}"
                f"  {result.perplexity:10.3f}",
                flush=True,
            )


def evaluation_windows(source: Source, count: int) -> Iterator[list[int]]:
    """Yield `count` windows of tokens from evenly spread places of the packages' METADATA."""
    text = "".join(sorted(str(package.read_text("METADATA")) for package in distributions()))[:3_000_000]
    tokenizer = Tokenizer.from_str(source.metadata["tokenizer.huggingface.json"].value)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for start in np.linspace(0, len(ids) - WINDOW_TOKENS, count).astype(int):
        yield from split_windows(ids[start:], count=WINDOW_TOKENS, window=WINDOW_TOKENS, bos=None)


def evaluate(
    source: Source, depth: int, model: ReferenceModel, windows: list[list[int]], expected: list[np.ndarray]
) -> Comparison:
    """Quantize the model's matrices with encoder v2 and compare its logits with the expected ones."""

    def read(name: str) -> np.ndarray:
        weights = source.read(name)
        if not quantized_tensor(name):
            return weights
        matrix = codec.quantize(weights, depth, "v2")
        return dequantize(matrix.pack(), matrix.codebook, depth)

    metadata = {key: value.value for key, value in source.metadata.items()}
    model.load_tensors(metadata, [tensor.name for tensor in source.tensors], read, source.name)
    return divergence(windows, expected, map(model.logits, windows))


if __name__ == "__main__":
    main()
