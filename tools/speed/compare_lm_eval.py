"""How much faster is lm-eval with a trit file than with its own model `hf` in float32 on this processor?

    python -m tools.speed.compare_lm_eval smollm2-d2.gguf models/SmolLM2-135M-Instruct

Both answer the multiple-choice questions of `tritgguf_facts` behind the same examples, some questions in turns, so that
a machine whose speed drifts treats them alike. The folder holds the model from which the file was converted; its speed
does not depend on its weights.
"""

from __future__ import annotations

import os
import time
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from tools import tool_command
from tritgguf.cli import terminal
from tritgguf.lm_eval.registration import TASKS_FOLDER, require_lm_eval

_TASK = "tritgguf_facts"
_CONTEXT = 2048


def requests_of_questions(lm: Any, questions: int, examples: int) -> list[list[Any]]:
    """Return lm-eval's requests for each of the first questions."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)
    task: Any = manager.load([_TASK])["tasks"][_TASK]
    task.set_config(key="num_fewshot", value=examples)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=questions, rank=0, world_size=1, tokenizer_name=lm.tokenizer_name)
    return [list(group) for _, group in groupby(task.instances, key=lambda request: request.doc_id)]


def seconds_of(lm: Any, requests: list[Any]) -> float:
    """Return how long log-likelihoods take."""
    start = time.perf_counter()
    lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - start


def main(
    file: Annotated[Path, typer.Argument(help="A trit file.")],
    folder: Annotated[Path, typer.Argument(help="The Hugging Face folder of its source.")],
    questions: Annotated[int, typer.Option(help="How many questions.", min=1)] = 84,
    examples: Annotated[int, typer.Option(help="Examples before each.", min=0)] = 5,
    turn: Annotated[int, typer.Option(help="Questions of a turn.", min=1)] = 16,
    batch_size: Annotated[int, typer.Option(help="Batch size of `hf`.", min=1)] = 16,
    prefill_bits: Annotated[int, typer.Option(help="Bits of the trit file's activations: 8 or 16.")] = 16,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
) -> None:
    """Measure the log-likelihoods of multiple-choice questions."""
    require_lm_eval()
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from lm_eval.models.huggingface import HFLM

    from tritgguf.lm_eval.model import TritGgufLM

    ours = TritGgufLM(file, max_length=_CONTEXT, prefill_bits=prefill_bits, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch_size)
    asked = requests_of_questions(ours, questions, examples)
    for lm in (ours, theirs):
        seconds_of(lm, [request for question in asked[:turn] for request in question])  # warms up
    ours.model.engine.clear_prefix_cache()
    totals, ratios = [0.0, 0.0], list[float]()
    for first in range(0, len(asked), turn):
        requests = [request for question in asked[first : first + turn] for request in question]
        times = [seconds_of(lm, requests) for lm in (ours, theirs)]
        totals = [total + seconds for total, seconds in zip(totals, times, strict=True)]
        ratios.append(times[1] / times[0])
        terminal.note(f"{first + turn:4d} questions: {times[0]:.2f} s, {times[1]:.2f} s, ratio {ratios[-1]:.2f}")
    rows = [
        (f"tritgguf, {prefill_bits} bits", f"{totals[0]:.2f}", f"{totals[1] / totals[0]:.2f}"),
        (f"hf, float32, batches of {batch_size}", f"{totals[1]:.2f}", "1"),
    ]
    title = f"{file.name}, {len(asked)} questions, {examples} examples; ratios of the turns {min(ratios):.2f} to"
    terminal.print_table(f"{title} {max(ratios):.2f}", ("", ">seconds", ">times faster"), rows)


if __name__ == "__main__":
    tool_command.run(main)
