"""Fuzz every reader with damaged input: nothing may crash, hang, print a traceback or read out of bounds.

    python -m tools.fuzz.fuzzer --seconds 60 --seed 1
    python -m tools.fuzz.fuzzer --target gguf-header --cases 1000000
    python -m tools.fuzz.fuzzer --target command --cases 10000
    python -m tools.fuzz.fuzzer --target command --seed 1 --first 4711 --cases 1    # repeats one case

A case is given by its target, the seed and its number. Cases run in a child process. If the child dies or a case takes
more than ten seconds, this is a finding, and another child continues with the next case.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tritgguf.cli import terminal

MOST_SECONDS_PER_CASE = 10.0
TARGETS = (
    "gguf-header", "gguf-file", "command", "safetensors", "config", "tokenizer", "chat-template", "trit-rows",
)  # fmt: skip
_MOST_FINDINGS = 20
_MOST_SECONDS_TO_START = 300.0
Target = Callable[[random.Random], object]
Make = Callable[[], Target]


@dataclass
class Result:
    """The result of one target."""

    target: str
    cases: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


def fuzz(make: Make, result: Result, *, seed: int, first: int, cases: int, seconds: float) -> None:
    """Run `cases` cases of a target from number `first` on, for at most `seconds`; fill in `result`.

    `make` makes the target in the child process, because a fork does not keep the parent's threads.
    """
    started = time.perf_counter()
    number = first
    while number < first + cases and time.perf_counter() - started < seconds:
        left = seconds - (time.perf_counter() - started)
        number = _child(make, result, seed=seed, first=number, last=first + cases, seconds=left)
        if len(result.findings) >= _MOST_FINDINGS:
            break
    result.cases, result.seconds = number - first, time.perf_counter() - started


def _child(make: Make, result: Result, *, seed: int, first: int, last: int, seconds: float) -> int:
    """Run cases in a child process until it ends; return the number of the next case."""
    # The number of the running case and its start time. Each store is atomic; `struct` would write zeros first, and the
    # parent could take a case that it reads then for one that hangs.
    progress = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")
    progress[0], progress[1] = first - 1, time.monotonic()
    reports_out, reports_in = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reports_out)
        code = 1
        try:
            _run_cases(make, result.target, progress, reports_in, seed, first, last, seconds)
            code = 0
        finally:
            os._exit(code)
    os.close(reports_in)
    status, hung = None, False
    while status is None:
        time.sleep(0.02)
        ended, code = os.waitpid(child, os.WNOHANG)
        number, begun = int(progress[0]), progress[1]
        if ended:
            status = code
        elif time.monotonic() - begun > (MOST_SECONDS_PER_CASE if number >= first else _MOST_SECONDS_TO_START):
            os.kill(child, signal.SIGKILL)
            hung = True
            os.waitpid(child, 0)
            status = 0
    with os.fdopen(reports_out, "r", encoding="utf-8", errors="replace") as reports:
        result.findings += [line for line in reports.read().split("\0") if line]
    number = int(progress[0])
    if hung:
        result.findings.append(f"{result.target} seed {seed} case {number}: takes more than {MOST_SECONDS_PER_CASE} s")
    elif os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        result.findings.append(f"{result.target} seed {seed} case {number}: dies of {name}")
    elif status:
        result.findings.append(f"{result.target} seed {seed} case {number}: ends the process")
    return number + 1


def _run_cases(
    make: Make, target: str, progress: memoryview[float], reports: int, seed: int, first: int, last: int, seconds: float
) -> None:
    """Run cases one after the other, each with its own random generator; report findings through a pipe."""
    faulthandler.enable()
    run = make()
    deadline = time.monotonic() + seconds
    for number in range(first, last):
        now = time.monotonic()
        if now > deadline:
            return
        progress[1], progress[0] = now, number
        try:
            run(random.Random(f"{seed} {number}"))
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{type(error).__name__}: {error}"[:400].replace("\0", "")
            report = f"{target} seed {seed} case {number}: {line} ({Path(where.filename).name}:{where.lineno})\0"
            os.write(reports, report.encode("utf-8", "replace"))


def main(
    seconds: Annotated[float, typer.Option(help="For all targets together, if --cases is not given.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of the damage.")] = 1,
    target: Annotated[str | None, typer.Option(help=", ".join(TARGETS), show_default="all")] = None,
    cases: Annotated[int | None, typer.Option(min=1, help="Of each target.", show_default="as time allows")] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of the first case.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Give damaged input to every reader; exit code 1 if there is a finding."""
    if target is not None and target not in TARGETS:
        raise typer.BadParameter(f"choose from {', '.join(TARGETS)}", param_hint="--target")
    names = [target] if target else list(TARGETS)
    results = []
    with tempfile.TemporaryDirectory(prefix="tritgguf-fuzz-", dir=_fast_folder()) as folder:

        def make(name: str) -> Target:
            from tools.fuzz.targets import Targets

            return Targets(Path(folder)).prepared(name)

        for name in names:
            result = Result(name)
            share = seconds / len(names) if cases is None else float("inf")
            fuzz(partial(make, name), result, seed=seed, first=first, cases=cases or sys.maxsize // 2, seconds=share)
            results.append(result)
            terminal.note(f"{name}: {result.cases} cases in {result.seconds:.0f} s, {len(result.findings)} findings")
    for result in results:
        for finding in result.findings:
            terminal.error(finding)
    if as_json:
        terminal.print_json([vars(result) for result in results])
    raise typer.Exit(int(any(result.findings for result in results)))


def _fast_folder() -> str | None:
    """Return a folder in memory if there is one: a run writes a million files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    typer.run(main)
