"""Measure the KL to the FP16 model of our encoders and llama.cpp's types, on one text.

    python -m tools.quality.compare_encoders --output quality.json --plot docs/quality.svg --markdown
    python -m tools.quality.compare_encoders --model qwen2.5-coder-1.5b --rows trit2-v2,Q3_K-imatrix --files build

Our rows are files that `convert` writes, dequantized and run by transformers. For llama.cpp's rows, libggml quantizes
every packed matrix. Calibration and evaluation text are disjoint (`package_texts.py`). `self` rows are calibrated on
text that the model itself generates.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before importing torch: else page faults take half of the time

import numpy as np
import typer
from tokenizers import Tokenizer

from cpu_kernels.threads.thread_pool import ThreadPool
from tools import tool_command
from tools.llama_cpp import binaries
from tools.llama_cpp.ggml_types import GgmlQuantizer, bits_per_weight
from tools.llama_cpp.referee import build_referee
from tools.quality import chart, package_texts
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.calibration.importance import summed_squares
from tritgguf.cli import terminal
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice
from tritgguf.conversion.own_text import SavedText, self_generated_windows
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.divergence import Comparison, compare_windows
from tritgguf.formats import svg
from tritgguf.formats.description import describe
from tritgguf.formats.durable_output import write_text
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.reference.model import ReferenceModel
from tritgguf.sources.open import open_source

MODELS = {
    "smollm2": ("SmolLM2-135M-Instruct", 16, 128),
    "qwen2.5-coder-1.5b": ("Qwen2.5-Coder-1.5B-Instruct", 6, 32),
    "small-olmoe": ("small-olmoe", 16, 128),  # of `tools.models.train_mixture`
}
"""Name -> folder in models/, number of windows to evaluate, number of windows to calibrate on."""
ENCODERS = ("v2", "best", "imatrix", "calibrated", "self")
TARGETS = ("2.5", "3.0", "4.0", "4.5")
TYPES = ("Q2_K", "Q3_K", "IQ3_S", "Q4_0", "IQ4_NL")
ROWS = (
    *(f"trit{depth}-{encoder}" for depth in (1, 2) for encoder in (*ENCODERS, "tuned")),
    *(f"trit{depth}-{encoder}" for depth in (3, 4) for encoder in ENCODERS),
    *(f"mixed-{target}" for target in TARGETS),
    *(f"{name}{suffix}" for name in TYPES for suffix in ("", "-imatrix")),
)


@dataclass(frozen=True)
class Row:
    """The loss of one file or type; divergences in nats."""

    name: str
    bpw: float
    kl_mean: float
    kl_p99: float
    perplexity: float
    top1_agreement: float
    seconds: float


class Measurement:
    """One model, its texts, and what several rows need; computed when it is first used.

    Args:
        model: a name of `MODELS`.
        models: their folder.
        threads: processor cores to use; None for all.
        files: folder where the rows' files stay; existing files are used again.
        windows: number of windows to evaluate and to calibrate on; None means those of `MODELS`.

    """

    def __init__(
        self,
        model: str,
        models: Path,
        threads: int | None,
        files: Path | None = None,
        windows: tuple[int, int] | None = None,
    ) -> None:
        self._files = files
        folder, *default_windows = MODELS[model]
        evaluation_windows, calibration_windows = windows or default_windows
        self._thread_pool = ThreadPool(threads)
        self._path = models / folder
        if not self._path.is_dir():
            raise TritGgufError(f"{self._path}: is not there; fetch it with python -m tools.models.fetch_model {model}")
        self._source = open_source(str(self._path))
        self._tokenizer = Tokenizer.from_str(self._source.metadata["tokenizer.huggingface.json"].value)
        calibration, evaluation = package_texts.texts()
        self.calibration = package_texts.windows_of(calibration, self._tokenizer, calibration_windows)
        self.evaluation = package_texts.windows_of(evaluation, self._tokenizer, evaluation_windows)

    def describe(self) -> dict[str, Any]:
        """Return a description of the texts, for the JSON."""
        return {
            "calibration_tokens": sum(map(len, self.calibration)),
            "calibration_text": package_texts.fingerprint(self.calibration),
            "evaluation_tokens": sum(map(len, self.evaluation)),
            "evaluation_text": package_texts.fingerprint(self.evaluation),
            "perplexity_fp16": self._perplexity(),
        }

    def row(self, name: str) -> Row:
        """Measure one row of `ROWS`."""
        started = time.perf_counter()
        kind, _, encoder = name.partition("-")
        if kind in TYPES:
            bits, compared = bits_per_weight(kind), self._llama_cpp_row(kind, with_importance=bool(encoder))
        elif kind == "mixed":
            bits, compared = self._trit_row(name, 2, "calibrated", DepthChoice(target_bpw=float(encoder)))
        else:
            bits, compared = self._trit_row(name, int(kind.removeprefix("trit")), encoder, DepthChoice())
        seconds = time.perf_counter() - started
        return Row(
            name,
            bits,
            compared.kl_mean,
            compared.kl_p99,
            compared.perplexity,
            compared.top1_agreement,
            round(seconds, 1),
        )

    @functools.cached_property
    def _model(self) -> ReferenceModel:
        return ReferenceModel.open(self._source, threads=self._thread_pool.threads)

    @functools.cached_property
    def _expected(self) -> list[np.ndarray]:
        """The original model's logits: float32 [tokens, vocabulary] of each window."""
        model = ReferenceModel.open(self._source, threads=self._thread_pool.threads)
        return [model.logits(window) for window in self.evaluation]

    @functools.cached_property
    def _importance(self) -> dict[str, np.ndarray]:
        sums, counts = summed_squares(self._source, self.calibration, threads=self._thread_pool.threads)
        return {name: (total / counts[name]).astype(np.float32) for name, total in sums.items() if counts[name]}

    @functools.cached_property
    def _own_text(self) -> list[list[int]]:
        tokens = sum(map(len, self.calibration))
        saved = SavedText(self._files / f"{self._path.name}-self", resume=True) if self._files else None
        return self_generated_windows(self._source, tokens, threads=self._thread_pool.threads, saved=saved)

    def _trit_row(self, name: str, depth: int, encoder: str, choice: DepthChoice) -> tuple[float, Comparison]:
        with tempfile.TemporaryDirectory(prefix="tritgguf-") as folder:
            path = (self._files or Path(folder)) / f"{self._path.name}-{name}.gguf"
            if not path.exists():
                self._convert(path, depth, encoder, choice)
            self._model.load_file(GgufFile(path))
            bits = describe(path).bits_per_weight_quantized
        return bits or 0.0, self._compare()

    def _convert(self, path: Path, depth: int, encoder: str, choice: DepthChoice) -> None:
        """Write a row's file; an interrupted conversion is resumed."""
        settings: dict[str, Any] = {"encoder": encoder, "recipe": "published"}  # the layers alone are compared
        if encoder == "imatrix":
            settings["importance"] = self._importance
        if encoder == "self":
            settings |= {"encoder": "calibrated", "windows": self._own_text}
        if encoder in ("calibrated", "tuned"):
            settings["windows"] = self.calibration
        threads = self._thread_pool.threads
        convert(self._path, path, depth=depth, choice=choice, threads=threads, resume=True, **settings)

    def _llama_cpp_row(self, kind: str, *, with_importance: bool) -> Comparison:
        quantizer = GgmlQuantizer(build_referee(binaries.cache_folder()), self._thread_pool)

        def read(name: str) -> np.ndarray:
            weights = self._source.read(name)
            if not quantized_tensor(name):
                return weights
            return quantizer.round_trip(weights, kind, self._importance[name] if with_importance else None)

        metadata = {key: value.value for key, value in self._source.metadata.items()}
        self._model.load_tensors(metadata, [t.name for t in self._source.tensors], read, self._source.name)
        return self._compare()

    def compare_file(self, file: Path) -> Comparison:
        """Compare the model that is in any GGUF file with the original one."""
        source = open_source(file)
        metadata = {key: value.value for key, value in source.metadata.items()}
        self._model.load_tensors(metadata, [tensor.name for tensor in source.tensors], source.read, source.name)
        return self._compare()

    def write_calibration_text(self, file: Path) -> None:
        """Write the calibration text to a file."""
        write_text(file, "\n".join(self._tokenizer.decode(window) for window in self.calibration))

    def _compare(self) -> Comparison:
        """Compare the model with its present weights with the original one."""
        return compare_windows(self.evaluation, self._expected, map(self._model.logits, self.evaluation))

    def _perplexity(self) -> float:
        return compare_windows(self.evaluation, self._expected, self._expected).perplexity_reference


def measure(
    measurement: Measurement, names: Sequence[str], result: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure rows one after the other into `result`; call `keep` after each."""
    for name in names:
        row = measurement.row(name)
        rows = [old for old in result["rows"] if old["name"] != name]
        result["rows"] = sorted([*rows, vars(row)], key=lambda row: ROWS.index(row["name"]))
        terminal.note(f"{name}: KL {row.kl_mean:.4f}, {row.bpw:.2f} bits per weight, {row.seconds:.0f} s")
        keep(result)


def markdown(result: dict[str, Any]) -> str:
    """Return the rows as a table for the documentation."""
    lines = [
        "| | bits per weight | KL, mean | KL, 99th percentile | perplexity | same top token |",
        "|---|---|---|---|---|---|",
        f"| FP16 | 16 | 0 | 0 | {result['text']['perplexity_fp16']:.2f} | 100 % |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['name']} | {row['bpw']:.2f} | {row['kl_mean']:.4f} | {row['kl_p99']:.2f}"
            f" | {row['perplexity']:.2f} | {100 * row['top1_agreement']:.1f} % |"
        )
    return "\n".join(lines)


def main(
    model: Annotated[str, typer.Option(help=" or ".join(MODELS))] = "smollm2",
    rows: Annotated[str | None, typer.Option(help="Comma-separated; default: all that --output lacks.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file, continued after every row.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file for KL over bits per weight.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show what --output has, of --rows if given; measure nothing.")
    ] = False,
    models: Annotated[Path, typer.Option(help="Folder of the models.")] = Path("models"),
    files: Annotated[
        Path | None, typer.Option(help="Folder that keeps the files MODEL-ROW.gguf and own text for later runs.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Measure the loss of our quantization and llama.cpp's, as KL to the FP16 model."""
    if model not in MODELS:
        raise typer.BadParameter(f"choose from {', '.join(MODELS)}", param_hint="--model")
    unknown = [name for name in (rows or "").split(",") if name and name not in ROWS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(ROWS)}", param_hint="--rows")
    result: dict[str, Any] = {"model": model, "rows": []}
    if output is not None and output.exists():
        result = json.loads(output.read_text("utf-8"))
        if result["model"] != model:
            raise typer.BadParameter(f"{output} is about {result['model']}", param_hint="--output")

    def keep(state: dict[str, Any]) -> None:
        if output is not None:
            write_text(output, json.dumps(state, indent=1) + "\n")

    if not show:
        measurement = Measurement(model, models, threads, files)
        text = measurement.describe()
        if result["rows"] and result["text"]["evaluation_text"] != text["evaluation_text"]:
            raise typer.BadParameter(f"{output} is about another text; begin a new file", param_hint="--output")
        result["text"] = text
        there = {row["name"] for row in result["rows"]}
        names = rows.split(",") if rows else [name for name in ROWS if name not in there]
        measure(measurement, names, result, keep)
    if plot is not None:
        svg.write(plot, chart.draw(result))
    if show and rows:
        result["rows"] = [row for row in result["rows"] if row["name"] in rows.split(",")]
    if as_json:
        terminal.print_json(result)
    else:
        print(markdown(result))


if __name__ == "__main__":
    tool_command.run(main)
