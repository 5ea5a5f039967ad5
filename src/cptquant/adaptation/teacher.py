"""The frozen teacher: asked at every step, or once for a cache of its swapped predictions.

A live teacher may hold the linear layers of its blocks in 8 bits, which halves the bytes of a 16-bit teacher and costs
a dequantization at every pass. A cache needs no teacher beside the student at all: for every position the k largest
probabilities after the swap and what all others have together. Windows that are read several times are stored once.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cptquant.adaptation.logit_swap import FullTargets, LossShape, TopTargets, swapped_log_probabilities
from cptquant.adaptation.mixture import Mixture
from cptquant.core.artifact import digest_file, digest_json, output_error, write_whole
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.written_files import list_damage
from cptquant.models.losses import IGNORED
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.quantizers.rtn import Rtn

_SHARD_TOKENS = 1 << 16
"""Positions of a cache file: what a killed computation loses at most."""
_ROW_ENTRIES = 2**21
"""Logits whose largest are sought at once."""
_BATCH = 8
_EIGHT_BITS = QuantFormat.parse("int8-channel")


class Teacher(Protocol):
    """Where targets come from."""

    @property
    def kind(self) -> str:
        """In words, for reports."""
        ...

    def stored(self, index: int) -> dict[str, Tensor]:
        """What is kept for a window of the mixture and travels with it."""
        ...

    def targets(self, ids: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> FullTargets | TopTargets:
        """Targets of a batch. Args: ids: what the model reads. inputs: the whole batch."""
        ...


class EightBitLinear(nn.Module):
    """A linear layer whose weight is kept as 8-bit codes with a 16-bit scale a row, and dequantized at every pass."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.to(torch.float32))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self._dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        codes, scales = self.get_buffer("codes"), self.get_buffer("scales")
        return functional.linear(inputs, codes.to(self._dtype) * scales.to(self._dtype), self._buffers["bias"])


def round_to_8_bits_(model: PreTrainedModel, layout: ModelLayout) -> int:
    """Replace the linear layers of the blocks by `EightBitLinear`; rounding to nearest, a scale a row.

    Returns:
        How many were replaced.

    Raises:
        ModelError: a weight that cannot be rounded.
    """
    rounded = 0
    for site in layout.sites:
        if site.kind != "linear" or site.block_index is None:
            continue
        old: Any = model.get_submodule(site.name)
        weight = old.weight.detach().T if site.transposed else old.weight.detach()
        stored = Rtn(clip_search=False)(weight, _EIGHT_BITS, torch.float16)
        assert isinstance(stored, QuantizedWeight)
        parent, _, leaf = site.name.rpartition(".")
        model.get_submodule(parent).set_submodule(leaf, EightBitLinear(stored, old.bias, old.weight.dtype))
        rounded += 1
    return rounded


@dataclass(frozen=True)
class LiveTeacher:
    """Asked at every step, without gradient. Attributes: model: frozen, evaluation mode."""

    model: PreTrainedModel
    kind: str = "live"

    def stored(self, index: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    @torch.no_grad()
    def targets(self, ids: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> FullTargets:
        """The teacher's logits."""
        device = ids["input_ids"].device
        if next(self.model.parameters()).device != device:
            cast(nn.Module, self.model).to(device)  # once: the Trainer decides where the student is
        return FullTargets(self.model(**ids, use_cache=False).logits)


class CachedTeacher:
    """Reads what `build_cache` left.

    Attributes:
        discarded_mass: mean probability of counted positions outside the top k. size_bytes: on disk.
        seconds: that computing took, over all calls.
    """

    def __init__(self, folder: Path, mixture: Mixture) -> None:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.k, self._per_shard = int(state["k"]), int(state["windows_per_shard"])
        sums = list(state["shards"].values())
        self.discarded_mass = sum(part["rest"] for part in sums) / max(1, sum(part["counted"] for part in sums))
        self.seconds = sum(part["seconds"] for part in sums)
        self.size_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self._folder, self._rows, self._open = folder, _rows_of(mixture), dict[int, Any]()
        self._mixture = mixture

    @property
    def kind(self) -> str:
        """In words."""
        return f"cache of the top {self.k}"

    def stored(self, index: int) -> dict[str, Tensor]:
        """(T, k) indices and probabilities and (T,) rest of a window."""
        shard, row = divmod(self._rows[self._mixture.place(index)], self._per_shard)
        if shard not in self._open:
            self._open[shard] = safe_open(self._folder / _shard_name(shard), framework="pt")
        file = self._open[shard]
        return {f"teacher_{name}": file.get_slice(name)[row] for name in ("indices", "probabilities", "rest")}

    def targets(self, ids: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> TopTargets:
        """What came with the windows."""
        indices = inputs["teacher_indices"]
        if indices.dtype is torch.int16:
            indices = indices.to(torch.int64) & 0xFFFF
        return TopTargets(indices, inputs["teacher_probabilities"], inputs["teacher_rest"])


_STATE = "cache.json"


def build_cache(
    model: PreTrainedModel,
    mixture: Mixture,
    shape: LossShape,
    k: int,
    folder: Path,
    *,
    teacher_digest: str,
    progress: Progress = ignore_progress,
) -> CachedTeacher:
    """Compute what is missing of a cache and open it.

    Args:
        k: probabilities kept a position, at most the vocabulary. folder: one cache; of other inputs it is made anew.
        teacher_digest: of the weights.

    Raises:
        OutputError: the disk is full.
    """
    rows = _rows_of(mixture)
    windows = sorted(rows, key=rows.__getitem__)
    per_shard = max(1, _SHARD_TOKENS // mixture.window_tokens)
    made_of = {
        "teacher": teacher_digest, "temperature": shape.temperature, "swap": shape.swap, "k": k,
        "window_tokens": mixture.window_tokens, "apart": mixture.keep_documents_apart,
        "sources": [source.digest for source in mixture.sources], "windows": digest_json([list(w) for w in windows]),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(folder, digest_json(made_of))
    state |= {"k": k, "windows_per_shard": per_shard}
    firsts = {window: index for index, window in _first_places(mixture).items()}
    for number in range(math.ceil(len(windows) / per_shard)):
        name = _shard_name(number)
        if name not in state["shards"]:
            part = windows[number * per_shard : (number + 1) * per_shard]
            indices = [firsts[window] for window in part]
            state["shards"][name] = _write_shard(model, mixture, indices, shape, k, folder / name)
            write_whole(folder / _STATE, json.dumps(state).encode())
        progress("teacher", min(len(windows), (number + 1) * per_shard), len(windows))
    return CachedTeacher(folder, mixture)


def _rows_of(mixture: Mixture) -> dict[tuple[int, int], int]:
    """(source, window of the source) -> row of the cache, in the order of first reading."""
    rows: dict[tuple[int, int], int] = {}
    for index in range(len(mixture)):
        rows.setdefault(mixture.place(index), len(rows))
    return rows


def _first_places(mixture: Mixture) -> dict[int, tuple[int, int]]:
    found: dict[tuple[int, int], int] = {}
    for index in range(len(mixture)):
        found.setdefault(mixture.place(index), index)
    return {index: place for place, index in found.items()}


def _state(folder: Path, digest: str) -> dict[str, Any]:
    """What stands already; shards of other inputs, and damaged ones, are forgotten."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        shards = dict(state["shards"]) if state["digest"] == digest else {}
    except (OSError, ValueError, KeyError, TypeError):
        shards = {}
    whole = {name: part for name, part in shards.items() if not list_damage(folder, {name: part["sha256"]}, {})}
    return {"digest": digest, "shards": whole}


@torch.no_grad()
def _write_shard(
    model: PreTrainedModel, mixture: Mixture, indices: list[int], shape: LossShape, k: int, path: Path
) -> dict[str, Any]:  # fmt: skip
    """One file of the cache. Returns: what cache.json says about it."""
    began, device = time.perf_counter(), next(model.parameters()).device
    length = mixture.window_tokens
    wide = model.config.get_text_config().vocab_size > 1 << 16
    stored = {
        "indices": torch.zeros(len(indices), length, k, dtype=torch.int32 if wide else torch.int16),
        "probabilities": torch.zeros(len(indices), length, k),
        "rest": torch.zeros(len(indices), length),
    }
    for start in range(0, len(indices), _BATCH):
        windows = [mixture[index] for index in indices[start : start + _BATCH]]
        ids = {"input_ids": torch.from_numpy(np.stack([window.input_ids for window in windows])).to(device)}
        if windows[0].position_ids is not None:
            positions = [cast(NDArray[np.int64], window.position_ids) for window in windows]
            ids["position_ids"] = torch.from_numpy(np.stack(positions)).to(device)
        logits = model(**ids, use_cache=False).logits
        gold = torch.from_numpy(np.stack([window.labels[1:] for window in windows])).to(device)
        places = (gold != IGNORED).nonzero()
        step = max(1, _ROW_ENTRIES // logits.shape[-1])
        for part in places.split(step):
            rows, columns = part.unbind(1)
            wanted = swapped_log_probabilities(logits[rows, columns], gold[rows, columns], shape).exp_()
            top = wanted.topk(k, dim=-1, sorted=False)
            rest = wanted.scatter_(1, top.indices, 0.0).sum(dim=-1)
            where = (start + rows.cpu(), columns.cpu())
            found = top.indices.cpu().numpy()
            stored["indices"][where] = torch.from_numpy(
                found.astype(np.int32) if wide else found.astype(np.uint16).view(np.int16)
            )
            stored["probabilities"][where], stored["rest"][where] = top.values.cpu(), rest.cpu()
    counted = sum(int((mixture[index].labels[1:] != IGNORED).sum()) for index in indices)
    try:
        partial = path.with_name(path.name + ".partial")
        save_file(stored, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise output_error(path, error) from None
    return {
        "sha256": digest_file(path),
        "rest": float(stored["rest"].sum(dtype=torch.float64)),
        "counted": counted,
        "seconds": time.perf_counter() - began,
    }


def _shard_name(number: int) -> str:
    return f"{number:05d}.safetensors"
