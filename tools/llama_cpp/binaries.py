"""Build llama.cpp's programs once for this processor, and run them.

The source is part of the source distribution of llama-cpp-python, pinned to a version and a hash. pip downloads it, so
pip's configuration (index, proxy, certificates) applies. Building needs cmake, a C++ compiler and five to ten minutes
on two cores. The programs are kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu_kernels.threads.cores import physical_cores
from tools.models.fetch_model import file_sha256
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PROGRAMS = ("llama-batched-bench", "llama-bench", "llama-quantize", "llama-imatrix")

_BATCHED_PROMPT = 16  # tokens
_STEM = f"{PACKAGE.replace('-', '_')}-{VERSION}"
_SOURCE = f"{_STEM}/vendor/llama.cpp"
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
_OPTION_OF_FLAG = {
    "avx2": "GGML_AVX2",
    "fma": "GGML_FMA",
    "f16c": "GGML_F16C",
    "bmi2": "GGML_BMI2",
    "avx512f": "GGML_AVX512",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_bf16": "GGML_AVX512_BF16",
}


def cache_folder() -> Path:
    """Return the cache folder, below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritgguf"


def processor_flags() -> set[str]:
    """Return the instruction-set flags that Linux lists for an x86 processor; none elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def cmake_options(flags: set[str]) -> list[str]:
    """Return cmake's options for a processor with these flags.

    On x86 the instruction sets are named one by one: a native build also enables AMX if the flags list it, and some
    machines list it but do not let processes use it.
    """
    if "avx2" not in flags:
        return [*_OPTIONS, "-DGGML_NATIVE=ON"]
    chosen = [f"-D{option}={'ON' if flag in flags else 'OFF'}" for flag, option in _OPTION_OF_FLAG.items()]
    return [*_OPTIONS, "-DGGML_NATIVE=OFF", *chosen]


def build_llama_cpp(cache: Path, flags: set[str] | None = None) -> Path:
    """Return the folder with PROGRAMS; build them unless `cache` has them for this processor.

    `flags` are the instruction sets that they may use; None takes all of the processor.
    Raises TritGgufError: no cmake or compiler, no download, a failed build.
    """
    allowed = processor_flags() if flags is None else flags
    folder = cache / (f"llama.cpp-{VERSION}" + ("" if allowed == processor_flags() else "-narrower"))
    options = cmake_options(allowed)
    built_with = folder / "cmake_options.txt"
    programs = [folder / name for name in PROGRAMS]
    if all(path.exists() for path in (built_with, *programs)) and built_with.read_text() == "\n".join(options):
        return folder
    for program in ("cmake", "c++"):
        if shutil.which(program) is None:
            raise TritGgufError(f"{program} is not here; building llama.cpp needs cmake and a C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        log = folder / "build.log"
        terminal.note(f"fetching {PACKAGE} {VERSION}")
        source = extract_source(download_source(work, log), work)
        terminal.note(f"building llama.cpp, which takes five to ten minutes; {log} shows how far it is")
        run_logged(["cmake", "-S", str(source), "-B", str(work / "build"), *options], log)
        jobs = str(physical_cores())
        run_logged(["cmake", "--build", str(work / "build"), "--target", *PROGRAMS, "-j", jobs], log)
        for path in programs:
            shutil.move(work / "build" / "bin" / path.name, path)
        built_with.write_text("\n".join(options))
    return folder


def download_source(folder: Path, log: Path) -> Path:
    """Let pip download the source distribution to `folder`, and return its path; raises TritGgufError on failure."""
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    run_logged(command, log)
    path = folder / f"{_STEM}.tar.gz"
    found = file_sha256(path) if path.exists() else "no such file"
    if found != SOURCE_SHA256:
        raise TritGgufError(
            f"{path.name}: its SHA-256 is {found}, pinned is {SOURCE_SHA256}; check the package index that pip uses"
        )
    return path


def extract_source(archive: Path, folder: Path) -> Path:
    """Unpack llama.cpp's part of the distribution into `folder` and return its path."""
    with tarfile.open(archive) as file:
        members = [member for member in file if member.name.startswith(f"{_SOURCE}/")]
        file.extractall(folder, members, filter="data")
    return folder / _SOURCE


def run_logged(command: Sequence[str], log: Path) -> None:
    """Run a command with its output appended to `log`; if it fails, raise a TritGgufError that names the log."""
    with log.open("ab") as output:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0:
        raise TritGgufError(f"{Path(command[0]).name} failed with exit code {code}; {log} says why")


def quantize(programs: Path, source: Path, output: Path, type_name: str, threads: int) -> None:
    """Let llama-quantize write all matrices of the layers as one type, head and embeddings as F16."""
    command = [str(programs / "llama-quantize"), "--pure", "--output-tensor-type", "f16"]
    command += ["--token-embedding-type", "f16", str(source), str(output), type_name, str(threads)]
    run_logged(command, programs / "quantize.log")


def write_imatrix(programs: Path, source: Path, output: Path, text: Path, chunks: int, threads: int) -> None:
    """Let llama-imatrix write the importance of a model's matrices on the first chunks, of 512 tokens, of a text."""
    command = [str(programs / "llama-imatrix"), "-m", str(source), "-f", str(text), "-o", str(output), "-c", "512"]
    run_logged([*command, "--chunks", str(chunks), "--no-ppl", "-t", str(threads)], programs / "imatrix.log")


def quantize_mixture(programs: Path, source: Path, output: Path, type_name: str, imatrix: Path, threads: int) -> None:
    """Let llama-quantize write one of its mixtures of types, such as Q4_K_M, with an importance matrix."""
    command = [str(programs / "llama-quantize"), "--imatrix", str(imatrix), str(source), str(output), type_name]
    run_logged([*command, str(threads)], programs / "quantize.log")


def tokens_per_second(programs: Path, file: Path, prompt_tokens: int, generated_tokens: int, threads: int) -> float:
    """Run one test of llama-bench (one of the two token counts is 0) and return its tokens per second."""
    command = [str(programs / "llama-bench"), "-m", str(file), "-p", str(prompt_tokens), "-n", str(generated_tokens)]
    return rate_of_test(run_json([*command, "-t", str(threads), "-r", "1", "-o", "json"]))


def batched_tokens_per_second(programs: Path, file: Path, sequences: int, tokens: int, threads: int) -> float:
    """Let llama-batched-bench decode several sequences at once, and return their tokens per second in total.

    Their prompts of 16 tokens are not counted.
    """
    context = sequences * (_BATCHED_PROMPT + tokens)
    command = [str(programs / "llama-batched-bench"), "-m", str(file), "-c", str(context), "-t", str(threads)]
    command += ["-npp", str(_BATCHED_PROMPT), "-ntg", str(tokens), "-npl", str(sequences), "--output-format", "jsonl"]
    return float(run_json(command)["speed_tg"])


def rate_of_test(tests: Any) -> float:
    """Return the tokens per second of llama-bench's only test."""
    if not isinstance(tests, list) or len(tests) != 1 or "avg_ts" not in tests[0]:
        raise TritGgufError(f"llama-bench printed no single test: {json.dumps(tests)[:200]}")
    return float(tests[0]["avg_ts"])


def run_json(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """Run a command and return the JSON that it prints; if it fails, raise a TritGgufError with its last line."""
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise TritGgufError(f"{' '.join(command[:4])} ... failed: {reason}")
    return json.loads(result.stdout)
