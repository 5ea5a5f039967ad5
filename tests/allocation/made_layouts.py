"""Layouts and tables made by hand, without a model."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import KeptTensor, ModelLayout, Site, Tie
from cptquant.core.sensitivity import BlockScore, Damage, SensitivityTable
from cptquant.core.targets import TARGETS, candidate_formats

TRANSFORMERS = TARGETS["transformers"]
FUSED = TARGETS["transformers-fused"]


def parse_formats(*names: str) -> tuple[QuantFormat, ...]:
    return tuple(QuantFormat.parse(name) for name in names)


def make_layout(
    blocks: Sequence[Sequence[tuple[int, int]]],
    *,
    embedding: tuple[int, int] | None = None,
    head: bool = False,
    shared: bool = False,
    ties: Sequence[Sequence[str]] = (),
    kept: int = 0,
) -> ModelLayout:
    """Sites `block.B.S` of the given (out, in) shapes, an `embedding` and a `head` of its shape."""
    sites: list[Site] = []
    if embedding:
        sites.append(Site(name="embedding", out_features=embedding[0], in_features=embedding[1], role="embedding",
                          kind="embedding"))  # fmt: skip
    for index, shapes in enumerate(blocks):
        sites += [
            Site(name=f"block.{index}.{s}", out_features=rows, in_features=columns, block_index=index)
            for s, (rows, columns) in enumerate(shapes)
        ]
    if head and embedding:
        sites.append(Site(name="head", out_features=embedding[0], in_features=embedding[1], role="head"))
    parameters = sum(site.weight_count for site in sites) + kept
    if shared and embedding:
        parameters -= embedding[0] * embedding[1]
    return ModelLayout(
        architecture="MadeForCausalLM", model_type="made", task="causal_lm", source="made", source_digest="0",
        source_dtype="float32", storage_dtype="float16", source_bytes=4 * parameters, parameters=parameters,
        block_count=len(blocks), hidden_size=16, max_positions=64, vocabulary_size=embedding[0] if embedding else 0,
        sites=tuple(sites), ties=tuple(Tie(sites=tuple(names), reason="fused") for names in ties),
        shared_head=("embedding", "head") if shared else None,
        kept=(KeptTensor(name="norm", shape=(kept,), stored_bytes=2 * kept),) if kept else (),
    )  # fmt: skip


def make_table(
    layout: ModelLayout,
    formats: Sequence[QuantFormat],
    damage: Callable[[str, QuantFormat], float],
    *,
    block_scores: Sequence[float] | None = None,
) -> SensitivityTable:
    """A damage for every candidate of every site, as `measure` writes it."""
    rows = {
        site.name: {
            fmt.name: Damage(value=0.0 if fmt.is_float else damage(site.name, fmt), n=4)
            for fmt in candidate_formats(site, layout, TRANSFORMERS, formats)
        }
        for site in layout.sites
    }
    return table_of(rows, block_scores if block_scores is not None else range(layout.block_count))


def table_of(rows: Mapping[str, Mapping[str, Damage]], block_scores: Sequence[float]) -> SensitivityTable:
    return SensitivityTable(
        method="ablation", unit="kl_nats_per_token", damages={name: dict(row) for name, row in rows.items()},
        block_scores=tuple(BlockScore(block_index=i, value=float(v), n=4) for i, v in enumerate(block_scores)),
    )  # fmt: skip


def typical_damage(seed: int = 0) -> Callable[[str, QuantFormat], float]:
    """Falls about fourfold per bit, differs by orders of magnitude between sites: what measured tables look like."""
    rng = np.random.default_rng(seed)
    fragility: dict[str, float] = {}

    def damage(site: str, fmt: QuantFormat) -> float:
        fragility.setdefault(site, 10 ** rng.uniform(-3, 1))
        return fragility[site] * 4.0**-fmt.code_bits * rng.uniform(0.7, 1.3)

    return damage
