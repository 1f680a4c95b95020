"""The third text of the quality tools: the same everywhere, and not a part of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tools.quality import exam_text, package_texts
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.text_windows import shipped_text


def test_the_exam_text_has_every_subject_and_nothing_of_the_other_texts() -> None:
    pytest.importorskip("lm_eval")
    text = exam_text.text()
    assert text.count("The following are multiple choice questions (with answers) about") == 57
    assert "step by step." not in text
    others = {
        line for other in (*package_texts.texts(), shipped_text()) for line in other.splitlines() if len(line) > 20
    }
    assert not others & set(text.splitlines())


def test_another_version_of_the_text_is_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(origin=f"{tmp_path}/__init__.py")
    monkeypatch.setattr(exam_text, "find_spec", lambda name: package)
    with pytest.raises(TritGgufError, match=r"install lm-eval 0\.4\.13"):
        exam_text.text()
