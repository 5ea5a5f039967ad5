"""Quantize a model of a sweep where it stands, and judge it beside itself: what its bits cost at its N, D and r."""

from collections.abc import Mapping

from cptquant.core.errors import FormatError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan, SolverStatus
from cptquant.core.sweep_record import QuantizedRecord
from cptquant.evaluation.evaluate import evaluate
from cptquant.models.load import LoadedModel
from cptquant.models.text import TokenSet
from cptquant.quantizers.first_pass import FinishedInMemory
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.stages.predict import uniform_plan

TARGET = "transformers"


def smallest_uniform(layout: ModelLayout, fmt: QuantFormat, target: str = TARGET) -> dict[str, QuantFormat]:
    """One format for every matrix of the blocks; outside them too, unless that makes the file larger.

    A head that shares its tensor with an embedding which the target keeps in 16 bits would be stored beside it.
    """
    everywhere = uniform_plan(layout, fmt, target)
    blocks = {site.name: everywhere[site.name] for site in layout.block_sites}
    inside = {site.name: layout.keep_format for site in layout.sites} | blocks
    return min((everywhere, inside), key=layout.plan_bytes)


def uniform_record(layout: ModelLayout, fmt: QuantFormat, target: str = TARGET) -> Plan:
    """`smallest_uniform` as a plan."""
    formats = smallest_uniform(layout, fmt, target)
    size_bytes, site_bytes = layout.plan_bytes(formats), layout.block_site_bytes(formats)
    return Plan(
        target=target,
        allocator="uniform",
        budget=f"{size_bytes}B",
        budget_scope="file",
        limit_bytes=size_bytes,
        formats={site: chosen.name for site, chosen in formats.items()},
        size_bytes=size_bytes,
        site_bytes=site_bytes,
        bits_per_weight=8 * size_bytes / layout.parameters,
        bits_per_weight_sites=8 * site_bytes / sum(site.weight_count for site in layout.block_sites),
        status=SolverStatus.HEURISTIC,
    )


def quantize_and_judge(
    model: LoadedModel, widths: tuple[int, ...], group: int, calibration: TokenSet, held: Mapping[str, TokenSet]
) -> tuple[QuantizedRecord, ...]:
    """GPTQ at every width, judged on every text.

    Raises:
        FormatError: no site of the model can hold a width with this group.
    """
    subjects: dict[str, FinishedInMemory] = {}
    sizes: dict[str, int] = {}
    for bits in widths:
        fmt = QuantFormat.parse(f"int{bits}-g{group}")
        plan = uniform_record(model.layout, fmt)
        if all(found.is_float for found in plan.quant_formats.values()):
            raise FormatError(f"quantize: no matrix of {model.path} can hold {fmt.name}; choose another group")
        weights = subjects[fmt.name] = FinishedInMemory()
        sizes[fmt.name] = plan.size_bytes
        quantize_sites(model, plan, find_quantizer("gptq"), calibration, weights.keep)
    records: list[QuantizedRecord] = []
    for text, tokens in held.items():
        found = {(m.name, m.subject): m for m in evaluate(model, subjects, tokens)}
        for bits, name in zip(widths, subjects, strict=True):
            kl, rise = found["kl_nats_per_token", name], found["nll_increase_nats_per_token", name]
            records.append(
                QuantizedRecord(
                    bits=bits, format=name, text=text, size_bytes=sizes[name],
                    kl_nats=kl.value, kl_stderr_nats=kl.stderr or 0.0,
                    rise_nats=rise.value, rise_stderr_nats=rise.stderr or 0.0,
                )
            )  # fmt: skip
    return tuple(records)
