"""Mixtures of experts: how the families name and store them, their sizes, and their keys in both directions.

A layer of a mixture has a router, a stack of experts, of which every token uses the few that the router chooses, and in
some families a shared expert that every token uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritgguf.architectures.key_rules import GgufKeys, HfConfig, SpecialRule
from tritgguf.architectures.tensor_part import TensorPart
from tritgguf.errors import DamagedFileError, TritGgufError
from tritgguf.formats.checked import count_of, positive_number

if TYPE_CHECKING:
    from tritgguf.architectures.architecture import Architecture

_MAX_EXPERTS = 1024
_MAX_WIDTH = 1 << 20
_MAX_DENSE_LAYERS = 1000
_LANES = 16  # the kernels want experts with a multiple of so many rows
_COUNT_ENTRIES = ("num_experts", "num_local_experts")
_USED_ENTRY = "num_experts_per_tok"
_NORM_ENTRY = "norm_topk_prob"
_JITTER_ENTRY, _JITTER = "router_jitter_noise", 0.01  # half of SparseMixer's margin; no GGUF key has it
_USED_OF_SPARSE_MIXER = 2  # whatever config.json says, in transformers
_CLAMPED_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # no GGUF key has them; llama.cpp assumes them too

COUNT_KEY = "expert_count"
USED_KEY = "expert_used_count"
WIDTH_KEY = "expert_feed_forward_length"
SHARED_WIDTH_KEY = "expert_shared_feed_forward_length"
NORM_KEY = "expert_weights_norm"
DENSE_LAYERS_KEY = "leading_dense_block_count"
GATING_KEY = "expert_gating_func"
SCALE_KEY = "expert_weights_scale"
_SOFTMAX, _SIGMOID, _SOFTMAX_OF_CHOSEN = 1, 2, 3  # GGUF's numbers
_FEED_FORWARD_KEY, FEED_FORWARD_ENTRY = "feed_forward_length", "intermediate_size"

ROUTER = "ffn_gate_inp"
SHARED_ROUTER = "ffn_gate_inp_shexp"
SELECTION_BIAS = "exp_probs_b.bias"
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED_MATRICES = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")


HfNames = Mapping[str, tuple[str, ...]]
"""Hugging Face name of a layer's tensor -> GGUF name, which may lack `.weight`. `{}` stands for the number of an expert
whose matrix is a tensor of its own. Two GGUF names are the halves of the rows of every matrix."""


@dataclass(frozen=True)
class ExpertFamily:
    """How a family describes and stores its experts.

    Attributes:
        stored: names in checkpoints, as published.
        module: names in the models of transformers 5, which can also save them so.
        count_entry: entry of config.json with the number of experts.
        width_entry: entry of config.json with the rows of an expert's gate matrix.
        shared_width_entry: the same of the shared expert; None if the family has none.
        has_shared_router: whether the shared expert's output is multiplied by the sigmoid of a product with its input.
        normalizes: whether the weights of the chosen experts are divided by their sum, if GGUF has no key that says so;
            llama.cpp does what this says.
        may_normalize: whether config.json says so (`norm_topk_prob`, by default false).
        softmax_of_chosen: whether the weights are the softmax of the chosen experts' scores instead of all scores.
        writes_width: whether GGUF has a key for the rows of an expert's gate matrix even if it is `intermediate_size`.
        alternates: whether the rows of gate and up alternate in a tensor of both.
        transposes: whether the matrices of stacks are stored transposed.
        may_be_mxfp4: whether checkpoints may have their stacks in MXFP4.
        sigmoid: whether the weights are sigmoids of the scores instead of a softmax, and the experts are chosen by
            these plus a bias for each (`SELECTION_BIAS`).
        sparse_mixer: whether the weight of a chosen expert is SparseMixer's, for two experts of a token; see
            `router.SPARSE_MIXER`.
        dense_layers_entry: entry of config.json with the number of layers, from the first on, that have a dense
            feed-forward; None if the family has none.

    """

    stored: HfNames
    module: HfNames
    count_entry: str = "num_experts"
    width_entry: str = FEED_FORWARD_ENTRY
    shared_width_entry: str | None = None
    has_shared_router: bool = False
    normalizes: bool = False
    may_normalize: bool = False
    softmax_of_chosen: bool = False
    writes_width: bool = False
    alternates: bool = False
    transposes: bool = False
    may_be_mxfp4: bool = False
    sigmoid: bool = False
    sparse_mixer: bool = False
    dense_layers_entry: str | None = None

    @property
    def gating(self) -> int | None:
        """GGUF's number of how the router's scores become weights; None for SparseMixer, which has none."""
        if self.sparse_mixer:
            return None
        if self.sigmoid:
            return _SIGMOID
        return _SOFTMAX_OF_CHOSEN if self.softmax_of_chosen else _SOFTMAX

    def part(self, names: tuple[str, ...], index: int) -> TensorPart:
        """Return how the `index`th of some GGUF tensors lies in the Hugging Face tensor of all of them."""
        stack, _, suffix = names[index].partition(".")
        return TensorPart(
            half=index if len(names) > 1 else None,
            alternates=self.alternates and len(names) > 1,
            transposed=self.transposes and stack in STACKS and suffix != "bias",
            of_vectors=suffix == "bias",
        )


@dataclass(frozen=True)
class Experts:
    """The experts of every layer of a model.

    Attributes:
        count: number of experts in a layer.
        used: how many of them a token uses.
        width: rows of an expert's gate and up matrices.
        shared_width: the same of the shared expert; 0 if there is none.
        has_shared_router: whether the shared expert has a router of its own.
        normalizes: whether the weights of the chosen experts are divided by their sum.
        dense_layers: number of layers, from the first on, that have a dense feed-forward instead.
        has_selection_bias: whether the experts are chosen by their weight plus a bias.
        gating: that of the family, or what a GGUF file says in its place.
        scale: factor of the weights.

    """

    count: int
    used: int
    width: int
    shared_width: int = 0
    has_shared_router: bool = False
    normalizes: bool = False
    dense_layers: int = 0
    has_selection_bias: bool = False
    gating: int | None = None
    scale: float = 1.0

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return GGUF name without layer -> shape in NumPy order of a layer's expert tensors."""
        shapes: dict[str, tuple[int, ...]] = {ROUTER: (self.count, hidden)}
        gate, up, down = STACKS
        shapes |= {gate: (self.count, self.width, hidden), up: (self.count, self.width, hidden)}
        shapes |= {down: (self.count, hidden, self.width)}
        if self.has_selection_bias:
            shapes[SELECTION_BIAS] = (self.count,)
        if self.shared_width:
            gate, up, down = SHARED_MATRICES
            shapes |= {gate: (self.shared_width, hidden), up: (self.shared_width, hidden)}
            shapes |= {down: (hidden, self.shared_width)}
            if self.has_shared_router:
                shapes[SHARED_ROUTER] = (hidden,)
        return shapes


def experts_from_config(entries: Mapping[str, Any], architecture: Architecture, where: str) -> Experts | None:
    """Return the experts of a config.json; None if the family has none. Raises TritGgufError for impossible entries."""
    family = architecture.experts
    if family is None:
        return None
    _check_supported(entries, where)
    if family.sparse_mixer and entries.get(_JITTER_ENTRY, _JITTER) != _JITTER:
        raise TritGgufError(
            f"{where}: {_JITTER_ENTRY} is {entries[_JITTER_ENTRY]!r:.40}, but only {_JITTER} is supported"
        )

    def count(entry: str, most: int) -> int:
        return count_of(entries, entry, where, default=architecture.defaults.get(entry), most=most)

    normalizes = family.normalizes
    if family.may_normalize:
        normalizes = bool(entries.get(_NORM_ENTRY, architecture.defaults.get(_NORM_ENTRY, False)))
    present = [entry for entry in _COUNT_ENTRIES if entries.get(entry) is not None]
    shared_entry = family.shared_width_entry or ""
    has_shared = entries.get(shared_entry, architecture.defaults.get(shared_entry)) not in (0, None)
    experts = Experts(
        count=count((present or [family.count_entry])[0], _MAX_EXPERTS),
        used=count(_USED_ENTRY, _MAX_EXPERTS),
        width=count(family.width_entry, _MAX_WIDTH),
        shared_width=count(shared_entry, _MAX_WIDTH) if has_shared else 0,
        has_shared_router=family.has_shared_router,
        normalizes=normalizes,
        dense_layers=_dense_layers(entries, family.dense_layers_entry, architecture, where),
        has_selection_bias=family.sigmoid,
        gating=family.gating,
    )
    _check_sizes(experts, family, _USED_ENTRY, where)
    return experts


def experts_from_gguf(metadata: Mapping[str, Any], architecture: Architecture, where: str) -> Experts | None:
    """Return the experts of a GGUF model; None if it has none.

    Raises TritGgufError for impossible keys, and for experts that the architecture does not have or lacks.
    """
    family, prefix = architecture.experts, f"{architecture.gguf_name}."
    if family is None:
        if metadata.get(prefix + COUNT_KEY):
            raise TritGgufError(f"{where}: experts of architecture {architecture.gguf_name} are not supported")
        return None
    of_experts = None if architecture.has_dense_width else metadata.get(prefix + WIDTH_KEY)
    feed_forward = count_of(metadata, prefix + _FEED_FORWARD_KEY, where, default=of_experts)
    used = count_of(metadata, prefix + USED_KEY, where, most=_MAX_EXPERTS)
    # Files of older converters lack the widths; these are llama.cpp's defaults for them.
    width = max(1, feed_forward // used) if family.width_entry != FEED_FORWARD_ENTRY else feed_forward
    shared_width = 0
    if family.has_shared_router or prefix + SHARED_WIDTH_KEY in metadata:
        shared_width = count_of(metadata, prefix + SHARED_WIDTH_KEY, where, default=feed_forward, most=_MAX_WIDTH)
    normalizes = metadata.get(prefix + NORM_KEY, family.normalizes)
    if not isinstance(normalizes, bool):
        raise DamagedFileError(f"{where}: {prefix}{NORM_KEY} is {normalizes!r:.40}, which is neither true nor false")
    experts = Experts(
        count=count_of(metadata, prefix + COUNT_KEY, where, most=_MAX_EXPERTS),
        used=used,
        width=count_of(metadata, prefix + WIDTH_KEY, where, default=width, most=_MAX_WIDTH),
        shared_width=shared_width,
        has_shared_router=family.has_shared_router,
        normalizes=normalizes,
        dense_layers=_dense_layers(metadata, family.dense_layers_entry and prefix + DENSE_LAYERS_KEY, None, where),
        has_selection_bias=family.sigmoid,
        gating=_gating(metadata, prefix + GATING_KEY, family, where),
        scale=positive_number(metadata.get(prefix + SCALE_KEY, 1.0), prefix + SCALE_KEY, where),
    )
    _check_sizes(experts, family, prefix + USED_KEY, where)
    return experts


def _gating(metadata: Mapping[str, Any], key: str, family: ExpertFamily, where: str) -> int | None:
    if key not in metadata:
        return family.gating
    gating = count_of(metadata, key, where, most=_SOFTMAX_OF_CHOSEN)
    if family.gating is None:
        raise TritGgufError(f"{where}: {key} is {gating}, but SparseMixer has weights of its own")
    return gating


def _dense_layers(entries: Mapping[str, Any], name: str | None, architecture: Architecture | None, where: str) -> int:
    """Return the number of dense layers under this name; 0 for a family without the name."""
    value = 0 if name is None else entries.get(name, architecture.defaults[name] if architecture else 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_DENSE_LAYERS:
        raise DamagedFileError(f"{where}: {name} is {value!r:.40}, which is no number of layers")
    return value


def _check_sizes(experts: Experts, family: ExpertFamily, name: str, where: str) -> None:
    """Raise TritGgufError for sizes that are impossible or not run; `name` is that of the number of experts used."""
    if experts.width % _LANES:
        raise TritGgufError(f"{where}: experts of {experts.width} rows are not supported, only multiples of {_LANES}")
    if experts.used > experts.count:
        raise DamagedFileError(f"{where}: {name} is {experts.used}, but there are only {experts.count} experts")
    if family.sparse_mixer and experts.used != _USED_OF_SPARSE_MIXER:
        raise TritGgufError(f"{where}: {name} is {experts.used}, but SparseMixer chooses {_USED_OF_SPARSE_MIXER}")


def _check_supported(entries: Mapping[str, Any], where: str) -> None:
    """Raise TritGgufError for a mixture with other layers or steps than those that are computed."""
    if entries.get("mlp_only_layers") or entries.get("decoder_sparse_step", 1) != 1:
        raise TritGgufError(f"{where}: layers without experts (mlp_only_layers, decoder_sparse_step) are not supported")
    if entries.get("use_expert_bias") is False or entries.get("routed_scaling_factor", 1.0) != 1.0:
        raise TritGgufError(
            f"{where}: a router without biases (use_expert_bias) or with a factor (routed_scaling_factor) is not"
            " supported"
        )
    if entries.get("clip_qkv") is not None:
        raise TritGgufError(f"{where}: clipped queries, keys and values (clip_qkv) are not supported")
    if entries.get("qkv_bias") is False:
        raise TritGgufError(f"{where}: queries, keys and values without biases (qkv_bias) are not supported")
    for entry, only in _CLAMPED_SWIGLU.items():
        if entries.get(entry, only) != only:
            raise TritGgufError(f"{where}: {entry} is {entries[entry]!r:.40}, but only {only} is supported")


def _to_gguf(config: HfConfig) -> dict[str, int | float | str]:
    family, experts = config.architecture.experts, config.dimensions.experts
    if family is None or experts is None:
        return {}
    keys: dict[str, int | float | str] = {COUNT_KEY: experts.count, USED_KEY: experts.used}
    if family.writes_width or family.width_entry != FEED_FORWARD_ENTRY:
        keys[WIDTH_KEY] = experts.width
    if experts.shared_width:
        keys[SHARED_WIDTH_KEY] = experts.shared_width
    if experts.normalizes != family.normalizes:
        keys[NORM_KEY] = experts.normalizes
    if family.dense_layers_entry is not None:
        keys[DENSE_LAYERS_KEY] = experts.dense_layers
    if family.sigmoid:
        keys[GATING_KEY] = _SIGMOID
    return keys


def _check_has_entries(keys: GgufKeys, family: ExpertFamily, experts: Experts) -> None:
    """Raise TritGgufError for weights of experts that `run` computes, but that no entry of config.json asks for."""
    if experts.gating != family.gating:
        key, value = GATING_KEY, float(experts.gating or 0)
    elif experts.scale != 1:
        key, value = SCALE_KEY, experts.scale
    else:
        return
    name, hf_class = f"{keys.architecture.gguf_name}.{key}", keys.architecture.hf_class
    raise TritGgufError(f"{keys.where}: {name} is {value:g}, which transformers' {hf_class} does not have")


def _to_hf(keys: GgufKeys) -> dict[str, Any]:
    family, experts = keys.architecture.experts, keys.dimensions.experts
    if family is None or experts is None:
        return {}
    _check_has_entries(keys, family, experts)
    entries: dict[str, Any] = {family.count_entry: experts.count, _USED_ENTRY: experts.used}
    if family.width_entry != FEED_FORWARD_ENTRY:
        entries[family.width_entry] = experts.width
    if family.shared_width_entry is not None:
        entries[family.shared_width_entry] = experts.shared_width
    if family.may_normalize:
        entries[_NORM_ENTRY] = experts.normalizes
    if family.dense_layers_entry is not None:
        entries[family.dense_layers_entry] = experts.dense_layers
    if family.sigmoid:
        entries["use_expert_bias"] = True
    if family.sparse_mixer:
        entries[_JITTER_ENTRY] = _JITTER
    return entries


EXPERTS = SpecialRule(_to_gguf, _to_hf)
