"""The order of a layer's inputs, moved for nothing into the layers that produce them.

A matrix with groups of mixed width is stored with its columns reordered. Where nothing but element-wise work lies
between its producer and it, the producer's rows are written in that order instead and no gather is left:

    up (and gate) -> down     fc1 -> fc2, gate and up -> down: any order
    q, k, v -> o              an order that keeps every head together: heads of q, k and v are exchanged whole, and v's
                              rows within a head. Where several heads share a key and value head, heads stay in place.

Inputs that come from the residual stream have no such producer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cptquant.core.layout import ModelLayout, Role, Site

_ELEMENTWISE_FAMILIES = ("opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "bert")
_SEPARATE_HEAD_FAMILIES = ("opt", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Folding:
    """Which orders went into the producers.

    Attributes:
        rows: site -> original number of each of its rows as written, int64 (out_features,); sites that keep theirs are
            left out.
        folded: sites whose inputs arrive in their stored order.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    folded: frozenset[str] = frozenset()


def find_folding(layout: ModelLayout, config: Any, orders: Mapping[str, Tensor]) -> Folding:
    """What of some orders can be folded, exactly.

    Args:
        config: of the Hugging Face model. orders: site -> original number of each stored column, int64 (in_features,).
    """
    rows: dict[str, Tensor] = {}
    folded: set[str] = set()
    for block_index in range(layout.block_count):
        sites = [site for site in layout.sites if site.block_index == block_index]
        found = _fold_down(layout, sites, orders) | _fold_attention(layout, sites, config, orders)
        rows |= found
        folded.update(site.name for site in sites if site.name in orders and _producers(site, sites, found))
    return Folding(rows, frozenset(folded))


def _producers(site: Site, sites: list[Site], rows: Mapping[str, Tensor]) -> bool:
    """Whether the layers before a site were reordered for it."""
    before: dict[Role, tuple[Role, ...]] = {"down": ("up", "gate"), "o": ("v",)}
    return any(other.name in rows for other in sites if other.role in before.get(site.role, ()))


def _only(sites: list[Site], role: Role) -> Site | None:
    found = [site for site in sites if site.role == role]
    return found[0] if len(found) == 1 and not found[0].transposed else None


def _fold_down(layout: ModelLayout, sites: list[Site], orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    down, up = _only(sites, "down"), _only(sites, "up")
    gates = [site for site in sites if site.role == "gate"]
    if layout.model_type not in _ELEMENTWISE_FAMILIES or down is None or up is None or down.name not in orders:
        return {}
    producers = [up, *gates]
    if any(site.out_features != down.in_features or site.transposed for site in producers):
        return {}
    return {site.name: orders[down.name] for site in producers}


def _fold_attention(
    layout: ModelLayout, sites: list[Site], config: Any, orders: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    q, k, v, o = (_only(sites, role) for role in ("q", "k", "v", "o"))
    if layout.model_type not in _SEPARATE_HEAD_FAMILIES or q is None or k is None or v is None or o is None:
        return {}
    if o.name not in orders:
        return {}
    heads = int(config.num_attention_heads)
    shared = heads // int(getattr(config, "num_key_value_heads", None) or heads)
    if q.out_features != o.in_features or v.out_features * shared != o.in_features:
        return {}
    found = head_orders(orders[o.name], heads, shared)
    if found is None:
        return {}
    whole_heads, values = found
    return {q.name: whole_heads, k.name: whole_heads, v.name: values} if shared == 1 else {v.name: values}


def head_orders(
    order: Tensor,  # (heads * width,) int64
    heads: int,
    shared: int,  # heads per key and value head
) -> tuple[Tensor, Tensor] | None:
    """(row order of q and k, row order of v) that give o its inputs in this order; None where heads would be torn."""
    width = len(order) // heads
    slots = order.view(heads, width)
    head_of, inside = slots // width, slots % width
    if not bool((head_of == head_of[:, :1]).all()):
        return None
    if shared == 1:
        whole = (head_of[:, :1] * width + torch.arange(width)).reshape(-1)
        return whole, order
    if not torch.equal(head_of[:, 0], torch.arange(heads)):
        return None
    groups = inside.view(heads // shared, shared, width)
    if not bool((groups == groups[:, :1]).all()):
        return None
    values = groups[:, 0] + torch.arange(heads // shared)[:, None] * width
    return torch.arange(heads * width), values.reshape(-1)
