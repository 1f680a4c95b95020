"""Functions that the tasks' YAML files name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def facts(**_: Any) -> dict[str, Any]:
    """Return the questions of `tritgguf_facts`, and the examples that stand before them."""
    return {"test": _read("facts.jsonl"), "validation": _read("facts_examples.jsonl")}


def cloze(**_: Any) -> dict[str, Any]:
    """Return the texts of `tritgguf_cloze`."""
    return {"test": _read("cloze.jsonl")}


def _read(name: str) -> Any:
    """Return a file of the folder; lm-eval's own loader would look for it in the current folder."""
    import json

    from datasets import Dataset

    lines = (_FOLDER / name).read_text("utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])
