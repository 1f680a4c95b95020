"""Measure the KL of whole files by their size: ours by recipe and depth, and llama-quantize's mixtures.

    python -m tools.quality.whole_files --files build --output files.json --plot docs/quality-files.svg
    python -m tools.quality.whole_files --output files.json --show

llama-imatrix measures the importance for llama-quantize on the text that ours are calibrated on. Files stay in the
folder `--files` and are used again. A mixture is marked where it can hit the grid of four-bit weights that the source
itself was made from: it then looks better than it is, and the table at equal size leaves it out.

A row of ours is a recipe and a depth (`small-d2`) or a size in megabytes (`size-85`), for which depths are chosen.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cpu_kernels.threads.thread_pool import ThreadPool
from tools import tool_command
from tools.llama_cpp import binaries
from tools.quality import chart
from tools.quality.compare_encoders import MODELS, Measurement
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.cli import terminal
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import DepthChoice, parse_rules
from tritgguf.errors import TritGgufError
from tritgguf.formats import svg
from tritgguf.formats.durable_output import write_text
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.text_format import format_bytes

OURS = tuple(f"{recipe}-d{depth}" for depth in (1, 2, 3, 4) for recipe in ("small", "balanced", "published"))
MIXTURES = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ3_XXS", "IQ3_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M")
_SIZE = "size-"
GRIDS = {"smollm2": "Q4_1", "qwen2.5-coder-1.5b": "Q4_K"}
"""Model -> the type that most of its source's weights were dequantized from (`tools/models/fetch_model.py`)."""
_HITTING = {"Q4_1": {"Q4_1", "Q5_1", "Q4_K", "Q5_K"}, "Q4_K": {"Q4_1", "Q5_1", "Q4_K", "Q5_K"}}
_SHARE_THAT_MARKS = 0.25  # of the bytes of the layers' matrices
_COLORS = {
    "small": "#8250df",
    "balanced": "#2f81c7",
    "published": "#9a9a9a",
    "size": "#0a3069",
    "llama.cpp, imatrix": "#a04a00",
    "llama.cpp, on the source's grid": "#d9b38c",
}


@dataclass(frozen=True)
class Row:
    """One file: its size and its loss. Divergences are in nats."""

    name: str
    file_bytes: int
    on_grid: bool
    kl_mean: float
    kl_p99: float
    perplexity: float
    top1_agreement: float
    seconds: float


class WholeFiles:
    """Makes and measures the files of one model.

    Args:
        model: a name of `GRIDS`.
        measurement: its texts and its original.
        source: its folder.
        files: folder of the files.
        encoder: encoder of ours.
        threads: processor cores to use; None for all.

    """

    def __init__(
        self, model: str, measurement: Measurement, source: Path, files: Path, encoder: str, threads: int | None
    ) -> None:
        self._model, self._measurement, self._source, self._files = model, measurement, source, files
        self._encoder, self._threads = encoder, ThreadPool(threads).threads
        files.mkdir(parents=True, exist_ok=True)

    def row(self, name: str) -> Row:
        """Make a file unless it is there, and measure it."""
        started = time.perf_counter()
        path = self._mixture(name) if name in MIXTURES else self._ours(name)
        found = self._measurement.compare_file(path)
        return Row(
            name,
            path.stat().st_size,
            is_on_grid(path, GRIDS[self._model]),
            found.kl_mean,
            found.kl_p99,
            found.perplexity,
            found.top1_agreement,
            round(time.perf_counter() - started, 1),
        )

    def _ours(self, name: str) -> Path:
        settings: dict[str, Any] = {"encoder": self._encoder, "threads": self._threads, "resume": True}
        if name.startswith(_SIZE):
            settings["choice"] = DepthChoice(target_bytes=round(float(name.removeprefix(_SIZE)) * 1e6))
        else:
            settings["recipe"], _, depth = name.partition("-d")
            settings["depth"] = int(depth)
        if self._encoder == "calibrated" or "choice" in settings:
            settings["windows"] = self._measurement.calibration
        path = self._files / f"{self._source.name}-{name}-{self._encoder}.gguf"
        if not path.exists():
            convert(self._source, path, **settings)
        return path

    def _mixture(self, name: str) -> Path:
        path = self._files / f"{self._source.name}-{name}.gguf"
        if not path.exists():
            programs = binaries.build_llama_cpp(binaries.cache_folder())
            whole, imatrix = self._unpacked(), self._imatrix(programs)
            binaries.quantize_mixture(programs, whole, path, name, imatrix, self._threads)
        return path

    def _unpacked(self) -> Path:
        """Return the source as a GGUF file in F16."""
        path = self._files / f"{self._source.name}-F16.gguf"
        if not path.exists():
            choice = DepthChoice(tuple(parse_rules("*=0")))
            convert(self._source, path, encoder="v2", recipe="published", choice=choice, threads=self._threads)
        return path

    def _imatrix(self, programs: Path) -> Path:
        path, text = (self._files / f"{self._source.name}{suffix}" for suffix in ("-imatrix.gguf", "-calibration.txt"))
        if not path.exists():
            self._measurement.write_calibration_text(text)
            chunks = len(self._measurement.calibration)
            binaries.write_imatrix(programs, self._unpacked(), path, text, chunks, self._threads)
        return path


def is_on_grid(path: Path, grid: str) -> bool:
    """Tell whether a file has many layers' weights in types that can hold those of a source from this type exactly."""
    sizes: dict[bool, int] = {}
    for info in GgufFile(path).tensors.values():
        if quantized_tensor(info.name):
            hits = info.type_name in _HITTING[grid]
            sizes[hits] = sizes.get(hits, 0) + info.n_bytes
    return sizes.get(True, 0) > _SHARE_THAT_MARKS * sum(sizes.values())


def draw(result: dict[str, Any]) -> str:
    """Return the chart of a result as the text of an SVG file."""
    series: dict[str, list[chart.Point]] = {name: [] for name in _COLORS}
    for row in result["rows"]:
        megabytes, recipe = row["file_bytes"] / 1e6, row["name"].partition("-")[0]
        if recipe in _COLORS:
            series[recipe].append(chart.Point(megabytes, row["kl_mean"]))
        else:
            name = "llama.cpp, on the source's grid" if row["on_grid"] else "llama.cpp, imatrix"
            series[name].append(chart.Point(megabytes, row["kl_mean"], row["name"]))
    sizes = [row["file_bytes"] / 1e6 for row in result["rows"]]
    step = next(step for step in (10, 20, 50, 100, 200, 500, 1000) if (max(sizes) - min(sizes)) / step < 12)
    title = f"KL to the FP16 model over megabytes of the file, {result['model']}"
    return chart.draw_points(title, {name: points for name, points in series.items() if points}, _COLORS, step=step)


def markdown(result: dict[str, Any]) -> str:
    """Return the rows, smallest file first, as a table for the documentation."""
    lines = ["| | file | KL, mean | KL, 99th percentile | same top token |", "|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: row["file_bytes"]):
        name = f"{row['name']} (on the source's grid)" if row["on_grid"] else row["name"]
        lines.append(
            f"| {name} | {format_bytes(row['file_bytes'])} | {row['kl_mean']:.4f} | {row['kl_p99']:.2f}"
            f" | {100 * row['top1_agreement']:.1f} % |"
        )
    return "\n".join(lines)


def equal_sizes(result: dict[str, Any]) -> str:
    """Return a table of the best file of ours and the best mixture off the grid that fit a size, at each size.

    It goes from our smallest file with d=2 to our largest with d=3, and has a line wherever a better file fits.
    """
    ours = [row for row in result["rows"] if row["name"] not in MIXTURES]
    theirs = [row for row in result["rows"] if row["name"] in MIXTURES and not row["on_grid"]]
    with_depth = [row["file_bytes"] for row in ours if row["name"].endswith(("-d2", "-d3"))]
    lines = ["| size | ours | KL | llama.cpp | KL | ratio |", "|---|---|---|---|---|---|"]
    before = None
    for size in sorted({row["file_bytes"] for row in (*ours, *theirs)}):
        found = [_best(rows, size) for rows in (ours, theirs)]
        if not min(with_depth) <= size <= max(with_depth) or found[0] is None or found == before:
            continue
        cells = [(row["name"], f"{row['kl_mean']:.4f}") if row else ("none", "") for row in found]
        ratio = f"{found[0]['kl_mean'] / found[1]['kl_mean']:.2f}" if found[1] else ""
        lines.append(f"| {format_bytes(size)} | {' | '.join(cell for pair in cells for cell in pair)} | {ratio} |")
        before = found
    return "\n".join(lines)


def _best(rows: list[dict[str, Any]], size: int) -> dict[str, Any] | None:
    """Return the row of least divergence among the files that are not larger than `size`; None if there is none."""
    return min((row for row in rows if row["file_bytes"] <= size), key=lambda row: row["kl_mean"], default=None)


def main(
    model: Annotated[str, typer.Option(help=" or ".join(GRIDS))] = "smollm2",
    rows: Annotated[str | None, typer.Option(help="Comma-separated; default: all that --output lacks.")] = None,
    encoder: Annotated[str, typer.Option(help="Encoder of our files.")] = "calibrated",
    windows: Annotated[int | None, typer.Option(help="Windows of 512 tokens to evaluate.")] = None,
    calibration: Annotated[int | None, typer.Option(help="Windows of 512 tokens to calibrate on.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file, continued after every row.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file for KL over megabytes.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Show what --output has; measure nothing.")] = False,
    models: Annotated[Path, typer.Option(help="Folder of the models.")] = Path("models"),
    files: Annotated[Path, typer.Option(help="Folder that keeps the files.")] = Path("build"),
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Measure the loss of whole files, ours and llama.cpp's, as KL to the FP16 model."""
    if model not in GRIDS:
        raise typer.BadParameter(f"choose from {', '.join(GRIDS)}", param_hint="--model")
    result: dict[str, Any] = {"model": model, "encoder": encoder, "rows": []}
    if output is not None and output.exists():
        result = json.loads(output.read_text("utf-8"))
        if (result["model"], result["encoder"]) != (model, encoder):
            raise TritGgufError(f"{output}: is about {result['model']}, {result['encoder']}; name another file")
    if not show:
        folder, *defaults = MODELS[model]
        counts = (windows or defaults[0], calibration or defaults[1])
        measurement = Measurement(model, models, threads, windows=counts)
        result["text"] = measurement.describe()
        made = WholeFiles(model, measurement, models / folder, files, encoder, threads)
        there = {row["name"] for row in result["rows"]}
        for name in rows.split(",") if rows else [name for name in (*MIXTURES, *OURS) if name not in there]:
            row = made.row(name)
            result["rows"] = [*(old for old in result["rows"] if old["name"] != name), asdict(row)]
            terminal.note(f"{name}: {format_bytes(row.file_bytes)}, KL {row.kl_mean:.4f}, {row.seconds:.0f} s")
            if output is not None:
                write_text(output, json.dumps(result, indent=1) + "\n")
    if plot is not None:
        svg.write(plot, draw(result))
    print(markdown(result), equal_sizes(result), sep="\n\n")


if __name__ == "__main__":
    tool_command.run(main)
