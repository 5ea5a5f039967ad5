"""A block taken apart for training: its layers, its norms and biases, and the way back to what is stored."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from cptquant.core.layout import ModelLayout, Site
from cptquant.models.stream import site_modules, write_weight_
from cptquant.packing.quantized_weight import StoredWeight


class StoringLayer(Protocol):
    """A layer that can say what of it is stored."""

    def stored(self) -> StoredWeight:
        """The present weight; `dequantize()` of it equals what the forward pass used bit for bit."""
        ...


@dataclass(frozen=True)
class Group:
    """Parameters of one rate, in Adam's units: the largest change of each in a step."""

    parameters: Sequence[nn.Parameter]
    rate: float


@dataclass(frozen=True)
class Moving:
    """What of a block moves.

    Attributes:
        layers: site -> its layer, of the sites whose weights move. others: full name -> norm or bias that moves.
        groups: all parameters, by rate. storage_dtype: of norms and biases as written.
    """

    layers: Mapping[str, StoringLayer]
    others: Mapping[str, nn.Parameter]
    groups: Sequence[Group]
    storage_dtype: torch.dtype

    def parameters(self) -> list[nn.Parameter]:
        """Of all groups."""
        return [parameter for group in self.groups for parameter in group.parameters]

    @property
    def size(self) -> int:
        """Numbers that move."""
        return sum(parameter.numel() for parameter in self.parameters())

    def stored(self) -> dict[str, StoredWeight]:
        """Present weights as written."""
        return {name: layer.stored() for name, layer in self.layers.items()}

    def kept(self) -> dict[str, Tensor]:
        """Present norms and biases as written."""
        return {name: parameter.detach().to(self.storage_dtype) for name, parameter in self.others.items()}

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Within a `with`, norms and biases have the values that would be written."""
        before = [parameter.detach().clone() for parameter in self.others.values()]
        with torch.no_grad():
            for parameter in self.others.values():
                parameter.copy_(parameter.to(self.storage_dtype))
            yield
            for parameter, value in zip(self.others.values(), before, strict=True):
                parameter.copy_(value)


@dataclass
class OpenBlock:
    """A block's private float32 copy with the start's weights in place.

    Attributes:
        layout: of the model. prefix: of the block's names in the state dict, with the last dot. index: of the block.
        starts: its quantized sites. originals: their weights before quantization, (out_features, in_features).
        frozen: sites that keep what they have.
    """

    layout: ModelLayout
    prefix: str
    index: int
    module: nn.Module
    starts: Mapping[str, StoredWeight]
    originals: Mapping[str, Tensor]
    frozen: frozenset[str] = frozenset()
    _replaced: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def trained_sites(self) -> list[Site]:
        """Quantized and not frozen, in forward order."""
        return [self.layout.site_by_name[name] for name in self.starts if name not in self.frozen]

    @property
    def storage_dtype(self) -> torch.dtype:
        """Of norms and biases as written."""
        return torch.float16 if self.layout.storage_dtype == "float16" else torch.bfloat16

    def bias(self, site: Site) -> Tensor | None:
        """(out_features,) float32, or None."""
        bias = getattr(self._find(site.name), "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def replace_(self, site: Site, layer: nn.Module) -> None:
        """Put a layer in a site's place until `close_`."""
        self._replaced.setdefault(site.name, self._find(site.name))
        self._set(site.name, layer)

    def others(self, *, norms_only: bool) -> dict[str, nn.Parameter]:
        """Norms and, where asked, biases of linear layers: full name -> parameter. Ask after `replace_`."""
        kept = {tensor.name for tensor in self.layout.kept}
        found: dict[str, nn.Parameter] = {}
        for path, module in self.module.named_modules():
            weight = cast(Any, getattr(module, "weight", None))
            is_norm = isinstance(weight, nn.Parameter) and weight.ndim == 1
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{self.prefix}{path}.{name}"
                if full in kept and parameter.ndim == 1 and (is_norm or not norms_only):
                    found[full] = parameter
        return found

    def close_(self, weights: Mapping[str, StoredWeight], kept: Mapping[str, Tensor]) -> None:
        """Put the block's own modules back, with these weights, norms and biases in them."""
        for name, module in self._replaced.items():
            self._set(name, module)
        self._replaced.clear()
        self.module.requires_grad_(False)
        for name, module in site_modules(self.module, self.layout, self.index).items():
            if name in weights:
                write_weight_(module, self.layout.site_by_name[name], weights[name].dequantize())
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if self.prefix + name in kept:
                    parameter.copy_(kept[self.prefix + name])

    def _find(self, site_name: str) -> nn.Module:
        return self.module.get_submodule(site_name.removeprefix(self.prefix))

    def _set(self, site_name: str, module: nn.Module) -> None:
        parent, _, attribute = site_name.removeprefix(self.prefix).rpartition(".")
        setattr(self.module.get_submodule(parent), attribute, module)
