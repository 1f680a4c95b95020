"""The model card of a published folder, with the table and the chart of all configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tritgguf.errors import TritGgufError
from tritgguf.evaluation.chart import chart
from tritgguf.evaluation.quantization_costs import FileQuality
from tritgguf.exporters.model_card import CODEC, cell, describe_depths, facts, front_matter
from tritgguf.formats.description import describe
from tritgguf.formats.durable_output import replace_text
from tritgguf.publishing.jobs import Job
from tritgguf.publishing.stages import CARD
from tritgguf.publishing.state import State
from tritgguf.text_format import format_bytes, one_line
from tritgguf.version import __version__

CARD_NAME, CHART_NAME = "README.md", "chart.svg"
_EXPORTS = {"hf": "for `transformers`, decoded to float16"}


def write_cards(state: State, jobs: Sequence[Job], qualities: Sequence[FileQuality]) -> list[str]:
    """Write card and chart into the folder of each job; all are of one source. Return warnings.

    A card that was changed by hand stays as it is.
    """
    warnings = []
    drawing = _chart(jobs, qualities)
    for job in jobs:
        texts = {CARD_NAME: _card(job, jobs, qualities, with_chart=drawing is not None)}
        if drawing is not None:
            texts[CHART_NAME] = drawing
        for name, text in texts.items():
            path = job.folder / name
            if path.is_file() and path.read_bytes() == text.encode():  # written, but perhaps not noted
                state.finish(CARD, path, text, {})
                continue
            try:
                state.check_ours(CARD, path)
            except TritGgufError:
                warnings.append(f"{path}: was changed or is not of `publish`; it stays as it is")
                continue
            if state.result(CARD, path, text) is None:
                replace_text(path, text)
                state.finish(CARD, path, text, {})
    return warnings


def _chart(jobs: Sequence[Job], qualities: Sequence[FileQuality]) -> str | None:
    """Return the chart of all configurations of a source; None if none of them differs from it."""
    named = [
        FileQuality(**{**vars(quality), "file": Path(f"{job.configuration.name}.gguf")})
        for job, quality in zip(jobs, qualities, strict=True)
    ]
    if all(quality.kl_mean <= 0 for quality in named):
        return None
    return chart(f"{jobs[0].source.name}: divergence and size", "trit files against their source", named)


def _card(job: Job, jobs: Sequence[Job], qualities: Sequence[FileQuality], *, with_chart: bool) -> str:
    file = describe(job.trit_file)
    use = f'tritgguf run {job.trit_file.name} -p "The capital of France is"'
    picture = f"\n![Divergence over size of all configurations]({CHART_NAME})\n" if with_chart else ""
    return f"""{front_matter(file, job.base_model, "gguf")}
# {cell(one_line(file.name))}, {job.configuration.name} ({describe_depths(file)})

A language model whose matrices are packed as balanced ternary numbers, made by tritgguf {__version__}. It runs on
ordinary processors.

{facts(file, job.base_model, None)}

## Files

{_files(job)}

## Use

```sh
pip install tritgguf
{use}
```

## All configurations

Divergence, agreement and perplexity against the source.

{_table(job, jobs, qualities)}
{picture}
{CODEC}"""


def _files(job: Job) -> str:
    rows = [f"| `{job.trit_file.name}` | {format_bytes(job.trit_file.stat().st_size)} | packed, for tritgguf |"]
    for to in job.plan.exports:
        path = job.export_path(to)
        n_bytes = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
        what = _EXPORTS.get(to, f"stock GGUF of type {to.upper()}, for llama.cpp")
        rows.append(f"| `{path.name}` | {format_bytes(n_bytes)} | {what} |")
    return "\n".join(["| file | size | |", "|---|---|---|", *rows])


def _table(job: Job, jobs: Sequence[Job], qualities: Sequence[FileQuality]) -> str:
    with_speed = any(quality.tokens_per_second is not None for quality in qualities)
    columns = ["configuration", "size", "bits per weight", "KL, mean", "KL, 99 %", "same top token", "perplexity"]
    columns += ["tokens/s"] if with_speed else []
    rows = [columns, ["---"] * len(columns)]
    for other, quality in zip(jobs, qualities, strict=True):
        name = f"**{other.configuration.name}**" if other == job else other.configuration.name
        row = [name, format_bytes(quality.file_bytes), f"{quality.bits_per_weight:.2f}", f"{quality.kl_mean:.4f}"]
        row += [f"{quality.kl_p99:.4f}", f"{quality.top1_agreement:.1%}", f"{quality.perplexity:.3f}"]
        speed = quality.tokens_per_second
        rows.append([*row, "" if speed is None else f"{speed:.1f}"] if with_speed else row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
