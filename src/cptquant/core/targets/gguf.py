"""GGUF, as llama.cpp (and what is built on it) reads it.

Rules: rows of K types are a multiple of 256, of the other block types a multiple of 32. Norms and biases are float32,
position tables 16 bits. An embedding that is also the head is one tensor, hence one format. OPT is written as GPT-2,
whose q, k and v are one tensor. Encoders come without their pooler, which llama.cpp does not use.
"""

import math
from dataclasses import dataclass

from cptquant.core.formats import QuantFormat, block_format
from cptquant.core.gguf_types import BLOCK_LAYOUTS, NARROW_ROW_TYPE, GgufType
from cptquant.core.layout import KeptTensor, ModelLayout, Site, Tie
from cptquant.core.targets.base import Target
from cptquant.core.targets.gguf_names import GGUF_FAMILIES, find_place, is_omitted

_NEAREST: dict[tuple[int, bool], GgufType] = {
    (2, True): "Q2_K", (2, False): "Q2_K",
    (3, True): "Q3_K", (3, False): "Q3_K",
    (4, True): "Q4_K", (4, False): "Q4_K",
    (5, True): "Q5_K", (5, False): "Q5_K",
    (6, True): "Q6_K", (6, False): "Q6_K",
    (7, True): "Q8_0", (7, False): "Q8_0",
    (8, True): "Q8_0", (8, False): "Q8_0",
}  # fmt: skip
"""(code bits, symmetric) of a format of another engine -> the nearest block type."""


@dataclass(frozen=True)
class Gguf(Target):
    """The rules of llama.cpp."""

    def refusal(self, site: Site, fmt: QuantFormat) -> str | None:
        """Why this site cannot have this format here, or None if it can."""
        if fmt.is_float:
            return None
        layout = fmt.block_layout
        if layout is None:
            return f"{fmt.name} is no format of GGUF; it has {', '.join(BLOCK_LAYOUTS)}"
        if site.role == "pooler":
            return "llama.cpp computes embeddings without the pooler: the file leaves it out"
        if site.in_features % layout.block_columns:
            return (
                f"{fmt.name} has blocks of {layout.block_columns} weights along a row, and the row has "
                f"{site.in_features}"
            )
        return None

    def fit(self, site: Site, fmt: QuantFormat) -> QuantFormat:
        """The nearest block type whose blocks divide the row; another engine's format by its (largest) width."""
        if fmt.is_float:
            return fmt
        fmt = fmt.promoted()
        block = fmt.block if fmt.block is not None else _NEAREST[fmt.code_bits, fmt.symmetric]
        if site.in_features % BLOCK_LAYOUTS[block].block_columns:
            block = NARROW_ROW_TYPE.get(block, block)
        return block_format(block)

    def refuse_model(self, layout: ModelLayout) -> str | None:
        """Architectures and tasks that llama.cpp does not run."""
        where = f"--target {self.name}: {layout.architecture}"
        if layout.model_type not in GGUF_FAMILIES:
            return f"{where} (model_type {layout.model_type}) is not supported; supported: {', '.join(GGUF_FAMILIES)}"
        wanted = "encoder" if layout.model_type == "bert" else "causal_lm"
        if layout.task != wanted:
            what = "embeddings (a bare BertModel)" if wanted == "encoder" else "text (…ForCausalLM)"
            return f"{where}: llama.cpp runs {layout.model_type} for {what}, this model is for {layout.task}"
        if layout.model_type == "opt":
            return _refuse_opt(layout, where)
        return None

    def ties(self, layout: ModelLayout) -> tuple[Tie, ...]:
        """OPT's q, k and v, which become one tensor of GPT-2."""
        if layout.model_type != "opt":
            return ()
        reason = "OPT is written as GPT-2, whose q, k and v are one tensor"
        return tuple(Tie(sites=tie.sites, reason=reason) for tie in layout.ties if tie.sites[0].endswith("q_proj"))

    def shares_head(self, layout: ModelLayout) -> bool:
        """llama.cpp takes a missing output tensor from the token embedding."""
        return True

    def site_bytes(self, layout: ModelLayout, site: Site, fmt: QuantFormat) -> int:
        """Bytes of one site; a pooler is left out."""
        if layout.model_type in GGUF_FAMILIES and is_omitted(layout.model_type, site.parameter_name):
            return 0
        return fmt.stored_bytes(site.out_features, site.in_features)

    def kept_bytes(self, layout: ModelLayout) -> int:
        """Norms and biases in float32, position tables in 16 bits, without what llama.cpp has no use for."""
        return sum(kept_tensor_bytes(layout, tensor) for tensor in layout.kept) + 4 * layout.rotary_factors

    def shared_head_bytes(self, layout: ModelLayout, embedding_format: QuantFormat, head_format: QuantFormat) -> int:
        """One tensor in one format.

        Raises:
            ValueError: two formats.
        """
        if embedding_format != head_format or layout.shared_head is None:
            raise ValueError(f"embedding and head are one tensor: {embedding_format.name} and {head_format.name}")
        embedding = layout.site_by_name[layout.shared_head[0]]
        return embedding_format.stored_bytes(embedding.out_features, embedding.in_features)


def kept_tensor_bytes(layout: ModelLayout, tensor: KeptTensor) -> int:
    """Bytes of one kept tensor in the file; 0 for one that it leaves out."""
    if layout.model_type not in GGUF_FAMILIES or is_omitted(layout.model_type, tensor.name):
        return 0
    place = find_place(layout.model_type, tensor.name)
    if place is None:
        return 0
    shape = (tensor.shape[0] - 2, *tensor.shape[1:]) if place.rows == "skip_two" else tensor.shape
    return math.prod(shape) * (4 if len(shape) == 1 or place.float32 else 2)


def _refuse_opt(layout: ModelLayout, where: str) -> str | None:
    if any(site.role == "projection" for site in layout.sites):
        return (
            f"{where}: OPT is written as GPT-2, and this one has projections between its embedding and its blocks (as "
            "OPT-350M, whose norms also follow the sublayers); GPT-2 has neither"
        )
    if not any(tensor.name.endswith("decoder.final_layer_norm.weight") for tensor in layout.kept):
        return (
            f"{where}: OPT is written as GPT-2, whose norms precede the sublayers with one more at the end; this one "
            "has no final norm (post-norm, do_layer_norm_before = false, as OPT-350M)"
        )
    return None


GGUF = Gguf(
    name="gguf",
    description="GGUF, read by llama.cpp, Ollama, LM Studio",
    default_formats=("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    architectures=tuple(GGUF_FAMILIES),
    divisibility="rows of K types are multiples of 256, of Q4_0 to Q8_0 of 32; other rows get those",
    tied="an embedding and the head it is shared with; q, k, v of OPT (written as GPT-2)",
    kept="norms and biases in float32, position tables in 16 bits; an encoder's pooler is left out",
)
