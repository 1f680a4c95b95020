"""llama.cpp as a reference: its logits, greedy answers, token ids and rendered chat templates.

    python -m tools.llama_cpp.referee         # builds the library if it is missing, and prints its path
    python -m tools.llama_cpp.referee FILE    # also compares the runner's logits with those of the file's F16 export

`referee_library/referee.cpp` wraps llama.cpp's own functions in one shared library, which is built from the pinned
source of `binaries.py` (about two minutes of one core) and kept in the user's cache folder. It needs cmake and a C++
compiler. Only tests depend on it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels.threads.cores import physical_cores
from tools.llama_cpp import binaries
from tritgguf import export
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError
from tritgguf.evaluation.text_windows import shipped_text
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.runtime.model import Model
from tritgguf.runtime.single_sequence import SingleSequence
from tritgguf.tokenization.tokenizer import Tokenizer

PROGRAMS = ("cmake", "c++")
POSITIONS = 1024
_PROJECT = Path(__file__).resolve().parent / "referee_library"
_LIBRARY = "libreferee.so"
# Keep the weights in the file's layout, and no second thread library in the process.
_OPTIONS = ("-DGGML_CPU_REPACK=OFF", "-DGGML_LLAMAFILE=OFF", "-DGGML_OPENMP=OFF")


def missing_programs() -> list[str]:
    """Return the programs that the build needs and that are missing here."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def find_referee(cache: Path) -> Path | None:
    """Return the path of the shared library for this processor and source in `cache`; None if it is not built."""
    library = _folder(cache) / _LIBRARY
    return library if library.exists() else None


def build_referee(cache: Path) -> Path:
    """Return the path of the shared library; build it unless `find_referee` finds it.

    Raises TritGgufError: no cmake or compiler, no download, a failed build.
    """
    if found := find_referee(cache):
        return found
    if missing := missing_programs():
        raise TritGgufError(f"{missing[0]} is not here; building llama.cpp needs cmake and a C++ compiler")
    folder = _folder(cache)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work, log = Path(temporary), folder / "build.log"
        terminal.note(f"fetching {binaries.PACKAGE} {binaries.VERSION}")
        source = binaries.extract_source(binaries.download_source(work, log), work)
        terminal.note(f"building llama.cpp's library, which takes a few minutes; {log} shows how far it is")
        return compile_library(source, work / "build", log).rename(folder / _LIBRARY)


def _options() -> list[str]:
    return [*binaries.cmake_options(binaries.processor_flags()), *_OPTIONS]


def _folder(cache: Path) -> Path:
    """Return the folder for the library; its name depends on the options and on our part of the source."""
    sources = b"".join(path.read_bytes() for path in sorted(_PROJECT.iterdir()))
    key = hashlib.sha256("\n".join(_options()).encode() + sources).hexdigest()[:16]
    return cache / f"llama.cpp-{binaries.VERSION}-referee-{key}"


def compile_library(source: Path, folder: Path, log: Path) -> Path:
    """Compile the library from llama.cpp's source tree in `folder`, and return its path there."""
    configure = ["cmake", "-S", str(_PROJECT), "-B", str(folder), f"-DLLAMA_CPP={source}", *_options()]
    binaries.run_logged(configure, log)
    jobs = str(physical_cores())
    binaries.run_logged(["cmake", "--build", str(folder), "--target", "referee", "-j", jobs], log)
    return folder / _LIBRARY


@functools.cache
def _load(library: Path) -> ctypes.CDLL:
    """Load the library and declare what its functions take."""
    loaded = ctypes.CDLL(str(library))
    handle, text, number, flag = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool
    tokens = np.ctypeslib.ndpointer(np.int32, ndim=1, flags="C")
    logits = np.ctypeslib.ndpointer(np.float32, ndim=2, flags="C")
    loaded.referee_open.argtypes, loaded.referee_open.restype = (text, number, number, flag), handle
    loaded.referee_close.argtypes, loaded.referee_close.restype = (handle,), None
    loaded.referee_vocabulary_size.argtypes = (handle,)
    loaded.referee_ends_text.argtypes, loaded.referee_ends_text.restype = (handle, number), flag
    loaded.referee_tokenize.argtypes = (handle, text, number, flag, flag, tokens, number)
    loaded.referee_detokenize.argtypes = (handle, tokens, number, text, number)
    loaded.referee_logits.argtypes = (handle, tokens, number, number, logits)
    loaded.referee_render.argtypes = (text, text, text, number)
    return loaded


class Referee:
    """A GGUF file, opened by llama.cpp.

    `positions` is the length of the longest sequence; 0 opens only the vocabulary, and the file need not have tensors.
    `exact` keeps keys and values in float32 and attention unfused; llama.cpp's default is float16 and fused. Raises
    TritGgufError if llama.cpp refuses the file.
    """

    def __init__(self, library: Path, file: Path, *, positions: int = 0, threads: int = 1, exact: bool = False) -> None:
        self._library = _load(library)
        self._handle = self._library.referee_open(str(file).encode(), positions, threads, exact)
        if not self._handle:
            raise TritGgufError(f"{file}: llama.cpp does not open it")
        self.vocabulary_size = int(self._library.referee_vocabulary_size(self._handle))

    def close(self) -> None:
        """Free the model; do not use it afterwards."""
        if self._handle:
            self._library.referee_close(self._handle)
            self._handle = None

    def __enter__(self) -> Referee:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text; the options are those of `Tokenizer.encode`."""
        data = text.encode()
        tokens = np.empty(len(data) + 8, np.int32)  # a token has at least a byte; room for bos and eos
        arguments = (data, len(data), add_special, parse_special, tokens, len(tokens))
        count = self._library.referee_tokenize(self._handle, *arguments)
        if count < 0:
            raise TritGgufError(f"llama.cpp makes {-count} tokens of a text of {len(data)} bytes")
        return [int(token) for token in tokens[:count]]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without control tokens; invalid UTF-8 becomes replacement characters."""
        ids = np.array(tokens, np.int32)
        buffer = ctypes.create_string_buffer(1 << 16)
        length = self._library.referee_detokenize(self._handle, ids, len(ids), buffer, len(buffer))
        if length < 0:
            raise TritGgufError(f"llama.cpp makes more than {len(buffer)} bytes of {len(ids)} tokens")
        return buffer.raw[:length].decode("utf-8", "replace")

    def ends_text(self, token: int) -> bool:
        """Return whether llama.cpp ends an answer at this token."""
        return bool(self._library.referee_ends_text(self._handle, token))

    def logits(self, tokens: Sequence[int], position: int = 0) -> np.ndarray:
        """Append tokens after the first `position` tokens of earlier calls; return float32 [tokens, vocabulary]."""
        ids = np.array(tokens, np.int32)
        logits = np.empty((len(ids), self.vocabulary_size), np.float32)
        code = self._library.referee_logits(self._handle, ids, len(ids), position, logits)
        if code != 0:
            raise TritGgufError(f"llama_decode failed with code {code} on {len(ids)} tokens at {position}")
        return logits

    def greedy(self, prompt: Sequence[int], count: int, stop_tokens: Collection[int]) -> list[int]:
        """Return up to `count` tokens, always the likeliest one; a stop token ends the answer and is not included."""
        answer: list[int] = []
        logits = self.logits(prompt)[-1]
        while len(answer) < count:
            token = int(np.argmax(logits))
            if token in stop_tokens:
                break
            answer.append(token)
            logits = self.logits([token], len(prompt) + len(answer) - 1)[0]
        return answer


def render(library: Path, template: str, variables: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Render a chat template with llama.cpp's Jinja interpreter: texts, each with whether it comes from a variable.

    Raises TritGgufError with the interpreter's message if rendering fails.
    """
    arguments = (template.encode(), json.dumps(variables, ensure_ascii=False).encode())
    capacity = 1 << 20
    buffer = ctypes.create_string_buffer(capacity)
    length = _load(library).referee_render(*arguments, buffer, capacity)
    if length > capacity:
        raise TritGgufError(f"the rendered template has {length} bytes, more than {capacity}")
    result = json.loads(buffer.raw[:length])
    if isinstance(result, str):
        raise TritGgufError(f"llama.cpp does not render the template: {' '.join(result.split())}")
    return [(text, from_variable) for text, from_variable in result]


@contextmanager
def open_export(file: GgufFile, *, to: str = "f16", threads: int | None = None) -> Iterator[Referee]:
    """Export a trit file to a stock type and open it in llama.cpp, for sequences of up to POSITIONS tokens.

    The export is in a temporary folder. Raises TritGgufError as `build_referee` and `export` do.
    """
    library = build_referee(binaries.cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "stock.gguf"
        export(file.path, output, to=to, threads=threads)
        with Referee(library, output, positions=POSITIONS, threads=threads or physical_cores()) as referee:
            yield referee


def relative_difference(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest difference of a logit, relative to the reference's largest logit."""
    return float(np.abs(logits - reference).max() / np.abs(reference).max())


def main() -> int:
    """Parse the command line, build, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", help="a trit GGUF file")
    parser.add_argument("--to", default="f16", help="type of the export: f16, bf16, q8_0 or q4_0 (default f16)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the text of `verify` (default 128)")
    parser.add_argument("--threads", type=int, default=None, help="threads of both (default: all cores)")
    options = parser.parse_args()
    try:
        print(build_referee(binaries.cache_folder()))
        if options.file:
            compare(GgufFile(options.file), options.to, options.tokens, options.threads)
    except TritGgufError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(file: GgufFile, to: str, count: int, threads: int | None) -> None:
    """Print how far the runner's logits are from llama.cpp's, on the first `count` tokens of the text of `verify`."""
    text = shipped_text()
    tokens = Tokenizer(file.metadata).encode(text, add_special=True, parse_special=False)[: min(count, POSITIONS)]
    with open_export(file, to=to, threads=threads) as referee:
        theirs = referee.logits(tokens)
    print(f"{'activations in the runner':27}  largest logit difference, relative  same top token, of {len(tokens)}")
    for name, bits, exact in (("8 bits, as `run` has them", 8, False), ("16 bits", 16, False), ("exact", 16, True)):
        model = Model(file, threads=threads, prefill_bits=bits, exact=exact)
        ours = SingleSequence(model, len(tokens)).forward(tokens, all_logits=True)
        same_top = (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()
        print(f"{name:27}  {relative_difference(ours, theirs):34.1e}  {same_top:.1%}")


if __name__ == "__main__":
    sys.exit(main())
