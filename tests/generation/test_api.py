"""What a program's author calls: `generate` in all its forms, `Chat`, logits, scores and embeddings."""

from __future__ import annotations

import gc
import pydoc
from collections.abc import Callable
from typing import Any

import pytest
from scripted_model import END, scripted
from small_tokenizers import encode

import tritgguf
from tritgguf import BadRequestError, Chat, ContextFullError, SamplingOptions, generate
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.generation.loaded_model import LoadedModel, load
from tritgguf.generation.text_stream import TextStream

Files = Callable[..., GgufFile]
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOKENS = [5, 401, 17, 17, 300, 0, 447, 62, 128, 33, 254]


@pytest.fixture(scope="module")
def tiny(tiny_trit_file: Files) -> LoadedModel:
    return load(tiny_trit_file().path, context=700, parallel=4)


def is_idle(model: Any) -> bool:
    """Check that every page is free or in the cache, and tell whether no request is left."""
    idle = not model.engine.has_work
    model.engine.check()
    return idle and model.engine.pool.free_sequences == model.engine.parallel


# -- prompts


@pytest.mark.parametrize("messages", [MESSAGES, tuple(MESSAGES)])
def test_messages_by_position_and_by_name(messages: Any) -> None:
    answers = [generate(scripted("Hello."), messages), generate(scripted("Hello."), messages=messages)]
    assert [answer.text for answer in answers] == ["Hello."] * 2
    assert answers[0].prompt_tokens == answers[1].prompt_tokens
    assert answers[0].prompt_tokens == generate(scripted(""), "Hi", system="Be brief.").prompt_tokens


def test_a_path_instead_of_a_model(tiny_trit_file: Files, tiny: LoadedModel) -> None:
    path = tiny_trit_file().path
    options: Any = {"temperature": 0, "max_tokens": 5}
    expected = generate(tiny, "The dog", **options)
    assert generate(path, "The dog", **options).tokens == expected.tokens
    assert generate(str(path), "The dog", **options).tokens == expected.tokens
    assert Chat(path, **options).ask("The dog").finish().tokens == expected.tokens


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (5, {}),
        (b"Hi", {}),
        ([], {}),
        ([1, 2], {}),
        (["Hi", 5], {}),
        ([MESSAGES, []], {}),
        ([{"role": "user"}], {}),
        ([{"role": "user", "content": 5}], {}),
        ([{"role": "user", "content": "Hi"}, "Hi"], {}),
        (None, {"messages": 5}),
        (None, {"messages": "Hi"}),
        (None, {"messages": [5]}),
        ("Hi", {"messages": MESSAGES}),
        (["Hi"], {"messages": MESSAGES}),
        ([MESSAGES], {"messages": MESSAGES}),
        ("Hi", {"system": 5}),
        ("Hi", {"stop": 5}),
        ("Hi", {"stop": [None]}),
        ("Hi", {"max_tokens": 1.5}),
        ("Hi", {"max_tokens": -5}),
        ("Hi", {"max_tokens": "5"}),
        ("Hi", {"temperature": "hot"}),
        ("Hi", {"top_k": 1.5}),
        ("Hi", {"temperature": -1}),
        ("Hi", {"stream": True, "on_text": print}),
        (["Hi"], {"stream": True}),
        (["Hi"], {"on_text": print}),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_line(prompt: Any, options: dict[str, Any]) -> None:
    model = scripted("Hello.")
    with pytest.raises(BadRequestError) as caught:
        generate(model, prompt, **options)
    assert 10 < len(str(caught.value)) < 200
    assert is_idle(model)
    assert not model.model.calls


@pytest.mark.parametrize("model", [5, None, object()])
def test_what_is_no_model(model: Any) -> None:
    for ask in (lambda: generate(model, "Hi"), lambda: Chat(model)):
        with pytest.raises(BadRequestError, match="a loaded model or the path of its file is needed"):
            ask()


@pytest.mark.parametrize("options", [{"context": 0}, {"context": -5}, {"parallel": 0}])
def test_no_room_at_all(tiny_trit_file: Files, options: Any) -> None:
    with pytest.raises(BadRequestError, match="must be 1 or more"):
        load(tiny_trit_file().path, **options)


@pytest.mark.parametrize("name", ["prefill_bits", "decode_bits"])
def test_numbers_of_bits_that_do_not_exist(tiny_trit_file: Files, name: str) -> None:
    with pytest.raises(BadRequestError, match=f": {name} must be 8 or 16, not 4$"):
        load(tiny_trit_file().path, **{name: 4})  # type: ignore[arg-type]


# -- options by keyword


def test_sampling_options_by_keyword() -> None:
    assert generate(scripted([40, END]), "Hi", temperature=0).tokens == [40]
    wild: Any = {"temperature": 100.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "max_tokens": 20}
    answers = [generate(scripted([40] * 20), "Hi", **wild).tokens for _ in range(2)]
    assert answers[0] == answers[1] != [40] * 20
    assert generate(scripted([40] * 20), "Hi", **{**wild, "seed": 4}).tokens != answers[0]


def test_a_keyword_goes_before_sampling() -> None:
    wild = SamplingOptions(temperature=100.0, top_k=0, top_p=1.0, min_p=0.0)
    answer = generate(scripted([40] * 20), "Hi", sampling=wild, temperature=0, max_tokens=20)
    assert answer.tokens == [40] * 20
    assert wild.temperature == 100.0


def test_an_unknown_keyword() -> None:
    ask: Any
    for ask in (generate, Chat):
        with pytest.raises(BadRequestError, match=r"^there is no option temprature; the sampling options are temperat"):
            ask(scripted(""), temprature=0)


def test_the_keywords_are_the_sampling_options() -> None:
    from typing import get_type_hints

    from tritgguf.generation.sampling import SamplingKeywords

    assert get_type_hints(SamplingKeywords) == get_type_hints(SamplingOptions)


# -- stop strings and streams


@pytest.mark.parametrize("stop", [" sleeps", [" sleeps"], ("never", " sleeps"), ["sleeps on", " sleeps", "eps"]])
def test_a_stop_string_ends_the_text_in_front_of_it(stop: Any) -> None:
    model = scripted("The dog sleeps on and on")
    answer = generate(model, "Hi", temperature=0, stop=stop)
    assert (answer.text, answer.finish_reason) == ("The dog", "stop")
    assert is_idle(model)


def test_stop_strings_that_cross_the_borders_of_tokens() -> None:
    text = "The quick brown fox jumps over the lazy dog"
    pieces = list(generate(scripted(text), "Hi", temperature=0, stream=True))
    assert "".join(pieces) == text
    for start in range(len(text) - 4):
        stop = text[start : start + 4]
        stream = generate(scripted(text), "Hi", temperature=0, stop=stop, stream=True)
        assert "".join(stream) == text[: text.index(stop)] == stream.result().text
        assert stream.result().finish_reason == "stop"


def test_what_was_held_back_comes_when_it_becomes_no_stop_string() -> None:
    model = scripted("The dog sleeps")
    stream = generate(model, "Hi", temperature=0, stop="sleeps on", stream=True)
    assert "".join(stream) == stream.result().text == "The dog sleeps"


def test_a_stream_is_an_iterator_with_a_result() -> None:
    stream = generate(scripted("The dog sleeps"), "Hi", temperature=0, stream=True)
    assert isinstance(stream, TextStream)
    assert iter(stream) is stream
    first = next(stream)
    assert stream.result().text == first
    assert first + "".join(stream) == stream.result().text == "The dog sleeps"
    assert list(stream) == []
    assert stream.finish().finish_reason == "stop"


@pytest.mark.parametrize("pieces", [0, 1, 2])
@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_a_stream_that_nobody_reads_to_its_end_leaves_nothing(pieces: int, how: str) -> None:
    model = scripted("The dog sleeps on and on")
    stream = generate(model, "Hi", temperature=0, stream=True)
    for _ in range(pieces):
        next(stream)
    if how == "closed":
        stream.close()
        stream.close()
        assert stream.result().finish_reason == "interrupted"
    del stream
    gc.collect()
    assert is_idle(model)


def test_a_stream_left_in_a_loop() -> None:
    model = scripted("The dog sleeps on and on")
    for _ in generate(model, "Hi", temperature=0, stream=True):
        break
    gc.collect()
    assert is_idle(model)


def test_an_error_of_on_text_ends_the_generation() -> None:
    model = scripted("The dog sleeps on and on")

    def refuse(piece: str) -> None:
        raise RuntimeError(piece)

    with pytest.raises(RuntimeError) as caught:  # whose traceback holds the stream
        generate(model, "Hi", temperature=0, on_text=refuse)
    assert caught.value.args
    assert is_idle(model)


# -- batches


def test_a_batch_equals_its_prompts_alone(tiny: LoadedModel) -> None:
    prompts = ["The dog", "A model reads text as tokens", "red", "The dog sleeps", "365 days", "The dog"]
    options: Any = {"temperature": 0.9, "seed": 5, "max_tokens": 12, "stop": ["e"]}
    alone = [generate(tiny, prompt, **options) for prompt in prompts]
    tiny.engine.clear_prefix_cache()
    together = generate(tiny, prompts, **options)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.prompt_tokens for answer in together] == [answer.prompt_tokens for answer in alone]
    assert len({answer.text for answer in together}) > 2
    assert is_idle(tiny)


def test_a_batch_of_chats_and_one_of_one() -> None:
    (answer,) = generate(scripted("Hello."), [MESSAGES], temperature=0)
    assert answer.text == "Hello."
    chat, text = generate(scripted([40, 40, END, END]), [MESSAGES, "Hi"], temperature=0)
    assert chat.prompt_tokens != text.prompt_tokens
    assert chat.tokens == text.tokens == [40]
    (raw,) = generate(scripted("Hello."), ["The"], raw=True, temperature=0)
    assert raw.text == "Hello."


def test_a_batch_with_a_prompt_that_does_not_fit_runs_nothing() -> None:
    model = scripted("Hello.", context=40)
    with pytest.raises(ContextFullError) as caught:
        generate(model, ["Hi", "dog " * 100, "Hi"])
    assert caught.value.args
    assert is_idle(model)
    assert not model.model.calls


def test_an_interruption_ends_the_whole_batch() -> None:
    model = scripted([40] * 50)
    model.model.interrupt_in_call = 3
    with pytest.raises(KeyboardInterrupt) as caught:
        generate(model, ["Hi", "The dog", "red"], temperature=0)
    assert caught.traceback
    assert is_idle(model)


# -- names and help


def test_public_names_can_be_completed_and_have_help() -> None:
    assert {"generate", "load", "Chat", "LoadedModel", "convert", "verify"} <= set(dir(tritgguf))
    for name in tritgguf.__all__:
        assert name in dir(tritgguf)
        assert len(getattr(tritgguf, name).__doc__) > 20
    assert "stop: a text or several" in pydoc.plain(pydoc.render_doc(tritgguf.generate))
    assert {"logits", "embed", "score", "context"} <= set(dir(tritgguf.LoadedModel))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = tritgguf.generat


# -- chats


def test_a_chat_remembers_answers_however_they_end() -> None:
    model = scripted("The dog sleeps on and on")
    chat = Chat(model, temperature=0, stop="on and")
    assert chat.ask("Hi").finish().text == chat.messages[-1]["content"] == "The dog sleeps "

    model.model.script = [*encode(model.tokenizer, "The dog sleeps"), END]
    stream = chat.ask("And then?")
    shown = next(stream)
    model.model.script = [*encode(model.tokenizer, "Red."), END]
    assert chat.ask("A color?").finish().text == "Red."  # the answer before has not been read to its end
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * 3
    assert [message["content"] for message in chat.messages[3:]] == [shown, "A color?", "Red."]
    assert stream.result().finish_reason == "interrupted"
    assert is_idle(model)


def test_a_chat_remembers_the_last_piece_of_an_answer() -> None:
    """It may come only with the end: held back as the beginning of a stop string, or of a character."""
    model = scripted("The dog sleeps")
    chat = Chat(model, temperature=0, stop=["sleeps on", "xyz"])
    assert chat.ask("Hi").finish().text == chat.messages[-1]["content"] == "The dog sleeps"


def test_a_chat_remembers_what_came_before_an_interruption() -> None:
    model = scripted("The dog sleeps")
    model.model.interrupt_in_call = 4
    chat = Chat(model, temperature=0)
    stream = chat.ask("Hi")
    with pytest.raises(KeyboardInterrupt):
        stream.finish()
    assert chat.messages[-1] == {"role": "assistant", "content": stream.result().text}
    assert stream.result().text
    model.model.script = [*encode(model.tokenizer, "Red."), END]
    assert chat.ask("A color?").finish().text == "Red."
    assert len(chat.messages) == 4
    assert is_idle(model)


def test_a_chat_that_is_dropped_leaves_nothing() -> None:
    model = scripted("The dog sleeps")
    chat = Chat(model, temperature=0)
    next(chat.ask("Hi"))
    del chat
    gc.collect()
    assert is_idle(model)


def test_none_stands_for_the_default() -> None:
    nothing: Any = {"max_tokens": None, "stop": None, "seed": None, "top_k": None, "sampling": None}
    answer = generate(scripted("Red."), "Hi", temperature=0, **nothing)
    assert (answer.text, answer.finish_reason) == ("Red.", "stop")
