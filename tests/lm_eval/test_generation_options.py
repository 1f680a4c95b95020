"""lm-eval's options of generated answers."""

from __future__ import annotations

import pytest

from tritgguf.errors import BadRequestError
from tritgguf.lm_eval.generation_options import generation_options


def test_answers_are_greedy_unless_a_task_samples() -> None:
    assert generation_options({}, max_tokens=5).sampling.temperature == 0
    assert generation_options({"do_sample": False, "temperature": 0.7}, max_tokens=5).sampling.temperature == 0
    assert generation_options({"temperature": 0.7}, max_tokens=5).sampling.temperature == 0.7
    sampled = generation_options({"do_sample": True, "top_p": 0.9}, max_tokens=5).sampling
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.min_p) == (1.0, 0.9, 0, 0.0)
    assert sampled.repeat_penalty == 1.0


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_the_length_has_several_names(name: str) -> None:
    assert generation_options({name: 7}, max_tokens=5).max_tokens == 7
    assert generation_options({name: None}, max_tokens=5).max_tokens == 5
    assert generation_options({"max_gen_toks": 9, name: 9}, max_tokens=5).max_tokens == 9


def test_ends_are_one_text_or_several() -> None:
    assert generation_options({"until": "\n"}, max_tokens=5).stop == ["\n"]
    assert generation_options({"until": ["a", "b"]}, max_tokens=5).stop == ["a", "b"]
    assert generation_options({"until": None}, max_tokens=5).stop == []


def test_an_option_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(BadRequestError, match=r"num_beams.*temperature"):
        generation_options({"num_beams": 4}, max_tokens=5)
