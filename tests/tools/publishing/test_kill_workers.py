"""kill_workers kills what executes a task, and nothing else of Ray."""

from __future__ import annotations

import pytest

from tools.publishing.kill_workers import runs_a_task


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        (b"ray::encoding of Tiny", True),
        (b"ray::evaluation of Tiny", True),
        (b"ray::publication on 192.0.2.1", True),
        (b"ray::IDLE", False),
        (b"ray::_Board.take", False),
        (b"ray::RuntimeEnvAgent", False),
        (b"ray::DashboardAgent", False),
        (b"python -m tritgguf publish", False),
    ],
)
def test_what_is_killed(title: bytes, expected: bool) -> None:
    assert runs_a_task(title) == expected
