"""Fetching trit files from a hub that behaves and from one that does not, and removing them."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, loopback_hub, use_hub

from tritgguf.errors import TritGgufError
from tritgguf.formats.durable_output import open_locked
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.sources import hub_files
from tritgguf.sources.hub_cache import cached_files, find_cached, is_in_cache, remove_from_cache
from tritgguf.sources.hub_files import local_or_fetched, pull
from tritgguf.sources.hub_names import HubName

TINY, D2 = HubName("org/tiny"), HubName("org/tiny", "d2")


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_trit_file: Callable[..., GgufFile]
) -> Iterator[LoopbackHub]:
    """A hub with a tiny model at two depths, for this process, whose cache is empty."""
    monkeypatch.setattr(hub_files, "_SECONDS_BETWEEN_ATTEMPTS", 0.0)
    with loopback_hub() as hub:
        files = {f"tiny-d{depth}.gguf": tiny_trit_file("llama", depth).path.read_bytes() for depth in (2, 3)}
        hub.models["org/tiny"] = {**files, "README.md": b"A model."}
        use_hub(monkeypatch, hub, tmp_path)
        yield hub


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def fails(message: str, name: HubName = D2) -> str:
    with pytest.raises(TritGgufError, match=message) as error:
        pull(name, silent)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_is_fetched_once(hub: LoopbackHub, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    file = pull(D2, lambda *progress: seen.append(progress))
    content = hub.models["org/tiny"]["tiny-d2.gguf"]
    assert file.location.read_bytes() == content
    assert (file.path, file.depth, file.n_bytes, file.revision) == (
        "tiny-d2.gguf",
        "2",
        len(content),
        hub.commit("org/tiny"),
    )
    assert seen[-1] == ("checking tiny-d2.gguf", len(content), len(content))
    digest = hashlib.sha256(content).hexdigest()
    assert files_in(tmp_path / "hub" / "models--org--tiny") == [
        f"blobs/{digest}",
        "refs/main",
        f"snapshots/{hub.commit('org/tiny')}/tiny-d2.gguf",
    ]
    asked = len(hub.asked)
    assert local_or_fetched(TINY, silent) == file
    assert len(hub.asked) == asked, "what is in the cache needs no hub"
    assert pull(D2, silent) == file
    assert hub.downloads() == [""]


def test_huggingface_hub_finds_it(hub: LoopbackHub) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    location = str(pull(D2, silent).location)
    assert try_to_load_from_cache("org/tiny", "tiny-d2.gguf") == location
    assert hf_hub_download("org/tiny", "tiny-d2.gguf") == location
    assert hub.downloads() == [""]


def test_ours_finds_what_huggingface_hub_has_fetched(hub: LoopbackHub) -> None:
    from huggingface_hub import hf_hub_download

    location = hf_hub_download("org/tiny", "tiny-d3.gguf")
    found = find_cached(HubName("org/tiny", "d3"))
    assert found is not None
    assert str(found.location) == location


def test_several_files_need_a_choice(hub: LoopbackHub) -> None:
    fails("has 2 trit files; name one of them: org/tiny:d2, org/tiny:d3", TINY)
    fails("has no such file; it has tiny-d2.gguf, tiny-d3.gguf", HubName("org/tiny", "d4"))
    assert hub.downloads() == []


def test_a_newer_version(hub: LoopbackHub) -> None:
    old = pull(D2, silent)
    files = hub.models["org/tiny"]
    newer = bytearray(files["tiny-d2.gguf"])
    newer[-1] ^= 1
    files["tiny-d2.gguf"] = bytes(newer)
    assert local_or_fetched(D2, silent) == old
    new = pull(D2, silent)
    assert new.location.read_bytes() == newer
    (found,) = cached_files("org/tiny")
    assert (found.location, found.earlier) == (new.location, (old.location,))
    assert remove_from_cache(found) == 2 * len(newer)
    assert cached_files() == []


@pytest.mark.parametrize("sent", [0, 1, 1000, 70_000, -1])
def test_a_download_that_broke_goes_on(hub: LoopbackHub, sent: int, tmp_path: Path) -> None:
    content = hub.models["org/tiny"]["tiny-d2.gguf"]
    pieces = itertools.chain([content[:sent]], itertools.repeat(b""))
    hub.sent = lambda content: next(pieces)
    count = len(content[:sent])
    line = fails("connection to the hub broke")
    assert "the next attempt goes on from there" in line
    assert [name.endswith(".incomplete") for name in files_in(tmp_path)] == [True]
    again = f"bytes={count}-" if count else ""
    assert hub.downloads() == ["", again, again]
    hub.sent = lambda content: content
    assert pull(D2, silent).location.read_bytes() == content
    assert hub.downloads()[-1] == (f"bytes={count}-" if count else "")


def test_an_interrupted_download_goes_on(hub: LoopbackHub) -> None:
    content = hub.models["org/tiny"]["tiny-d2.gguf"]
    done: list[int] = []

    def interrupt(stage: str, count: int, total: int) -> None:
        done.append(count)
        if count > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(D2, interrupt)
    assert find_cached(D2) is None
    assert pull(D2, silent).location.read_bytes() == content
    assert hub.downloads() == ["", f"bytes={done[-1]}-"]


def test_a_connection_that_breaks_again_and_again_is_made_again(hub: LoopbackHub) -> None:
    hub.sent = lambda content: content[:50_000]
    content = hub.models["org/tiny"]["tiny-d2.gguf"]
    assert pull(D2, silent).location.read_bytes() == content
    assert hub.downloads()[:3] == ["", "bytes=50000-", "bytes=100000-"]


def test_a_server_that_ignores_ranges(hub: LoopbackHub) -> None:
    content = hub.models["org/tiny"]["tiny-d2.gguf"]
    hub.sent = lambda content: content[:1000]
    hub.ranges = False
    fails("connection to the hub broke")
    hub.sent = lambda content: content
    assert pull(D2, silent).location.read_bytes() == content


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, "the hub does not accept the token"),
        (401, {"X-Error-Code": "RepoNotFound"}, "no such model on the hub"),
        (403, {"X-Error-Code": "GatedRepo"}, "access is gated"),
        (403, {}, "does not allow this access"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such file or folder here, and no such model on the hub"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no revision"),
        (404, {}, "the download from the hub failed .*404"),
        (429, {}, "too many requests; try again in some minutes"),
        (429, {"Retry-After": "7"}, "too many requests; try again in 7 s"),
        (503, {}, "out of order"),
    ],
)
@pytest.mark.parametrize("where", ["/api/", "/resolve/", "/content/"])
def test_refusals(
    hub: LoopbackHub, tmp_path: Path, status: int, headers: dict[str, str], message: str, where: str
) -> None:
    hub.refuse = lambda path: (status, headers) if where in path else None
    fails(message)
    assert not any("snapshots" in name for name in files_in(tmp_path))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (lambda content: content[:-1] + b"!", "does not match its hash; it is removed"),
        (lambda content: bytes(len(content)), "is no GGUF file"),
        (lambda content: b"<!doctype html>" + content[15:], "is no GGUF file"),
    ],
)
def test_wrong_contents(hub: LoopbackHub, tmp_path: Path, sent: Callable[[bytes], bytes], message: str) -> None:
    hub.sent = sent
    fails(message)
    assert files_in(tmp_path) == []


def test_a_model_without_trit_files(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.models["org/other"] = {"model.safetensors": b"x"}
    hub.models["org/stock"] = {"model-Q4_K_M.gguf": b"GGUF"}
    assert "make one: tritgguf convert org/other other.gguf" in fails("no trit file", HubName("org/other"))
    fails("neither a trit file of this model nor safetensors", HubName("org/stock"))
    assert files_in(tmp_path) == []


def test_a_stock_file_is_recognized_by_its_first_bytes(hub: LoopbackHub, tmp_path: Path) -> None:
    """Its name does not tell, so its download begins."""
    header = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)
    hub.models["org/stock"] = {"model.gguf": header + bytes(3_000_000)}
    seen: list[int] = []
    with pytest.raises(TritGgufError, match=r"model\.gguf is no trit file.* tritgguf convert org/stock stock\.gguf"):
        pull(HubName("org/stock"), lambda stage, done, total: seen.append(done))
    assert seen[-1] < 1_000_000
    assert files_in(tmp_path) == []


def test_a_hub_that_answers_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.hangs = True
    fails("the hub cannot be reached .*; go online")
    assert files_in(tmp_path) == []


def test_no_hub(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    fails("the hub cannot be reached .*; go online")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("because HF_HUB_OFFLINE is set; go online")


def test_what_is_in_the_cache_runs_offline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pull(D2, silent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_or_fetched(D2, silent) == file


@pytest.mark.skipif(os.name == "nt", reason="files are not locked there")
def test_two_processes(hub: LoopbackHub, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    digest = hashlib.sha256(hub.models["org/tiny"]["tiny-d2.gguf"]).hexdigest()
    with open_locked(blobs / f"{digest}.incomplete", ""):
        fails("another process is fetching tiny-d2.gguf; wait for it")


def test_a_full_disk(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))
    fails("needs .*, .* more than are free there; make room")


@pytest.mark.parametrize("path", ["../evil.gguf", "/tmp/evil.gguf", "a/../../../evil.gguf"])
def test_paths_that_lead_out(hub: LoopbackHub, tmp_path: Path, path: str) -> None:
    hub.models["org/evil"] = {path: hub.models["org/tiny"]["tiny-d2.gguf"]}
    fails("the hub's answer lacks", HubName("org/evil"))
    assert files_in(tmp_path) == []


# ---- the cache ----


def test_removing_leaves_everything_else(hub: LoopbackHub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hub.models["org/tiny"]["copy-d2.gguf"] = hub.models["org/tiny"]["tiny-d2.gguf"]
    readme = Path(hf_hub_download("org/tiny", "README.md"))
    copy, d3 = (pull(HubName("org/tiny", name), silent) for name in ("copy-d2.gguf", "d3"))
    file = pull(HubName("org/tiny", "tiny-d2.gguf"), silent)
    assert is_in_cache(file.location)
    assert not is_in_cache(tmp_path / "else.gguf")
    assert remove_from_cache(file) == 0, "the copy has the same content"
    assert remove_from_cache(d3) == len(hub.models["org/tiny"]["tiny-d3.gguf"])
    assert copy.location.read_bytes() == hub.models["org/tiny"]["copy-d2.gguf"]
    assert readme.read_bytes() == b"A model."
    assert [found.path for found in cached_files()] == ["copy-d2.gguf"]


def test_nothing_is_left_of_a_model_s_only_file(hub: LoopbackHub, tmp_path: Path) -> None:
    from huggingface_hub import scan_cache_dir

    file = pull(D2, silent)
    assert [repo.repo_id for repo in scan_cache_dir().repos] == ["org/tiny"]
    remove_from_cache(file)
    assert list((tmp_path / "hub").iterdir()) == []


def test_what_is_no_trit_file_is_not_listed(hub: LoopbackHub) -> None:
    from huggingface_hub import hf_hub_download

    hub.models["org/stock"] = {"model.gguf": b"GGUF" + (3).to_bytes(4, "little") + bytes(16), "d2.gguf": b"text"}
    for path in hub.models["org/stock"]:
        hf_hub_download("org/stock", path)
    assert cached_files() == []
    assert find_cached(HubName("org/stock")) is None
