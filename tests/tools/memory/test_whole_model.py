"""A model taken through every step, with a tiny shape in place of one that does not fit the disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.memory import whole_model
from tools.memory.curve import BOUND
from tools.models import synthetic_checkpoint
from tools.models.random_model import QKV
from tritgguf.architectures.dimensions import Dimensions

SIZES = Dimensions(layers=2, vocabulary=384, hidden=128, feed_forward=192, heads=4, kv_heads=2, head_dim=32, biased=QKV)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize(("bound", "code"), [(BOUND, 0), (1_000_000, 1)])
def test_every_step_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, bound: int, code: int
) -> None:
    monkeypatch.setattr(synthetic_checkpoint, "_RANDOM_WEIGHTS", 1 << 12)
    monkeypatch.setitem(synthetic_checkpoint.SHAPES, "qwen2.5-32b", SIZES)
    monkeypatch.setattr(whole_model, "BOUND", bound)
    monkeypatch.setattr(sys, "argv", ["whole_model.py", "--layers", "1", "--folder", str(tmp_path)])
    assert whole_model.main() == code
    *table, last = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("|", "{"))]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| convert", "| check", "| run", "| export"]
    printed = json.loads(last)
    assert printed["check"]["trit_tensors"] == 7
    assert len(printed["run"]["tokens"]) == 16
    assert printed["export"]["weights"] > SIZES.vocabulary * SIZES.hidden * 2
    assert list(tmp_path.iterdir()) == []
