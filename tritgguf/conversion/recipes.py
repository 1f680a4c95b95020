"""Recipes: how deep the embeddings and the output head are packed, beside layers of some depth.

`docs/quality.md` has the measurements that the depths of `BALANCED` were chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritgguf.architectures.tensor_names import EMBEDDINGS, HEAD
from tritgguf.errors import TritGgufError
from tritgguf.formats.trit_types import DEPTHS


@dataclass(frozen=True)
class Recipe:
    """Depths of the embeddings and of the output head, by the depth of the layers; 0 means F16.

    Attributes:
        name: name on the command line.
        embeddings: depth of the layers -> depth of the embeddings, if the head is another tensor.
        head: depth of the layers -> depth of the output head, and of embeddings that are also the head.

    """

    name: str
    embeddings: Mapping[int, int]
    head: Mapping[int, int]

    def depths(self, layer_depth: int, *, tied: bool) -> dict[str, int]:
        """Return GGUF name -> depth of the embeddings and, unless it is the same tensor, of the output head."""
        if tied:
            return {EMBEDDINGS: self.head[layer_depth]}
        return {EMBEDDINGS: self.embeddings[layer_depth], HEAD: self.head[layer_depth]}


PUBLISHED = Recipe("published", dict.fromkeys(DEPTHS, 0), dict.fromkeys(DEPTHS, 0))
"""The convention of published trit models: FP16."""
BALANCED = Recipe("balanced", {1: 3, 2: 3, 3: 0, 4: 0}, {1: 3, 2: 4, 3: 0, 4: 0})
"""The least depths that add about 2 % to the divergence that calibrated layers of this depth cause."""
SMALL = Recipe("small", {1: 2, 2: 3, 3: 4, 4: 4}, {1: 2, 2: 3, 3: 4, 4: 4})
"""The depths that cost about as much per byte as another trit of the layers."""

RECIPES = {recipe.name: recipe for recipe in (PUBLISHED, BALANCED, SMALL)}
DEFAULT = BALANCED


def parse_recipe(name: str) -> Recipe:
    """Return the recipe with this name; TritGgufError if there is none."""
    if name not in RECIPES:
        raise TritGgufError(f"recipe {name} does not exist; choose from {', '.join(RECIPES)}")
    return RECIPES[name]
