"""Weights read back from a GGUF file by the `gguf` package's own dequantizer, undone to the model's order and scale."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.targets.gguf_names import find_place, is_omitted
from cptquant.exporters.gguf.tensors import RowOrders
from cptquant.models.load import LoadedModel


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a file.

    Raises:
        ArtifactError: missing, cut short, or no GGUF.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ArtifactError(
            f"{path} is missing, cut short or no GGUF file ({reason}); write it again with: cptquant quantize RUN"
        ) from None
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if end > path.stat().st_size:
        raise ArtifactError(f"{path} is cut short: {path.stat().st_size:,} of {end:,} bytes; write it again")
    return reader


class GgufWeights:
    """The sites of a GGUF file as a source of weights, each dequantized by the `gguf` package.

    Args:
        model: the original the file was made from: names, shapes, and how rows were moved.
    """

    def __init__(self, path: Path, model: LoadedModel) -> None:
        self._layout: ModelLayout = model.layout
        self._rows = RowOrders(model)
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in open_gguf(path).tensors}
        self._path = path

    def tensor_of(self, site: Site) -> str | None:
        """Name in the file; None where the file leaves the site out."""
        if is_omitted(self._layout.model_type, site.parameter_name):
            return None
        shared = self._layout.shared_head
        name = self._layout.site_by_name[shared[0]].parameter_name if shared and site.name == shared[1] else None
        place = find_place(self._layout.model_type, name or site.parameter_name)
        return None if place is None else place.tensor

    def weight(self, site_name: str) -> Tensor | None:
        """float32 (out_features, in_features); None where the file leaves the site out.

        Raises:
            ArtifactError: the file lacks the tensor.
        """
        site = self._layout.site_by_name[site_name]
        tensor = self.tensor_of(site)
        if tensor is None:
            return None
        if tensor not in self._tensors:
            raise ArtifactError(f"{self._path} lacks the tensor {tensor}; write it again")
        read = self._tensors[tensor]
        values = torch.from_numpy(np.array(gguf.dequantize(read.data, read.tensor_type), dtype=np.float32))
        shared = self._layout.shared_head
        first = self._layout.site_by_name[shared[0]] if shared and site_name == shared[1] else site
        place = find_place(self._layout.model_type, first.parameter_name)
        assert place is not None
        if place.part is not None:
            index, count = place.part
            values = values.reshape(count, -1, values.shape[1])[index]
        order = self._rows.order(place, site.out_features)
        if order is not None:
            values = torch.empty_like(values).index_copy_(0, order, values)
        return values / self._rows.factor(place)
