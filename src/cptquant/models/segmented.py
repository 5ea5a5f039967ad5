"""A checkpoint with groups of mixed width, run by torch: linear layers of segments, each dequantized when it is used.

    y = sum over segments  x[columns of the segment] W_segment'  + bias

Corrections are further products beside that of the codes, of the corrected columns or of two thin factors:

    y = x W_codes'  +  x[corrected columns] O'  + bias,      y = x W_codes'  +  (x B') A'  + bias

One gather puts the inputs into the stored order, where that order was not folded into the layer before (folding.py).
"""

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cptquant.core.artifact import read_json
from cptquant.core.errors import FormatError, ModelError
from cptquant.core.formats import QuantFormat
from cptquant.core.targets.torch_segments import METHOD
from cptquant.packing.columns import CODES, COLUMNS, SCALES
from cptquant.packing.low_rank import LEFT, PRODUCT_SCALES, RIGHT, RIGHT_UNIT, LowRankCorrection
from cptquant.packing.quantized_weight import CorrectedWeight, decode, encode
from cptquant.packing.segments import SegmentedWeight, encode_segments, group_size, one_bit_offset

WEIGHTS_NAME = "segments"
"""Files are not called model.safetensors: transformers ignores a quantization method it does not know, and would fill
the missing weights with random numbers."""
SCHEMA_VERSION = 1
MADE_BY = "cptquant quantize MODEL --target torch --budget BUDGET --output RUN"
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_CORRECTION_PARTS = (CODES, SCALES, COLUMNS, LEFT, RIGHT, PRODUCT_SCALES)
_SEGMENT_PARTS = ("weight_packed", "weight_scale", "weight_binary", "weight_widths", "weight_columns", "weight_shape")


class SegmentedLinear(nn.Module):
    """A linear layer whose columns stand in segments of one width each.

    Args:
        weight: groups of mixed width. bias: (out_features,) or None.
        gathers: put the inputs into the stored order first; False where they arrive in it.
    """

    def __init__(self, weight: SegmentedWeight, bias: Tensor | None, *, gathers: bool = True) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.group_columns = group_size(weight.format)
        tensors = encode_segments(weight)
        groups = {bits: int((weight.widths == bits).sum()) for bits in sorted(set(weight.widths.tolist()))}
        stored = torch.argsort(weight.widths, stable=True)
        words = column = 0
        self._bounds: list[tuple[int, int, int]] = []  # bits, first and last column
        for bits, count in groups.items():
            width = count * self.group_columns
            of_width = stored[weight.widths[stored] == bits]
            stop = words + width * bits // 32
            self.register_buffer(f"packed_{bits}", tensors["weight_packed"][:, words:stop].contiguous())
            self.register_buffer(f"scales_{bits}", weight.scales[:, of_width].contiguous())
            if bits == 1 and weight.means is not None:
                self.register_buffer("means_1", weight.means[:, of_width].contiguous())
            self._bounds.append((bits, column, column + width))
            words, column = stop, column + width
        order = weight.stored_order()
        identity = torch.equal(order, torch.arange(self.in_features))
        self.register_buffer("order", order if gathers and not identity else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def segment(self, bits: int, dtype: torch.dtype) -> Tensor:
        """The matrix of one width, (out_features, columns of that width)."""
        first, last = next((first, last) for width, first, last in self._bounds if width == bits)
        packed, scales = cast(Tensor, self.get_buffer(f"packed_{bits}")), self.get_buffer(f"scales_{bits}")
        codes = unpack_from_int32(packed, bits, torch.Size((self.out_features, last - first))).float()
        grouped = codes.view(self.out_features, -1, self.group_columns)
        if bits == 1:
            grouped = grouped + one_bit_offset(self.get_buffer("means_1"))[:, :, None]
        return (grouped * scales.float()[:, :, None]).view(self.out_features, -1).to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the inputs."""
        if self.order is not None:
            inputs = inputs.index_select(-1, cast(Tensor, self.order))
        output: Tensor | None = None
        for bits, first, last in self._bounds:
            product = nn.functional.linear(inputs[..., first:last], self.segment(bits, inputs.dtype))
            output = product if output is None else output + product
        assert output is not None
        return output if self.bias is None else output + self.bias.to(output.dtype)


class PackedLinear(nn.Module):
    """A linear layer of one width, kept packed and dequantized when it is used."""

    def __init__(
        self, tensors: dict[str, Tensor], fmt: QuantFormat, shape: tuple[int, int], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self._format = fmt
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the inputs."""
        weight = decode(dict(self.named_buffers()), self._format, (self.out_features, self.in_features)).dequantize()
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return nn.functional.linear(inputs, weight.to(inputs.dtype), bias)


class CorrectedLinear(nn.Module):
    """A linear layer of one width with a correction, of some input columns or of low rank, both kept as stored."""

    def __init__(self, weight: CorrectedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.base = PackedLinear(encode(weight.base), weight.base.format, weight.shape, None)
        correction = weight.correction
        self._of_low_rank = isinstance(correction, LowRankCorrection)
        if isinstance(correction, LowRankCorrection):
            self.register_buffer("right", correction.right)
            self.register_buffer("correction", correction.left)
        else:
            self.register_buffer("columns", correction.columns)
            self.register_buffer("correction", correction.codes)
        self.register_buffer("scales", correction.scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the inputs."""
        matrix = self.get_buffer("correction").float() * self.get_buffer("scales").float()
        if self._of_low_rank:
            chosen = nn.functional.linear(inputs, (self.get_buffer("right").float() / RIGHT_UNIT).to(inputs.dtype))
        else:
            chosen = inputs.index_select(-1, self.get_buffer("columns"))
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return self.base(inputs) + nn.functional.linear(chosen, matrix.to(inputs.dtype), bias)


class SegmentedFolder:
    """The tensors of a checkpoint written for --target torch.

    Raises:
        ModelError: another kind of folder, another version of the schema, or a damaged file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json", made_by=MADE_BY)
        found = self.config.get("quantization_config")
        record: dict[str, Any] = found if isinstance(found, dict) else {}
        if record.get("quant_method") != METHOD:
            raise ModelError(
                f"{folder} was not written for --target torch (quant_method {record.get('quant_method')!r}, expected "
                f"{METHOD!r}); make it with: {MADE_BY}"
            )
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ModelError(
                f"{folder} has version {record.get('schema_version')} of the schema, this cptquant reads "
                f"{SCHEMA_VERSION}; write it again with: {MADE_BY}"
            )
        try:
            self.formats = {name: QuantFormat.parse(text) for name, text in record["formats"].items()}
            self.folded = frozenset[str](record["folded"])
            self._check_names(record["folded"])
        except (KeyError, TypeError, AttributeError, FormatError, ValueError) as error:
            raise ModelError(
                f"{folder}/config.json: quantization_config is damaged ({type(error).__name__}: {error}); write it "
                f"again with: {MADE_BY}"
            ) from None
        self._files: dict[str, Path] = {}
        for path in sorted(self.folder.glob(f"{WEIGHTS_NAME}*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    found = dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({error}); write the folder again") from None
            twice = found.keys() & self._files.keys()
            if twice:
                name = min(twice)
                raise ModelError(
                    f"{name} is in {self._files[name].name} and in {path.name}; write the folder again with: {MADE_BY}"
                )
            self._files.update(found)

    def _check_names(self, folded: object) -> None:
        mixed = {name for name, fmt in self.formats.items() if fmt.storage == "segments"}
        if not isinstance(folded, list) or not self.folded <= mixed:
            raise ValueError(f"folded is {folded!r}, expected a list of sites with groups of mixed width")
        foreign = [fmt.name for fmt in self.formats.values() if fmt.storage == "blocks"]
        if foreign:
            raise ValueError(f"{foreign[0]} is a block format of GGUF")

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor as stored."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def stored(self, site: str) -> dict[str, Tensor]:
        """The tensors of a quantized site under their local names."""
        parts = _SEGMENT_PARTS if self.formats[site].storage == "segments" else (*_PARTS, *_CORRECTION_PARTS)
        return {part: self.read(f"{site}.{part}") for part in parts if f"{site}.{part}" in self._files}


def load_segmented(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Hugging Face model of a folder written for --target torch, its quantized linear layers kept packed.

    Embeddings held in 8 bits are dequantized.

    Args:
        dtype: what it computes in.

    Raises:
        ModelError: not such a folder, or tensors that do not fit its config. ArtifactError: damaged tensors.
    """
    source = SegmentedFolder(folder)
    model = _empty_model(source, dtype)
    state = {name: source.read(name) for name in source.names() if _site_of(name) not in source.formats}
    state |= {n: source.read(n) for n in source.names() if n.endswith(".bias") and _site_of(n) in source.formats}
    for site, fmt in source.formats.items():
        old = _find_module(model, site, source)
        shape = tuple(cast(Tensor, old.weight).shape)
        try:
            weight = decode(source.stored(site), fmt, (shape[0], shape[1]))
        except ValueError as error:
            raise ModelError(f"{source.folder}, {site}: {error}; write the folder again with: {MADE_BY}") from None
        if isinstance(old, nn.Embedding):
            state[f"{site}.weight"] = weight.dequantize()
            continue
        bias = cast(Tensor | None, old.bias)
        if isinstance(weight, SegmentedWeight):
            new: nn.Module = SegmentedLinear(weight, bias, gathers=site not in source.folded)
        elif isinstance(weight, CorrectedWeight):
            new = CorrectedLinear(weight, bias)
        else:
            new = PackedLinear(encode(weight), fmt, weight.shape, bias)
        parent, _, leaf = site.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    _load(model, state, source)
    return model


def _empty_model(source: SegmentedFolder, dtype: torch.dtype) -> nn.Module:
    """The architecture that config.json names, weights not set."""
    config: Any = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
    del config.quantization_config
    names = getattr(config, "architectures", None)
    model_class = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ModelError(
            f"{source.folder}/config.json: architectures is {names!r}, expected one model class of transformers; write "
            f"the folder again with: {MADE_BY}"
        )
    return cast(nn.Module, model_class._from_config(config, dtype=dtype)).eval().requires_grad_(False)


def _find_module(model: nn.Module, site: str, source: SegmentedFolder) -> nn.Module:
    """The layer of a site."""
    found = dict(model.named_modules()).get(site)
    if not isinstance(found, nn.Linear | nn.Embedding):
        raise ModelError(
            f"{source.folder}/config.json: {site!r} is no linear layer and no embedding of {type(model).__name__}; "
            f"write the folder again with: {MADE_BY}"
        )
    return found


def _site_of(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]


def _load(model: nn.Module, state: dict[str, Tensor], source: SegmentedFolder) -> None:
    """Put the tensors that are no site's codes into the model."""
    report = model.load_state_dict(state, strict=False)
    if hasattr(model, "tie_weights"):
        cast(Any, model).tie_weights()
    replaced = tuple(f"{site}." for site in source.formats)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [
        name
        for name in report.missing_keys
        if name not in tied and (not name.startswith(replaced) or name.endswith(".bias"))
    ]
    if missing or report.unexpected_keys:
        raise ModelError(
            f"{source.folder}: tensors do not fit config.json (missing: {missing[:3]}, not used: "
            f"{list(report.unexpected_keys)[:3]}); write it again with: {MADE_BY}"
        )
