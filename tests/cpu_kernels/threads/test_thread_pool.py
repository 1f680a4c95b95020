"""The thread pool, the barrier, and the number of cores."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpu_kernels.compilation import kernel_cache
from cpu_kernels.compilation import lazy_numba as numba
from cpu_kernels.threads.barrier import wait_for_all
from cpu_kernels.threads.cores import cpu_quota, physical_cores
from cpu_kernels.threads.thread_pool import CompilingThreadPool, ThreadPool, announcing_compilation, default_thread_pool


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_gets_its_share(threads: int) -> None:
    def kernel(argument: str, thread: int, of: int) -> tuple[str, int, int, int]:
        time.sleep(0.001 * (of - thread))
        return argument, thread, of, threading.get_ident()

    results = ThreadPool(threads).run(kernel, "argument")
    assert [result[:3] for result in results] == [("argument", thread, threads) for thread in range(threads)]
    assert results[0][3] == threading.get_ident()


@pytest.mark.parametrize("threads", [None, 0, -3])
def test_number_of_threads(threads: int | None) -> None:
    assert ThreadPool(threads).threads == (physical_cores() if threads is None else 1)
    assert default_thread_pool() is default_thread_pool()


@pytest.mark.parametrize("failing", [0, 2])
def test_errors_are_raised_when_all_have_returned(failing: int) -> None:
    returned = []

    def kernel(thread: int, threads: int) -> None:
        if thread == failing:
            raise ArithmeticError("no")
        time.sleep(0.01)
        returned.append(thread)

    thread_pool = ThreadPool(3)
    for _ in range(2):
        returned.clear()
        with pytest.raises(ArithmeticError):
            thread_pool.run(kernel)
        assert sorted(returned) == sorted({0, 1, 2} - {failing})


def fake_system(root: Path, siblings: list[str], groups: str = "", limits: dict[str, str] | None = None) -> Path:
    """Write a fake /sys and /proc: the thread siblings of each logical processor, and the control groups."""
    for cpu, text in enumerate(siblings):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in (limits or {}).items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


LAYOUTS = {
    "no hyperthreads": (["0", "1", "2", "3"], 4),
    "neighbours share a core": (["0-1", "0-1", "2-3", "2-3"], 2),
    "the second half are the hyperthreads": (["0,3", "1,4", "2,5", "0,3", "1,4", "2,5"], 3),
    "two fast cores with hyperthreads, four slow ones without": (["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"], 6),
    "one core": (["0-1", "0-1"], 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hyperthreads_count_once(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings, cores = LAYOUTS[layout]
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(len(siblings))), raising=False)
    assert physical_cores(fake_system(tmp_path, siblings)) == cores


def test_only_allowed_processors_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_system(tmp_path, ["0-1", "0-1", "2-3", "2-3", "4", "5"])
    for allowed, cores in (({0, 1}, 1), ({1, 2}, 2), ({0, 1, 2, 3, 5}, 3), ({4}, 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda process, allowed=allowed: allowed, raising=False)
        assert physical_cores(root) == cores


def test_without_the_topology_logical_processors_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    assert physical_cores(tmp_path) == 3
    monkeypatch.delattr("os.sched_getaffinity")
    assert physical_cores(tmp_path) == os.cpu_count()


CONTROL_GROUPS = {
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "200000 100000"}, 2.0),
    "version 2, the limit is an ancestor's": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"},
        1.5,
    ),
    "version 2 inside a container": ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
    "version 2, no limit": ("0::/a\n", {"a/cpu.max": "max 100000"}, math.inf),
    "version 1": (
        "4:memory:/m\n3:cpu,cpuacct:/a\n",
        {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000", "cpu/m/cpu.max": "1 1"},
        3.0,
    ),
    "version 1 inside a container": (
        "3:cpu:/not/here\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"},
        2.0,
    ),
    "version 1, no limit": ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "50000"}, math.inf),
    "nonsense": ("0::/\n", {"cpu.max": "many"}, math.inf),
}


@pytest.mark.parametrize("case", CONTROL_GROUPS)
def test_control_groups_limit_the_threads(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, limits, quota = CONTROL_GROUPS[case]
    root = fake_system(tmp_path, ["0", "1", "2", "3"], groups, limits)
    assert cpu_quota(root) == quota
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    assert physical_cores(root) == max(1, int(min(4, quota)))


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf


@numba.njit(nogil=True)
def _exchange(counter: Any, slots: Any, rounds: int, thread: int, threads: int) -> int:
    """Repeatedly write a number, wait, and read all threads' numbers; return how many were not yet written."""
    missed = 0
    for number in range(1, rounds + 1):
        slots[thread] = number
        wait_for_all(counter, threads)
        for other in range(threads):
            missed += slots[other] != number
        wait_for_all(counter, threads)
    return missed


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_barrier(threads: int) -> None:
    # Small machines have fewer than four cores, so some threads have to yield.
    thread_pool, counter = ThreadPool(threads), np.zeros(1, np.int64)
    for _ in range(3):
        assert thread_pool.run(_exchange, counter, np.zeros(threads, np.int64), 200) == [0] * threads


def test_compiling_without_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "folder", lambda: tmp_path)  # earlier runs have left the kernel in the real one
    calls = []

    @numba.njit(nogil=True)
    def kernel(out: Any, thread: int, threads: int) -> None:
        out[thread] = threads

    out = np.zeros(1, np.int64)
    with announcing_compilation(lambda: calls.append("now")):
        assert CompilingThreadPool(1).run(kernel, out) == []
    assert calls == ["now"]
    assert out[0] == 0
    with announcing_compilation(lambda: calls.append("again")):
        ThreadPool(1).run(kernel, out)
    assert calls == ["now"]
    assert out[0] == 1


def test_an_interrupt_waits_for_all_threads() -> None:
    returned = []

    def kernel(thread: int, threads: int) -> None:
        if thread == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        returned.append(thread)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ThreadPool(3).run(kernel)
    assert sorted(returned) == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_of_a_single_thread_leaves_a_pool_that_runs() -> None:
    thread_pool = ThreadPool(1)
    with pytest.raises(KeyboardInterrupt):
        thread_pool.run(lambda thread, threads: signal.raise_signal(signal.SIGINT))
    assert thread_pool.run(lambda thread, threads: (thread, threads)) == [(0, 1)]


def test_an_interrupt_ends_compiling_at_once() -> None:
    reached = []

    class Kernel:
        def load(self, *arguments: object) -> None:
            signal.raise_signal(signal.SIGINT)
            reached.append("end of compiling")

    with pytest.raises(KeyboardInterrupt):
        CompilingThreadPool(1).run(Kernel())
    assert not reached
