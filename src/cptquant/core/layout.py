"""What a model consists of, without its weights: the sites that can be quantized and everything else by size."""

from functools import cached_property
from typing import ClassVar, Literal

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.formats import BFLOAT16, FLOAT16, QuantFormat

Task = Literal["causal_lm", "masked_lm", "sequence_classification", "encoder"]

Role = Literal[
    "q", "k", "v", "o", "qkv", "up", "gate", "down", "gate_up",
    "embedding", "head", "pooler", "projection", "other",
]  # fmt: skip


class Site(Frozen):
    """One weight matrix that can be quantized.

    Attributes:
        name: module path in the Hugging Face model, e.g. `model.decoder.layers.0.self_attn.q_proj`.
        out_features, in_features: rows and columns of the matrix as a linear map, whatever the framework's layout;
            for an embedding, vocabulary size and width.
        block_index: transformer block it belongs to; None outside the blocks.
        role: what it does in the block.
        kind: "linear" or "embedding".
        transposed: the framework stores (in, out), as GPT-2's Conv1D does.
    """

    name: str
    out_features: int
    in_features: int
    block_index: int | None = None
    role: Role = "other"
    kind: Literal["linear", "embedding"] = "linear"
    transposed: bool = False

    @property
    def parameter_name(self) -> str:
        """Name of the weight in the state dict."""
        return f"{self.name}.weight"

    @property
    def weight_count(self) -> int:
        """Entries of the matrix."""
        return self.out_features * self.in_features


class KeptTensor(Frozen):
    """A tensor that is never quantized: norms, biases, positions. Stored in the layout's 16-bit float."""

    name: str
    shape: tuple[int, ...]
    stored_bytes: int


class Tie(Frozen):
    """Sites that a fusing engine runs as one matrix, hence in one format."""

    sites: tuple[str, ...]
    reason: str


class ModelLayout(Artifact):
    """Result of `inspect` (layout.json).

    Attributes:
        architecture: class name in `config.architectures`, e.g. `OPTForCausalLM`.
        source: the model as the person named it. source_digest: sha256 over config and weight files.
        source_dtype: dtype of the weights as found; storage_dtype: the 16-bit float that kept tensors and scales get
            (the source's own, float16 for float32 sources unless a weight exceeds its range).
        source_bytes: bytes of the original's tensors, each shared tensor once.
        parameters: entries of all parameters, each shared tensor once.
        sites: in forward order. ties: which sites a fusing engine wants in one format.
        shared_head: (embedding site, head site) if the two are one tensor in the original, else None.
        kept: everything that is no site.
        key_value_width: numbers a token leaves in the cache of one block (keys and values of all key-value heads).
        attention_heads: of queries, in one block.
        rotary_factors: entries of a table of rotary frequencies that an engine needs in the file (Llama 3's scaling).
    """

    SCHEMA: ClassVar[str] = "cptquant.layout"
    MADE_BY: ClassVar[str] = "cptquant inspect MODEL --output RUN"

    architecture: str
    model_type: str
    task: Task
    source: str
    source_digest: str
    source_dtype: Literal["float32", "float16", "bfloat16"]
    storage_dtype: Literal["float16", "bfloat16"]
    source_bytes: int
    parameters: int
    block_count: int
    hidden_size: int
    max_positions: int | None
    vocabulary_size: int
    sites: tuple[Site, ...]
    ties: tuple[Tie, ...] = ()
    shared_head: tuple[str, str] | None = None
    kept: tuple[KeptTensor, ...] = ()
    key_value_width: int | None = None
    attention_heads: int | None = None
    rotary_factors: int = 0

    @cached_property
    def site_by_name(self) -> dict[str, Site]:
        """Sites by module path."""
        return {site.name: site for site in self.sites}

    @cached_property
    def block_sites(self) -> tuple[Site, ...]:
        """The linear sites inside the blocks: what `@sites` budgets count, as papers do."""
        return tuple(site for site in self.sites if site.block_index is not None)

    @property
    def keep_format(self) -> QuantFormat:
        """The 16-bit format of this model."""
        return FLOAT16 if self.storage_dtype == "float16" else BFLOAT16

    @property
    def kept_bytes(self) -> int:
        """Bytes of all tensors that are no site."""
        return sum(tensor.stored_bytes for tensor in self.kept)

    @property
    def bytes_at_16_bit(self) -> int:
        """Bytes of the whole model with every weight in 16 bits, a shared head once."""
        return 2 * self.parameters

    @property
    def bytes_at_32_bit(self) -> int:
        """Bytes of the whole model in float32."""
        return 4 * self.parameters

    def shared_head_bytes(self, embedding_format: QuantFormat, head_format: QuantFormat) -> int:
        """Bytes of an embedding and a head that are one tensor in the original.

        Both in 16 bits: one tensor, still shared. Otherwise each is stored by itself.
        """
        if self.shared_head is None:
            raise ValueError("this model's embedding and head are not shared")
        embedding, head = (self.site_by_name[name] for name in self.shared_head)
        stored = embedding_format.stored_bytes(embedding.out_features, embedding.in_features)
        if embedding_format.is_float and head_format.is_float:
            return stored
        return stored + head_format.stored_bytes(head.out_features, head.in_features)

    def plan_bytes(self, formats: dict[str, QuantFormat]) -> int:
        """Bytes of all tensors of a checkpoint in which each site has the given format (16 bits if not named)."""
        chosen = {site.name: formats.get(site.name, self.keep_format) for site in self.sites}
        total = self.kept_bytes
        if self.shared_head is not None:
            embedding, head = self.shared_head
            total += self.shared_head_bytes(chosen.pop(embedding), chosen.pop(head))
        for name, fmt in chosen.items():
            site = self.site_by_name[name]
            total += fmt.stored_bytes(site.out_features, site.in_features)
        return total

    def block_site_bytes(self, formats: dict[str, QuantFormat]) -> int:
        """Bytes of the blocks' linear sites alone: what an `@sites` budget limits."""
        return sum(
            formats.get(site.name, self.keep_format).stored_bytes(site.out_features, site.in_features)
            for site in self.block_sites
        )
