"""The threads that kernels run on, and the barrier at which they meet."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numba
import numpy as np
import pytest

from cpu_kernels.barrier import wait_for_all
from cpu_kernels.crew import CompilingCrew, Crew, announcing_compilation, default_crew, physical_cores


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_thread_gets_its_share(threads: int) -> None:
    def kernel(argument: str, thread: int, of: int) -> tuple[str, int, int, int]:
        time.sleep(0.001 * (of - thread))
        return argument, thread, of, threading.get_ident()

    results = Crew(threads).run(kernel, "argument")
    assert [result[:3] for result in results] == [("argument", thread, threads) for thread in range(threads)]
    assert results[0][3] == threading.get_ident()


@pytest.mark.parametrize("threads", [None, 0, -3])
def test_number_of_threads(threads: int | None) -> None:
    assert Crew(threads).threads == (physical_cores() if threads is None else 1)
    assert default_crew() is default_crew()


@pytest.mark.parametrize("failing", [0, 2])
def test_errors_are_raised_when_all_have_returned(failing: int) -> None:
    returned = []

    def kernel(thread: int, threads: int) -> None:
        if thread == failing:
            raise ArithmeticError("no")
        time.sleep(0.01)
        returned.append(thread)

    crew = Crew(3)
    for _ in range(2):
        returned.clear()
        with pytest.raises(ArithmeticError):
            crew.run(kernel)
        assert sorted(returned) == sorted({0, 1, 2} - {failing})


@numba.njit(nogil=True)
def _exchange(counter: Any, slots: Any, rounds: int, thread: int, threads: int) -> int:
    """Write a number, meet, and read everyone's, again and again; return how often one was not there yet."""
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
    # Four threads are more than small machines have, so that some must wait for their turn.
    crew, counter = Crew(threads), np.zeros(1, np.int64)
    for _ in range(3):
        assert crew.run(_exchange, counter, np.zeros(threads, np.int64), 200) == [0] * threads


def test_compiling_without_running() -> None:
    calls = []

    @numba.njit(nogil=True)
    def kernel(out: Any, thread: int, threads: int) -> None:
        out[thread] = threads

    out = np.zeros(1, np.int64)
    with announcing_compilation(lambda: calls.append("now")):
        assert CompilingCrew(1).run(kernel, out) == []
    assert calls == ["now"]
    assert out[0] == 0
    with announcing_compilation(lambda: calls.append("again")):
        Crew(1).run(kernel, out)
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
        Crew(3).run(kernel)
    assert sorted(returned) == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is before
