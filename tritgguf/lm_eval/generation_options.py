"""lm-eval's options of generated answers, as this package's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tritgguf.errors import BadRequestError
from tritgguf.generation.sampling import SamplingOptions
from tritgguf.generation.stop_strings import stop_list

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
}
_ALL_TOKENS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated.

    Attributes:
        sampling: how tokens are chosen.
        stop: texts that end it.
        max_tokens: how many tokens it has at most.

    """

    sampling: SamplingOptions
    stop: list[str]
    max_tokens: int


def generation_options(options: Mapping[str, Any], *, max_tokens: int) -> GenerationOptions:
    """Return the options of a task's `generation_kwargs`; `max_tokens` is the length where these name none.

    Greedy unless `do_sample` is true or a temperature above 0 is given. Sampling draws from all tokens unless top_k,
    top_p or min_p say otherwise. Raises BadRequestError for an option that is not known here.
    """
    left = {name: value for name, value in options.items() if value is not None}
    lengths = [left.pop(name) for name in _LENGTHS if name in left]
    stop = stop_list(left.pop("until", None))
    do_sample = left.pop("do_sample", left.get("temperature", 0) > 0)
    unknown = sorted(left.keys() - _SAMPLING.keys())
    if unknown:
        raise BadRequestError(
            f"the task generates with {', '.join(unknown)}, which is not supported; there are"
            f" {', '.join(['until', 'do_sample', _LENGTHS[0], *_SAMPLING])}"
        )
    chosen = _ALL_TOKENS | {_SAMPLING[name]: value for name, value in left.items()}
    if not do_sample:
        chosen["temperature"] = 0.0
    return GenerationOptions(SamplingOptions(**chosen), stop, int(lengths[0] if lengths else max_tokens))
