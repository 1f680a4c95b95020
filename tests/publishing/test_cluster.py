"""publish on Ray: the files of a local run, also after a worker was killed; nodes with disks of their own; errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Capture, fails
from tiny_models import write_tiny_model

from tritgguf.cli import app
from tritgguf.conversion.convert import convert
from tritgguf.errors import BadRequestError, DamagedFileError, TritGgufError
from tritgguf.publishing import tasks
from tritgguf.publishing.cluster import RayExecutor, _check_disks, cluster
from tritgguf.publishing.inputs import SourceInputs
from tritgguf.publishing.jobs import jobs_of
from tritgguf.publishing.plan_file import read_plan
from tritgguf.publishing.tasks import Task

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL"), pytest.mark.slow]
PLAN = """
sources = ["Tiny", { source = "Tiny", name = "Again" }]
configurations = ["uniform-d2", "uniform-d3"]
[publish]
output = "out"
tokens = 120
bench = false
exports = ["hf"]
"""


def write_plan(folder: Path, text: str = PLAN) -> Path:
    if not (folder / "Tiny").exists():
        write_tiny_model(folder / "Tiny")
    file = folder / "plan.toml"
    file.write_text(text, encoding="utf-8")
    return file


def published(folder: Path) -> dict[str, bytes]:
    """Return the content of everything that was made, by its path; not that of notes."""
    files = [path for path in (folder / "out").rglob("*") if path.is_file() and ".publish" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """Ray on this machine, which `publish --ray` in this process then uses."""
    pytest.importorskip("torch")
    pytest.importorskip("ray")
    with cluster(None, 1, lambda stage, done, total: None) as executor:
        yield executor


def test_the_files_are_those_of_a_local_run(executor: RayExecutor, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    assert app.main(["publish", str(write_plan(tmp_path / "here")), "--threads", "1"]) == 0
    shutil.copytree(tmp_path / "here" / "Tiny", tmp_path / "there" / "Tiny")
    capsys.readouterr()
    assert app.main(["publish", "--json", "--ray", str(write_plan(tmp_path / "there")), "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert [row["source"] for row in json.loads(captured.out)["files"]] == ["Tiny", "Tiny", "Again", "Again"]
    assert "encoding" in captured.err, "progress of the workers"
    here, there = published(tmp_path / "here"), published(tmp_path / "there")
    assert len(here) > 20
    assert there == here


def test_a_killed_worker_loses_no_finished_matrix(executor: RayExecutor, tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path))
    inputs = SourceInputs(plan, plan.sources[0], 1)
    jobs = jobs_of(plan, plan.sources[0])
    for job in jobs:
        job.folder.mkdir(parents=True)
    journals = [job.trit_file.with_name(f"{job.trit_file.name}.part.journal") for job in jobs]

    def killed_once(progress: Any) -> list[int]:
        found = [len(path.read_text().splitlines()) for path in journals if path.exists()]

        def kill(stage: str, done: int, total: int) -> None:
            if not found and done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)

        from tritgguf.formats import gguf_writer

        gguf_writer._SYNC_BYTES = 0  # the model is too small for more than one entry otherwise
        tasks.encode(inputs, jobs, {job.name: "" for job in jobs}, progress=kill)
        return found

    ((place, found),) = executor.run([Task(killed_once, (), "encoding")])
    assert place == 0
    assert len(found) == 2
    assert min(found) > 5, "the second try resumed from the journals of the first"
    for job in jobs:
        convert(tmp_path / "Tiny", tmp_path / "whole.gguf", **vars_of(job.configuration), overwrite=True)
        assert job.trit_file.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def vars_of(configuration: Any) -> dict[str, Any]:
    return {"depth": configuration.depth, "encoder": configuration.encoder, "recipe": configuration.recipe}


def test_a_finished_file_is_not_made_again_by_a_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(write_plan(tmp_path))
    inputs, jobs = SourceInputs(plan, plan.sources[0], 1), jobs_of(plan, plan.sources[0])
    for job in jobs:
        job.folder.mkdir(parents=True)
    replaced = {job.name: "" for job in jobs}

    def progress(stage: str, done: int, total: int) -> None:
        """Tell nobody."""

    first = tasks.encode(inputs, jobs, replaced, progress=progress)
    again = tasks.encode(inputs, jobs, replaced, progress=progress)
    assert all(one.seconds > 0 for one in first)
    assert all(one.seconds == 0 for one in again)


def test_errors_of_tasks_arrive_as_they_are(executor: RayExecutor) -> None:
    def fail(progress: Any) -> None:
        raise DamagedFileError("model.gguf: is damaged")

    with pytest.raises(DamagedFileError, match=r"^model\.gguf: is damaged$"):
        list(executor.run([Task(fail, (), "stage")]))


def test_tasks_that_no_node_can_take(executor: RayExecutor) -> None:
    with pytest.raises(BadRequestError, match=r"no node has what a stage takes .*memory"):
        list(executor.run([Task(print, (), "a stage", memory_bytes=1 << 60)]))


def test_more_cores_than_a_node_has(executor: RayExecutor) -> None:
    cores = (os.cpu_count() or 1) + 1
    with pytest.raises(BadRequestError, match=f"a task takes {cores} cores, but no node has more than {cores - 1}"):
        cluster(None, cores, lambda stage, done, total: None).__enter__()


def test_each_source_stays_on_a_node_with_a_disk_of_its_own(
    executor: RayExecutor, tmp_path: Path, capsys: Capture
) -> None:
    plan = str(write_plan(tmp_path, PLAN.replace('"hf"', "") + '[cluster]\ndisk = "node"\n'))
    assert app.main(["publish", plan, "--ray", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["files"]) == 4
    notes = tmp_path / "out" / ".publish" / "nodes.json"
    nodes = json.loads(notes.read_text())
    (address,) = executor.node_addresses()
    assert nodes == {"Tiny": address, "Again": address}
    assert "--upload needs files on a shared disk" in fails(capsys, "publish", plan, "--ray", "--upload", "org", code=2)
    notes.write_text(json.dumps({"Tiny": "203.0.113.1"}))
    message = fails(capsys, "publish", plan, "--ray", "--threads", "1")
    assert "the files of Tiny are on the node 203.0.113.1, which is not in the cluster" in message


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_that_share_a_disk_which_should_be_their_own(shared: bool, tmp_path: Path) -> None:
    class Nodes:
        shards, takes_all_sources = 1, True

        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
            for place, task in enumerate(tasks):
                folder = tmp_path / ("all" if shared else task.node)
                yield place, task.function(folder, *task.arguments[1:], progress=lambda *step: None)

    nodes = ["192.0.2.1", "192.0.2.2"]
    if shared:
        message = r"out: is one folder for the nodes 192\.0\.2\.1 and 192\.0\.2\.2, .*; give disk = \"shared\""
        with pytest.raises(BadRequestError, match=message):
            _check_disks(tmp_path / "out", nodes, Nodes())
    else:
        _check_disks(tmp_path / "out", nodes, Nodes())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "no mark is left"


def test_nothing_listens_at_the_address(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("ray")
    message = fails(capsys, "publish", str(write_plan(tmp_path)), "--ray", "127.0.0.1:1")
    assert "--ray: 127.0.0.1:1: no Ray cluster can be reached" in message


def test_without_ray(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = fails(capsys, "publish", str(write_plan(tmp_path)), "--ray")
    assert message.endswith('--ray needs Ray, which is not installed; pip install "tritgguf[cluster]"\n')


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["PLAN", "--ray"], "here"),
        (["--ray", "PLAN"], "here"),
        (["PLAN", "--ray", "--threads", "1"], "here"),
        (["PLAN", "--ray", "192.0.2.1:6379"], "192.0.2.1:6379"),
        (["PLAN"], None),
    ],
)
def test_the_address_may_be_missing(
    arguments: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    plan, seen = str(write_plan(tmp_path)), []

    def publish(plan: Any, threads: int | None, ray: str | None, report: Any) -> None:
        seen.append(ray)
        raise TritGgufError("stop")

    monkeypatch.setattr("tritgguf.cli.publish._publish", publish)
    fails(capsys, *["publish", *(plan if argument == "PLAN" else argument for argument in arguments)])
    assert seen == [expected]
