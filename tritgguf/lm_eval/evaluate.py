"""`tritgguf evaluate`: lm-eval's tasks on a trit file, in this process."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.formats.text_file import read_text
from tritgguf.generation.loaded_model import LoadedModel
from tritgguf.lm_eval.registration import TASKS_FOLDER, require_lm_eval
from tritgguf.text_format import one_line

_BOOTSTRAP_SAMPLES = 1000  # for the standard error of metrics that are no means
_MARK_OF_OURS = "tritgguf_"
_OFFLINE_TASKS = "tritgguf_facts and tritgguf_cloze"
_LONGEST_REASON = 160  # characters of another package's error
_ENVIRONMENT = ("get_git_commit_hash", "add_env_info")  # lm-eval's functions
_LOUD = ("datasets", "huggingface_hub", "lm_eval")  # loggers

Progress = Callable[[str, int, int], None]
"""Called with the stage, the number of steps done and their total."""


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task, metric, filter: as lm-eval names them.
        value: the metric's.
        stderr: its standard error; None where lm-eval gives none.
        higher_is_better: None where the task does not say.
        shots: examples before each question; None for a group.
        questions: how many were asked; None for a group.
        version: the task's.

    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    shots: int | None
    questions: int | None
    version: float | str | None


@dataclass(frozen=True)
class EvaluationReport:
    """Results of `evaluate`."""

    file: Path
    results: list[TaskResult]
    limit: int | None
    chat_template: bool
    lm_eval_version: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return what `evaluate --json` prints."""
        return {**asdict(self), "file": str(self.file)}


def evaluate(
    model: LoadedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    allow_code_execution: bool = False,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Run tasks of lm-eval on a model.

    Args:
        model: what answers.
        tasks: names of tasks, groups or tags, patterns such as `tritgguf_*`, or paths of YAML files.
        limit: questions of each task; None for all.
        num_fewshot: examples before each question; None for as many as the task has. A task that forbids them has none.
        chat_template: whether questions become messages of a chat.
        allow_code_execution: whether code that the model writes may run, in a sandbox.
        progress: called with the stage, the number of requests done and their total.

    Raises:
        TritGgufError: lm-eval is missing, a task is unknown, its data cannot be loaded, or it would run code that is
            not allowed to run.

    """
    require_lm_eval()
    start = time.perf_counter()
    report: Progress = progress or (lambda stage, done, total: None)
    with _quiet():
        from lm_eval import __version__, simple_evaluate

        from tritgguf.lm_eval.model import TritGgufLM

        manager = _task_manager(tasks)
        loaded = _load_tasks(manager, tasks, report)
        _check_code(loaded, allow_code_execution)
        results = simple_evaluate(
            model=TritGgufLM(model, progress=report),
            tasks=loaded,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat_template,
            confirm_run_unsafe_code=allow_code_execution,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
        )
    seconds = time.perf_counter() - start
    return EvaluationReport(model.path, _task_results(results), limit, chat_template, __version__, seconds)


def _task_manager(names: Sequence[str]) -> Any:
    """Return lm-eval's index of tasks, as far as these names need it."""
    if not names:
        raise BadRequestError(f"there is no task to run; name some, such as {_OFFLINE_TASKS}")
    from lm_eval.tasks import TaskManager

    defaults = not all(map(_needs_no_index, names))
    return TaskManager(include_path=str(TASKS_FOLDER), include_defaults=defaults)


def _load_tasks(manager: Any, names: Sequence[str], report: Progress) -> list[Any]:
    """Return lm-eval's tasks and groups with these names, with their data."""
    found = dict.fromkeys(match for name in names for match in _matches(manager, name))
    loaded = []
    for done, name in enumerate(found):
        report("loading tasks", done, len(found))
        try:
            parts = manager.load([name])
        except TritGgufError:
            raise
        except Exception as error:  # of the task's own code, of `datasets` or of what it needs
            reason = one_line(str(error))[:_LONGEST_REASON]
            raise TritGgufError(
                f"the task {name} cannot be loaded ({type(error).__name__}: {reason}); if its data set has to be"
                f" fetched, this needs a network once; {_OFFLINE_TASKS} need none"
            ) from error
        children = {child for members in parts.get("group_map", {}).values() for child in members}
        loaded += [part for part_name, part in parts["groups"].items() if part_name not in children] or list(
            parts["tasks"].values()
        )
    report("loading tasks", len(found), len(found))
    return loaded


def _needs_no_index(name: str) -> bool:
    """Tell whether a name needs none of the tasks that lm-eval brings, whose index takes ten seconds."""
    if _is_file(name):
        return "group:" not in read_text(Path(name))
    return name.startswith(_MARK_OF_OURS)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _matches(manager: Any, name: str) -> list[str]:
    """Return the names that a name or pattern stands for; BadRequestError if there are none."""
    if _is_file(name):
        return [name]
    matches: list[str] = manager.match_tasks([name])
    if matches:
        return matches
    close = get_close_matches(name, manager.all_tasks, n=3)
    meant = f"did you mean {', '.join(close)}? " if close else ""
    raise BadRequestError(
        f"there is no task {name}; {meant}{', '.join(_shipped_tasks())} ship with tritgguf, and"
        " `python -m tritgguf.lm_eval ls tasks` lists all"
    )


def _shipped_tasks() -> list[str]:
    return sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml"))


def _check_code(loaded: Sequence[Any], allowed: bool) -> None:
    """Raise BadRequestError for tasks that run generated code, unless that is allowed and they do it in the sandbox."""
    from lm_eval.api.group import Group

    tasks = [task for part in loaded for task in (part.get_all_tasks() if isinstance(part, Group) else [part])]
    for task in tasks:
        if not getattr(task, "UNSAFE_CODE", False):
            continue
        if not task.task_name.startswith(_MARK_OF_OURS):
            raise BadRequestError(
                f"the task {task.task_name} runs generated code without a sandbox; tritgguf_human_eval runs it in one"
            )
        if not allowed:
            raise BadRequestError(
                f"the task {task.task_name} runs code that the model writes; allow it with --allow-code-execution"
                " (allow_code_execution=True)"
            )


def _task_results(results: Mapping[str, Any]) -> list[TaskResult]:
    found = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            found.append(
                TaskResult(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    shots=results["n-shot"].get(task),
                    questions=results["n-samples"].get(task, {}).get("effective"),
                    version=results["versions"].get(task),
                )
            )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notes and worker processes away, and what it prints."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork a process for each processor
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), _no_environment():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def _no_environment() -> Iterator[None]:
    """Keep lm-eval from describing the machine and the folder, which no report here shows.

    It asks git, which complains on stderr outside of a checkout, and torch, which takes seconds to ask other programs.
    """
    from lm_eval import evaluator

    names = [name for name in _ENVIRONMENT if hasattr(evaluator, name)]
    before = {name: getattr(evaluator, name) for name in names}
    try:
        for name in names:
            setattr(evaluator, name, lambda *arguments: None)
        yield
    finally:
        for name, function in before.items():
            setattr(evaluator, name, function)
