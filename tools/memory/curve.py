"""Measure the memory of convert, inspect, export and recovery on a checkpoint in the shape of a large model.

    python -m tools.memory.curve --shape qwen2.5-72b --layers 10 --json docs/memory.json --plot docs/memory.svg

The commands run one after the other, as a user runs them, on a checkpoint by `tools/models/synthetic_checkpoint.py`.
Their resident memory is read fifty times a second. Everything but the results is removed at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.memory.chart import draw
from tools.models.random_model import with_layers
from tools.models.synthetic_checkpoint import SHAPES, write_checkpoint
from tritgguf.diagnostics.bench import processor_name
from tritgguf.exporters.export import FORMATS
from tritgguf.formats import svg
from tritgguf.formats.durable_output import disk_errors, write_text
from tritgguf.machine import resident_bytes

BOUND = 1_500_000_000
_INTERVAL = 0.02  # seconds
_POINTS = 150  # of a stored curve, at most
_RECOVERED_LAYERS = 2

Sample = tuple[float, int, int]


@dataclass(frozen=True)
class Run:
    """A command and its memory in bytes: its own, and pages of mapped files, which the system can reclaim."""

    name: str
    command: str
    seconds: float
    peak_own: int
    peak_files: int
    curve: list[Sample]
    """Seconds since the start, own memory, pages of files: the largest of each interval."""
    processor_seconds: float = 0.0
    """What all its threads took, in the kernel too."""


def measure(name: str, arguments: Sequence[str], *, module: str = "tritgguf", output: Path | None = None) -> Run:
    """Run `tritgguf`, or another module, with these arguments and sample its memory until it ends.

    What it prints goes to the file `output`, or nowhere. Raises SystemExit if it fails.
    """
    before = _processor_seconds()
    with open(output or os.devnull, "w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdout=printed, stderr=subprocess.PIPE, text=True
        )
    samples: list[Sample] = []
    start = time.perf_counter()
    assert process.stderr is not None
    with process.stderr:
        while process.poll() is None:
            try:
                own, files = resident_bytes(process.pid)
            except OSError:  # it has ended
                break
            samples.append((time.perf_counter() - start, own, files))
            time.sleep(_INTERVAL)
        said = process.stderr.read()
    seconds = time.perf_counter() - start
    if process.wait():
        raise SystemExit(f"{name} failed: {said.strip().splitlines()[-1:]}")
    return Run(
        name,
        " ".join([module, *(Path(argument).name for argument in arguments)]),
        round(seconds, 1),
        max(own for _, own, _ in samples),
        max(files for _, _, files in samples),
        thinned(samples, _POINTS),
        round(_processor_seconds() - before, 1),
    )


def _processor_seconds() -> float:
    """Return the processor time of all processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return at most `most` samples: the largest values of each of that many equal parts."""
    size = -(-len(samples) // most)
    parts = [samples[first : first + size] for first in range(0, len(samples), size)]
    return [
        (round(part[0][0], 2), max(own for _, own, _ in part), max(files for _, _, files in part)) for part in parts
    ]


def measure_shape(shape: str, layers: int, folder: Path, formats: Sequence[str]) -> list[Run]:
    """Measure every command on a checkpoint of this shape; remove files as soon as they are not needed."""
    sizes = with_layers(SHAPES[shape], layers)
    checkpoint, file, output, again = (folder / name for name in ("checkpoint", "d2.gguf", "output", "again.gguf"))
    write_checkpoint(checkpoint, sizes)
    packed_head = ["--encoder", "v2", "--output-depth", "4", "--embedding-depth", "4"]
    runs = [reported("convert, head packed too", ["convert", str(checkpoint), str(file), *packed_head])]
    remove(file)
    published = ["--encoder", "v2", "--recipe", "published"]
    runs.append(reported("convert", ["convert", str(checkpoint), str(file), *published]))
    remove(checkpoint)
    runs.append(reported("inspect", ["inspect", str(file)]))
    for name in formats:
        runs.append(reported(f"export to {name}", ["export", str(file), str(output), "--to", name]))
        if output.is_file():
            runs.append(reported(f"convert from {name}", ["convert", str(output), str(again)]))
            remove(again)
        remove(output)
    remove(file)
    few = min(layers, _RECOVERED_LAYERS)
    write_checkpoint(checkpoint, with_layers(sizes, few), dequantized=True)
    arguments = ["convert", str(checkpoint), str(file), "--encoder", "recover"]
    runs.append(reported(f"recovery ({few} layers)", arguments))
    return runs


def reported(name: str, arguments: Sequence[str], *, module: str = "tritgguf", output: Path | None = None) -> Run:
    """Measure a command and print a line."""
    run = measure(name, arguments, module=module, output=output)
    print(
        f"{run.name:45} {run.peak_own / 1e9:6.2f} GB own {run.peak_files / 1e9:6.2f} GB of files {run.seconds:8.1f} s",
        flush=True,
    )
    return run


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it has."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    lines = ["| model | command | peak of its own memory | pages of files | seconds |", "|---|---|---|---|---|"]
    for shape, run in itertools.chain.from_iterable(
        ((shape, run) for run in runs) for shape, runs in result["shapes"].items()
    ):
        lines.append(
            f"| {shape} | {run['name']} | {run['peak_own'] / 1e9:.2f} GB | {run['peak_files'] / 1e9:.2f} GB"
            f" | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, measure, save and print; return 1 if a command exceeded BOUND."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="shape of the checkpoint; without it, only draw and print")
    parser.add_argument("--layers", type=int, help="number of its layers (default all)")
    parser.add_argument("--export", nargs="*", default=["q8_0"], choices=FORMATS, help="export formats (default q8_0)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, required=True, help="file for the results; other shapes in it stay")
    parser.add_argument("--plot", type=Path, help="SVG file for a chart of all results in the file")
    options = parser.parse_args()
    result: dict[str, Any] = {"bound": BOUND, "processor": processor_name(), "shapes": {}}
    if options.json.exists():
        result = json.loads(options.json.read_text(encoding="utf-8"))
    if options.shape:
        layers = options.layers or SHAPES[options.shape].layers
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            runs = measure_shape(options.shape, layers, Path(folder), options.export)
        result["shapes"][f"{options.shape}, {layers} layers"] = [asdict(run) for run in runs]
        with disk_errors(options.json):
            write_text(options.json, json.dumps(result) + "\n")
    print(markdown(result))
    if options.plot:
        svg.write(options.plot, draw(result))
    peaks = [run["peak_own"] for runs in result["shapes"].values() for run in runs]
    return int(max(peaks, default=0) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
