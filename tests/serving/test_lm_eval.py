"""lm-eval, the evaluation harness, on the server: its likelihoods are those of `model.score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import RunningServer

from tritgguf.generation.loaded_model import LoadedModel

QUESTIONS = [
    {"question": "The quick brown fox", "choices": [" jumps over", " sleeps", " 12"]},
    {"question": "Name three", "choices": [" primary colors", " months in a year", " dogs"]},
    {"question": "Weights are sums", "choices": [" of ternary digits", " of text", "."]},
]
TASK = """
task: tiny_questions
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}
  data_files: {{test: {folder}/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_lm_evals_likelihoods_are_those_of_score(
    server: RunningServer, serving_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), "utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path), "utf-8")
    url = f"{server.url}/v1/completions"
    results: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=f"model=tiny,base_url={url},tokenizer_backend=remote,num_concurrent=2,max_length=600",
        tasks=["tiny_questions"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    compared = 0
    for sample in results["samples"]["tiny_questions"]:
        for (context, continuation), (log_likelihood, is_greedy) in zip(
            sample["arguments"], sample["filtered_resps"], strict=True
        ):
            score = serving_model.score(context, continuation)
            assert float(log_likelihood) == pytest.approx(score.log_probability, abs=1e-4)
            assert str(is_greedy) == str(score.is_greedy)
            compared += 1
    assert compared == 9
