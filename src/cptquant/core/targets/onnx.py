"""ONNX Runtime on the CPU, through the graphs of `exporters/onnx`.

Rules: MatMulNBits has kernels for 2, 4 and 8 bits (3, 5, 6 and 7 are rejected when the model is loaded), symmetric or
not, in blocks of powers of two from 16. A scale per row or per matrix is written once and spread when the engine loads
the file. A prompt of many tokens, all that an encoder sees, runs 3 to 4 times faster with one 8-bit scale a row than in
blocks (decision 0006): that is what encoders are offered at 8 bits. SliM-LLM's groups of mixed width are two products
where half of them have 2 bits and half 4 (`slim3-g64-halves`). Corrected columns (`int2-g64-c2`) and products of low
rank (`int2-g64-r4`) are float products beside the one of the codes. Everything else stays in 16 bits in the file and is
float32 in memory. An embedding that is also the head is one tensor. Other matrices of one input are joined only where
the plan gives them one format.
"""

from dataclasses import dataclass

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.targets.base import Target, keep_correction, refuse_correction

_WIDTHS = (2, 4, 8)
_SMALLEST_BLOCK = 16
_HALVES_BITS = 3
"""The average whose neighbours, 2 and 4, both have kernels."""
_NUMBER_BYTES = 2
_UNUSED_POOLER = "pooler.dense"
"""The pooler of a bare BertModel (a classifier's is bert.pooler.dense)."""
ONNX_MODEL_TYPES = ("opt", "llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "bert")


@dataclass(frozen=True)
class Onnx(Target):
    """The rules of ONNX Runtime 1.23 and later."""

    def refusal(self, site: Site, fmt: QuantFormat) -> str | None:
        """Why this site cannot have this format here, or None if it can."""
        if fmt.is_float:
            return None
        if site.name == _UNUSED_POOLER:
            return "a bare encoder's file leaves its pooler out: embeddings are means of the last hidden state"
        if fmt.storage == "blocks":
            return f"{fmt.name} is a block format of GGUF, which ONNX Runtime does not have"
        if fmt.storage == "segments":
            return self._refuse_segments(site, fmt)
        if fmt.is_corrected:
            return refuse_correction(self, site, fmt)
        if fmt.code_bits not in _WIDTHS:
            return f"ONNX Runtime has kernels for 2, 4 and 8 bits, not {fmt.code_bits}"
        group = fmt.granularity if isinstance(fmt.granularity, int) else site.in_features
        if site.in_features % group:
            return f"groups of {group} columns do not divide the row of {site.in_features}"
        if group % _SMALLEST_BLOCK:
            return f"ONNX Runtime needs {_SMALLEST_BLOCK} columns or a multiple to share a scale, here {group} do"
        return None

    def _refuse_segments(self, site: Site, fmt: QuantFormat) -> str | None:
        if site.kind != "linear" or site.block_index is None:
            return f"{fmt.name} is for linear layers inside the blocks here"
        if not fmt.halves or fmt.code_bits != _HALVES_BITS:
            return (
                f"{fmt.name} has widths that ONNX Runtime has no product for; write slim3-g64-halves (half of the "
                "groups in 2 bits, half in 4) or use --target torch"
            )
        return fmt.segments_refusal(site.in_features)

    def fit(self, site: Site, fmt: QuantFormat) -> QuantFormat:
        """The next wider width that has a kernel, in groups that divide the row; corrections stay if they can."""
        if fmt.is_float or self.refusal(site, fmt) is None:
            return fmt
        corrected = keep_correction(self, site, fmt)
        if corrected is not None:
            return corrected
        fmt = fmt.promoted()
        if fmt.storage == "blocks":
            fmt = QuantFormat(code_bits=fmt.code_bits, granularity=64)
        bits = next(width for width in _WIDTHS if width >= fmt.code_bits)
        granularity = fmt.granularity
        if isinstance(granularity, int) and (site.in_features % granularity or granularity % _SMALLEST_BLOCK):
            size = 1 << (max(granularity, _SMALLEST_BLOCK).bit_length() - 1)
            while size > _SMALLEST_BLOCK and site.in_features % size:
                size //= 2
            granularity = size if site.in_features % size == 0 else "channel"
        return QuantFormat(code_bits=bits, granularity=granularity, symmetric=fmt.symmetric)

    def refuse_model(self, layout: ModelLayout) -> str | None:
        """Architectures and tasks without a graph here."""
        if layout.model_type not in ONNX_MODEL_TYPES:
            return (
                f"--target {self.name}: {layout.architecture} (model_type {layout.model_type}) is not supported; "
                f"supported: {', '.join(ONNX_MODEL_TYPES)}"
            )
        if layout.model_type != "bert" and layout.task != "causal_lm":
            return (
                f"--target {self.name}: {layout.model_type} is supported for text (…ForCausalLM), not for {layout.task}"
            )
        return None

    def site_bytes(self, layout: ModelLayout, site: Site, fmt: QuantFormat) -> int:
        """Bytes of one site: codes, 16-bit scales, and zero points as wide as the codes, one per block."""
        rows, columns = site.out_features, site.in_features
        if site.name == _UNUSED_POOLER:
            return 0
        if fmt.is_float:
            return 2 * rows * columns
        if fmt.storage == "segments":  # numbers of the groups, or of sorted columns, say which half they are in
            numbers = columns if fmt.sorted_columns else fmt.group_count(columns)
            return rows * columns * fmt.code_bits // 8 + 2 * fmt.scale_count(rows, columns) + _NUMBER_BYTES * numbers
        if fmt.is_corrected:
            return self.site_bytes(layout, site, fmt.base) + fmt.correction_bytes(rows, columns)
        codes, scales = rows * (columns * fmt.code_bits // 8), 2 * fmt.scale_count(rows, columns)
        if fmt.symmetric:
            return codes + scales
        return codes + scales + rows * -(-(columns // _block(site, fmt)) * fmt.code_bits // 8)

    def kept_bytes(self, layout: ModelLayout) -> int:
        """Everything in 16 bits, without a bare encoder's pooler."""
        return sum(tensor.stored_bytes for tensor in layout.kept if tensor.name.rpartition(".")[0] != _UNUSED_POOLER)

    def shares_head(self, layout: ModelLayout) -> bool:
        """The embedding's rows and the head's product read the same codes."""
        return True

    def shared_head_bytes(self, layout: ModelLayout, embedding_format: QuantFormat, head_format: QuantFormat) -> int:
        """One tensor."""
        if layout.shared_head is None:
            raise ValueError("this model's embedding and head are not shared")
        return self.site_bytes(layout, layout.site_by_name[layout.shared_head[0]], embedding_format)


def _block(site: Site, fmt: QuantFormat) -> int:
    """Columns per block: a power of two that divides the group, at most 128 (`packing.nbits`)."""
    group = fmt.granularity if isinstance(fmt.granularity, int) else site.in_features
    return min(group & -group, 128)


ONNX = Onnx(
    name="onnx",
    description="model.onnx with MatMulNBits for ONNX Runtime on the CPU: pip install cptquant[onnx]",
    default_formats=("int2-g64", "slim3-g64-halves", "slim3-g64-sorted-halves", "int4-g64", "int8-g128"),
    low_rank_bases=("int2-g64", "int4-g64"),
    architectures=ONNX_MODEL_TYPES,
    divisibility="2, 4 or 8 bits; groups a multiple of 16 that divides the row, else the largest power of two",
    tied="an embedding and the head it is shared with",
    kept="norms, biases, positions in 16 bits; embeddings in 2, 4, 8 or 16",
    encoder_formats=("int2-g64", "int4-g64", "int8-channel"),
)
