"""Take a model whose float16 weights do not fit the disk through every step: pack, check, run, export by shards.

    python -m tools.memory.whole_model --shape qwen2.5-32b --folder /scratch

The checkpoint is sparse (`tools/models/synthetic_checkpoint.py`), the commands are those of a user, and the export is
`export_by_shards`, which compares every weight with the reference decoder. Memory is sampled as in `curve`. The packed
file and one shard have to fit the disk; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.memory.curve import BOUND, Run, remove, reported
from tools.models.random_model import with_layers
from tools.models.synthetic_checkpoint import SHAPES, write_checkpoint

_TOKENS = 16
_BOUNDED = ("convert", "export")  # the steps that may not take more than BOUND


def take_through(shape: str, layers: int, folder: Path, *, depth: int, recipe: str) -> tuple[list[Run], dict[str, Any]]:
    """Run every step in this folder; return the runs, and what `check`, `run` and the export have printed."""
    checkpoint, file = folder / "checkpoint", folder / "packed.gguf"
    printed = {name: folder / f"{name}.json" for name in ("check", "run", "export")}
    write_checkpoint(checkpoint, with_layers(SHAPES[shape], layers))
    packing = ["--depth", str(depth), "--encoder", "v2", "--recipe", recipe]
    runs = [reported("convert", ["convert", str(checkpoint), str(file), *packing])]
    remove(checkpoint)
    runs.append(reported("check", ["check", str(file), "--json"], output=printed["check"]))
    asked = ["-p", "Once upon a time", "--raw", "-n", str(_TOKENS), "--temp", "0", "--json"]
    runs.append(reported("run", ["run", str(file), *asked], output=printed["run"]))
    module = "tools.memory.export_by_shards"
    runs.append(reported("export", [str(file), "--folder", str(folder)], module=module, output=printed["export"]))
    return runs, {name: json.loads(path.read_text(encoding="utf-8")) for name, path in printed.items()}


def markdown(runs: Sequence[Run]) -> str:
    """Return the table of the steps."""
    lines = ["| step | minutes | processor minutes | peak of its own memory |", "|---|---|---|---|"]
    for run in runs:
        minutes = (seconds / 60 for seconds in (run.seconds, run.processor_seconds))
        lines.append(f"| {run.name} | {' | '.join(f'{m:.1f}' for m in minutes)} | {run.peak_own / 1e9:.2f} GB |")
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, measure and print; return 1 if convert or export exceeded BOUND."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-32b", help="shape of the checkpoint")
    parser.add_argument("--layers", type=int, help="number of its layers (default all)")
    parser.add_argument("--depth", type=int, default=2, help="trits per weight of the layers (default 2)")
    parser.add_argument("--recipe", default="published", help="recipe of convert (default published)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    options = parser.parse_args()
    layers = options.layers or SHAPES[options.shape].layers
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        runs, printed = take_through(options.shape, layers, Path(folder), depth=options.depth, recipe=options.recipe)
    print(markdown(runs))
    print(json.dumps(printed))
    return int(max(run.peak_own for run in runs if run.name in _BOUNDED) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
