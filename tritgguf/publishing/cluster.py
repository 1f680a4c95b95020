"""Tasks on a Ray cluster. Ray passes only plans, measures and progress; weights stay on the disks of the nodes.

With `disk = "shared"` every node has the output folder and the sources under the same paths, and any node takes any
task. With `disk = "node"` each node has folders of its own there: a source is published on one node, always the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritgguf.errors import BadRequestError, MissingExtraError, TritGgufError
from tritgguf.evaluation.quantization_costs import Progress
from tritgguf.formats.durable_output import disk_errors, open_locked, replace_text
from tritgguf.publishing.plan_file import PublishPlan
from tritgguf.publishing.publish import PublishReport, publish
from tritgguf.publishing.state import WORK_FOLDER
from tritgguf.publishing.tasks import Executor, Task

RETRIES = 20
"""How often a task is run again whose process was killed."""
_OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum is 75 MiB
_GB = 1_000_000_000
_STARTS = 3
_CONNECTION_SECONDS = 20.0
_POLL_SECONDS = 0.3
_NODES_FILE = "nodes.json"
_ENVIRONMENT = ("TRITGGUF_LOGITS", "HF_HUB_OFFLINE", "HF_HOME")


def require_ray() -> Any:
    """Return the module ray, which is told to send nothing home; MissingExtraError if it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError('--ray needs Ray, which is not installed; pip install "tritgguf[cluster]"') from error
    return ray


@contextmanager
def cluster(address: str | None, cores: int, progress: Progress) -> Iterator[RayExecutor]:
    """Connect to a Ray cluster, or start one on this machine if `address` is None; yield what runs tasks there.

    Args:
        address: of the cluster, as for `ray.init`.
        cores: what each task takes.
        progress: called with the stage, the number of steps done and their total, of all tasks.

    Raises:
        TritGgufError: Ray is missing, cannot be reached or started, or no node has so many cores.

    """
    ray = require_ray()
    if address is not None:
        _check_listens(address)
    with contextlib.ExitStack() as ends:
        if not ray.is_initialized():
            folder = tempfile.mkdtemp(prefix="trit-")  # short, because Ray makes sockets there
            ends.callback(shutil.rmtree, folder, ignore_errors=True)
            ends.callback(ray.shutdown)
            if address is None:
                _start(ray, cores, folder)
            else:
                _connect(ray, f"{address}: no Ray cluster can be reached", address=address)
        executor = RayExecutor(ray, cores, progress)
        ends.callback(executor.close)
        yield executor


def _check_listens(address: str) -> None:
    """Raise TritGgufError if nothing listens at an address, where Ray would wait for ever."""
    if "://" in address:
        raise TritGgufError(f"--ray: {address}: is no address of a cluster; give HOST:PORT, or auto")
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # such as "auto"
        return
    try:
        socket.create_connection((host, int(port)), _CONNECTION_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise TritGgufError(f"--ray: {address}: no Ray cluster can be reached ({_first_line(error)})") from error


def _start(ray: Any, cores: int, folder: str) -> None:
    """Start Ray on this machine, with its files in a folder."""
    settings: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(cores, os.cpu_count() or 1),
        "resources": {"disk": shutil.disk_usage(Path.cwd()).free // _GB},
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": folder,
    }
    for last in [False] * (_STARTS - 1) + [True]:
        try:
            return _connect(ray, "Ray cannot be started here", **settings)
        except TritGgufError:  # Ray waits for its own processes for half a minute, which a busy machine may exceed
            if last:
                raise
            ray.shutdown()


def _connect(ray: Any, failure: str, **settings: Any) -> None:
    try:
        with _silent_stderr():
            ray.init(log_to_driver=False, logging_level="CRITICAL", **settings)
    except Exception as error:  # Ray's kinds of errors depend on its version
        raise TritGgufError(f"--ray: {failure} ({_first_line(error)})") from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what is written to stderr meanwhile, also by libraries: Ray's log lines of a failure, which is an error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class RayExecutor:
    """Runs tasks on a cluster, several at a time; a task whose process is killed is run again, on any node."""

    takes_all_sources = True

    def __init__(self, ray: Any, cores: int, progress: Progress) -> None:
        self._ray, self._cores, self._progress = ray, cores, progress
        self._nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max(node.get("CPU", 0) for node in self._nodes)
        if most < cores:
            raise BadRequestError(f"--ray: a task takes {cores} cores, but no node has more than {most:.0f}; --threads")
        self.shards = max(1, sum(int(node.get("CPU", 0) // cores) for node in self._nodes))
        self._environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
        self._running: list[Any] = []

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Yield the place of each task and its result, as they end; those that measure time run one by one."""
        alone = [[place] for place, task in enumerate(tasks) if task.alone]
        together = [place for place, task in enumerate(tasks) if not task.alone]
        for places in (together, *alone):
            yield from self._run({self._submit(tasks[place]): place for place in places})

    def node_addresses(self) -> list[str]:
        """Return the addresses of the nodes that have enough cores."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return [str(node["NodeManagerAddress"]) for node in nodes if node["Resources"].get("CPU", 0) >= self._cores]

    def close(self) -> None:
        """End what still runs."""
        with contextlib.suppress(Exception):
            for running in self._running:
                self._ray.cancel(running, force=True)
            self._ray.kill(self._board)

    def _run(self, places: dict[Any, int]) -> Iterator[tuple[int, Any]]:
        self._running = list(places)
        while self._running:
            ended, self._running = self._ray.wait(self._running, num_returns=1, timeout=_POLL_SECONDS)
            self._show_progress()
            for done in ended:
                yield places[done], self._result(done)

    def _submit(self, task: Task) -> Any:
        """Start a task; BadRequestError if no node can ever take it."""
        needed: dict[str, float] = {"CPU": self._cores, "memory": task.memory_bytes}
        if task.disk_bytes and any("disk" in node for node in self._nodes):
            needed["disk"] = -(-task.disk_bytes // _GB)  # Ray takes whole numbers only
        if task.node:
            needed[f"node:{task.node}"] = 0.001
        if not any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in self._nodes):
            what = ", ".join(f"{name} {amount:.4g}" for name, amount in needed.items())
            raise BadRequestError(f"--ray: no node has what {task.name} takes ({what})")
        options = {"num_cpus": needed.pop("CPU"), "memory": needed.pop("memory") or None, "resources": needed}
        remote = self._ray.remote(_call).options(**options, max_retries=RETRIES, name=task.name)
        return remote.remote(task.function, task.arguments, self._board, self._environment)

    def _result(self, done: Any) -> Any:
        try:
            return self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise TritGgufError(
                f"--ray: a task ended {RETRIES + 1} times without a result ({_first_line(error)}); is its node short of"
                " memory?"
            ) from error

    def _show_progress(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            for stage, (done, total) in self._ray.get(self._board.take.remote(), timeout=10).items():
                self._progress(stage, done, total)


class _Board:
    """The one place where all tasks tell how far they are; it runs in a process of its own."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[int, int]] = {}

    def put(self, stage: str, done: int, total: int) -> None:
        """Take the progress of a stage."""
        self._newest[stage] = (done, total)

    def take(self) -> dict[str, tuple[int, int]]:
        """Return what came since the last call."""
        newest, self._newest = self._newest, {}
        return newest


def _call(function: Any, arguments: tuple[Any, ...], board: Any, environment: dict[str, str]) -> Any:
    """Call a task's function in a worker process; its progress goes to the board, a few times a second at most."""
    os.environ.update(environment)
    last: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - last.get(stage, 0.0) >= _POLL_SECONDS:
            last[stage] = now
            board.put.remote(stage, done, total)

    return function(*arguments, progress=progress)


def publish_on_nodes(plan: PublishPlan, threads: int, executor: RayExecutor) -> PublishReport:
    """Publish each source as a whole on one node, whose own disk has its files; which one is noted and stays.

    Raises TritGgufError as `publish` does, and if a source's node has gone or two nodes share the output folder.
    """
    started = time.perf_counter()
    with _locked_notes(plan.output):
        nodes = _nodes_of(plan, executor.node_addresses())
        _check_disks(plan.output, sorted(set(nodes.values())), executor)
        todo = []
        for node in dict.fromkeys(nodes[source.name] for source in plan.sources):
            there = replace(plan, sources=tuple(source for source in plan.sources if nodes[source.name] == node))
            todo.append(Task(_publish_here, (there, threads), f"publication on {node}", node=node))
        reports = dict(executor.run(todo))
    together = PublishReport(seconds=time.perf_counter() - started)
    for place, task in enumerate(todo):
        report = reports[place]
        together.files += report.files
        together.warnings += [f"the files in {plan.output} are on the node {task.node}", *report.warnings]
        for stage, seconds in report.stage_seconds.items():
            together.stage_seconds[stage] = together.stage_seconds.get(stage, 0.0) + seconds
    return together


@contextmanager
def _locked_notes(output: Path) -> Iterator[None]:
    """Keep other runs from placing sources meanwhile; the output folder itself is locked by the nodes."""
    with disk_errors(output):
        (output / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = open_locked(output / WORK_FOLDER / "nodes.lock", f"{output}: another `publish` is writing there")
    with lock:
        yield


def _publish_here(plan: PublishPlan, threads: int, *, progress: Progress) -> PublishReport:
    return publish(plan, threads=threads, progress=progress)


def _nodes_of(plan: PublishPlan, addresses: Sequence[str]) -> dict[str, str]:
    """Return source's name -> its node's address, as noted by an earlier run; new sources are spread evenly."""
    notes = plan.output / WORK_FOLDER / _NODES_FILE
    nodes: dict[str, str] = json.loads(notes.read_text("utf-8")) if notes.exists() else {}
    for source in plan.sources:
        if source.name not in nodes:
            nodes[source.name] = min(addresses, key=lambda address: list(nodes.values()).count(address))
        elif nodes[source.name] not in addresses:
            raise BadRequestError(
                f"{notes}: the files of {source.name} are on the node {nodes[source.name]}, which is not in the"
                " cluster; start it, or remove the entry to begin elsewhere"
            )
    replace_text(notes, json.dumps(nodes, indent=1) + "\n")
    return nodes


def _check_disks(output: Path, nodes: Sequence[str], executor: Executor) -> None:
    """Raise BadRequestError if one of some nodes sees in its output folder what another has written there."""
    marks = {node: f"{uuid.uuid4().hex}.mark" for node in nodes}

    def on_all_nodes(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        todo = [
            Task(function, (output, marks[node], *arguments), f"look at the disk of {node}", node=node)
            for node in nodes
        ]
        return {nodes[place]: result for place, result in executor.run(todo)}

    if len(nodes) < 2:
        return
    on_all_nodes(_leave_mark)
    seen = on_all_nodes(_marks_seen, list(marks.values()))
    on_all_nodes(_remove_mark)
    for node, found in seen.items():
        others = [other for other in nodes if other != node and marks[other] in found]
        if others:
            raise BadRequestError(
                f"{output}: is one folder for the nodes {node} and {others[0]}, which by the plan have disks of their"
                ' own; give disk = "shared" in [cluster]'
            )


def _leave_mark(output: Path, mark: str, *, progress: Progress) -> None:
    """Write an empty file where a node has its notes."""
    with disk_errors(output):
        (output / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        (output / WORK_FOLDER / mark).touch()


def _marks_seen(output: Path, mark: str, marks: Sequence[str], *, progress: Progress) -> list[str]:
    """Return which of some marks a node sees."""
    return [one for one in marks if (output / WORK_FOLDER / one).exists()]


def _remove_mark(output: Path, mark: str, *, progress: Progress) -> None:
    """Remove a node's mark."""
    (output / WORK_FOLDER / mark).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
