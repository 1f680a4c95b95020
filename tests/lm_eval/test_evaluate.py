"""`evaluate`: lm-eval's tasks in this process, and the tasks that ship with the package."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Capture, fails, run_python

from tritgguf.cli import app
from tritgguf.errors import MissingExtraError, TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.request import Request, RunningRequest
from tritgguf.lm_eval.registration import TASKS_FOLDER, require_lm_eval

pytest.importorskip("lm_eval")

from tritgguf.lm_eval.evaluate import evaluate  # it needs lm-eval

UNSAFE_TASK = """
task: {name}
custom_dataset: !function functions.cloze
test_split: test
output_type: generate_until
unsafe_code: true
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def model(tiny_trit_file: Callable[..., GgufFile]) -> LoadedModel:
    return load(tiny_trit_file("qwen2", 2).path, context=640, parallel=4)


@pytest.fixture
def file(model: LoadedModel) -> str:
    return str(model.path)


def lines(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (TASKS_FOLDER / name).read_text("utf-8").splitlines()]


def test_the_questions_are_sound() -> None:
    facts, examples, cloze = map(lines, ("facts.jsonl", "facts_examples.jsonl", "cloze.jsonl"))
    assert 60 <= len(facts) <= 100
    assert 60 <= len(cloze) <= 100
    questions = [row["question"] for row in facts + examples]
    assert len(set(questions)) == len(questions)
    for row in facts + examples:
        assert isinstance(row["choices"], list)
        assert len(set(row["choices"])) == 4
        assert row["answer"] in range(4)
    places = [sum(row["answer"] == place for row in facts) for place in range(4)]
    assert max(places) < len(facts) / 2  # nothing is won by always taking one place
    assert len({row["text"] for row in cloze}) == len(cloze)
    assert all(str(row["target"]).isalpha() and str(row["text"])[-1].isalnum() for row in cloze)


def test_the_results_are_those_of_the_likelihoods(model: LoadedModel) -> None:
    stages = list[tuple[str, int, int]]()
    report = evaluate(model, ["tritgguf_f*", "tritgguf_cloze"], limit=6, progress=lambda *stage: stages.append(stage))
    found = {(result.task, result.metric): result for result in report.results}
    facts, cloze = lines("facts.jsonl")[:6], lines("cloze.jsonl")[:6]
    right = 0
    for row in facts:
        context, choices = f"Question: {row['question']}\nAnswer:", row["choices"]
        assert isinstance(choices, list)
        likelihoods = [model.score(context, f" {choice}").log_probability for choice in choices]
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    assert found["tritgguf_facts", "acc"].value == pytest.approx(right / 6)
    scores = [model.score(row["text"], f" {row['target']}").log_probability for row in cloze]  # type: ignore[arg-type]
    expected = 2.718281828 ** (-sum(scores) / 6)
    assert found["tritgguf_cloze", "perplexity"].value == pytest.approx(expected, rel=1e-5)
    for result in report.results:
        assert (result.questions, result.shots) == (6, 0)
        assert result.higher_is_better is (result.metric != "perplexity")
        assert result.stderr is not None
    assert ("log-likelihoods", 30, 30) in stages


def test_examples_stand_before_the_questions(model: LoadedModel) -> None:
    [result, *_] = evaluate(model, ["tritgguf_facts"], limit=2, num_fewshot=3).results
    assert result.shots == 3
    first = lines("facts.jsonl")[0]
    examples = lines("facts_examples.jsonl")[:3]
    shown = ""
    for row in examples:
        assert isinstance(row["choices"], list)
        assert isinstance(row["answer"], int)
        shown += f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}\n\n"
    context = f"{shown}Question: {first['question']}\nAnswer:"
    prompts = list[list[int]]()
    submit = model.engine.submit

    def submit_and_note(request: Request) -> RunningRequest:
        prompts.append(request.prompt)
        return submit(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "submit", submit_and_note)
        evaluate(model, ["tritgguf_facts"], limit=1, num_fewshot=3)
    tokens = model.tokenizer.encode(context, add_special=True, parse_special=True)
    assert any(prompt[: len(tokens)] == tokens for prompt in prompts)


def test_the_command_prints_a_table_or_json_and_writes_a_file(file: str, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "results.json"
    command = ["evaluate", file, "-c", "640", "--tasks", "tritgguf_cloze", "--limit", "3", "--output", str(output)]
    assert app.main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(output.read_text("utf-8"))
    assert printed["limit"] == 3
    assert {result["metric"] for result in printed["results"]} == {"acc", "perplexity"}
    assert "exists already" in fails(capsys, *command)
    assert app.main([*command, "--overwrite"]) == 0
    table = capsys.readouterr().out
    assert "the first 3 of each task" in table
    assert "tritgguf_cloze  perplexity" in table


def test_an_unknown_task_is_one_line(file: str, capsys: Capture) -> None:
    assert "did you mean tritgguf_facts" in fails(capsys, "evaluate", file, "--tasks", "tritgguf_fact")
    assert "there is no task to run" in fails(capsys, "evaluate", file, "--tasks", ",")


def test_data_that_cannot_be_fetched_is_one_line(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(importlib.import_module(package), "HF_HUB_OFFLINE", True)
    task = tmp_path / "far.yaml"
    task.write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: loglikelihood\n", "utf-8")
    with pytest.raises(TritGgufError, match=r"far.yaml cannot be loaded .*nobody/nothing.*tritgguf_cloze need none"):
        evaluate(model, [str(task)])


def test_a_missing_extra_is_one_line(file: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install lm-eval" in fails(capsys, "evaluate", file, "--tasks", "tritgguf_facts")
    with pytest.raises(MissingExtraError):
        require_lm_eval()


def test_code_of_the_model_runs_only_where_it_may(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text((TASKS_FOLDER / "functions.py").read_text("utf-8"), "utf-8")
    for name in ("tritgguf_unsafe", "others_unsafe"):
        (tmp_path / f"{name}.yaml").write_text(UNSAFE_TASK.format(name=name), "utf-8")
    (tmp_path / "cloze.jsonl").write_text((TASKS_FOLDER / "cloze.jsonl").read_text("utf-8"), "utf-8")
    with pytest.raises(TritGgufError, match="--allow-code-execution"):
        evaluate(model, [str(tmp_path / "tritgguf_unsafe.yaml")])
    with pytest.raises(TritGgufError, match="without a sandbox"):
        evaluate(model, [str(tmp_path / "others_unsafe.yaml")], allow_code_execution=True)


def test_git_is_not_asked(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Capture) -> None:
    """lm-eval asks it for the commit of the folder; outside of a checkout it complains on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    evaluate(model, ["tritgguf_cloze"], limit=1)
    assert "git" not in capfd.readouterr().err


def test_importing_the_package_does_not_import_lm_eval() -> None:
    program = "import sys, tritgguf, tritgguf.cli.app\nassert not {'lm_eval', 'datasets', 'torch'} & {*sys.modules}"
    assert run_python("-c", program).returncode == 0


@pytest.mark.slow
def test_lm_evals_own_command_line_knows_the_model_and_the_tasks(file: str) -> None:
    arguments = ["--model_args", f"pretrained={file},max_length=640", "--tasks", "tritgguf_cloze", "--limit", "2"]
    done = run_python("-m", "tritgguf.lm_eval", "run", "--model", "tritgguf", *arguments)
    assert done.returncode == 0, done.stderr
    assert "|tritgguf_cloze|" in done.stdout
