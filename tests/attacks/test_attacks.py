"""Every attack is rejected: exit code 1, one line with location and remedy, and no file left."""

from __future__ import annotations

import re
from pathlib import Path

import chat_templates
import checkpoints
import gguf_headers
import pytest
import trit_tensors
from attack import Attack

from tritgguf.cli import app
from tritgguf.tokenization import template_process

ATTACKS = [attack for module in (gguf_headers, trit_tensors, checkpoints, chat_templates) for attack in module.ATTACKS]


@pytest.fixture(autouse=True)
def _short_time_for_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time limit of templates from 5 seconds, to speed up the tests."""
    monkeypatch.setattr(template_process, "MOST_SECONDS", 1.0)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_is_rejected(attack: Attack, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = attack.build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert app.main(arguments) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not re.search(r"Traceback|panicked", captured.err)
    for part in attack.message_parts:
        assert part in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_names_are_unique() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
