"""The ratios of the comparison with llama.cpp: names, bounds, samples, and the result as JSON and tables.

A name is `test.ours/theirs`; `test.file.variant/variant` compares one of our files with itself, and `smollm2.` before
a file selects the shape of SmolLM2-135M instead of the --shape of the run.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritgguf.errors import TritGgufError
from tritgguf.formats.durable_output import disk_errors, write_text

SMOLLM2 = "smollm2-135m"
READ_BANDWIDTH = "read_bandwidth"
BATCH = "batch"  # a test of several sequences: batch4
SIZE_OF_PROMPT, LONG_CONTEXT = 512, 4096
_UNITS = {"tokens/s": ("tokens/s", 1.0), "weights/s": ("M weights/s", 1e6), "bytes/s": ("GB/s", 1e9)}


@dataclass(frozen=True)
class Goal:
    """A ratio's label, its lower bound and a stretch goal; None: no bound."""

    label: str
    bound: float | None = None
    stretch: float | None = None


GOALS = {
    "decode.trit2/q4_0": Goal("decode, d=2 over Q4_0 (1.3 times the bits)", 1.0, 1.4),
    "decode.trit2/q3_k_s": Goal("decode, d=2 over Q3_K_S (the same bits)", 1.5, 2.0),
    "decode.trit1/tq2_0": Goal("decode, d=1 over TQ2_0", 0.8, 1.1),
    "decode.trit3/q5_k_s": Goal("decode, d=3 over Q5_K_S", 1.2, 2.0),
    "decode.trit4/q6_k": Goal("decode, d=4 over Q6_K", 1.2, 2.0),
    "prefill.trit2/q3_k_s": Goal(f"prompt of {SIZE_OF_PROMPT}, d=2 over Q3_K_S", 1.5, 2.0),
    "prefill.trit2/q4_0": Goal(f"prompt of {SIZE_OF_PROMPT}, d=2 over Q4_0, repacked"),
    "prefill.trit3/q5_k_s": Goal(f"prompt of {SIZE_OF_PROMPT}, d=3 over Q5_K_S"),
    "batch4.trit2/q4_0": Goal("4 sequences, d=2 over Q4_0", 1.3, 1.8),
    "batch8.trit2/q4_0": Goal("8 sequences, d=2 over Q4_0", 1.3, 1.8),
    "convert.v2/q4_0": Goal("convert over llama-quantize to Q4_0"),
    "convert.v2/q3_k_s": Goal("convert over llama-quantize to Q3_K_S", 1.0, 2.0),
    "decode.trit2/read_bandwidth": Goal("bytes read by decode, d=2, over read bandwidth", 0.5, 0.7),
    "decode.smollm2.trit2/q4_0": Goal("decode of SmolLM2-135M, d=2 over Q4_0", 0.8),
    "decode.trit2.context4096/context0": Goal("decode, d=2, at 4,096 tokens of context over at 0", 0.7),
    "decode.smollm2.trit2.context4096/context0": Goal("decode of SmolLM2-135M, d=2, at 4,096 over at 0", 0.7),
    "decode.trit2.avx2/avx512": Goal("decode, d=2, AVX2 over AVX-512", 0.6),
    "prefill.trit2.avx2/avx512": Goal(f"prompt of {SIZE_OF_PROMPT}, d=2, AVX2 over AVX-512", 0.6),
}


@dataclass(frozen=True)
class Side:
    """One side of a ratio: a file made from random weights of a shape, and the variant that runs it."""

    shape: str
    file: str
    variant: str = ""


@dataclass(frozen=True)
class Ratio:
    """A ratio's name and its parts."""

    name: str
    test: str
    ours: Side
    theirs: Side

    @classmethod
    def parse(cls, name: str, shape: str) -> Ratio:
        """Parse a name of GOALS; raises TritGgufError for any other."""
        if name not in GOALS:
            raise TritGgufError(f"{name} is no ratio; choose from {', '.join(GOALS)}")
        test, _, sides = name.partition(".")
        ours, _, theirs = sides.partition("/")
        if ours.startswith("smollm2."):
            shape, ours = SMOLLM2, ours.removeprefix("smollm2.")
        file, _, variant = ours.partition(".")
        other = Side(shape, file, theirs) if variant else Side(shape, theirs)
        return cls(name, test, Side(shape, file, variant), other)

    @property
    def unit(self) -> str:
        """The unit of both sides."""
        if self.theirs.file == READ_BANDWIDTH:
            return "bytes/s"
        return "weights/s" if self.test == "convert" else "tokens/s"


@dataclass
class Samples:
    """The measurements of both sides of one ratio, in one unit; more is better."""

    unit: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    other_programs: list[float] = field(default_factory=list)
    """Share of all cores' time that other programs used in each turn; 0 where the system does not report it."""

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


class Result:
    """The results so far, as the JSON object that the tool prints and saves."""

    def __init__(self, shape: str, threads: int, processor: str, llama_cpp: str, isa: str) -> None:
        self.json: dict[str, Any] = {
            "shape": shape,
            "threads": threads,
            "ratios": {},
            "bounds": {},
            "absolute": {"processor": processor, "instructions": isa, "llama.cpp": llama_cpp},
        }

    def add(self, name: str, samples: Samples, date: str, revision: str) -> None:
        """Add a ratio, or replace it."""
        self.json["ratios"][name] = samples.ratio
        self.json["bounds"][name] = GOALS[name].bound
        self.json["absolute"][name] = {**samples.as_dict(), "measured": date, "revision": revision}
        for part in ("ratios", "bounds"):
            self.json[part] = {known: self.json[part][known] for known in GOALS if known in self.json[part]}

    def merge(self, file: Path) -> None:
        """Load earlier results from a file; raises TritGgufError if they are not comparable with new ones."""
        before = read_result(file)
        for part, found, expected in (
            ("shape", before["shape"], self.json["shape"]),
            ("number of threads", before["threads"], self.json["threads"]),
            ("processor", before["absolute"]["processor"], self.json["absolute"]["processor"]),
            ("instruction set", before["absolute"].get("instructions"), self.json["absolute"]["instructions"]),
            ("llama.cpp", before["absolute"]["llama.cpp"], self.json["absolute"]["llama.cpp"]),
        ):
            if found != expected:
                raise TritGgufError(f"{file}: another {part} ({found}, now {expected}); choose another --output")
        self.json = before

    def write(self, file: Path) -> None:
        """Replace a file's contents atomically."""
        partial = file.with_name(file.name + ".partial")
        try:
            with disk_errors(file):
                write_text(partial, json.dumps(self.json, indent=1) + "\n")
                partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def read_result(file: Path) -> dict[str, Any]:
    """Return a result that `Result.write` wrote; raises TritGgufError for anything else."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result.keys() >= {"shape", "threads", "ratios", "bounds", "absolute"} and result["ratios"].keys() <= set(
            GOALS
        ):
            return dict(result)
    except OSError as error:
        raise TritGgufError(f"{file}: cannot be read ({error.strerror}); choose another file") from error
    except (ValueError, AttributeError):
        pass
    raise TritGgufError(f"{file} is no result of this tool; choose another file")


def verdict(name: str, ratio: float) -> str:
    """Return `pass` or `fail`, or an empty string for a ratio without a bound."""
    bound = GOALS[name].bound
    return "" if bound is None else "pass" if ratio >= bound else "fail"


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def table(result: dict[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, columns and rows of a plain table."""
    rows: list[tuple[str, ...]] = []
    for name, ratio in result["ratios"].items():
        both = result["absolute"][name]
        unit, scale = _UNITS[both["unit"]]
        ours, theirs = (f"{both[side] / scale:.1f}" for side in ("ours", "theirs"))
        others = f"{max(both['other_programs']):.0%}"
        goal = GOALS[name]
        judged = (name, f"{ratio:.2f}", _format(goal.bound), verdict(name, ratio))
        rows.append((*judged, ours, theirs, unit, others))
    processor = " with ".join(filter(None, map(result["absolute"].get, ("processor", "instructions"))))
    title = f"{result['shape']}, {result['threads']} threads, {processor}"
    return title, ("ratio", ">", ">at least", "", ">ours", ">theirs", "unit", ">other programs"), rows


def markdown(result: dict[str, Any]) -> str:
    """Return the table of docs/speed.md."""
    lines = ["| ours over theirs | measured | at least | stretch |", "|---|---|---|---|"]
    for name, ratio in result["ratios"].items():
        goal = GOALS[name]
        lines.append(f"| {goal.label} | {ratio:.2f} | {_format(goal.bound)} | {_format(goal.stretch)} |")
    return "\n".join(lines)
