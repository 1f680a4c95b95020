"""Jobs: a source in a configuration, and where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tritgguf.formats.file_kinds import is_hub_id
from tritgguf.publishing.configurations import Configuration
from tritgguf.publishing.plan_file import PlannedSource, PublishPlan


@dataclass(frozen=True)
class Job:
    """A source in a configuration."""

    plan: PublishPlan
    source: PlannedSource
    configuration: Configuration

    @property
    def name(self) -> str:
        """Name of its folder, and of its repository on the hub."""
        return f"{self.source.name}-trit-{self.configuration.name}"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.plan.output / self.name

    @property
    def trit_file(self) -> Path:
        """The packed file."""
        return self.folder / f"{self.name}.gguf"

    def export_path(self, to: str) -> Path:
        """Return the folder or file of an export."""
        return self.folder / "hf" if to == "hf" else self.folder / f"{self.name}-{to}.gguf"

    @property
    def base_model(self) -> str | None:
        """The source's hub id, if it is one."""
        location = self.source.location
        return location if is_hub_id(location) and not Path(location).exists() else None


def jobs_of(plan: PublishPlan, source: PlannedSource) -> list[Job]:
    """Return a source's jobs."""
    return [Job(plan, source, configuration) for configuration in plan.configurations]
