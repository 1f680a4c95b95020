"""`tritgguf publish`: a plan's sources in all its configurations, packed, measured, described and uploaded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tritgguf.cli import terminal
from tritgguf.cli.options import Json, Threads, UsageError, option
from tritgguf.cli.quality_table import print_qualities
from tritgguf.cli.terminal import note, print_table
from tritgguf.text_format import format_bytes

if TYPE_CHECKING:
    from tritgguf.cli.terminal import Report
    from tritgguf.publishing.estimate import Estimate
    from tritgguf.publishing.plan_file import PublishPlan
    from tritgguf.publishing.publish import PublishReport


_HERE = "here"


def print_estimate(estimate: Estimate) -> None:
    """Print what a plan makes and needs."""
    print_table(
        "Plan",
        ("source", "configuration", ">file, about", ">exports", ">time, about"),
        [
            (
                file.source,
                file.configuration,
                format_bytes(file.file_bytes),
                format_bytes(file.export_bytes) if file.export_bytes else "",
                _duration(file.seconds),
            )
            for file in estimate.files
        ],
    )
    rows = [
        ("disk", f"{format_bytes(estimate.disk_bytes)} of {format_bytes(estimate.free_bytes)} that are free"),
        ("memory, about", format_bytes(estimate.memory_bytes)),
        ("time, about", _duration(estimate.seconds)),
    ]
    print_table("Needs", ("", ">"), rows)
    for location in estimate.not_fetched:
        note(f"note: {location} has to be fetched from the hub, so its size is not known and not in these figures")
    if estimate.disk_bytes > estimate.free_bytes:
        note("warning: the disk is too small for this plan; make room or choose another output folder")


def print_publication(report: PublishReport) -> None:
    """Print a table for each source, and what took how long."""
    import dataclasses

    for source, files in itertools.groupby(report.files, lambda file: file.source):
        print_qualities(source, [dataclasses.replace(file.quality, file=Path(file.configuration)) for file in files])
    rows = [(stage, f"{seconds:.1f} s") for stage, seconds in report.stage_seconds.items()]
    print_table("Time of this run", ("", ">"), [*rows, ("together", f"{report.seconds:.1f} s")])
    for upload in report.uploads:
        if not upload.error:
            note(f"uploaded: {upload.repository}")
    for warning in report.warnings:
        note(f"warning: {warning}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _publish(plan: PublishPlan, threads: int | None, ray: str | None, report: Report) -> PublishReport:
    from tritgguf.publishing.publish import publish

    if ray is None:
        return publish(plan, threads=threads, progress=report)
    from cpu_kernels.threads.cores import physical_cores
    from tritgguf.publishing.cluster import cluster, publish_on_nodes

    cores = threads or physical_cores()
    with cluster(None if ray == _HERE else ray, cores, report) as executor:
        if not plan.shared_disk:
            return publish_on_nodes(plan, cores, executor)
        return publish(plan, threads=cores, executor=executor)


class PublishCommand(TyperCommand):
    """The command line of `publish`, where the value of `--ray` may be missing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an option without a value means a cluster on this machine."""
        given = []
        for position, argument in enumerate(args):
            given.append(argument)
            following = args[position + 1] if position + 1 < len(args) else "-"
            if argument == "--ray" and (following.startswith("-") or following.endswith(".toml")):
                given.append(_HERE)
        return super().parse_args(ctx, given)


def publish_command(
    plan_file: Annotated[Path, typer.Argument(help="What to make, see docs/publishing.md.", metavar="PLAN.toml")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the files, disk, memory and time that the plan takes.")
    ] = False,
    upload: Annotated[
        str | None,
        option("--upload", metavar="ORG", help="Upload each folder to this account on the hub.", show_default=False),
    ] = None,
    ray: Annotated[
        str | None,
        option(
            "--ray",
            metavar="[ADDRESS]",
            help="Run on this Ray cluster, or on all cores of this machine (docs/publishing.md).",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Make, measure and describe each source of a plan in each configuration.

    The same command goes on where an earlier one stopped: what is finished and unchanged is not made again.
    Needs torch and transformers: pip install "tritgguf[verify]".

    Example: tritgguf publish plan.toml --dry-run
    """
    from tritgguf.publishing.plan_file import read_plan

    plan = read_plan(plan_file)
    if dry_run:
        from tritgguf.publishing.estimate import estimate

        needs = estimate(plan, threads)
        terminal.print_json(needs.as_dict()) if as_json else print_estimate(needs)
        return
    from tritgguf.publishing.upload import check_organization, upload_folders

    if upload is not None:
        check_organization(upload)
        if ray is not None and not plan.shared_disk:
            raise UsageError("--upload needs files on a shared disk; they are on the disks of the nodes")
    with terminal.progress(in_bytes=False) as report:
        result = _publish(plan, threads, ray, report)
        if upload is not None:
            result.uploads = upload_folders([Path(file.folder) for file in result.files], upload, report)
    terminal.print_json(result.as_dict()) if as_json else print_publication(result)
    for failed in (failures := [done for done in result.uploads if done.error]):
        terminal.error(failed.error)
    if failures:
        raise typer.Exit(1)
