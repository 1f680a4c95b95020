"""Compare the speed with llama.cpp's: random weights of the same shape, F16 head and embeddings on both sides.

    python -m tools.speed.compare_llama_cpp [--shape qwen2.5-1.5b] [--output FILE.json] [--plot FILE.svg] [--only NAME]
    python -m tools.speed.compare_llama_cpp --from FILE.json --markdown [--plot FILE.svg]    # measures nothing

Every ratio is our speed over theirs; more is better. It is the ratio of the medians over turns (ours, theirs, ours,
theirs ...), so that other programs disturb both sides equally. Their share of the machine is printed, and --patience
SECONDS waits for a quiet machine. Ratios with the same numerator share its measurement in each turn. `decode` and
`prefill` are tokens per second of `tritgguf bench` and llama-bench. `convert` is weights per second of `tritgguf
convert` and llama-quantize from the same F16 file, until all is on the disk. `decode.trit2/read_bandwidth` is the read
rate of decode over the read bandwidth of the same threads. Other ratios compare this project with itself: at two
context lengths, or with two instruction sets.

`batch4` and `batch8` are tokens per second in total of so many sequences at once (tools/speed/batched_decode.py and
llama-batched-bench). llama.cpp repacks Q4_0 when it loads a file, which all figures of Q4_0 contain.

--output saves the result after every ratio, and adds to the results in the file. --isa avx2 measures both sides as a
processor without AVX-512 would run them. The first run builds llama.cpp
(tools/llama_cpp/binaries.py). It needs 16 GB of disk temporarily. Run nothing else at the same time: llama.cpp's
threads spin, and stall when they share a core.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cpu_kernels.simd import instruction_set, variants
from cpu_kernels.threads.cores import physical_cores
from tools.llama_cpp import binaries
from tools.models.random_model import SHAPES, write_random_model
from tools.speed import narrower_processor
from tools.speed.chart import draw
from tools.speed.compared_files import ROOT, check_types, has_no_source, our_command, our_program, write_blocks
from tools.speed.quiet_machine import Patience, processor_seconds, share_of_others
from tools.speed.ratios import (
    BATCH,
    GOALS,
    READ_BANDWIDTH,
    SIZE_OF_PROMPT,
    SMOLLM2,
    Ratio,
    Result,
    Samples,
    Side,
    markdown,
    read_result,
    table,
)
from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.cli import terminal
from tritgguf.diagnostics.bench import processor_name
from tritgguf.errors import TritGgufError
from tritgguf.formats import svg
from tritgguf.formats.gguf_file import GgufFile

_GENERATED_TOKENS = {SMOLLM2: 128}  # 32 tokens of a small model are too fast to measure
_BATCHED_TOKENS = 24  # of each sequence
_K_BLOCK = 256  # llama.cpp's K and ternary types need row lengths that are multiples of it


@dataclass(frozen=True)
class Measured:
    """The rate of one side, in tokens or weights per second, and the report of our own benchmark, if it was one."""

    rate: float
    report: dict[str, Any] | None = None


class Comparison:
    """Makes files when they are first needed, and measures with them."""

    def __init__(self, folder: Path, programs: Path, threads: int, environment: Mapping[str, str]) -> None:
        """Keep llama.cpp's `programs` and the `environment` in which ours run."""
        self.folder, self.programs, self.threads, self.environment = folder, programs, threads, environment

    def make_files(self, ratios: Sequence[Ratio]) -> None:
        """Make the files for these ratios."""
        for side in _sides(ratios):
            if not has_no_source(side.shape):
                self._source(side.shape)
            if ratios[0].test != "convert":
                self._file(side)

    def measure(self, test: str, side: Side) -> Measured:
        """Measure one side once."""
        if test == "convert":
            return Measured(self._rate_of_conversion(side))
        if test.startswith(BATCH):
            return Measured(self._rate_of_batch(self._file(side), int(test.removeprefix(BATCH))))
        generated = _GENERATED_TOKENS.get(side.shape, 32)
        counts = (SIZE_OF_PROMPT, 0) if test == "prefill" else (0, generated)
        if side.file.startswith("trit"):
            report = self._our_bench(self._file(side), *counts, variant_options(side.variant))
            return Measured(report["tests"][0]["tokens_per_second"], report)
        return Measured(binaries.tokens_per_second(self.programs, self._file(side), *counts, self.threads))

    def remove_files(self, keep: frozenset[tuple[str, str]] = frozenset()) -> None:
        """Delete files that were made from the F16 files, except those of these shapes and names."""
        for path in itertools.chain.from_iterable((self.folder / shape).glob("*.gguf") for shape in SHAPES):
            if path.stem != "f16" and (path.parent.name, path.stem) not in keep:
                path.unlink()

    def _source(self, shape: str) -> Path:
        path = self.folder / shape / "f16.gguf"
        if not path.exists():
            terminal.note(f"writing random weights of the shape {shape}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_random_model(path, *SHAPES[shape])
        return path

    def _file(self, side: Side) -> Path:
        path = self.folder / side.shape / f"{side.file}.gguf"
        if not path.exists():
            terminal.note(f"making {path.name} of {side.shape}")
            if has_no_source(side.shape):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_blocks(side.shape, path, side.file)
                check_types(path, side.file)
            else:
                self._make(side.shape, path, side.file)
        return path

    def _our_bench(self, file: Path, prompt_tokens: int, generated_tokens: int, options: Sequence[str]) -> Any:
        command = [*our_command(), "bench", str(file), "-p", str(prompt_tokens), "-n", str(generated_tokens)]
        command += ["-t", str(self.threads), "-r", "1", "--no-kernels", "--json", *options]
        return binaries.run_json(command, self.environment)

    def _rate_of_batch(self, file: Path, sequences: int) -> float:
        """Return the tokens per second, in total, of several sequences; ours with 8-bit activations, as theirs."""
        if not file.stem.startswith("trit"):
            arguments = (file, sequences, _BATCHED_TOKENS, self.threads)
            return binaries.batched_tokens_per_second(self.programs, *arguments)
        command = [*our_program("tools.speed.batched_decode", "typer.run(main)"), str(file), "--decode-bits", "8"]
        command += ["--sequences", str(sequences), "--tokens", str(_BATCHED_TOKENS), "--turns", "1"]
        rates = binaries.run_json([*command, "-t", str(self.threads), "--json"], self.environment)
        return float(rates[str(sequences)])

    def _make(self, shape: str, output: Path, type_name: str) -> float:
        """Make a file of a type with our converter or theirs; return the seconds until it is on the disk."""
        source = self._source(shape)
        os.sync()  # so that earlier writes do not count
        start = time.perf_counter()
        if type_name.startswith("trit"):
            depth = type_name.removeprefix("trit")
            command = [*our_command(), "convert", str(source), str(output), "--depth", depth, "--encoder", "v2"]
            command += ["--recipe", "published"]
            binaries.run_json([*command, "-t", str(self.threads), "--json"], self.environment)
        else:
            binaries.quantize(self.programs, source, output, type_name.upper(), self.threads)
        os.sync()
        seconds = time.perf_counter() - start
        check_types(output, type_name)
        return seconds

    def _rate_of_conversion(self, side: Side) -> float:
        """Return the quantized weights per second of one conversion; the file stays, because decode uses it."""
        source = self._source(side.shape)
        weights = sum(info.n_weights for info in GgufFile(source).tensors.values() if quantized_tensor(info.name))
        output, name = source.with_name("conversion.gguf"), file_of(side)
        try:
            seconds = self._make(side.shape, output, name)
            output.replace(source.with_name(f"{name}.gguf"))
        finally:
            output.unlink(missing_ok=True)
        return weights / seconds


def file_of(side: Side) -> str:
    """Return the name of the file that a side runs or writes: the encoder v2 is measured at depth 2."""
    return "trit2" if side.file == "v2" else side.file


def variant_options(variant: str) -> list[str]:
    """Return the options of `tritgguf bench` for a side's variant."""
    if variant in variants.NAMES:
        return ["--isa", variant]
    if variant.startswith("context"):
        return ["--n-depth", variant.removeprefix("context")]
    return []


def select_ratios(shape: str, only: str | None, isa: str | None = None) -> list[Ratio]:
    """Return the ratios to measure: those of the comma-separated list, or all that the shape and processor allow.

    Where `isa` is the most that may be used, nothing is compared with a wider one.
    """
    if only is not None:
        return [Ratio.parse(name.strip(), shape) for name in only.split(",")]
    here = {isa} if isa else {name for name, number in variants.NAMES.items() if number in instruction_set.supported()}
    ratios = []
    for name in GOALS:
        ratio = Ratio.parse(name, shape)
        wanted = {ratio.ours.variant, ratio.theirs.variant} & variants.NAMES.keys()
        _, sizes = SHAPES[ratio.ours.shape]
        whole_blocks = not any(length % _K_BLOCK for length in (sizes.hidden, sizes.feed_forward))
        runs_anywhere = ratio.theirs.file in ("q4_0", READ_BANDWIDTH, ratio.ours.file)
        again = shape == SMOLLM2 and ".smollm2." in name  # the ratio without that part measures the same
        if wanted <= here and (whole_blocks or runs_anywhere) and not again:
            ratios.append(ratio)
    return ratios


def _sides(ratios: Sequence[Ratio]) -> list[Side]:
    """Return the sides of these ratios without repetition, the common numerator first."""
    sides = [*(ratio.ours for ratio in ratios), *(ratio.theirs for ratio in ratios)]
    return [side for side in dict.fromkeys(sides) if side.file != READ_BANDWIDTH]


def in_groups(ratios: Sequence[Ratio]) -> list[list[Ratio]]:
    """Return the ratios in groups with one numerator; conversions first, because others use their files."""

    def order(ratio: Ratio) -> tuple[bool, str, str, str, str]:
        return ratio.test != "convert", ratio.test, ratio.ours.shape, ratio.ours.file, ratio.ours.variant

    return [list(group) for _, group in itertools.groupby(sorted(ratios, key=order), key=order)]


def measure(
    comparison: Comparison,
    ratios: Sequence[Ratio],
    repeats: int,
    patience: Patience,
    keep_result: Callable[[str, Samples], None],
    *,
    keep_files: bool = False,
) -> None:
    """Measure every ratio `repeats` times, in turns; `keep_result` is called with each when it is done.

    Files are deleted as soon as no later ratio needs them.
    """
    groups = in_groups(ratios)
    for number, group in enumerate(groups):
        comparison.make_files(group)
        for name, samples in measure_group(comparison, group, repeats, patience).items():
            keep_result(name, samples)
            others = f"other programs took {max(samples.other_programs):.0%} at most"
            terminal.note(f"{name}: {samples.ratio:.3f}, {others}")
        if not keep_files:
            later = _sides(list(itertools.chain.from_iterable(groups[number + 1 :])))
            comparison.remove_files(frozenset((side.shape, file_of(side)) for side in later))


def measure_group(
    comparison: Comparison, ratios: Sequence[Ratio], repeats: int, patience: Patience
) -> dict[str, Samples]:
    """Measure ratios with one numerator, all sides in each turn."""
    results = {ratio.name: Samples(ratio.unit) for ratio in ratios}
    turns = 0
    while turns < repeats:
        patience.wait()
        before = processor_seconds()
        measured = {side: comparison.measure(ratios[0].test, side) for side in _sides(ratios)}
        after = processor_seconds()
        disturbance = share_of_others(before, after)
        # Turns are rejected for disturbance only, never for their result.
        if not patience.accepts(disturbance, after.elapsed - before.elapsed):
            continue
        turns += 1
        for ratio in ratios:
            ours = measured[ratio.ours]
            if ratio.theirs.file == READ_BANDWIDTH:
                report = ours.report or {}
                pair = report["decode"]["bytes_per_second"], report["read_bandwidth"]
            else:
                pair = ours.rate, measured[ratio.theirs].rate
            results[ratio.name].add(*pair, disturbance)
    return results


def git_revision() -> str:
    """Return this checkout's commit, with `-dirty` appended if files differ, or `unknown`."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def _compare(
    shape: str,
    only: str | None,
    threads: int,
    repeats: int,
    patience: float,
    cache: Path,
    output: Path | None,
    keep: bool,
    isa: str | None,
) -> dict[str, Any]:
    """Measure, and return the result."""
    if shape not in SHAPES:
        raise TritGgufError(f"shape {shape} is not known; choose from {', '.join(SHAPES)}")
    if isa not in (None, *narrower_processor.NAMES):
        raise TritGgufError(f"--isa {isa} is not possible here; choose from {', '.join(narrower_processor.NAMES)}")
    ratios = select_ratios(shape, only, isa)
    best = isa or variants.name_of(len(instruction_set.chosen(None)))
    result = Result(shape, threads, processor_name(), f"{binaries.PACKAGE} {binaries.VERSION}", best)
    if output is not None and output.is_dir():
        output = output / f"speed-{best}.json"
    if output is not None and output.exists():
        result.merge(output)
    revision = git_revision()

    def keep_result(name: str, samples: Samples) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        result.add(name, samples, now, revision)
        if output is not None:
            result.write(output)

    flags = narrower_processor.llama_cpp_flags(binaries.processor_flags(), isa)
    programs = binaries.build_llama_cpp(cache, flags)
    comparison = Comparison(cache, programs, threads, narrower_processor.environment(isa))
    try:
        measure(comparison, ratios, repeats, Patience(patience), keep_result, keep_files=keep)
    finally:
        if not keep:
            comparison.remove_files()
    return result.json


def main(
    shape: Annotated[str, typer.Option(help="|".join(SHAPES))] = "qwen2.5-1.5b",
    print_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    print_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of docs/speed.md instead.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="JSON file, written after every ratio; in a folder, speed-<instructions>.json.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file for a bar chart.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Show this JSON file; measure nothing.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns for each ratio.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One turn only, to try the tool.")] = False,
    only: Annotated[str | None, typer.Option(help="Comma-separated ratios to measure.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Default: the physical cores.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for llama.cpp and the models.")] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds for waiting and repeating turns while other programs are busy.")
    ] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized models for the next run.")] = False,
    isa: Annotated[str | None, typer.Option(help="Let both sides use no more than this: avx2.")] = None,
) -> None:
    """Compare this project's speed with llama.cpp's on random weights of a known shape."""
    try:
        if source is not None:
            result = read_result(source)
        else:
            threads, repeats = threads or physical_cores(), 1 if quick else repeats
            folder = cache or binaries.cache_folder()
            result = _compare(shape, only, threads, repeats, patience, folder, output, keep, isa)
        if plot is not None:
            svg.write(plot, draw(result))
    except TritGgufError as error:
        terminal.error(str(error))
        raise typer.Exit(1) from error
    if print_json:
        print(json.dumps(result, indent=1))
    elif print_markdown:
        print(markdown(result))
    else:
        terminal.print_table(*table(result))


if __name__ == "__main__":
    typer.run(main)
