"""The share of other programs, and waiting for them."""

from __future__ import annotations

import os

import pytest

from tools.speed import quiet_machine
from tools.speed.quiet_machine import QUIET, Patience, ProcessorSeconds, processor_seconds, share_of_others


def test_the_share_of_other_programs() -> None:
    cores = os.cpu_count() or 1
    start = ProcessorSeconds(0, 0, 0)
    assert share_of_others(start, ProcessorSeconds(10, 4 * cores + 1, 1)) == pytest.approx(0.4)
    assert share_of_others(start, ProcessorSeconds(10, 1, 2)) == 0
    assert share_of_others(start, start) == 0


def test_the_clocks_go_forward() -> None:
    before, after = processor_seconds(), processor_seconds()
    assert all(earlier <= later for earlier, later in zip(before, after, strict=True))


def test_patience_repeats_disturbed_turns_until_it_is_over() -> None:
    patience = Patience(100)
    assert patience.accepts(QUIET, 60)
    assert not patience.accepts(QUIET + 0.01, 60)
    assert not patience.accepts(QUIET + 0.01, 60)
    assert patience.accepts(QUIET + 0.01, 60)


def test_patience_waits_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbances = [0.9, 0.5, 0.0]
    slept: list[float] = []
    monkeypatch.setattr(quiet_machine, "share_of_others", lambda before, after: disturbances.pop(0))
    monkeypatch.setattr("time.sleep", slept.append)
    Patience(0).wait()
    assert slept == []
    Patience(100).wait()
    assert (len(slept), disturbances) == (3, [])
    disturbances += [0.9] * 9
    Patience(2 * slept[0]).wait()
    assert len(slept) == 5
