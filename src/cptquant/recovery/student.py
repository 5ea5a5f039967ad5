"""The model that is trained: the original, its quantized layers replaced by layers that know their grid."""

import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptquant.core.errors import UserError
from cptquant.core.layout import ModelLayout
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource, read_weight, write_weight_
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_layer import TrainedLinear, Trains

FROZEN = Trains(latent=False, steps=False, zeros=False)
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "attn_pdrop", "hidden_dropout", "layerdrop")


@dataclass(frozen=True)
class StudentOptions:
    """What of the model moves.

    Attributes:
        trains: of each quantized layer inside the blocks. surrogate: of rounding, where there is a latent.
        others: whether norms and biases move; they are written in 16 bits as before.
        frozen: patterns of site names (or parts of them) that keep codes and steps.
        activation_bits: of the inputs of quantized layers; None leaves them.
    """

    trains: Trains
    surrogate: Surrogate = field(default_factory=Surrogate)
    others: bool = True
    frozen: tuple[str, ...] = ()
    activation_bits: int | None = None


@dataclass(frozen=True)
class Student:
    """A trainable copy.

    Attributes:
        module: float32; whatever is not trained has requires_grad False.
        layers: site -> its layer, for every quantized site inside the blocks.
        others: name in the original's state dict -> parameter, of the norms and biases that move.
        storage_dtype: of tensors in 16 bits.
    """

    module: nn.Module
    layers: Mapping[str, TrainedLinear]
    others: Mapping[str, nn.Parameter]
    storage_dtype: torch.dtype

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names that do not depend on how the module is wrapped, and what moves."""
        for site, layer in self.layers.items():
            for name in ("latent", "log_steps", "zeros", "left"):
                parameter = cast(nn.Parameter | None, getattr(layer, name))
                if parameter is not None:
                    yield f"{site}.{name}", parameter
        yield from self.others.items()

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of everything that moves, and of codes that a method changes beside it."""
        found = {
            name: parameter.detach().clone(memory_format=torch.contiguous_format)
            for name, parameter in self.trainable()
        }
        return found | {
            f"{site}.codes": layer.codes.clone() for site, layer in self.layers.items() if layer.moves_codes
        }

    def moments(self) -> dict[str, Tensor]:
        """What a resumed training needs beside the snapshot: averages of methods that change codes by themselves."""
        followed = {site: layer for site, layer in self.layers.items() if layer.moves_codes}
        return {f"{site}.code_momentum": layer.code_momentum for site, layer in followed.items()}

    def restore_(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put copies back."""
        with torch.no_grad():
            for name, parameter in self.trainable():
                parameter.copy_(snapshot[name])
            for site, layer in self.layers.items():
                if layer.moves_codes:
                    layer.codes.copy_(snapshot[f"{site}.codes"])
            for name, tensor in self.moments().items():
                if name in snapshot:
                    tensor.copy_(snapshot[name])

    def stored(self) -> dict[str, StoredWeight]:
        """Site -> present weight as it will be written."""
        return {site: layer.stored() for site, layer in self.layers.items()}

    def kept(self) -> dict[str, Tensor]:
        """Name -> present norm or bias as it will be written, in 16 bits."""
        return {name: parameter.detach().to(self.storage_dtype) for name, parameter in self.others.items()}

    def round_others_(self) -> None:
        """Give norms and biases the values that will be written."""
        with torch.no_grad():
            for parameter in self.others.values():
                parameter.copy_(parameter.to(self.storage_dtype))


def build_student(
    model: LoadedModel, start: QuantizedSource, kept: Mapping[str, Tensor], options: StudentOptions
) -> Student:
    """A trainable copy of the quantized model.

    Args:
        model: the original; not changed. start: weights of the quantized sites; those outside the blocks stay as they
            are. kept: norms and biases that an earlier recovery changed, by name.

    Raises:
        UserError: a pattern of `frozen` names no site.
    """
    layout = model.layout
    frozen = frozen_sites(layout, options.frozen)
    storage = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
    module = _copy_without(model.module, [s.name for s in layout.block_sites if start.quantized(s.name) is not None])
    _round_kept(module, layout, storage, kept)
    module = module.float().requires_grad_(False).eval()
    cast(Any, module).config.use_cache = False
    _without_dropout(module)
    layers: dict[str, TrainedLinear] = {}
    for site in layout.sites:
        stored = start.quantized(site.name)
        if stored is None:
            continue
        found = module.get_submodule(site.name)
        if site.block_index is None:
            part = cast(Any, found)
            part.weight = nn.Parameter(
                part.weight.detach().clone(), requires_grad=False
            )  # head and embedding part ways
            write_weight_(found, site, stored.dequantize())
            continue
        original = read_weight(model.module.get_submodule(site.name), site)
        trains = FROZEN if site.name in frozen else options.trains
        layer = TrainedLinear(
            stored, original, cast(Tensor | None, getattr(found, "bias", None)), trains, options.surrogate,
            activation_bits=options.activation_bits,
        )  # fmt: skip
        parent, _, attribute = site.name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, layer)
        layers[site.name] = layer
    others = _others(module, layout) if options.others else {}
    for parameter in others.values():
        parameter.requires_grad_(True)
    return Student(module, layers, others, storage)


def _copy_without(module: nn.Module, sites: Sequence[str]) -> nn.Module:
    """A copy in which some sites have empty weights: those that are replaced at once need not be held twice."""
    weights = [cast(Tensor, module.get_submodule(name).weight) for name in sites]
    return copy.deepcopy(module, {id(weight): nn.Parameter(torch.empty(0), requires_grad=False) for weight in weights})


def frozen_sites(layout: ModelLayout, patterns: Sequence[str]) -> frozenset[str]:
    """Sites that a pattern names: a shell pattern of the whole name, or a part of it between dots.

    Raises:
        UserError: a pattern names none.
    """
    found: set[str] = set()
    names = [site.name for site in layout.block_sites]
    for pattern in patterns:
        mine = [name for name in names if pattern in name.split(".") or fnmatch.fnmatchcase(name, pattern)]
        if not mine:
            kinds = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(f"--freeze {pattern!r} names no linear layer; this model's are: {', '.join(kinds)}")
        found.update(mine)
    return frozenset(found)


def _others(module: nn.Module, layout: ModelLayout) -> dict[str, nn.Parameter]:
    """Norms and biases: the original's kept tensors of one dimension that are parameters, biases of sites too."""
    kept = {tensor.name for tensor in layout.kept}
    return {name: p for name, p in module.named_parameters() if name in kept and p.ndim == 1}


def _round_kept(module: nn.Module, layout: ModelLayout, storage: torch.dtype, kept: Mapping[str, Tensor]) -> None:
    """What 16-bit storage does to a float32 original, and what an earlier recovery left."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
            elif layout.source_dtype == "float32":
                parameter.copy_(parameter.to(storage))


def _without_dropout(module: nn.Module) -> None:
    """The student is compared with the original position by position, and training modes come and go."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
