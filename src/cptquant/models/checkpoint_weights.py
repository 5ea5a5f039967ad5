"""Weights of a changed model, one site at a time: from a checkpoint on disk, or from memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cptquant.core.artifact import read_json
from cptquant.core.errors import ArtifactError, FormatError, ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.manifest import Manifest
from cptquant.models.weights import read_weight_files
from cptquant.packing.quantized_weight import StoredWeight, decode


@dataclass(frozen=True)
class MemoryWeights:
    """Quantized weights held in memory; sites that are not named are the original's."""

    weights: Mapping[str, StoredWeight]

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes and scales of a site; None if it is the original's."""
        return self.weights.get(site_name)

    def weight(self, site_name: str) -> Tensor | None:
        """float32 (out_features, in_features); None if it is the original's."""
        quantized = self.weights.get(site_name)
        return None if quantized is None else quantized.dequantize()


class CheckpointWeights:
    """The sites of a checkpoint that cptquant wrote, read and dequantized one at a time.

    Args:
        folder: holds config.json and `model.safetensors`, or the shards of `model.safetensors.index.json`.
        layout: of the original model: names and shapes of the sites.
        formats: site name -> format, e.g. `plan.quant_formats`; None reads them from config.json.

    Raises:
        ModelError: no weights, an unreadable index or config, or a config of another tool's making (groups that name
            no sites of this model): such folders are judged by `evaluate_models`.
    """

    def __init__(self, folder: Path, layout: ModelLayout, formats: Mapping[str, QuantFormat] | None = None) -> None:
        self.folder, self._layout = folder, layout
        self._formats = formats_from_config(folder, layout) if formats is None else formats
        self._tensors = read_weight_files(folder).tensors

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes and scales of a site; None if the checkpoint holds it in 16 bits.

        Raises:
            ModelError: a file is damaged. ArtifactError: tensors are missing or do not fit the format.
        """
        fmt = self._formats.get(site_name)
        if fmt is None or fmt.is_float:
            return None
        site = self._layout.site_by_name[site_name]
        names = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        stored = {name: self._read(f"{site_name}.{name}") for name in names if f"{site_name}.{name}" in self._tensors}
        try:
            return decode(stored, fmt, (site.out_features, site.in_features))
        except ArtifactError as error:
            raise ArtifactError(f"{self.folder}, site {site_name}: {error}") from None

    def weight(self, site_name: str) -> Tensor | None:
        """(out_features, in_features), float32 if quantized, else as stored; None for a head that is shared.

        Raises:
            ModelError: a file is damaged or a tensor missing. ArtifactError: tensors do not fit the format.
        """
        quantized = self.quantized(site_name)
        if quantized is not None:
            return quantized.dequantize()
        site = self._layout.site_by_name[site_name]
        if site.parameter_name not in self._tensors:
            if self._layout.shared_head is not None and site_name == self._layout.shared_head[1]:
                return None
            raise ModelError(f"{self.folder} lacks the tensor {site.parameter_name}; write the checkpoint again")
        return self._kept(site)

    def kept(self) -> dict[str, Tensor]:
        """Norms and biases as the checkpoint holds them, by name.

        Raises:
            ModelError: a file is damaged.
        """
        names = [tensor.name for tensor in self._layout.kept if tensor.name in self._tensors]
        found = {name: self._read(name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor.ndim == 1 and tensor.is_floating_point()}

    def _kept(self, site: Site) -> Tensor:
        weight = self._read(site.parameter_name)  # as stored: a large embedding is upcast where its rows are used
        if site.transposed:
            weight = weight.t().contiguous()
        if tuple(weight.shape) != (site.out_features, site.in_features):
            raise ModelError(
                f"{self.folder}: {site.parameter_name} has shape {tuple(weight.shape)}, the model's is "
                f"{(site.out_features, site.in_features)}; this checkpoint belongs to another model"
            )
        return weight

    def _read(self, tensor_name: str) -> Tensor:
        path = self._tensors[tensor_name].file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(tensor_name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read ({error}); write the checkpoint again") from None


def formats_from_config(folder: Path, layout: ModelLayout) -> dict[str, QuantFormat]:
    """Formats of the quantized sites, from the `quantization_config` of config.json; empty if it has none.

    Raises:
        ModelError: config.json is unreadable, or a group is not one that cptquant writes.
    """
    path = folder / "config.json"
    try:
        quantization = read_json(path, made_by=Manifest.MADE_BY).get("quantization_config")
    except ArtifactError as error:
        raise ModelError(str(error)) from None
    if quantization is None:
        return {}
    formats: dict[str, QuantFormat] = {}
    try:
        for group in quantization["config_groups"].values():
            fmt = _group_format(group)
            for target in group["targets"]:
                if target not in layout.site_by_name:
                    raise ModelError(
                        f"{path}: quantization group target {target!r} is no site of {layout.source}; cptquant names "
                        "every module, so this is another model's or another tool's checkpoint: evaluate it as a model "
                        "folder"
                    )
                formats[target] = fmt
    except (KeyError, TypeError, AttributeError, FormatError) as error:
        raise ModelError(
            f"{path}: quantization_config is not one that cptquant writes ({type(error).__name__}: {error}); evaluate "
            "it as a model folder"
        ) from None
    return formats


def _group_format(group: Mapping[str, Any]) -> QuantFormat:
    arguments = group["weights"]
    strategy = arguments["strategy"]
    granularity = f"g{arguments['group_size']}" if strategy == "group" else strategy
    asymmetric = "" if arguments["symmetric"] else "-asym"
    plain = "-plain" if group["format"] == "int-quantized" else ""
    return QuantFormat.parse(f"int{arguments['num_bits']}-{granularity}{asymmetric}{plain}")
