"""Uploads: folders become models on a hub; each failure is one line, and models that are not ours stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, loopback_hub, use_hub

from tritgguf.errors import BadRequestError
from tritgguf.publishing.upload import Upload, check_organization, upload_folders

CONTENTS = {"NAME.gguf": b"packed" * 100, "README.md": b"# card\n", "hf/config.json": b"{}"}


def ignore(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "out" / name for name in ("a-trit-uniform-d2", "b-trit-uniform-d2")]
    for folder in paths:
        for name, content in CONTENTS.items():
            file = folder / name.replace("NAME", folder.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content + folder.name.encode())
    return paths


def uploaded(hub: LoopbackHub, folder: Path) -> bool:
    """Tell whether the hub has every file of a folder."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return files.items() <= hub.models[f"org/{folder.name}"].items()


def test_every_folder_becomes_a_model(hub: LoopbackHub, folders: list[Path]) -> None:
    uploads = upload_folders(folders, "org", ignore)
    assert uploads == [Upload(str(folder), f"org/{folder.name}") for folder in folders]
    assert all(uploaded(hub, folder) for folder in folders)


def test_an_own_model_is_updated_and_known_contents_are_not_sent_again(hub: LoopbackHub, folders: list[Path]) -> None:
    upload_folders(folders[:1], "org", ignore)
    sent = sum(method == "PUT" for method, _, _ in hub.asked)
    (folders[0] / "README.md").write_text("# new card\n")
    assert [done.error for done in upload_folders(folders[:1], "org", ignore)] == [""]
    assert uploaded(hub, folders[0])
    assert sum(method == "PUT" for method, _, _ in hub.asked) == sent == 1


def test_a_foreign_model_stays_as_it_is(hub: LoopbackHub, folders: list[Path]) -> None:
    theirs = {"README.md": b"theirs", "model.safetensors": b"theirs"}
    hub.models[f"org/{folders[0].name}"] = dict(theirs)
    first, second = upload_folders(folders, "org", ignore)
    assert first.error.startswith(f"org/{folders[0].name}: exists on the hub and has no {folders[0].name}.gguf")
    assert hub.models[f"org/{folders[0].name}"] == theirs
    assert second.error == ""
    assert uploaded(hub, folders[1])


@pytest.mark.parametrize(
    ("status", "path", "message"),
    [
        (401, "/api/repos/create", "does not accept the token"),
        (403, "/api/repos/create", "does not allow this account to write there"),
        (403, "/commit/main", "does not allow this account to write there"),
        (400, "/commit/main", "failed"),
    ],
)
def test_refusals(status: int, path: str, message: str, hub: LoopbackHub, folders: list[Path]) -> None:
    hub.refuse = lambda asked: (status, {}) if asked.endswith(path) else None
    for folder, done in zip(folders, upload_folders(folders, "org", ignore), strict=True):
        assert done.error.startswith(f"org/{folder.name}: the upload failed")
        assert message in done.error
        assert f"HTTP {status}" in done.error
        assert "\n" not in done.error


def test_no_network(hub: LoopbackHub, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (done,) = upload_folders(folders[:1], "org", ignore)
    assert done.error.startswith(f"org/{folders[0].name}: the hub cannot be reached; go online (")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (done,) = upload_folders(folders[:1], "org", ignore)
    assert "HF_HUB_OFFLINE is set" in done.error


def test_impossible_organizations() -> None:
    for name in ("", "a/b", "a b"):
        with pytest.raises(BadRequestError, match="is no name of an organization"):
            check_organization(name)
