"""Generation: stopping, streaming, the cache between turns and interruptions, on a model with a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_model import END, START, VOCABULARY, scripted
from small_tokenizers import encode, tokenizer

from tritgguf.errors import TritGgufError
from tritgguf.generation.chat import Chat
from tritgguf.generation.generate import generate
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.prompt import prompt_tokens
from tritgguf.generation.result import Timings
from tritgguf.generation.sampling import Sampler, SamplingOptions
from tritgguf.generation.text_stream import TextStream

GREEDY = SamplingOptions(temperature=0)


def stream(model: LoadedModel, prompt: Sequence[int], **options: Any) -> TextStream:
    return TextStream(model, list(prompt), Sampler(GREEDY), **options)


# -- one generation


def test_an_answer() -> None:
    model = scripted("Red, blue and yellow.")
    answer = generate(model, "Name three primary colors.", sampling=GREEDY)
    assert answer.text == "Red, blue and yellow."
    assert answer.tokens == encode(model.tokenizer, answer.text)
    assert answer.finish_reason == "stop"
    assert answer.prompt_tokens[0] == START


def test_pieces_of_text_come_one_by_one() -> None:
    pieces: list[str] = []
    answer = generate(scripted("The dog 🙂 sleeps"), "Hi", sampling=GREEDY, on_text=pieces.append)
    assert "".join(pieces) == answer.text == "The dog 🙂 sleeps"
    assert len(pieces) > 3
    assert not any("\ufffd" in piece or not piece for piece in pieces)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit(limit: int) -> None:
    model = scripted("The dog sleeps on and on")
    answer = generate(model, "Hi", sampling=GREEDY, max_tokens=limit)
    assert len(answer.tokens) == limit
    assert answer.finish_reason == "length"
    # The last token's successor is not computed for nothing.
    assert len(model.model.calls) == 1 + max(0, limit - 1)


def test_a_limit_as_long_as_the_answer() -> None:
    length = len(encode(tokenizer(), "The dog"))
    assert generate(scripted("The dog"), "Hi", sampling=GREEDY, max_tokens=length).finish_reason == "length"
    assert generate(scripted("The dog"), "Hi", sampling=GREEDY, max_tokens=length + 1).finish_reason == "stop"


def test_an_answer_of_nothing() -> None:
    answer = generate(scripted(""), "Hi", sampling=GREEDY)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", [], "stop")


def test_the_context_fills_up() -> None:
    prompt = [5, 6, 7]
    answer = stream(scripted([40] * 50, context=10), prompt).finish()
    assert answer.finish_reason == "context"
    # The last token needs no place: nothing is computed behind it.
    assert len(answer.tokens) == 10 - len(prompt) + 1


def test_a_prompt_that_fills_the_context_has_one_token_of_answer() -> None:
    answer = stream(scripted([40] * 50, context=3), [5, 6, 7]).finish()
    assert (len(answer.tokens), answer.finish_reason) == (1, "context")


def test_a_prompt_longer_than_the_context() -> None:
    with pytest.raises(TritGgufError, match="the prompt has 4 tokens, the context holds 3"):
        stream(scripted("", context=3), [5, 6, 7, 8])


def test_an_empty_prompt() -> None:
    with pytest.raises(TritGgufError, match="empty"):
        generate(scripted(""), "", raw=True)


def test_a_tokenizer_that_does_not_fit_the_model() -> None:
    with pytest.raises(TritGgufError, match=r"model\.gguf: .*token 448"):
        stream(scripted(""), [5, VOCABULARY])


def test_a_long_prompt_is_evaluated_in_parts() -> None:
    model = scripted([40, END], context=2000)
    prompt = (list(range(10, 300)) * 5)[:1300]
    stream(model, prompt).finish()
    calls = model.model.calls
    assert [*calls[0], *calls[1], *calls[2]] == prompt
    assert [len(call) for call in calls] == [512, 512, 276, 1]


def test_the_penalty_sees_prompt_and_answer() -> None:
    options = SamplingOptions(temperature=0, repeat_penalty=2)
    assert TextStream(scripted([40]), [40], Sampler(options), max_tokens=1).finish().tokens == [41]
    assert TextStream(scripted([40, 40]), [5], Sampler(options), max_tokens=2).finish().tokens == [40, 41]


# -- prompts


def test_raw_continues_the_text_as_it_is() -> None:
    model = scripted(" dog sleeps")
    answer = generate(model, "<|im_start|>The", raw=True, sampling=GREEDY)
    assert answer.prompt_tokens == [START, *encode(model.tokenizer, "The")]
    assert answer.text == " dog sleeps"


def test_raw_text_goes_on_with_its_space_where_a_tokenizer_drops_it() -> None:
    tokens = tokenizer("sentencepiece")
    model = scripted([*encode(tokens, "dog"), 2])
    model.tokenizer = tokens
    assert generate(model, "The", raw=True, sampling=GREEDY).text == " dog"
    model.model.script = [*encode(tokens, "dog"), 2]
    assert generate(model, "The", sampling=GREEDY).text == "dog"


def test_a_prompt_with_system_message_is_the_chat_of_both() -> None:
    model = scripted("")
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert prompt_tokens(model, "Hi", system="Be brief.") == prompt_tokens(model, None, messages=messages)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": "Hi", "messages": []},
        {"messages": [], "system": "Be brief."},
        {"messages": [], "raw": True},
        {"prompt": "Hi", "system": "Be brief.", "raw": True},
    ],
)
def test_arguments_that_contradict_each_other(arguments: dict[str, Any]) -> None:
    with pytest.raises(TritGgufError):
        generate(scripted(""), **arguments)


def test_a_base_model_has_no_chat_template() -> None:
    with pytest.raises(TritGgufError, match=r"model\.gguf has no chat template.*--raw"):
        generate(scripted("", template=None), "Hi")


# -- the cache


def test_what_the_cache_shares_is_not_evaluated_again() -> None:
    model = scripted([40, END, 41, END, 42, END])
    stream(model, [5, 6, 7]).finish()
    answer = stream(model, [5, 6, 8, 9]).finish()
    assert answer.timings.prompt_tokens == 2
    assert model.model.calls[-2:] == [[8, 9], [41]]
    assert answer.timings.cached_tokens == 2
    model.engine.check()


def test_the_last_token_is_always_evaluated() -> None:
    model = scripted([40, END, 41, END])
    stream(model, [5, 6, 7]).finish()
    stream(model, [5, 6, 7]).finish()
    assert model.model.calls[2] == [7]
    model.engine.check()


def test_a_prompt_shorter_than_the_cache() -> None:
    model = scripted([40, END, 41, END])
    stream(model, [5, 6, 7]).finish()
    answer = stream(model, [5]).finish()
    assert (answer.tokens, answer.timings.prompt_tokens) == ([41], 1)
    model.engine.check()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interruption_leaves_a_usable_model(call: int) -> None:
    model = scripted([40, 41, 42, 43])
    model.model.interrupt_in_call = call
    running = stream(model, [5, 6, 7])
    with pytest.raises(KeyboardInterrupt):
        running.finish()
    partial = running.result()
    assert partial.finish_reason == "interrupted"
    assert partial.tokens == [40, 41][: call - 1]
    model.model.script = [50, END]
    assert stream(model, [5, 6, 7, 40]).finish().tokens == [50]
    model.engine.check()


# -- chats


def test_a_chat_remembers() -> None:
    model = scripted("Red.")
    chat = Chat(model, system="Be brief.", sampling=GREEDY)
    chat.ask("A color?").finish()
    evaluated = sum(map(len, model.model.calls))
    model.model.script = [*encode(model.tokenizer, "Blue."), END]
    second = chat.ask("Another?").finish()
    assert [message["content"] for message in chat.messages] == [
        "Be brief.",
        "A color?",
        "Red.",
        "Another?",
        "Blue.",
    ]
    # The whole first turn comes from the cache.
    assert second.timings.prompt_tokens == len(second.prompt_tokens) - evaluated
    assert second.prompt_tokens == prompt_tokens(model, None, messages=chat.messages[:-1])


def test_a_stopped_answer_stays_in_the_history() -> None:
    model = scripted("The dog sleeps on")
    chat = Chat(model, sampling=GREEDY)
    running = chat.ask("Hi")
    shown = next(running) + next(running)
    running.close()
    assert chat.messages[-1] == {"role": "assistant", "content": shown}
    assert running.result().finish_reason == "interrupted"


def test_a_message_without_room_is_not_added() -> None:
    chat = Chat(scripted("Red.", context=30), sampling=GREEDY)
    with pytest.raises(TritGgufError, match="the context holds 30"):
        chat.ask("dog " * 100)
    assert chat.messages == []
    assert chat.ask("Hi").finish().finish_reason == "stop"


def test_clear_keeps_the_system_message() -> None:
    chat = Chat(scripted("Red."), system="Be brief.", sampling=GREEDY)
    chat.ask("Hi").finish()
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


# -- timings


def test_timings_count_what_was_computed() -> None:
    timings = stream(scripted([40, 41, END]), [5, 6, 7]).finish().timings
    assert (timings.load_seconds, timings.prompt_tokens, timings.decode_tokens) == (0.25, 3, 2)
    assert timings.prompt_seconds > 0
    assert timings.decode_seconds > 0


def test_sums_and_rates_of_timings() -> None:
    total = Timings.total([Timings(1.0, 10, 2.0, 20, 4.0), Timings(1.0, 20, 1.0, 20, 1.0)])
    assert total == Timings(1.0, 30, 3.0, 40, 5.0)
    assert (total.prompt_tokens_per_second, total.decode_tokens_per_second) == (10.0, 8.0)
    assert Timings(1.0, 0, 0.0, 0, 0.0).as_dict()["decode_tokens_per_second"] == 0.0


# -- the real one


@pytest.mark.real_model
def test_smollm2_answers(smollm2_d2: Path) -> None:
    model = load(smollm2_d2, context=256)
    first = generate(model, "Name three primary colors.", max_tokens=24, sampling=GREEDY)
    again = generate(model, "Name three primary colors.", max_tokens=24, sampling=GREEDY)
    assert first.text == again.text == model.tokenizer.decode(first.tokens)
    assert len(first.text.split()) > 3
    assert again.timings.prompt_tokens == 1
    seeded = [generate(model, "Hi", max_tokens=8, sampling=SamplingOptions(seed=7)).text for _ in range(2)]
    assert seeded[0] == seeded[1]
