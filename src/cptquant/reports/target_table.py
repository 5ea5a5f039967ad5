"""The table of `cptquant targets`: what each engine can hold."""

from collections.abc import Iterable

from cptquant.core.formats import QuantFormat
from cptquant.core.targets import Target, low_rank_names
from cptquant.reports.tables import TextTable, render_text

_EXAMPLE_COLUMNS = 1024
"""Row length at which bits per weight are stated: a multiple of every block and group."""


def describe_target(target: Target) -> dict[str, object]:
    """A target's rules as plain values, for JSON."""
    return {
        "target": target.name,
        "description": target.description,
        "formats": {name: _bits_per_weight(name) for name in target.default_formats},
        "low_rank_bases": list(target.low_rank_bases),
        "encoder_formats": {name: _bits_per_weight(name) for name in target.encoder_formats},
        "divisibility": target.divisibility,
        "share_a_format": target.tied,
        "kept": target.kept,
        "architectures": list(target.architectures),
    }


def target_table(targets: Iterable[Target]) -> str:
    """One block of lines a target."""
    tables = [
        TextTable(
            title=f"--target {target.name}: {target.description}",
            columns=("Rule", "What"),
            rows=[
                ["default formats (bits per weight)", _spell_formats(target.default_formats)],
                *([["... with products of low rank", _spell_low_rank(target)]] if target.low_rank_bases else []),
                *([["... of encoders", _spell_formats(target.encoder_formats)]] if target.encoder_formats else []),
                ["row lengths", target.divisibility],
                ["share a format", target.tied],
                ["never quantized", target.kept],
                ["architectures", ", ".join(target.architectures) or "those that cptquant inspect accepts"],
            ],
            left=(0, 1),
        )
        for target in targets
    ]
    return render_text(*tables)


def _spell_formats(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({_bits_per_weight(name):g})" for name in names)


def _spell_low_rank(target: Target) -> str:
    ranks = [name.rpartition("-r")[2] for name in low_rank_names(target.low_rank_bases[:1], _EXAMPLE_COLUMNS)]
    return f"{', '.join(target.low_rank_bases)}, at a width of {_EXAMPLE_COLUMNS} each with -r{', -r'.join(ranks)}"


def _bits_per_weight(name: str) -> float:
    return round(QuantFormat.parse(name).bits_per_weight(1024, _EXAMPLE_COLUMNS), 4)
