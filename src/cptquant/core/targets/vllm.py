"""vLLM on a GPU: a compressed-tensors checkpoint within the rules of its WNA16 kernels.

Rules (vLLM's documentation, 2026-11): symmetric integer weights, groups of 32, 64 or 128 columns that divide the row or
one scale a row; q/k/v and gate/up are one matrix there, hence one scheme; embedding and head stay in 16 bits; a linear
layer in 16 bits must be named under `ignore`. 4 and 8 bits run on Marlin kernels (Ampere and newer); 2, 3, 5, 6 and 7
bits need the Humming kernels of releases from the summer of 2026 (Turing and newer).
"""

from dataclasses import dataclass

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.targets.compressed_tensors import CompressedTensors

_GROUPS = (128, 64, 32)
VLLM_MODEL_TYPES = ("opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox")


@dataclass(frozen=True)
class Vllm(CompressedTensors):
    """The rules of vLLM's compressed-tensors loader."""

    def refusal(self, site: Site, fmt: QuantFormat) -> str | None:
        """Why this site cannot have this format here, or None if it can."""
        if fmt.is_float:
            return None
        if site.block_index is None:
            return "vLLM keeps embedding and head in 16 bits"
        if not fmt.symmetric:
            return "cptquant writes symmetric formats for vLLM: its loader takes zero points in 4 and 8 bits only"
        if fmt.granularity != "channel" and fmt.granularity not in _GROUPS:
            return f"vLLM's kernels take groups of {', '.join(map(str, _GROUPS))} columns or one scale a row"
        return super().refusal(site, fmt)

    def fit(self, site: Site, fmt: QuantFormat) -> QuantFormat:
        """The same width, symmetric, in the largest legal groups not above those asked for; else one scale a row."""
        if fmt.is_float or site.block_index is None:
            return fmt
        fmt = fmt.promoted()
        asked = fmt.granularity if isinstance(fmt.granularity, int) else None
        sizes = [
            size for size in _GROUPS if asked is not None and site.in_features % size == 0 and size <= max(asked, 32)
        ]
        return QuantFormat(code_bits=fmt.code_bits, granularity=sizes[0] if sizes else "channel")

    def refuse_model(self, layout: ModelLayout) -> str | None:
        """Architectures whose quantized form was not looked at."""
        if layout.model_type not in VLLM_MODEL_TYPES or layout.task != "causal_lm":
            return (
                f"--target {self.name}: {layout.architecture} (model_type {layout.model_type}) is not supported; "
                f"supported are text models (…ForCausalLM) of: {', '.join(VLLM_MODEL_TYPES)}"
            )
        return None


VLLM = Vllm(
    name="vllm",
    description="compressed-tensors safetensors for `vllm serve` on a GPU (docs/serving.md)",
    default_formats=("int4-g128", "int8-g128"),
    architectures=VLLM_MODEL_TYPES,
    divisibility="symmetric; groups of 32, 64 or 128 that divide the row, else one scale a row; 2, 3, 5, 6, 7 bits "
    "need vLLM's Humming kernels",
    tied="q, k, v; gate, up",
    kept="embedding, head, norms, biases, positions in 16 bits",
    fuses=True,
)
