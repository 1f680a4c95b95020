"""Hugging Face folders: invalid safetensors headers, shards outside the folder, pickles, invalid config.json."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack import Attack
from tiny_models import edit_json, write_tiny_model

SHARD = "model.safetensors"
_EMBEDDINGS = "model.embed_tokens.weight"


def _folder(name: str, damage: Callable[[Path], None], *message_parts: str, variant: str = "llama") -> Attack:
    """Return an attack on `convert` with a valid folder that `damage` changes."""

    def build(folder: Path) -> list[str]:
        write_tiny_model(folder / "model", variant)
        damage(folder / "model")
        return ["convert", str(folder / "model"), str(folder / "out.gguf"), "--encoder", "v2"]

    return Attack(name, build, message_parts)


def _header(name: str, change: Callable[[dict[str, Any]], object], *message_parts: str) -> Attack:
    def damage(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return _folder(name, damage, SHARD, *(message_parts or ("fetch the file again",)))


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Attack:
    def damage(folder: Path) -> None:
        (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))

    return _folder(name, damage, SHARD, "fetch the file again")


def _entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[_EMBEDDINGS].update(values)


def _config(name: str, *message_parts: str, **entries: Any) -> Attack:
    return _folder(name, lambda folder: edit_json(folder / "config.json", **entries), "config.json", *message_parts)


def _elsewhere(shard: str) -> Attack:
    def damage(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_text("utf-8"))["weight_map"]
        edit_json(index, weight_map=names | {_EMBEDDINGS: shard})

    return _folder(f"a shard called {shard!r}", damage, "index.json", repr(shard), variant="llama-sharded")


def _pickled(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": [1.0]}))


def _linked(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        os.replace(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)

    return damage


def _write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text, "utf-8")

    return damage


ATTACKS = [
    _bytes("a header of 2**63 bytes", lambda data: (1 << 63).to_bytes(8, "little") + data[8:]),
    _bytes("a header that is longer than the file", lambda data: (len(data)).to_bytes(8, "little") + data[8:]),
    _bytes("a header of no bytes", lambda data: bytes(8) + data[8:]),
    _bytes("a header that is not JSON", lambda data: data[:8] + b"!" + data[9:]),
    _bytes("a shard of three bytes", lambda data: data[:3]),
    _bytes("a shard whose data was cut off", lambda data: data[:-100]),
    _bytes("a shard with extra bytes after its data", lambda data: data + b"x"),
    _header("offsets in the wrong order", _entry(data_offsets=[100, 0])),
    _header("negative offsets", _entry(data_offsets=[-2, 100])),
    _header("offsets beyond 2**64", _entry(data_offsets=[0, 1 << 65])),
    _header("offsets that overlap another tensor's", _entry(data_offsets=[0, 448 * 128 * 2])),
    _header("a shape that does not fit the bytes", _entry(shape=[448, 129])),
    _header("a negative shape", _entry(shape=[-448, -128])),
    _header("a shape beyond 2**64", _entry(shape=[1 << 40, 1 << 40])),
    _header("a dtype that does not exist", _entry(dtype="F5")),
    _header("an entry that is a list", lambda header: header.update({_EMBEDDINGS: []})),
    _header("an entry without a shape", lambda header: header[_EMBEDDINGS].pop("shape")),
    _header(
        "a tensor that the model does not have",
        lambda header: header.update({"model.evil.weight": header.pop(_EMBEDDINGS)}),
        "model.evil.weight",
        "does not belong",
    ),
    _elsewhere("../outside.safetensors"),
    _elsewhere("/etc/passwd"),
    _elsewhere("sub/model.safetensors"),
    _elsewhere("..\\outside.safetensors"),
    _elsewhere(".hidden.safetensors"),
    _folder("a link out of the folder", _linked(SHARD), SHARD, "link", "FOLLOW_LINKS=1"),
    _folder("a config.json that is a link", _linked("config.json"), "config.json", "link", "FOLLOW_LINKS=1"),
    _folder("a tokenizer that is a link", _linked("tokenizer.json"), "tokenizer.json", "link", "FOLLOW_LINKS=1"),
    _folder("weights in a pickle", _pickled, "pytorch_model.bin", "save_pretrained"),
    _folder("a config.json that is not JSON", _write("config.json", "{"), "config.json", "fetch the file again"),
    _folder("a config.json that is a list", _write("config.json", "[]"), "config.json", "fetch the file again"),
    _folder(
        "a config.json of nested lists", _write("config.json", "[" * 100_000), "config.json", "fetch the file again"
    ),
    _config("a negative number of layers", "num_hidden_layers is -1", num_hidden_layers=-1),
    _config("10**9 layers", "num_hidden_layers is 1000000000", num_hidden_layers=10**9),
    _config("no heads", "num_attention_heads is 0", num_attention_heads=0),
    _config("heads not divisible by key-value heads", "3 key-value heads", num_key_value_heads=3),
    _config("a fractional width", "hidden_size is 128.5", hidden_size=128.5),
    _config("a head of odd length", "rotated in pairs", head_dim=33),
    _config("a size that is a string", "intermediate_size is '192'", intermediate_size="192"),
    _config("an epsilon of zero", "rms_norm_eps is 0", rms_norm_eps=0),
    _config("a rope base of NaN", "rope_theta", rope_theta=float("nan")),
    _config("an unknown model class", "BloomForCausalLM is not supported", architectures=["BloomForCausalLM"]),
    _config("a model class that is a number", "names no model class", architectures=[5]),
    _folder(
        "a vocabulary smaller than the tokens",
        lambda folder: edit_json(folder / "config.json", vocab_size=100),
        "model",
        "embed_tokens",
    ),
    _folder(
        "a tokenizer that is not JSON", _write("tokenizer.json", "{"), "tokenizer.json", "fetch"
    ),
    _folder(
        "a tokenizer without a model", _write("tokenizer.json", '{"version": "1.0"}'), "tokenizer.json", ""
    ),
    _folder(
        "a token beyond the vocabulary",
        lambda folder: edit_json(
            folder / "tokenizer.json",
            added_tokens=[
                {"id": 5000, "content": "<evil>", "special": True, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False}
            ],
        ),
        "tokenizer.json",
        "",
    ),
]  # fmt: skip
