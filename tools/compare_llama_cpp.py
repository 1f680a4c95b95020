"""Is it as fast as llama.cpp? The same shape, random weights, F16 head and embeddings on both sides, in one run.

    python tools/compare_llama_cpp.py --shape qwen2.5-1.5b [--json] [--only decode.trit2/q4_0,...] [--quick]

Every ratio is ours over theirs in speed, more is better: of medians over turns (ours, theirs, ours, theirs ...), so
that whatever else the machine does meets both; how much that was is shown, and --patience SECONDS waits for a quiet
machine. `decode` and `prefill` are tokens per
second of `tritgguf bench` and llama-bench; `convert` is weights per second of `tritgguf convert` and llama-quantize
from the same F16 file, start-up and writing included; `decode.trit2/read_bandwidth` is what decode reads per second
over what the same threads merely read. The first run builds llama.cpp (see llama_cpp.py). It takes 16 GB of disk for
a while, and nothing else should run beside it: llama.cpp's threads spin, and stall when they share a core.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import llama_cpp
import typer
from random_model import SHAPES, write_random_model

from cpu_kernels.crew import physical_cores
from tritgguf import console
from tritgguf.architectures import quantized_tensor
from tritgguf.bench import processor_name
from tritgguf.errors import TritGgufError
from tritgguf.gguf_file import F16, GgufFile

KEYS = (
    "decode.trit2/q4_0",
    "decode.trit2/q3_k_s",
    "decode.trit1/tq2_0",
    "decode.trit3/q5_k_s",
    "decode.trit4/q6_k",
    "prefill.trit2/q3_k_s",
    "prefill.trit2/q4_0",
    "prefill.trit3/q5_k_s",
    "convert.v2/q4_0",
    "convert.v2/q3_k_s",
    "decode.trit2/read_bandwidth",
)
PROMPT_TOKENS, GENERATED_TOKENS = 512, 32
QUIET = 0.1  # share of all cores' time that other programs may take
_POLL_SECONDS = 3.0
_K_BLOCK = 256  # row lengths of llama.cpp's K and ternary types are multiples of it
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Key:
    """A ratio's name in parts: `test.ours/theirs`."""

    name: str
    test: str
    ours: str
    theirs: str

    @classmethod
    def parse(cls, name: str) -> Key:
        """Take a name of KEYS apart; TritGgufError for any other."""
        if name not in KEYS:
            raise TritGgufError(f"{name} is no ratio; choose from {', '.join(KEYS)}")
        test, _, sides = name.partition(".")
        ours, _, theirs = sides.partition("/")
        return cls(name, test, ours, theirs)


@dataclass
class Samples:
    """Both sides' measurements for one ratio; the unit is the same, and more is better."""

    unit: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    other_programs: list[float] = field(default_factory=list)
    """Share of all cores' time that went to other programs in each turn; 0 where the system does not tell."""

    def add(self, ours: float, theirs: float, other_programs: float) -> None:
        """Add a turn."""
        self.ours.append(ours)
        self.theirs.append(theirs)
        self.other_programs.append(other_programs)

    @property
    def ratio(self) -> float:
        """The median of ours over the median of theirs."""
        return statistics.median(self.ours) / statistics.median(self.theirs)

    def as_dict(self) -> dict[str, Any]:
        """Return medians, samples and unit."""
        return {
            "unit": self.unit,
            "ours": statistics.median(self.ours),
            "theirs": statistics.median(self.theirs),
            "ours_samples": self.ours,
            "theirs_samples": self.theirs,
            "other_programs": self.other_programs,
        }


class Comparison:
    """The files of one shape, made when they are first needed, and the measurements on them."""

    def __init__(self, shape: str, folder: Path, programs: Path, threads: int) -> None:
        self.shape, self.folder, self.programs, self.threads = shape, folder, programs, threads
        self.source = folder / "f16.gguf"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.source.exists():
            console.note(f"writing random weights of the shape {shape}")
            write_random_model(self.source, *SHAPES[shape])

    def make_files(self, key: Key) -> None:
        """Make what is needed to measure `key`."""
        if key.test != "convert":
            self._our_file(key.ours)
            if key.theirs != "read_bandwidth":
                self._their_file(key.theirs)

    def turn(self, key: Key) -> tuple[float, float]:
        """Measure ours, then theirs."""
        if key.theirs == "read_bandwidth":
            report = self._our_bench(self._our_file(key.ours), 0, GENERATED_TOKENS)
            return report["decode"]["bytes_per_second"], report["read_bandwidth"]
        if key.test == "convert":
            ours = self._rate_of_conversion(self._convert)
            return ours, self._rate_of_conversion(lambda output: self._quantize(output, key.theirs))
        counts = (PROMPT_TOKENS, 0) if key.test == "prefill" else (0, GENERATED_TOKENS)
        report = self._our_bench(self._our_file(key.ours), *counts)
        theirs = llama_cpp.tokens_per_second(self.programs, self._their_file(key.theirs), *counts, self.threads)
        return report["tests"][0]["tokens_per_second"], theirs

    def remove_files(self, keep: frozenset[str] = frozenset()) -> None:
        """Delete what was made from the F16 file, but for files of these names."""
        for path in self.folder.glob("*.gguf"):
            if path != self.source and path.stem not in keep:
                path.unlink()

    def _our_file(self, name: str) -> Path:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            console.note(f"making {path.name}")
            self._convert(path, depth=name.removeprefix("trit"))
            check_types(path, name)
        return path

    def _their_file(self, name: str) -> Path:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            console.note(f"making {path.name}")
            self._quantize(path, name)
            check_types(path, name)
        return path

    def _our_bench(self, file: Path, prompt_tokens: int, generated_tokens: int) -> Any:
        command = [*our_command(), "bench", str(file), "-p", str(prompt_tokens), "-n", str(generated_tokens)]
        return llama_cpp.run_json([*command, "-t", str(self.threads), "-r", "1", "--json"])

    def _convert(self, output: Path, depth: str = "2") -> None:
        command = [*our_command(), "convert", str(self.source), str(output), "--depth", depth, "--encoder", "v2"]
        llama_cpp.run_json([*command, "-t", str(self.threads), "--json"])

    def _quantize(self, output: Path, type_name: str) -> None:
        llama_cpp.quantize(self.programs, self.source, output, type_name.upper(), self.threads)

    def _rate_of_conversion(self, convert: Callable[[Path], None]) -> float:
        """Return the quantized weights per second of one conversion."""
        tensors = GgufFile(self.source).tensors.values()
        weights = sum(info.n_weights for info in tensors if quantized_tensor(info.name))
        output = self.folder / "conversion.gguf"
        os.sync()  # what the last one has written should not be this one's burden
        start = time.perf_counter()
        try:
            convert(output)
            return weights / (time.perf_counter() - start)
        finally:
            output.unlink(missing_ok=True)


def our_command() -> list[str]:
    """Return how to call this checkout's `tritgguf`, whatever the current folder is."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(_ROOT)!r}); import tritgguf.__main__"]


def check_types(path: Path, name: str) -> None:
    """Raise TritGgufError unless all matrices of the layers are of the type and head and embeddings are F16."""
    expected = name.upper().removesuffix("_S")
    for info in GgufFile(path).tensors.values():
        if quantized_tensor(info.name) and info.type_name != expected:
            raise TritGgufError(f"{path}: tensor {info.name} is {info.type_name}, not {expected}")
        if info.name in ("token_embd.weight", "output.weight") and info.type_id != F16:
            raise TritGgufError(f"{path}: tensor {info.name} is {info.type_name}, not F16")


def select_keys(shape: str, only: str | None) -> list[Key]:
    """Return the ratios to measure: those of the comma-separated list, or all that the shape's row lengths allow."""
    if only is not None:
        return [Key.parse(name.strip()) for name in only.split(",")]
    _, sizes = SHAPES[shape]
    keys = [Key.parse(name) for name in KEYS]
    if any(length % _K_BLOCK for length in (sizes.hidden, sizes.feed_forward)):
        keys = [key for key in keys if key.theirs in ("q4_0", "read_bandwidth")]
    return keys


class Patience:
    """Waits for other programs to leave the machine, for a limited time in all."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self) -> None:
        """Return when the machine is quiet, or when patience is over."""
        while self.seconds > 0:
            before = processor_seconds()
            time.sleep(_POLL_SECONDS)
            if share_of_others(before, processor_seconds()) <= QUIET:
                return
            self.seconds -= _POLL_SECONDS

    def accepts(self, disturbance: float, elapsed: float) -> bool:
        """Tell whether a turn of `elapsed` seconds counts; one that was disturbed is to be repeated meanwhile."""
        if disturbance <= QUIET or self.seconds <= 0:
            return True
        self.seconds -= elapsed
        return False


def measure(
    comparison: Comparison, keys: Sequence[Key], repeats: int, patience: Patience, *, keep: bool = False
) -> dict[str, Samples]:
    """Measure every ratio `repeats` times, in turns; files are deleted as soon as no later ratio needs them."""
    units = {"convert": "weights/s"}
    results: dict[str, Samples] = {}
    for number, key in enumerate(keys):
        unit = "bytes/s" if key.theirs == "read_bandwidth" else units.get(key.test, "tokens/s")
        results[key.name] = samples = Samples(unit)
        comparison.make_files(key)
        while len(samples.ours) < repeats:
            patience.wait()
            before = processor_seconds()
            ours, theirs = comparison.turn(key)
            after = processor_seconds()
            disturbance = share_of_others(before, after)
            # Turns are judged by what others took, never by their outcome.
            if patience.accepts(disturbance, after.elapsed - before.elapsed):
                samples.add(ours, theirs, disturbance)
        console.note(f"{key.name}: {samples.ratio:.3f}, other programs took {max(samples.other_programs):.0%} at most")
        if not keep:
            later = keys[number + 1 :]
            comparison.remove_files(frozenset(name for key in later for name in (key.ours, key.theirs)))
    return results


class ProcessorSeconds(NamedTuple):
    """Seconds so far: elapsed, of all cores while busy, and of this process and its children."""

    elapsed: float
    busy: float
    own: float


def processor_seconds() -> ProcessorSeconds:
    """Read the clocks; on other systems than Linux only the elapsed time.

    From proc(5), /proc/stat. Time that a hypervisor took counts as busy.
    """
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return ProcessorSeconds(time.perf_counter(), 0.0, 0.0)
    user, nice, system, _idle, _wait, irq, soft_irq, stolen = map(int, fields)
    busy = (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    own_seconds = own.user + own.system + own.children_user + own.children_system
    return ProcessorSeconds(time.perf_counter(), busy, own_seconds)


def share_of_others(before: ProcessorSeconds, after: ProcessorSeconds) -> float:
    """Return what share of all cores' time between two readings other programs took."""
    others = (after.busy - before.busy) - (after.own - before.own)
    elapsed = max(after.elapsed - before.elapsed, 1e-9)
    return max(0.0, others / (elapsed * (os.cpu_count() or 1)))


def as_json(shape: str, threads: int, repeats: int, results: dict[str, Samples]) -> dict[str, Any]:
    """Return the result with the keys `ratios` and `absolute`, and what it was measured on."""
    return {
        "shape": shape,
        "threads": threads,
        "repeats": repeats,
        "ratios": {name: samples.ratio for name, samples in results.items()},
        "absolute": {
            "processor": processor_name(),
            "llama.cpp": f"{llama_cpp.PACKAGE} {llama_cpp.VERSION}",
            **{name: samples.as_dict() for name, samples in results.items()},
        },
    }


def print_results(result: dict[str, Any]) -> None:
    """Print a plain table."""
    rows = []
    for name, ratio in result["ratios"].items():
        both = result["absolute"][name]
        unit, scale = {"tokens/s": ("tokens/s", 1.0), "weights/s": ("M weights/s", 1e6), "bytes/s": ("GB/s", 1e9)}[
            both["unit"]
        ]
        others = f"{max(both['other_programs']):.0%}"
        ours, theirs = (f"{both[side] / scale:.1f}" for side in ("ours", "theirs"))
        rows.append((name, f"{ratio:.2f}", ours, theirs, unit, others))
    title = f"{result['shape']}, {result['threads']} threads, {result['absolute']['processor']}"
    console.print_table(title, ("ratio", ">", ">ours", ">theirs", "unit", ">other programs"), rows)


def main(
    shape: Annotated[str, typer.Option(help="|".join(SHAPES))] = "qwen2.5-1.5b",
    print_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Turns for each ratio.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One turn only, to try the tool.")] = False,
    only: Annotated[str | None, typer.Option(help="Comma-separated ratios to measure.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Default: the physical cores.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for llama.cpp and the models.")] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait and to repeat turns in, while other programs are busy.")
    ] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized models for the next run.")] = False,
) -> None:
    """Compare this project's speed with llama.cpp's on random weights of a known shape."""
    try:
        if shape not in SHAPES:
            raise TritGgufError(f"shape {shape} is not known; choose from {', '.join(SHAPES)}")
        keys = select_keys(shape, only)
        cache = cache or llama_cpp.cache_folder()
        threads, repeats = threads or physical_cores(), 1 if quick else repeats
        programs = llama_cpp.build_llama_cpp(cache)
        comparison = Comparison(shape, cache / shape, programs, threads)
        try:
            results = measure(comparison, keys, repeats, Patience(patience), keep=keep)
        finally:
            if not keep:
                comparison.remove_files()
        result = as_json(shape, threads, repeats, results)
    except TritGgufError as error:
        console.error(str(error))
        raise typer.Exit(1) from error
    if print_json:
        print(json.dumps(result, indent=1))
    else:
        print_results(result)


if __name__ == "__main__":
    typer.run(main)
