"""Run a model block by block in float32, holding one block's weights in float32 at a time.

Every stage that looks inside a model (sensitivity, GPTQ, evaluation) goes through `ModelStream`. The Hugging Face
model itself is never changed: blocks are copied, cast and discarded; everything around the blocks (embeddings, final
norm, head) lives in a *shell*, a copy of the model in which each block is a stand-in that records the arguments the
model's own forward hands it (masks, rotary angles, per-layer mask types). So any architecture with a list of blocks
works without being described here, and peak memory is the model in its own dtype plus one block.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from cptquant.core.errors import ModelError
from cptquant.core.layout import ModelLayout, Site
from cptquant.models.large_weights import LargeEmbedding, LargeLinear, WeightRows
from cptquant.packing.quantized_weight import StoredWeight

if TYPE_CHECKING:
    from cptquant.models.load import LoadedModel
    from cptquant.models.text import TokenSet

_LARGE_WEIGHT_ENTRIES = 1 << 22
"""Embeddings and heads above this many weights stay in their own dtype and are upcast on use."""


class WeightSource(Protocol):
    """Where a changed model's weights come from."""

    def weight(self, site_name: str) -> Tensor | None:
        """The site's float32 weight, shape (out_features, in_features); None if it is the original's."""
        ...


@runtime_checkable
class QuantizedSource(WeightSource, Protocol):
    """A source that can also hand over codes, so that a large embedding is never dequantized whole."""

    def quantized(self, site_name: str) -> StoredWeight | None:
        """The site's integer codes and scales; None if it is not quantized."""
        ...


@runtime_checkable
class KeptSource(WeightSource, Protocol):
    """A source that also changes norms and biases, as training after quantizing does."""

    def kept(self) -> Mapping[str, Tensor]:
        """Name in the original's state dict -> tensor of the same shape; the rest is the original's."""
        ...


def kept_of(weights: WeightSource | None) -> Mapping[str, Tensor]:
    """Norms and biases that a source changes; none of most sources."""
    return weights.kept() if isinstance(weights, KeptSource) else {}


def site_modules(block: nn.Module, layout: ModelLayout, block_index: int) -> dict[str, nn.Module]:
    """The modules of a block (or of its copy) that are sites: site name -> module, in forward order.

    Site names end in the path inside the block: what follows the block's own index.
    """
    found: dict[str, nn.Module] = {}
    for site in layout.sites:
        if site.block_index == block_index:
            found[site.name] = block.get_submodule(_path_inside_block(site))
    return found


def _path_inside_block(site: Site) -> str:
    marker = f".{site.block_index}."
    head, _, tail = site.name.partition(marker)
    if not tail:
        raise ValueError(f"site {site.name} does not lie under a block numbered {site.block_index} ({head})")
    return tail


def read_weight(module: nn.Module, site: Site) -> Tensor:
    """The site's weight as (out_features, in_features); a view, transposed for Conv1D."""
    weight = cast(Tensor, module.weight)
    return weight.t() if site.transposed else weight


def write_weight_(
    module: nn.Module,
    site: Site,
    weight: Tensor,  # (out_features, in_features)
) -> None:
    """Replace the site's weight in a private copy of its block, keeping the module's dtype."""
    target = cast(nn.Parameter, module.weight)
    with torch.no_grad():
        target.copy_(weight.t() if site.transposed else weight)


class _Stop(BaseException):
    """Ends a forward pass once everything needed was recorded; never leaves this module."""


class _StandIn(nn.Module):
    """Takes a block's place in the shell: records its arguments, returns the hidden state it is told to."""

    def __init__(self, block: nn.Module, shell_state: "_ShellState", index: int) -> None:
        super().__init__()
        # Not registered as a submodule: the block's weights do not belong to the shell.
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_state", shell_state)
        self._index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # e.g. `attention_type`, which some models read from their layers
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record or inject, then hand the hidden state on."""
        state = cast(_ShellState, object.__getattribute__(self, "_state"))
        if args:
            hidden, rest = args[0], args[1:]
        else:
            hidden, rest = kwargs.pop("hidden_states"), ()
        if state.injected is not None:
            hidden = state.injected
        else:
            state.calls.append((hidden, rest, kwargs))
            if self._index == state.block_count - 1:
                raise _Stop
        return (hidden,) if state.blocks_return_tuples else hidden


@dataclass
class _ShellState:
    block_count: int
    blocks_return_tuples: bool
    injected: Tensor | None = None
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class ModelStream:
    """A model's forward pass on fixed tokens, one block at a time.

    Args:
        model: never changed.
        tokens: what to run on.
        weights: substitutes for sites; None runs the original. With a source given, every weight it does not supply is
            rounded to the layout's 16-bit storage dtype first, as it will be in the checkpoint.
        batch_size: sequences a batch.

    Attributes:
        hidden: per batch, (sequences, T, width) float32: the input of the next block.
        block_index: index of the next block; equals `layout.block_count` after the last.
        batches: the tokens, per batch.
    """

    def __init__(
        self, model: "LoadedModel", tokens: "TokenSet", *, weights: WeightSource | None = None, batch_size: int = 8
    ) -> None:
        self.model, self.layout, self.weights = model, model.layout, weights
        self.block_index = 0
        self._kept = kept_of(weights)
        count = tokens.sequence_count
        self.batches = [
            tokens.subset(torch.arange(start, min(start + batch_size, count))) for start in range(0, count, batch_size)
        ]
        self._blocks = cast(nn.ModuleList, model.module.get_submodule(model.blocks_path))
        self._state = _ShellState(len(self._blocks), _blocks_return_tuples(model, self._blocks[0], tokens))
        self._shell = self._build_shell()
        self.hidden: list[Tensor] = []
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        with torch.no_grad():
            for batch in self.batches:
                calls = self._record(batch)
                self.hidden.append(calls[0][0])
                self._arguments.append([(rest, kwargs) for _, rest, kwargs in calls])

    def load_block(self) -> nn.Module:
        """A private float32 copy of the next block, with the source's weights in place; nothing requires grad.

        Raises:
            IndexError: all blocks have been run.
        """
        if self.block_index >= len(self._blocks):
            raise IndexError(f"all {len(self._blocks)} blocks have been run")
        block = copy.deepcopy(self._blocks[self.block_index])
        block = self._round(block).float().requires_grad_(False).eval()
        self._replace_kept(block, f"{self.model.blocks_path}.{self.block_index}.")
        if self.weights is not None:
            for name, module in site_modules(block, self.layout, self.block_index).items():
                weight = self.weights.weight(name)
                if weight is not None:
                    write_weight_(module, self.layout.site_by_name[name], weight)
        return block

    def run_block(
        self,
        block: nn.Module,
        batch_index: int,
        hidden: Tensor,  # (sequences, T, width)
    ) -> Tensor:
        """The block's output for one batch, shape as `hidden`; differentiable if gradients are enabled."""
        return self.run_block_at(block, self.block_index, batch_index, hidden)

    def run_block_at(
        self,
        block: nn.Module,
        block_index: int,
        batch_index: int,
        hidden: Tensor,  # (sequences, T, width)
    ) -> Tensor:
        """As `run_block`, with the arguments the model gives to block `block_index`."""
        rest, kwargs = self._arguments[batch_index][block_index]
        output = block(hidden, *rest, **kwargs)
        # Between blocks the stream is float32 whatever a coarse last layer gives (models/arithmetic.py).
        return (output[0] if isinstance(output, tuple) else output).float()

    def advance(self, block: nn.Module) -> None:
        """Replace `hidden` by the block's outputs and step to the next block."""
        with torch.no_grad():
            for index, hidden in enumerate(self.hidden):
                self.hidden[index] = self.run_block(block, index, hidden)
        self.block_index += 1

    def finish(
        self,
        batch_index: int,
        hidden: Tensor,  # (sequences, T, width): output of the last block
    ) -> Tensor:
        """What the model makes of the last block's output; differentiable.

        Returns:
            Logits (sequences, T, vocabulary) of a language model, logits (sequences, classes) of a classifier, or the
            last hidden state (sequences, T, width) of a bare encoder; float32.
        """
        self._state.injected = hidden
        try:
            batch = self.batches[batch_index]
            # Some models shape their output after input_ids; what stands in these no longer matters.
            rows, columns = slice(hidden.shape[0]), slice(hidden.shape[1])
            output = self._call_shell(batch.input_ids[rows, columns], batch.attention_mask[rows, columns])
        finally:
            self._state.injected = None
        return output.last_hidden_state if self.layout.task == "encoder" else output.logits

    def outer_modules(self) -> dict[str, nn.Module]:
        """Sites outside the blocks -> their module in the shell (for hooks on their inputs)."""
        return {
            site.name: self._shell.get_submodule(site.name) for site in self.layout.sites if site.block_index is None
        }

    def _record(self, batch: "TokenSet") -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
        self._state.calls = calls = []
        try:
            self._call_shell(batch.input_ids, batch.attention_mask)
        except _Stop:
            return calls
        raise RuntimeError("the model returned without running its blocks")

    def _call_shell(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        device = self.model.module.device
        return self._shell(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), return_dict=True)

    def _round(self, module: nn.Module) -> nn.Module:
        """What 16-bit storage does to a float32 original; the identity for 16-bit originals."""
        if self.weights is None or self.layout.source_dtype != "float32":
            return module
        storage = torch.float16 if self.layout.storage_dtype == "float16" else torch.bfloat16
        for parameter in module.parameters():
            parameter.data = parameter.data.to(storage)
        return module

    def _replace_kept(self, module: nn.Module, prefix: str) -> None:
        """Norms and biases that the source changes, in a private copy of the part of the model under `prefix`.

        Raises:
            ModelError: one of another shape.
        """
        if not self._kept:
            return
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                found = self._kept.get(prefix + name)
                if found is None:
                    continue
                if found.shape != parameter.shape:  # copying would spread a single number over all
                    raise ModelError(
                        f"{prefix}{name} has shape {tuple(found.shape)}, the model's is {tuple(parameter.shape)}; "
                        "these weights belong to another model"
                    )
                parameter.copy_(found)

    def _build_shell(self) -> nn.Module:
        module = self.model.module
        memo: dict[int, Any] = {
            id(block): _StandIn(block, self._state, index) for index, block in enumerate(self._blocks)
        }
        large = {
            name: child
            for name, child in module.named_modules()
            if type(child) in (nn.Embedding, nn.Linear)
            and cast(Tensor, child.weight).numel() >= _LARGE_WEIGHT_ENTRIES
            and not name.startswith(self.model.blocks_path + ".")
        }
        # Large tables are shared with the model, not copied; their modules are replaced before anything is cast.
        memo.update({id(child.weight): child.weight for child in large.values()})
        shell = cast(nn.Module, copy.deepcopy(module, memo))
        for name, child in large.items():
            rows = WeightRows(self._large_weight(name, cast(Tensor, child.weight)))
            stand_in: nn.Module = (
                LargeEmbedding(rows)
                if isinstance(child, nn.Embedding)
                else LargeLinear(rows, cast(Tensor | None, child.bias))
            )
            parent, _, attribute = name.rpartition(".")
            setattr(shell.get_submodule(parent), attribute, stand_in)
        shell = self._round(shell).float().requires_grad_(False).eval()
        cast(Any, shell).config.use_cache = False
        self._replace_kept(shell, "")
        self._substitute_outer(shell, skip=large)
        return shell

    def _large_weight(self, site_name: str, original: Tensor) -> Tensor | StoredWeight:
        if self.weights is not None:
            if isinstance(self.weights, QuantizedSource):
                quantized = self.weights.quantized(site_name)
                if quantized is not None:
                    return quantized
            weight = self.weights.weight(site_name)
            if weight is not None:
                return weight
            if self.layout.source_dtype == "float32":
                storage = torch.float16 if self.layout.storage_dtype == "float16" else torch.bfloat16
                return original.detach().to(storage)
        return original.detach()

    def _substitute_outer(self, shell: nn.Module, skip: Mapping[str, nn.Module]) -> None:
        if self.weights is None:
            return
        for site in self.layout.sites:
            if site.block_index is not None or site.name in skip:
                continue
            weight = self.weights.weight(site.name)
            if weight is None:
                continue
            module = shell.get_submodule(site.name)
            # A shared embedding and head part ways here: each gets a parameter of its own.
            parameter = cast(nn.Parameter, module.weight)
            module.weight = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            write_weight_(module, site, weight.to(parameter.device))


def _blocks_return_tuples(model: "LoadedModel", block: nn.Module, tokens: "TokenSet") -> bool:
    """Whether the architecture's blocks return a tuple or a bare hidden state; found out on a few tokens."""
    seen: list[bool] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise _Stop

    device = model.module.device
    handle = block.register_forward_hook(look)
    try:
        with torch.no_grad():
            model.module(
                input_ids=tokens.input_ids[:1, :8].to(device), attention_mask=tokens.attention_mask[:1, :8].to(device)
            )
    except _Stop:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError("the model returned without running its first block")
