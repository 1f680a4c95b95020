"""Configurations: what a file of a source is made with, under the names of `convert`'s options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from tritgguf.conversion.depths import DepthChoice, DepthOptions, MeasuredCosts, parse_rules
from tritgguf.conversion.encoders import Automatic, Encoder, parse_encoder, with_tuning
from tritgguf.conversion.recipes import parse_recipe
from tritgguf.errors import BadRequestError

_PUBLISHED = {"encoder": "v2", "recipe": "published"}
BUILT_IN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **{f"uniform-d{depth}": {"depth": depth, **_PUBLISHED} for depth in (1, 2, 3, 4)},
        # The definition of the published ones is not public: these are thresholds of `--sensitivity` here.
        "d3scale-sens002": {"depth": 3, "sensitivity": 0.002, **_PUBLISHED},
        "d3scale-sens003": {"depth": 3, "sensitivity": 0.003, **_PUBLISHED},
    }
)
"""The six configurations in which trit models are published: name -> options."""


@dataclass(frozen=True)
class Configuration:
    """Options of `convert`; raises TritGgufError if they do not exist or contradict each other."""

    name: str
    depth: int | None = None
    output_depth: int | None = None
    embedding_depth: int | None = None
    recipe: str | None = None
    encoder: str = Automatic.name
    tune: bool | str = False
    keep: str | None = None
    target_bpw: float | None = None
    target_size: int | None = None
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        options = self.options
        if self.sensitivity is not None and options.layer_depth == 1:
            raise BadRequestError("sensitivity removes a trit, but depth 1 has none to remove; give a greater depth")
        _ = self.parsed_encoder

    @property
    def parsed_encoder(self) -> Encoder:
        """The encoder as it is named; `auto` depends on the source."""
        encoder = parse_encoder(self.encoder)
        if self.tune is False:
            return encoder
        return with_tuning(encoder) if self.tune is True else with_tuning(encoder, str(self.tune))

    @property
    def choice(self) -> DepthChoice:
        """The options that choose depths of single matrices."""
        rules = () if self.keep is None else tuple(parse_rules(self.keep))
        return DepthChoice(rules, self.target_bpw, self.sensitivity, self.target_size)

    @property
    def options(self) -> DepthOptions:
        """The requested depths."""
        recipe = None if self.recipe is None else parse_recipe(self.recipe)
        return DepthOptions(self.depth, self.output_depth, self.embedding_depth, self.choice, recipe)

    def options_with(self, known: MeasuredCosts) -> DepthOptions:
        """Return the requested depths, with costs that other configurations of a source share."""
        return replace(self.options, choice=replace(self.choice, known=known))

    def settings(self) -> dict[str, Any]:
        """Return what determines the file, as JSON has it; the name does not."""
        return {name: value for name, value in asdict(self).items() if name != "name"}
