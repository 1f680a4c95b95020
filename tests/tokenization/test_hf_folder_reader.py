"""What the files of a Hugging Face folder mean together, with transformers as the authority."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from source_checks import tokenizer_values
from tiny_models import CHAT_TEMPLATE, PADDED_VOCABULARY, tiny_tokenizer_json, write_tokenizer_folder
from tokenizers import Tokenizer

from tritgguf.errors import TritGgufError
from tritgguf.tokenization.hf_folder_files import generation_config
from tritgguf.tokenization.hf_to_gguf import HUGGINGFACE_JSON_KEY, tokenizer_metadata
from tritgguf.tokenization.tokenizer import KEY_STOP_IDS
from tritgguf.tokenization.tokenizer import Tokenizer as TritTokenizer

EOS, EOT, EOM = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def folder_with(path: Path, *tokens: str, **files: Any) -> Path:
    """Write a smollm folder with more special tokens, 401 onwards, and JSON files (`generation_config={...}`)."""
    write_tokenizer_folder(path, "smollm")
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json("smollm"))
    tokenizer.add_special_tokens(list(tokens))
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    for name, entries in files.items():
        file = path / f"{name}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**old, **entries}))
    return path


# -- stop tokens


@pytest.mark.parametrize(
    ("files", "keys", "stops", "exported"),
    [
        # Nothing to say beyond eos: llama.cpp's keys are enough.
        ({}, {EOS: 2}, {0, 2}, [2, 0]),
        ({"config": {"eos_token_id": [2, 0]}}, {EOS: 2}, {0, 2}, [2, 0]),
        # A list in config.json or in generation_config.json, which wins.
        ({"config": {"eos_token_id": [2, 401]}}, {EOS: 2, EOT: 401, KEY_STOP_IDS: [2, 401]}, {0, 2, 401}, [2, 401]),
        (
            {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [402, 2, 401, 403]}},
            {EOS: 2, EOT: 402, EOM: 401, KEY_STOP_IDS: [402, 2, 401, 403]},
            {0, 2, 401, 402, 403},
            [402, 2, 401, 403],
        ),
        ({"generation_config": {"eos_token_id": 401}}, {EOS: 2, EOT: 401, KEY_STOP_IDS: [401]}, {0, 2, 401}, 401),
        # Without eos_token in tokenizer_config.json, the first of the list is llama.cpp's eos.
        (
            {"config": {"eos_token_id": [401, 402]}, "tokenizer_config": {"eos_token": None}},
            {EOS: 401, EOT: 402, KEY_STOP_IDS: [401, 402]},
            {0, 2, 401, 402},
            [401, 402],
        ),
        # Ids that mean nothing are left out.
        ({"generation_config": {"eos_token_id": [2, -1, True, 10**6, "x"]}}, {EOS: 2}, {0, 2}, [2, 0]),
        ({"generation_config": {"eos_token_id": None}, "config": {"pad_token_id": -1}}, {EOS: 2}, {0, 2}, [2, 0]),
    ],
)
def test_stop_tokens_are_those_of_generate(
    tmp_path: Path, files: dict[str, Any], keys: dict[str, Any], stops: set[int], exported: Any
) -> None:
    values = tokenizer_values(folder_with(tmp_path, "<|my_end|>", "<|b|>", "<|c|>", **files))
    assert {key: values[key] for key in (EOS, EOT, EOM, KEY_STOP_IDS) if key in values} == keys
    tokenizer = TritTokenizer(values)
    assert tokenizer.stop_tokens == stops
    assert generation_config(values, tokenizer)["eos_token_id"] == exported


@pytest.mark.parametrize("value", [None, 3, "2", [2.0, "a", None, -1]])
def test_senseless_stop_ids_in_a_gguf_file(tmp_path: Path, value: Any) -> None:
    values = tokenizer_values(folder_with(tmp_path))
    assert TritTokenizer({**values, KEY_STOP_IDS: value}).stop_tokens == {0, 2}


# -- chat templates


def template_of(folder: Path) -> tuple[str, list[str]]:
    """Return the chat template of a folder and the warnings; assert that it is the one of transformers."""
    from transformers import AutoTokenizer

    metadata, warnings = tokenizer_metadata(folder, PADDED_VOCABULARY, add_space_prefix_key=True)
    template = metadata["tokenizer.chat_template"].value
    assert template == AutoTokenizer.from_pretrained(folder).get_chat_template()
    return template, warnings


def test_the_template_in_its_own_file_wins(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    template, warnings = template_of(folder)
    assert template == "{{ messages }}"
    assert len(warnings) == 1
    assert "chat_template.jinja and tokenizer_config.json have different chat templates" in warnings[0]
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert template_of(folder) == (CHAT_TEMPLATE, [])


def test_a_template_without_tokenizer_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_values(folder)["tokenizer.chat_template"] == "{{ messages }}"


def test_additional_templates(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    template, warnings = template_of(folder)
    assert template == CHAT_TEMPLATE
    assert len(warnings) == 1  # the one in tokenizer_config.json has no tool_use
    metadata, _ = tokenizer_metadata(folder, PADDED_VOCABULARY, add_space_prefix_key=True)
    assert metadata["tokenizer.chat_template.tool_use"].value == "{{ tools }}"


@pytest.mark.parametrize("value", [3, [3], [{"name": "default"}], {"default": 3}])
def test_a_senseless_template_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TritGgufError, match=r"tokenizer_config\.json: chat_template is neither a text nor a list"):
        tokenizer_values(folder_with(tmp_path, tokenizer_config={"chat_template": value}))


# -- added tokens beside tokenizer.json


def ids_of(folder: Path, text: str) -> list[int]:
    """Return the ids of a text; assert that they are those of transformers."""
    from transformers import AutoTokenizer

    ours = Tokenizer.from_str(tokenizer_values(folder)[HUGGINGFACE_JSON_KEY]).encode(text, add_special_tokens=False)
    assert ours.ids == AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    return list(ours.ids)


def test_added_tokens_that_only_other_files_name(tmp_path: Path) -> None:
    """Fine-tuning adds tokens to added_tokens.json or tokenizer_config.json and may leave tokenizer.json behind."""
    folder = folder_with(tmp_path / "a", added_tokens={"<|new|>": 401}, tokenizer_config={"eos_token": "<|new|>"})
    assert ids_of(folder, "a<|new|>b").count(401) == 1
    assert tokenizer_values(folder)[EOS] == 401
    entry = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    folder = folder_with(tmp_path / "b", tokenizer_config={"added_tokens_decoder": {"401": entry}})
    assert ids_of(folder, "a<|new|>b").count(401) == 1


def test_an_added_token_that_tokenizer_json_cannot_number(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, added_tokens={"<|new|>": 430})
    with pytest.raises(TritGgufError, match=r"has no token 430, which another file names .*save the tokenizer"):
        tokenizer_values(folder)


@pytest.mark.parametrize("name", ["vocab.json", "tekken.json", "tiktoken.model"])
def test_other_kinds_of_tokenizer_files(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text("{}")
    with pytest.raises(TritGgufError, match=rf"only {name}, which is not supported; save the tokenizer .*AutoTok"):
        tokenizer_values(folder)
