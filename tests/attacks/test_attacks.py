"""Every attack is refused: exit code 1, one line that says where and what to do, and no file left behind."""

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

ATTACKS = [attack for kind in (gguf_headers, trit_tensors, checkpoints, chat_templates) for attack in kind.ATTACKS]


@pytest.fixture(autouse=True)
def _short_time_for_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an attack by an endless template take less than the 5 seconds that it really may."""
    monkeypatch.setattr(template_process, "MOST_SECONDS", 1.0)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_is_refused(attack: Attack, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = attack.build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert app.main(arguments) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not re.search(r"Traceback|panicked", captured.err)
    for part in attack.says:
        assert part in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_names_are_unique() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
