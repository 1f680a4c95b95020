"""`tritgguf evaluate`: tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritgguf.cli import terminal
from tritgguf.cli.loading import load_model
from tritgguf.cli.model_file import local_file
from tritgguf.cli.options import (
    CacheType,
    InstructionSet,
    Json,
    KeyType,
    Overwrite,
    PrefillBits,
    Threads,
    TritFile,
    ValueType,
    one_cache_type,
    option,
)

if TYPE_CHECKING:
    from tritgguf.lm_eval.evaluate import EvaluationReport, TaskResult

Tasks = Annotated[str, option("--tasks", metavar="A,B", help="Tasks, groups or patterns of lm-eval.")]
Limit = Annotated[
    int | None, option("--limit", min=1, help="Questions of each task, the first ones.", show_default="all")
]
Examples = Annotated[
    int | None,
    option("--num-fewshot", min=0, help="Examples before each question.", show_default="what the task has"),
]
ChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Ask each question as a message of a chat.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run code that the model writes, in a sandbox (Linux).")
]
Output = Annotated[
    Path | None, option("--output", metavar="FILE", help="Also write the results as JSON.", show_default=False)
]
Context = Annotated[int, option("--ctx-size", "-c", min=0, help="Context in tokens; 0: the model's training context.")]
Parallel = Annotated[int, option("--parallel", "-np", min=1, max=256, help="Requests that run at once.")]
Exact = Annotated[
    bool, typer.Option("--exact", help="Multiply all activations with 31 bits, at a fraction of the speed.")
]

_ARROWS = {True: "↑", False: "↓", None: ""}


def print_evaluation(report: EvaluationReport) -> None:
    """Print a row for each metric; an arrow shows which direction is better."""
    terminal.print_table(
        f"{report.file}, {report.seconds:.0f} s" + (f", the first {report.limit} of each task" if report.limit else ""),
        ("task", "metric", "", ">value", ">±", ">examples", ">questions"),
        [_row(result) for result in report.results],
    )


def _row(result: TaskResult) -> tuple[str, ...]:
    metric = result.metric if result.filter == "none" else f"{result.metric}, {result.filter}"
    error = "" if result.stderr is None else f"{result.stderr:.4f}"
    counts = ("" if count is None else str(count) for count in (result.shots, result.questions))
    return (result.task, metric, _ARROWS[result.higher_is_better], f"{result.value:.4f}", error, *counts)


def evaluate_command(
    file: TritFile,
    tasks: Tasks,
    limit: Limit = None,
    num_fewshot: Examples = None,
    chat_template: ChatTemplate = False,
    allow_code_execution: AllowCode = False,
    output: Output = None,
    overwrite: Overwrite = False,
    context: Context = 0,
    parallel: Parallel = 64,
    threads: Threads = None,
    prefill_bits: PrefillBits = 16,
    exact: Exact = False,
    cache_type: CacheType = None,
    key_type: KeyType = None,
    value_type: ValueType = None,
    isa: InstructionSet = None,
    as_json: Json = False,
) -> None:
    """Evaluate a trit file on tasks of lm-evaluation-harness.

    tritgguf_facts and tritgguf_cloze need no network; most other tasks fetch their data set once.
    Needs lm-eval: pip install lm-eval.

    Example: tritgguf evaluate d3.gguf --tasks tritgguf_facts,tritgguf_cloze
    """
    from tritgguf.formats.durable_output import check_output, replace_text
    from tritgguf.lm_eval.registration import require_lm_eval

    cache_type = one_cache_type(cache_type, key_type, value_type)
    require_lm_eval()
    file = local_file(file)
    output = None if output is None else check_output(output, overwrite, [file])
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is imported
    settings = {"prefill_bits": prefill_bits, "exact": exact, "cache_type": cache_type, "threads": threads, "isa": isa}
    model = load_model(file, context=context or None, parallel=parallel, **settings)
    from tritgguf.lm_eval.evaluate import evaluate

    with terminal.progress(in_bytes=False) as progress:
        report = evaluate(
            model,
            [name for name in tasks.split(",") if name],
            limit=limit,
            num_fewshot=num_fewshot,
            chat_template=chat_template,
            allow_code_execution=allow_code_execution,
            progress=progress,
        )
    if output is not None:
        replace_text(output, json.dumps(report.as_dict(), ensure_ascii=False, indent=2) + "\n")
    if as_json:
        terminal.print_json(report.as_dict())
    else:
        print_evaluation(report)
