"""The fuzzing targets: each makes damaged input from a seed and gives it to a reader or a command.

A target returns if the input was read or refused properly; everything else is a finding.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import mmap
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpu_kernels.packed_rows.check_words import first_damaged_row
from cpu_kernels.packed_rows.unpack import dequantize
from cpu_kernels.threads.thread_pool import ThreadPool
from cpu_kernels.transformer.projection import Activations, Batch, Matrix, Projection, quantize_vector
from tools.fuzz.mutations import MarkedBytes, mark_gguf, mutate_bytes, mutate_json
from tools.models import families
from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.imatrix import read_importance
from tritgguf.formats.integrity import check
from tritgguf.formats.trit_types import codebook_key, is_trit_type, row_bytes
from tritgguf.runtime.config import ModelConfig
from tritgguf.runtime.model import Model
from tritgguf.runtime.single_sequence import SingleSequence
from tritgguf.sources.open import open_source
from tritgguf.tokenization import chat_template
from tritgguf.tokenization.tokenizer import Tokenizer

_FAMILIES = ("qwen3", "qwen3-moe", "phimoe")
_WITH_KERNELS = ("gguf-file", "command", "trit-rows")
_OUTPUTS = ("out.gguf", "out.gguf.part", "out.gguf.part.journal")
Target = Callable[[random.Random], None]
_HEADER_KEYS = re.compile(r"^(?!tokenizer\.|trit\.xxh3)")


class FindingError(Exception):
    """Damaged input had an effect that it must not have."""


@dataclass(frozen=True)
class _Seed:
    """A valid model to damage: its Hugging Face folder, its trit file, and a file of its first layer only."""

    source: Path
    path: Path
    file: MarkedBytes
    header: MarkedBytes

    @classmethod
    def make(cls, folder: Path, family: str) -> _Seed:
        """Write a random model of a family, if it is not there, and return it."""
        source, path = folder / family, folder / f"{family}.gguf"
        if not path.exists():
            families.write_random_family(source, family)
            convert(source, path, depth=2, threads=1)
        return cls(source, path, mark_gguf(str(path)), _short_header(path))


class Targets:
    """The targets, with the valid models that they damage; all files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._seeds = [_Seed.make(folder, family) for family in _FAMILIES]
        self._damaged = folder / "damaged.gguf"
        self.by_name: dict[str, Target] = {
            "gguf-header": self.gguf_header,
            "gguf-file": self.gguf_file,
            "command": self.command,
            "safetensors": self.safetensors,
            "config": self.config,
            "tokenizer": self.tokenizer,
            "chat-template": self.chat_template,
            "trit-rows": self.trit_rows,
        }

    def prepared(self, name: str) -> Target:
        """Return a target whose kernels are compiled: a case has only ten seconds."""
        if name in _WITH_KERNELS:
            self._compile_kernels()
        return self.by_name[name]

    def _compile_kernels(self) -> None:
        """Compile the kernels of all targets, or load them from the cache."""
        for seed in self._seeds:
            for command in self._commands(seed.path):
                self._call(command)
        for number in range(40):
            self.trit_rows(random.Random(number))

    def gguf_header(self, rng: random.Random) -> None:
        """Open a file with a damaged short header, and read every key and tensor."""
        self._damaged.write_bytes(mutate_bytes(rng.choice(self._seeds).header, rng))
        with _refusal():
            file = GgufFile(self._damaged)
            size = self._damaged.stat().st_size
            for info in file.tensors.values():
                if not 0 <= info.offset <= info.offset + info.n_bytes <= size:
                    raise FindingError(f"tensor {info.name} lies outside of the file")
                file.raw(info.name)
                if is_trit_type(info.type_id):
                    file.codebooks(info.name)
            dict(file.metadata)
            ModelConfig.from_file(file)

    def gguf_file(self, rng: random.Random) -> None:
        """Open a damaged file, load the model and run a few tokens, check the file and read it as a source."""
        self._damaged.write_bytes(mutate_bytes(rng.choice(self._seeds).file, rng))
        with _refusal():
            file = GgufFile(self._damaged)
            Tokenizer(file.metadata, name=str(self._damaged))
            sequence = SingleSequence(Model(file, threads=1), 4)
            sequence.forward([1, 2])
            sequence.forward([3])
        with _refusal():
            check(self._damaged, threads=1)
        with _refusal():
            for tensor in open_source(str(self._damaged)).tensors:
                open_source(str(self._damaged)).read(tensor.name)
                break
        with _refusal():
            read_importance(self._damaged, {"blk.0.attn_q.weight": 128, "blk.0.ffn_up_exps.weight[0]": 128})

    def command(self, rng: random.Random) -> None:
        """Give a damaged file to a command as a user would."""
        self._damaged.write_bytes(mutate_bytes(rng.choice(self._seeds).file, rng))
        self._call(rng.choice(self._commands(self._damaged)))

    def _commands(self, file: Path) -> tuple[list[str], ...]:
        path, out = str(file), str(self.folder / "out.gguf")
        return (
            ["inspect", path],
            ["check", path, "-t", "1"],
            ["run", path, "--raw", "-p", "a", "-n", "1", "-c", "8", "-t", "1", "--temp", "0"],
            ["convert", path, out, "--depth", "1", "--encoder", "v2", "-t", "1", "--overwrite"],
        )

    def _call(self, arguments: list[str]) -> None:
        """Run a command in this process and check its messages, its exit code and the files that it leaves."""
        for name in _OUTPUTS:
            (self.folder / name).unlink(missing_ok=True)  # from a case that did not finish
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = app.main(arguments)
        left = [name for name in _OUTPUTS if (self.folder / name).exists()]
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        if code not in (0, 1) or (code == 1) != (len(lines) == 1):
            raise FindingError(f"{arguments[0]}: exit code {code}, stderr {errors.getvalue()[-300:]!r}")
        if "Traceback" in errors.getvalue() or (code and left):
            raise FindingError(f"{arguments[0]}: left {left}, stderr {errors.getvalue()[-300:]!r}")

    def safetensors(self, rng: random.Random) -> None:
        """Read a folder with a damaged safetensors header."""
        source = rng.choice(self._seeds).source
        sound = (source / "model.safetensors").read_bytes()
        length = int.from_bytes(sound[:8], "little")
        if rng.random() < 0.7:
            header = json.dumps(mutate_json(json.loads(sound[8 : 8 + length]), rng), ensure_ascii=True).encode()
            damaged = len(header).to_bytes(8, "little") + header + sound[8 + length :]
        else:
            marked = MarkedBytes()
            marked.integer(length, 8)
            marked.texts.append((8, length))
            marked.plain(sound[8:])
            damaged = mutate_bytes(marked, rng)
        self._read_folder(source, "model.safetensors", damaged, read=True)

    def config(self, rng: random.Random) -> None:
        """Read a folder with a damaged config.json."""
        source = rng.choice(self._seeds).source
        sound = json.loads((source / "config.json").read_text("utf-8"))
        self._read_folder(source, "config.json", json.dumps(mutate_json(sound, rng)).encode(), read=False)

    def tokenizer(self, rng: random.Random) -> None:
        """Read a folder with damaged tokenizer files, and encode with its tokenizer."""
        source, name = self._seeds[0].source, rng.choice(("tokenizer.json", "tokenizer_config.json"))
        sound = json.loads((source / name).read_text("utf-8"))
        self._read_folder(source, name, json.dumps(mutate_json(sound, rng)).encode(), read=False)

    def chat_template(self, rng: random.Random) -> None:
        """Render templates made of parts of real and malicious ones."""
        parts = (
            "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m.role }}{% endfor %}",
            "{{ 'a' * 99999999999 }}", "{% for i in range(9999) %}", "{% endfor %}", "{{ ''.__class__ }}",
            "{{ 2 ** 99999999 }}", "{% macro f() %}", "{{ f() }}", "{% endmacro %}", "{{ messages | tojson }}",
            "{% set x = messages %}", "{{ x ~ x }}", "{% if", "{{ bos_token }}", "{% generation %}",
            "{% endgeneration %}", "}}", "{#", "{{ raise_exception('no') }}",
        )  # fmt: skip
        template = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 9)))
        with _refusal():
            chat_template.render(template, [{"role": "user", "content": "a"}], bos_token="", eos_token="")

    def trit_rows(self, rng: random.Random) -> None:
        """Run every kernel on random words that end where an unreadable page begins."""
        depth, rows = rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 5, 16, 17, 33))
        columns = 64 * rng.choice((1, 2, 3, 5, 9))
        generator = np.random.default_rng(rng.getrandbits(32))
        with _guarded(generator.integers(0, 256, rows * row_bytes(depth, columns), np.uint8)) as data:
            codebook = np.sort(generator.random(27).astype(np.float32))
            in_rows = data.reshape(rows, -1)
            decoded = dequantize(in_rows, codebook, depth, ThreadPool(1))
            if not np.isfinite(decoded).all():
                raise FindingError("random words decode to numbers that are not finite")
            first_damaged_row(in_rows.view(np.uint16), depth)
            projection = Projection([Matrix(data, rows, columns, depth, codebook)])
            vector = Activations(1, columns).vector(0)
            vector[0][:] = generator.standard_normal(columns)
            quantize_vector(vector)
            projection.multiply_vector(vector[0], np.empty(rows, np.float32), ThreadPool(1))
            batch = Batch(7, columns, bits=rng.choice((8, 16)))
            batch.x[:] = generator.standard_normal((7, columns))
            batch.quantize(ThreadPool(1))
            projection.multiply(batch, np.empty((7, rows), np.float32), ThreadPool(1))

    def _read_folder(self, source: Path, name: str, damaged: bytes, *, read: bool) -> None:
        folder = self.folder / f"damaged-{source.name}"
        if not folder.exists():
            shutil.copytree(source, folder)
        (folder / name).write_bytes(damaged)
        try:
            with _refusal():
                opened = open_source(str(folder))
                Tokenizer({key: value.value for key, value in opened.metadata.items()}, name=str(folder)).encode(
                    "a b", add_special=True, parse_special=True
                )
                for tensor in opened.tensors if read else ():
                    opened.read(tensor.name)
        finally:
            shutil.copyfile(source / name, folder / name)


@contextlib.contextmanager
def _refusal():  # type: ignore[no-untyped-def]
    """Suppress a refusal whose message is one line."""
    try:
        yield
    except TritGgufError as error:
        if "\n" in str(error) or not str(error):
            raise FindingError(f"a message of several lines or none: {error!r}") from error


@contextlib.contextmanager
def _guarded(data: np.ndarray):  # type: ignore[no-untyped-def]
    """Copy bytes to right before an unreadable page: a kernel that reads past the end crashes the process."""
    pages = -(-len(data) // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    end = (pages - 1) * mmap.PAGESIZE
    placed = whole[end - len(data) : end]
    placed[:] = data
    placed.flags.writeable = False  # as files are, so the kernels are those that a model runs
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(whole.ctypes.data + end)
    if libc.mprotect(guard, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    try:
        yield placed
    finally:
        libc.mprotect(guard, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def _short_header(model: Path) -> MarkedBytes:
    """Return a model's first layer without a tokenizer, a file of which thousands can be read in a second."""
    from gguf import GGUFValue, GGUFValueType

    from tritgguf.formats.gguf_writer import PlannedTensor, StreamingWriter

    sound = GgufFile(model)
    in_layers = [name for name in sound.tensors if name.startswith("blk.")]
    vectors = [name for name, info in sound.tensors.items() if len(info.shape) == 1 and name not in in_layers]
    names = ["token_embd.weight", *vectors, *(name for name in in_layers if name.startswith("blk.0."))]
    others = tuple(codebook_key(name) for name in sound.tensors if name not in names)
    metadata = {key: sound.value(key) for key in sound.metadata if _HEADER_KEYS.match(key) and key not in others}
    metadata[f"{sound.metadata['general.architecture']}.block_count"] = GGUFValue(1, GGUFValueType.UINT32)
    infos = [sound.tensors[name] for name in names]
    plan = [PlannedTensor(info.name, info.shape, info.type_id, info.n_bytes) for info in infos]
    path = model.with_name(f"short-{model.name}")
    with StreamingWriter(path, metadata, plan, overwrite=True) as writer:
        for tensor in plan:
            writer.begin(tensor)
            writer.write(sound.raw(tensor.name))
    return mark_gguf(str(path))
