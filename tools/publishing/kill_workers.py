"""Kill workers of `publish --ray` at random times, and compare the files with those of a run on this machine alone.

    python -m tools.publishing.kill_workers plan.toml build/kills --kills 20

The plan is carried out once without Ray and then with Ray, again and again into a new folder, until so many workers
were killed in the middle of a task. The exit code is 1 if a run fails or a file differs. It needs Linux.
"""

from __future__ import annotations

import filecmp
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tools.tool_command import run
from tritgguf.errors import TritGgufError
from tritgguf.formats.text_file import read_text
from tritgguf.publishing.plan_file import read_plan
from tritgguf.publishing.state import WORK_FOLDER

_TITLE = b"ray::"


def main(
    plan: Annotated[Path, typer.Argument(help="The plan, with `bench = false`: speeds in cards are never the same.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the results; what is in it is removed.")],
    kills: Annotated[int, typer.Option(help="How many workers to kill.")] = 20,
    kills_per_run: Annotated[int, typer.Option(help="How many of them in one run.")] = 5,
    seconds: Annotated[float, typer.Option(help="Mean time between two kills.")] = 6.0,
    threads: Annotated[int, typer.Option(help="Cores of each task.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the random times.")] = 0,
) -> None:
    """Kill workers and compare the files."""
    if read_plan(plan).bench:
        raise TritGgufError(f"{plan}: measures speeds, which are never the same; give bench = false")
    chooser, killed, runs = random.Random(seed), Counter[str](), 0
    expected = _publish(plan, folder / "alone", threads)
    while killed.total() < kills:
        runs += 1
        wanted = min(kills_per_run, kills - killed.total())
        found = _publish(plan, folder / "ray", threads, _Killer(chooser, wanted, seconds, killed))
        differing = _differing(expected, found)
        print(f"run {runs}: {killed.total()} kills so far, {len(differing)} files differ", flush=True)
        if differing:
            raise TritGgufError(f"{found}: differs from {expected} in {', '.join(differing)}")
    for task, count in killed.most_common():
        print(f"{count:3d} kills during: {task}")


class _Killer:
    """Kills workers of a process at random times, until it ends."""

    def __init__(self, chooser: random.Random, wanted: int, seconds: float, killed: Counter[str]) -> None:
        self._chooser, self._wanted, self._seconds, self._killed = chooser, wanted, seconds, killed

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill workers while the process runs."""
        left, due = self._wanted, self._next()
        while process.poll() is None:
            time.sleep(0.05)
            workers = _busy_workers(process.pid) if left and time.monotonic() >= due else {}
            if workers:
                worker = self._chooser.choice(sorted(workers))
                os.kill(worker, signal.SIGKILL)
                self._killed[workers[worker]] += 1
                left, due = left - 1, self._next()

    def _next(self) -> float:
        return time.monotonic() + self._chooser.expovariate(1 / self._seconds)


def _publish(plan: Path, folder: Path, threads: int, killer: _Killer | None = None) -> Path:
    """Carry a plan out with its output in a new folder; return this. TritGgufError if that fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = re.sub(r"(?m)^output\s*=.*$", f"output = '{folder.resolve()}'", read_text(plan))
    copy = plan.with_name(f"{plan.stem}.{folder.name}.toml")  # beside the plan: its paths are relative
    copy.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "tritgguf", "publish", str(copy), "--threads", str(threads)]
    command += [] if killer is None else ["--ray"]
    try:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            if killer is not None:
                killer.watch(process)
            _, errors = process.communicate()
    finally:
        copy.unlink()
    if process.returncode:
        raise TritGgufError(f"{plan}: publish failed ({errors.decode().strip().splitlines()[-1]})")
    return folder


def _busy_workers(ancestor: int) -> dict[int, str]:
    """Return the processes that execute a task of Ray and descend from a process: number -> the task's name."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().rstrip(b"\0 ")
        except OSError:
            continue

    def descends(process: int) -> bool:
        while process not in (0, 1, ancestor):
            process = parents.get(process, 0)
        return process == ancestor

    return {
        process: title.removeprefix(_TITLE).decode()
        for process, title in titles.items()
        if runs_a_task(title) and descends(process)
    }


def runs_a_task(title: bytes) -> bool:
    """Tell whether a process with this title executes a task of a plan.

    Their names have several words. Others of Ray's processes have one: without its agents, a node of Ray ends.
    """
    return title.startswith(_TITLE) and b" " in title


def _differing(expected: Path, found: Path) -> list[str]:
    """Return the files, other than notes, that are in only one of two folders or differ."""
    names = {
        str(path.relative_to(folder))
        for folder in (expected, found)
        for path in folder.rglob("*")
        if path.is_file() and WORK_FOLDER not in path.relative_to(folder).parts
    }
    return [name for name in sorted(names) if not _same(expected / name, found / name)]


def _same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and filecmp.cmp(first, second, shallow=False)


if __name__ == "__main__":
    run(main)
