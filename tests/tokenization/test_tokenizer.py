"""Tokenizer: GGUF keys, control tokens as text, and streaming decoding."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import encode, metadata, tokenizer

from tritgguf.errors import TritGgufError
from tritgguf.tokenization.stream_decoder import StreamDecoder
from tritgguf.tokenization.tokenizer import KEY_HUGGINGFACE, Tokenizer

KINDS = ("smollm", "qwen2", "llama-bpe", "sentencepiece")


def with_tokens(*contents: str, special: bool = True) -> dict[str, Any]:
    """Return the metadata of the smollm tokenizer with more added tokens."""
    keys = metadata()
    serialized = json.loads(keys[KEY_HUGGINGFACE])
    for content in contents:
        token = dict(serialized["added_tokens"][0], id=1000 + len(serialized["added_tokens"]))
        serialized["added_tokens"].append({**token, "content": content, "special": special})
    return {**keys, KEY_HUGGINGFACE: json.dumps(serialized)}


def stream(tokens: Tokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokens, context or [])
    return [*map(decoder.step, ids), decoder.flush()]


# -- the file's keys


@pytest.mark.parametrize("value", [None, 7, ["{}"]])
def test_a_file_without_tokenizer_is_an_error(value: Any) -> None:
    with pytest.raises(TritGgufError, match=r"model\.gguf carries no tokenizer"):
        Tokenizer({KEY_HUGGINGFACE: value}, name="model.gguf")


@pytest.mark.parametrize("value", ["", "{", "{}", "[1]", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_an_error(value: str) -> None:
    with pytest.raises(TritGgufError, match=r"model\.gguf: the tokenizer cannot be read"):
        Tokenizer({KEY_HUGGINGFACE: value}, name="model.gguf")


def test_the_texts_of_bos_and_eos() -> None:
    assert (tokenizer().bos_token, tokenizer().eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (tokenizer("sentencepiece").bos_token, tokenizer("sentencepiece").eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("token", [None, -1, 10**6, 1 << 40, "0"])
def test_a_bos_token_that_does_not_exist_is_none(token: Any) -> None:
    tokens = tokenizer(bos_token_id=token, add_bos_token=True)
    assert (tokens.bos_id, tokens.bos_token) == (None, "")
    assert tokens.encode("a", add_special=True, parse_special=True) == encode(tokens, "a")


@pytest.mark.parametrize(
    ("kind", "stated", "expected"),
    [
        ("smollm", None, False),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("sentencepiece", None, True),
        ("smollm", True, True),
        ("llama-bpe", False, False),
        ("sentencepiece", False, False),
    ],
)
def test_whether_a_text_starts_with_bos(kind: str, stated: bool | None, expected: bool) -> None:
    tokens = tokenizer(kind, add_bos_token=stated)
    plain = encode(tokens, "The dog")
    bos = [tokens.bos_id] if expected else []
    assert tokens.add_bos is expected
    assert tokens.encode("The dog", add_special=True, parse_special=True) == bos + plain


def test_bos_is_not_doubled() -> None:
    tokens = tokenizer("sentencepiece")
    ids = tokens.encode("<s>The dog", add_special=True, parse_special=True)
    assert ids.count(1) == 1
    assert tokens.with_bos(ids) == ids


def test_truncation_and_padding_in_the_file_do_not_apply() -> None:
    keys = metadata()
    serialized = json.loads(keys[KEY_HUGGINGFACE])
    serialized["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    serialized["padding"] = {
        "strategy": {"Fixed": 500},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    assert encode(Tokenizer({**keys, KEY_HUGGINGFACE: json.dumps(serialized)}), "The dog sleeps") == encode(
        Tokenizer(keys), "The dog sleeps"
    )


# -- stop tokens


def test_stop_tokens_by_key_and_by_name() -> None:
    assert tokenizer(eos_token_id=None).stop_tokens == {0, 2}
    assert tokenizer(eos_token_id=70).stop_tokens == {0, 2, 70}
    assert tokenizer(eot_token_id=71, eom_token_id=72).stop_tokens == {0, 2, 71, 72}


@pytest.mark.parametrize(
    "name", ["<|eot_id|>", "<|end|>", "<end_of_turn>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>"]
)
def test_end_of_turn_tokens_are_known_by_name(name: str) -> None:
    tokens = Tokenizer(with_tokens(name))
    assert tokens.encode(name, add_special=False, parse_special=True)[0] in tokens.stop_tokens


def test_the_end_of_a_part_does_not_stop_a_model_that_has_another_end() -> None:
    tokens = Tokenizer(with_tokens("<|end|>", "<|return|>", "<|call|>"))
    end, last = (tokens.encode(text, add_special=False, parse_special=True)[0] for text in ("<|end|>", "<|return|>"))
    assert end not in tokens.stop_tokens
    assert last in tokens.stop_tokens


def test_ordinary_vocabulary_does_not_stop() -> None:
    keys = metadata()
    serialized = json.loads(keys[KEY_HUGGINGFACE])
    serialized["model"]["vocab"]["</s>"] = 999
    tokens = Tokenizer({**keys, KEY_HUGGINGFACE: json.dumps(serialized)})
    assert 999 not in tokens.stop_tokens


# -- encoding


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_are_parsed_or_stay_text(kind: str) -> None:
    tokens = tokenizer(kind)
    end, end_id = tokens.eos_token, tokens.eos_id
    text = f"The dog{end}sleeps"
    assert end_id is not None
    assert tokens.encode(text, add_special=False, parse_special=True).count(end_id) == 1
    assert end_id not in encode(tokens, text)
    assert tokens.decode(encode(tokens, text)) == text
    # The library's switch is persistent; every call must set it.
    assert tokens.encode(text, add_special=False, parse_special=True).count(end_id) == 1


def test_added_tokens_that_are_not_control_tokens_are_always_parsed() -> None:
    tokens = tokenizer()
    assert "<tool_call>" not in tokens.control_texts
    assert len(encode(tokens, "<tool_call>")) == 1


@pytest.mark.parametrize("parse_special", [True, False])
def test_a_long_text_has_the_tokens_of_its_parts(parse_special: bool) -> None:
    """Long texts are encoded by another function of the library, which lets other threads run."""
    tokens, part = tokenizer(), "Hello world, <|im_end|>\n"
    once = tokens.encode(part, add_special=False, parse_special=parse_special)
    assert tokens.encode(part * 1000, add_special=False, parse_special=parse_special) == once * 1000


def test_bytes_that_were_no_utf8_become_replacement_characters() -> None:
    text = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
    assert tokenizer().decode(encode(tokenizer(), text)) == "caf\ufffd \ufffd"


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe"])
@given(text=st.text())
def test_byte_level_tokenizers_lose_nothing(kind: str, text: str) -> None:
    assert tokenizer(kind).decode(encode(tokenizer(kind), text)) == text


# -- streaming


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text())
def test_the_stream_is_the_text_in_whole_characters(kind: str, text: str) -> None:
    tokens = tokenizer(kind)
    ids = encode(tokens, text)
    expected = tokens.decode(ids)
    pieces = stream(tokens, ids)
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_a_character_of_several_tokens_is_held_back() -> None:
    tokens = tokenizer()
    ids = encode(tokens, "a🙂b")
    assert len(ids) == 6  # a, four bytes, b
    assert stream(tokens, ids) == ["a", "", "", "", "🙂", "b", ""]


@pytest.mark.parametrize("kind", ["smollm", "sentencepiece"])
def test_an_incomplete_character_at_the_end_becomes_a_replacement(kind: str) -> None:
    tokens = tokenizer(kind)
    pieces = stream(tokens, encode(tokens, "dog🙂")[:-1])
    assert "\ufffd" not in "".join(pieces[:-1])
    assert pieces[-1].strip("\ufffd") == ""
    assert pieces[-1]


def test_broken_text_does_not_wait_for_ever() -> None:
    tokens = tokenizer()
    continuation = encode(tokens, "é")[1]
    pieces = stream(tokens, [continuation] * 40)
    assert "".join(pieces) == "\ufffd" * 40
    assert pieces[:-1].count("") < 35


def test_a_real_replacement_character_is_text() -> None:
    tokens = tokenizer()
    assert "".join(stream(tokens, encode(tokens, "\ufffd\ufffda\ufffd"))) == "\ufffd\ufffda\ufffd"


def test_control_tokens_and_tokens_beyond_the_vocabulary_show_nothing() -> None:
    tokens = tokenizer()
    (dog,) = encode(tokens, " dog")
    assert stream(tokens, [2, dog, 100_000, 0, dog]) == ["", " dog", "", "", " dog", ""]


def test_spaces_between_words_survive_and_the_first_depends_on_the_context() -> None:
    tokens = tokenizer("sentencepiece")
    ids = encode(tokens, "the dog sleeps")
    assert "".join(stream(tokens, ids)) == "the dog sleeps"
    assert "".join(stream(tokens, ids, context=encode(tokens, "And"))) == " the dog sleeps"


def test_a_control_token_in_between_leaves_the_space() -> None:
    tokens = tokenizer("sentencepiece")
    ids = encode(tokens, "the dog sleeps")
    expected = tokens.decode([*ids[:2], 2, *ids[2:]])
    assert "".join(stream(tokens, [*ids[:2], 2, *ids[2:]])) == expected


@pytest.mark.parametrize("kind", ["smollm", "sentencepiece"])
@given(data=st.data())
def test_any_tokens_can_be_streamed(kind: str, data: st.DataObject) -> None:
    tokens = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, 420), max_size=60))
    streamed = "".join(stream(tokens, ids, context=data.draw(st.lists(st.integers(0, 420), max_size=12))))
    assert isinstance(streamed, str)
    if kind == "smollm":
        assert "".join(stream(tokens, ids)) == tokens.decode(ids)


# -- the real one


@pytest.mark.real_model
def test_smollm2_agrees_with_transformers(smollm2_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    serialized = (smollm2_folder / "tokenizer.json").read_text(encoding="utf-8")
    tokens = Tokenizer({KEY_HUGGINGFACE: serialized, "tokenizer.ggml.eos_token_id": 2})
    assert tokens.stop_tokens >= {0, 2}
    for text in (
        "Hello, world! 12345",
        "  def f(x):\n\treturn x",
        "日本語 🙂 naïve",
        "<|im_start|>user\nHi<|im_end|>",
    ):
        ids = tokens.encode(text, add_special=False, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert "".join(stream(tokens, ids)) == theirs.decode(ids, skip_special_tokens=True)


# -- threads


def test_threads_that_parse_control_tokens_do_not_disturb_those_that_do_not() -> None:
    tokens = tokenizer()
    text = "<|im_start|>The dog<|im_end|>" * 20
    expected = {parse: tokens.encode(text, add_special=False, parse_special=parse) for parse in (False, True)}
    assert expected[False] != expected[True]

    def encode_often(parse: bool) -> bool:
        return all(tokens.encode(text, add_special=False, parse_special=parse) == expected[parse] for _ in range(100))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(encode_often, [False, True] * 4))
    finally:
        sys.setswitchinterval(interval)


def test_lone_surrogates_become_replacement_characters() -> None:
    tokens = tokenizer()
    for text in ("a \ud800 b", "\udfff", "\ud83d\ude00\ud800"):
        encoded = tokens.encode(text, add_special=False, parse_special=False)
        assert encoded == tokens.encode(
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), add_special=False, parse_special=False
        )
