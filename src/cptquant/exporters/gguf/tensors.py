"""The tensors of a GGUF file, from the quantized pieces and the original's kept tensors; one in memory at a time.

OPT as GPT-2 (llama.cpp has no OPT). GELU(s h) / s is ReLU(h) up to 0.17 / s, and layer norm ignores scale, so the whole
residual stream is carried times s = 1024: embeddings, positions, the attention's and the feed-forward's contributions
are multiplied by s (the second matrix of the feed-forward is not: its input already is s ReLU(h)), the last norm by
1 / s, and epsilon by s^2. s is a power of two, so float16 scales carry it exactly and no integer changes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.gguf_types import FLOAT_TYPE_IDS
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.plan import Plan
from cptquant.core.targets.gguf_names import Place, find_place, is_omitted
from cptquant.models.load import LoadedModel
from cptquant.models.stream import read_weight
from cptquant.packing.block_weight import BlockWeight
from cptquant.packing.shards import ShardFolder

OPT_RESIDUAL_SCALE = 1024.0


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, made when it is written.

    Attributes:
        shape: rows first, as in torch. type_id: ggml's number. size_bytes: of the data.
        sites: the sites (or the kept tensor) it comes from.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    size_bytes: int
    sites: tuple[str, ...]
    make: Callable[[], NDArray[Any]]


def list_tensors(model: LoadedModel, plan: Plan, shards: ShardFolder, *, in_float32: bool = False) -> list[GgufTensor]:
    """Every tensor of the file, in the model's order.

    Args:
        in_float32: sites dequantized, so that an engine computes with the same weights and float activations.

    Raises:
        ModelError: a tensor that llama.cpp has no place for.
    """
    layout = model.layout
    rows = RowOrders(model)
    formats = plan.quant_formats
    skipped = {layout.shared_head[1]} if layout.shared_head else set[str]()
    stacked: dict[str, list[tuple[int, Site]]] = {}
    tensors: list[GgufTensor] = []
    for site in layout.sites:
        if site.name in skipped or is_omitted(layout.model_type, site.parameter_name):
            continue
        place = _place(layout, site.parameter_name)
        stacked.setdefault(place.tensor, []).append((place.part[0] if place.part else 0, site))
    for name, parts in stacked.items():
        sites = [site for _, site in sorted(parts, key=lambda part: part[0])]
        tensors.append(_site_tensor(model, name, sites, formats[sites[0].name], shards, rows))
    tensors += _kept_tensors(model, shards, rows)
    return [_widened(tensor) for tensor in tensors] if in_float32 else tensors


def _widened(tensor: GgufTensor) -> GgufTensor:
    """The same values in float32, dequantized by the `gguf` package."""
    size_bytes = 4 * int(np.prod(tensor.shape))

    def make() -> NDArray[Any]:
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        return tensor.make() if kind.value == 0 else gguf.dequantize(tensor.make(), kind).reshape(tensor.shape)

    return GgufTensor(tensor.name, tensor.shape, FLOAT_TYPE_IDS["float32"], size_bytes, tensor.sites, make)


def _place(layout: ModelLayout, parameter_name: str) -> Place:
    place = find_place(layout.model_type, parameter_name)
    if place is None:
        raise ModelError(
            f"--target gguf: llama.cpp has no place for {parameter_name} of {layout.architecture}; this variant of the "
            "architecture cannot be exported"
        )
    return place


class RowOrders:
    """How rows move on their way into the file."""

    def __init__(self, model: LoadedModel) -> None:
        config: Any = model.module.config.get_text_config()
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(getattr(config, "num_key_value_heads", None) or self._heads)
        self._opt = model.layout.model_type == "opt"

    def order(
        self,
        place: Place,
        rows: int,
    ) -> Tensor | None:
        """int64 (rows of the file,): row r of the file is row order[r] of the model's; None: as they are."""
        if place.rows == "same":
            return None
        index = torch.arange(rows)
        if place.rows == "skip_two":
            return index[2:]
        if place.rows == "by_head":
            return index.reshape(self._heads, 3, -1).transpose(0, 1).reshape(-1)
        heads = self._heads if place.rows == "rope" else self._kv_heads
        return index.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)

    def factor(self, place: Place) -> float:
        """What a tensor is multiplied by."""
        return OPT_RESIDUAL_SCALE**place.residual_power if self._opt else 1.0


def _site_tensor(
    model: LoadedModel, name: str, sites: list[Site], fmt: QuantFormat, shards: ShardFolder, rows: RowOrders
) -> GgufTensor:
    blocks = fmt.block_layout
    type_id = FLOAT_TYPE_IDS[fmt.storage] if blocks is None else blocks.type_id
    shape = (sum(site.out_features for site in sites), sites[0].in_features)

    def make() -> NDArray[Any]:
        parts = [_site_bytes(model, site, fmt, shards, rows) for site in sites]
        return torch.cat(parts).numpy()

    names = tuple(site.name for site in sites)
    return GgufTensor(name, shape, type_id, fmt.stored_bytes(*shape), names, make)


def _site_bytes(model: LoadedModel, site: Site, fmt: QuantFormat, shards: ShardFolder, rows: RowOrders) -> Tensor:
    """Packed rows, uint8 (out_features, bytes a row)."""
    place = _place(model.layout, site.parameter_name)
    order, factor = rows.order(place, site.out_features), rows.factor(place)
    if fmt.is_float:
        weight = read_weight(model.module.get_submodule(site.name), site).detach()
        return _sixteen_bit_rows(weight if order is None else weight[order], factor, fmt, site.name)
    stored = shards.quantized(site.name)
    if not isinstance(stored, BlockWeight):
        raise ModelError(f"{site.name} is not in blocks of GGUF but in {fmt.name}; quantize again with --target gguf")
    try:
        moved = (stored if order is None else stored.rows(order)).scaled(factor)
    except ValueError as error:
        raise ModelError(f"{site.name}: written as GPT-2, its {error}; this model cannot be exported") from None
    return moved.pack()


def _sixteen_bit_rows(weight: Tensor, factor: float, fmt: QuantFormat, name: str) -> Tensor:
    """A matrix in 16 bits as bytes, (rows, 2 * columns) uint8."""
    dtype = torch.float16 if fmt.storage == "float16" else torch.bfloat16
    stored = (weight.to(dtype).float() * factor).to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ModelError(f"{name}: times {factor:g} a weight exceeds float16; convert the model to bfloat16 first")
    return stored.contiguous().view(torch.uint8)


def _kept_tensors(model: LoadedModel, shards: ShardFolder, rows: RowOrders) -> Iterator[GgufTensor]:
    layout = model.layout
    state = {**model.module.state_dict(), **shards.kept()}
    parts: dict[str, list[tuple[int, str]]] = {}
    for tensor in layout.kept:
        if is_omitted(layout.model_type, tensor.name) or tensor.name not in state:
            continue
        place = _place(layout, tensor.name)
        parts.setdefault(place.tensor, []).append((place.part[0] if place.part else 0, tensor.name))
    for name, members in parts.items():
        yield _kept_tensor(layout, name, [member for _, member in sorted(members)], state, rows)
    if layout.rotary_factors:
        yield _rotary_factors(model)


def _kept_tensor(
    layout: ModelLayout, name: str, members: list[str], state: dict[str, Tensor], rows: RowOrders
) -> GgufTensor:
    places = [_place(layout, member) for member in members]
    orders = [rows.order(place, state[member].shape[0]) for place, member in zip(places, members, strict=True)]
    counts = [
        state[member].shape[0] if order is None else len(order) for member, order in zip(members, orders, strict=True)
    ]
    shape = (sum(counts), *state[members[0]].shape[1:])
    wide = len(shape) == 1 or places[0].float32
    storage = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16

    def make() -> NDArray[Any]:
        found: list[Tensor] = []
        for member, place, order in zip(members, places, orders, strict=True):
            tensor = state[member].detach()
            # As our own evaluation sees it: rounded to 16 bits where the source is wider.
            found.append((tensor if order is None else tensor[order]).to(storage).float() * rows.factor(place))
        joined = torch.cat(found)
        return joined.numpy() if wide else joined.to(storage).contiguous().view(torch.uint8).numpy()

    type_id = FLOAT_TYPE_IDS["float32" if wide else layout.storage_dtype]
    size_bytes = int(np.prod(shape)) * (4 if wide else 2)
    return GgufTensor(name, shape, type_id, size_bytes, tuple(members), make)


def _rotary_factors(model: LoadedModel) -> GgufTensor:
    """Llama 3's scaling of rotary frequencies, as factors that llama.cpp divides them by."""
    count = model.layout.rotary_factors

    def make() -> NDArray[Any]:
        config: Any = model.module.config.get_text_config()
        scaling: dict[str, Any] = config.rope_parameters
        base, factor = float(scaling["rope_theta"]), float(scaling["factor"])
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        original = float(scaling["original_max_position_embeddings"])
        wavelength = 2 * np.pi * base ** (np.arange(count, dtype=np.float64) / count)
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)

    return GgufTensor("rope_freqs.weight", (count,), FLOAT_TYPE_IDS["float32"], 4 * count, ("rotary factors",), make)
