"""Read a model's `ModelLayout` from its config, its class built without memory, and the headers of its weights.

Nothing is loaded: the class is built on torch's meta device, so a model of any size takes a moment. The weight files
are read once for their digest, for NaN and infinity, and for the largest magnitude.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cptquant.core.errors import ModelError
from cptquant.core.layout import KeptTensor, ModelLayout, Role, Site, Tie
from cptquant.models.families import BEFORE_BLOCKS, FAMILIES, suffix_role
from cptquant.models.source import ModelFolder
from cptquant.models.weights import WeightFiles, WeightScan, digest_source

MINIMUM_OUTSIDE_WEIGHTS = 2048
"""A linear layer outside the blocks with fewer weights (a classifier of a few labels) is kept: it costs nothing."""
MINIMUM_BLOCK_SHARE = 0.5
"""Share of the blocks' matrix weights that must lie in linear layers for a model to be worth quantizing here."""

_TIES: tuple[tuple[tuple[Role, ...], str], ...] = (
    (("q", "k", "v"), "an engine that fuses attention runs q, k and v as one matrix"),
    (("gate", "up"), "an engine that fuses the feed-forward layer runs gate and up as one matrix"),
)


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks: where, and what each is called inside.

    Attributes:
        path: module path of the list, e.g. `model.decoder.layers`. count: how many.
        roles: path inside a block -> role, in forward order.
    """

    path: str
    count: int
    roles: dict[str, Role]


def build_layout(
    folder: ModelFolder,
    skeleton: PreTrainedModel,  # on the meta device
    weights: WeightFiles,
    scan: WeightScan,
) -> tuple[ModelLayout, str]:
    """Describe a model.

    Returns:
        The layout and the module path of the list of blocks.

    Raises:
        ModelError: no blocks of linear layers, no token embedding, weights shared in a way that cannot be split, or
            most of the blocks' weights not in linear layers: with what was found and what is missing.
    """
    _check_takes_tokens(folder, skeleton)
    blocks = find_blocks(skeleton, folder.config, folder.architecture)
    sites = _sites(skeleton, blocks)
    shared_head = _shared_head(skeleton, sites)
    _check_sharing(skeleton, sites, shared_head, folder)
    _check_coverage(skeleton, blocks, sites, folder)
    dtype, digest = weights.float_dtype, digest_source(folder.path, weights)
    text_config = folder.config.get_text_config()
    storage = dtype if dtype != "float32" else ("float16" if scan.fits_float16 else "bfloat16")
    layout = ModelLayout(
        inputs={"model": digest},
        architecture=folder.architecture,
        model_type=str(folder.config.model_type),
        task=folder.task,
        source=folder.source,
        source_digest=digest,
        source_dtype=dtype,
        storage_dtype=storage,
        source_bytes=_source_bytes(folder, skeleton, weights),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        block_count=blocks.count,
        hidden_size=int(text_config.hidden_size),
        max_positions=_max_positions(skeleton, text_config),
        vocabulary_size=sites[0].out_features,
        sites=sites,
        ties=tuple(_ties(sites)),
        shared_head=shared_head,
        kept=tuple(_kept(skeleton, sites)),
        key_value_width=_key_value_width(text_config),
        attention_heads=_attention_heads(text_config),
        rotary_factors=_rotary_factors(text_config),
    )
    return layout, blocks.path


def _check_takes_tokens(folder: ModelFolder, skeleton: PreTrainedModel) -> None:
    embedding = skeleton.get_input_embeddings() if skeleton.main_input_name == "input_ids" else None
    if not isinstance(embedding, nn.Embedding):
        found = type(embedding).__name__ if embedding is not None else f"an input named {skeleton.main_input_name}"
        raise ModelError(
            f"{folder.source}: {folder.architecture} has no token embedding (found {found}); cptquant handles models "
            "that take input_ids"
        )


def find_blocks(skeleton: PreTrainedModel, config: PretrainedConfig, architecture: str) -> Blocks:
    """The family's list of blocks, or for an unlisted model type the longest list of alike modules.

    Raises:
        ModelError: there is none, or it is not run once per layer of the config.
    """
    family = FAMILIES.get(str(config.model_type))
    path = _family_path(skeleton, family.blocks) if family is not None else None
    if path is None:
        path = _discover_path(skeleton, architecture)
    members = list(skeleton.get_submodule(path).children())
    expected = getattr(config.get_text_config(), "num_hidden_layers", len(members))
    if expected != len(members):
        raise ModelError(
            f"{architecture}: found {len(members)} blocks in {path}, but num_hidden_layers = {expected} in the config; "
            "models that run the same block several times, or only some of their blocks, are not supported"
        )
    roles: dict[str, Role] = {}
    if family is not None:
        roles.update(family.roles)
    for member in members:
        for name, _ in _linear_modules(member):
            roles.setdefault(name, suffix_role(name))
    return Blocks(path, len(members), roles)


def _family_path(skeleton: PreTrainedModel, below_base: str) -> str | None:
    base = skeleton.base_model
    prefix = "" if base is skeleton else next(name for name, module in skeleton.named_modules() if module is base) + "."
    try:
        found = skeleton.get_submodule(prefix + below_base)
    except AttributeError:
        return None
    return prefix + below_base if isinstance(found, nn.ModuleList) and len(found) else None


def _discover_path(skeleton: PreTrainedModel, architecture: str) -> str:
    candidates: dict[str, int] = {}
    mixed: list[str] = []
    for name, module in skeleton.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in candidates):
            continue
        members = list(module.children())
        if not members or not all(any(_linear_modules(member)) for member in members):
            continue
        if len({type(member) for member in members}) > 1:
            mixed.append(f"{name} ({', '.join(sorted({type(member).__name__ for member in members}))})")
            continue
        candidates[name] = len(members)
    if candidates:
        return max(candidates, key=lambda name: candidates[name])
    count = sum(1 for _ in _linear_modules(skeleton))
    found = f"lists of mixed classes: {'; '.join(mixed)}" if mixed else f"{count} linear layers, but no such list"
    raise ModelError(
        f"{architecture} has no repeated blocks of linear layers: cptquant needs a ModuleList of blocks of one class "
        f"that contain nn.Linear or Conv1D; found {found}"
    )


def _linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


def _sites(skeleton: PreTrainedModel, blocks: Blocks) -> tuple[Site, ...]:
    """Forward order: embedding, what runs before the blocks, the blocks, what runs after, the output head."""
    names = {id(module): name for name, module in skeleton.named_modules()}
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    head_name = names.get(id(head), "")
    before, after = [], []
    for name, module in _linear_modules(skeleton):
        if name.startswith(blocks.path + ".") or name == head_name or module.weight.numel() < MINIMUM_OUTSIDE_WEIGHTS:
            continue
        target = before if name.rsplit(".", 1)[-1] in BEFORE_BLOCKS else after
        target.append(_site(name, module, suffix_role(name), None))
    rows, columns = cast(nn.Embedding, embedding).weight.shape
    first = Site(name=names[id(embedding)], out_features=rows, in_features=columns, role="embedding", kind="embedding")
    inside = [
        _site(f"{blocks.path}.{index}.{path}", module, role, index)
        for index, block in enumerate(skeleton.get_submodule(blocks.path).children())
        for path, role, module in _block_linears(block, blocks.roles)
    ]
    last = [_site(head_name, head, "head", None)] if isinstance(head, nn.Linear | Conv1D) and head_name else []
    return (first, *before, *inside, *after, *last)


def _block_linears(block: nn.Module, roles: dict[str, Role]) -> Iterator[tuple[str, Role, nn.Linear | Conv1D]]:
    found = dict(_linear_modules(block))
    for path, role in roles.items():
        if path in found:
            yield path, role, found[path]


def _site(name: str, module: nn.Linear | Conv1D, role: Role, block_index: int | None) -> Site:
    transposed = isinstance(module, Conv1D)
    shape = cast(nn.Parameter, module.weight).shape
    rows, columns = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    return Site(
        name=name,
        out_features=rows,
        in_features=columns,
        block_index=block_index,
        role=role,
        transposed=transposed,
    )


def _shared_head(skeleton: PreTrainedModel, sites: tuple[Site, ...]) -> tuple[str, str] | None:
    embedding, last = sites[0], sites[-1]
    if last.role != "head" or last.kind != "linear":
        return None
    shared = skeleton.get_submodule(embedding.name).weight is skeleton.get_submodule(last.name).weight
    return (embedding.name, last.name) if shared else None


def _check_sharing(
    skeleton: PreTrainedModel, sites: tuple[Site, ...], shared_head: tuple[str, str] | None, folder: ModelFolder
) -> None:
    owners: dict[int, str] = {}
    for site in sites:
        weight = skeleton.get_submodule(site.name).weight
        other = owners.setdefault(id(weight), site.name)
        if other != site.name and (other, site.name) != shared_head:
            raise ModelError(
                f"{folder.source}: {other} and {site.name} are one matrix; cptquant handles an embedding shared with "
                "the output head, no other sharing"
            )


def _check_coverage(skeleton: PreTrainedModel, blocks: Blocks, sites: tuple[Site, ...], folder: ModelFolder) -> None:
    inside = {f"{blocks.path}.{name}": p for name, p in skeleton.get_submodule(blocks.path).named_parameters()}
    matrices = {name: p.numel() for name, p in inside.items() if p.dim() > 1}
    in_sites = {site.parameter_name for site in sites}
    covered = sum(count for name, count in matrices.items() if name in in_sites)
    total = sum(matrices.values())
    if covered < MINIMUM_BLOCK_SHARE * total:
        other = sorted((name for name in matrices if name not in in_sites), key=lambda name: -matrices[name])
        shapes = ", ".join(f"{name} {list(inside[name].shape)}" for name in other[:3])
        raise ModelError(
            f"{folder.source}: only {covered / total:.0%} of the weights in the blocks of {folder.architecture} are "
            f"nn.Linear or Conv1D, at least {MINIMUM_BLOCK_SHARE:.0%} are needed; the largest others are {shapes} "
            "(mixture-of-experts tensors are not supported yet)"
        )


def _kept(skeleton: PreTrainedModel, sites: tuple[Site, ...]) -> Iterator[KeptTensor]:
    site_weights = {id(skeleton.get_submodule(site.name).weight) for site in sites}
    seen: set[int] = set()
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        if id(tensor) in site_weights or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size_bytes = 2 if tensor.is_floating_point() else tensor.element_size()
        yield KeptTensor(name=name, shape=tuple(tensor.shape), stored_bytes=size_bytes * tensor.numel())


def _ties(sites: tuple[Site, ...]) -> Iterator[Tie]:
    by_parent: dict[str, list[Site]] = {}
    for site in sites:
        if site.block_index is not None:
            by_parent.setdefault(site.name.rpartition(".")[0], []).append(site)
    for members in by_parent.values():
        for roles, reason in _TIES:
            tied = [site for role in roles for site in members if site.role == role]
            if [site.role for site in tied] == list(roles):
                yield Tie(sites=tuple(site.name for site in tied), reason=reason)


def _source_bytes(folder: ModelFolder, skeleton: PreTrainedModel, weights: WeightFiles) -> int:
    """A quantized source: the bytes of its tensors. Otherwise each of the model's own tensors once, in its dtype."""
    if folder.quantization_method is not None:
        return weights.tensor_bytes
    width = torch.finfo(getattr(torch, weights.float_dtype)).bits // 8
    seen: set[int] = set()
    total = 0
    for tensor in skeleton.state_dict(keep_vars=True).values():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * (width if tensor.is_floating_point() else tensor.element_size())
    return total


def _head_width(text_config: PretrainedConfig) -> int | None:
    heads = getattr(text_config, "num_attention_heads", None)
    width = getattr(text_config, "head_dim", None)
    if isinstance(width, int) and width > 0:
        return width
    return int(text_config.hidden_size) // heads if isinstance(heads, int) and heads > 0 else None


def _key_value_width(text_config: PretrainedConfig) -> int | None:
    heads = getattr(text_config, "num_key_value_heads", None) or getattr(text_config, "num_attention_heads", None)
    width = _head_width(text_config)
    return 2 * heads * width if isinstance(heads, int) and width is not None else None


def _attention_heads(text_config: PretrainedConfig) -> int | None:
    heads = getattr(text_config, "num_attention_heads", None)
    return heads if isinstance(heads, int) and heads > 0 else None


def _rotary_factors(text_config: PretrainedConfig) -> int:
    """Half the head's width where frequencies are scaled one by one (Llama 3), else 0."""
    parameters = getattr(text_config, "rope_parameters", None)
    scaled = isinstance(parameters, dict) and cast(dict[str, Any], parameters).get("rope_type") == "llama3"
    width = _head_width(text_config)
    return width // 2 if scaled and width is not None else 0


def _max_positions(skeleton: PreTrainedModel, text_config: PretrainedConfig) -> int | None:
    declared = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(declared, int) or declared < 1:
        return None
    for name, module in skeleton.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return declared - module.padding_idx - 1  # RoBERTa numbers positions from padding_idx + 1
    return declared


def entry_count(layout: ModelLayout) -> int:
    """Entries of all sites and kept tensors, a shared head once: equals `parameters` plus persistent buffers."""
    head = layout.shared_head[1] if layout.shared_head else None
    sites = sum(site.weight_count for site in layout.sites if site.name != head)
    return sites + sum(math.prod(tensor.shape) for tensor in layout.kept)
