"""The tables of a sweep: runs.csv, which `cptquant law fit` reads, early features, and what quantizing cost."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cptquant.core.sweep import GENERAL, SweepRun
from cptquant.core.sweep_record import LossRecord, PointRecord, QuantizedRecord, RungRecord

RUN_COLUMNS = (
    "domain", "run", "size", "seed", "N", "D", "r", "U", "general_nll", "general_nll_stderr", "domain_nll",
    "domain_nll_stderr", "scored_tokens", "anneal_tokens", "domain_epochs", "general_epochs",
)  # fmt: skip
PTQ_COLUMNS = (
    "domain", "run", "size", "seed", "N", "D", "r", "bits", "format", "size_bytes", "general_kl", "general_kl_stderr",
    "general_rise", "general_rise_stderr", "domain_kl", "domain_kl_stderr", "domain_rise", "domain_rise_stderr",
)  # fmt: skip
FEATURE_COLUMNS = ("domain", "initial_nll", "middle_nll", "early_nll", "size", "r", "early_tokens")


@dataclass(frozen=True)
class SweepData:
    """What stands on disk of a sweep.

    Attributes:
        rungs: by name. runs: in the order of the grid. bases: (size, seed) -> losses before training (D = 0).
        points: run id -> evaluations in order, early looks included.
    """

    rungs: Mapping[str, RungRecord]
    runs: Sequence[SweepRun]
    bases: Mapping[tuple[str, int], PointRecord]
    points: Mapping[str, Sequence[PointRecord]]
    step_tokens: int


def run_rows(data: SweepData, domain: str | None = None) -> list[dict[str, str]]:
    """One row an evaluation and domain, base models (D = 0) first; of one domain, or of all."""
    rows = [
        _row(data, name, f"base-{size}-s{seed}", size, seed, 0.0, record)
        for (size, seed), record in data.bases.items()
        for name in record.losses
        if name != GENERAL and domain in (None, name)
    ]
    for run in data.runs:
        for record in data.points.get(run.id, ()):
            if record.annealed:
                rows += [
                    _row(data, name, run.id, run.size, run.seed, run.ratio, record)
                    for name in run.judged
                    if domain in (None, name)
                ]
    return rows


def _row(
    data: SweepData, domain: str, run: str, size: str, seed: int, ratio: float, record: PointRecord
) -> dict[str, str]:  # fmt: skip
    general, own = record.losses[GENERAL], record.losses[domain]
    anneal = (record.last_step - record.branch_step) * data.step_tokens
    return {
        "domain": domain, "run": run, "size": size, "seed": str(seed), "N": str(data.rungs[size].parameters),
        "D": str(record.tokens), "r": f"{ratio:g}", "U": str(record.distinct_tokens),
        **_loss("general_nll", general), **_loss("domain_nll", own), "scored_tokens": str(own.n),
        "anneal_tokens": str(anneal), "domain_epochs": f"{record.epochs.get(domain, 0.0):.4g}",
        "general_epochs": f"{record.epochs.get(GENERAL, 0.0):.4g}",
    }  # fmt: skip


def _loss(name: str, loss: LossRecord) -> dict[str, str]:
    assert loss.stderr is not None  # at least eight windows are judged
    return {name: f"{loss.value:.8g}", f"{name}_stderr": f"{loss.stderr:.4g}"}


def ptq_rows(data: SweepData) -> list[dict[str, str]]:
    """One row a quantized model and domain."""
    rows: list[dict[str, str]] = []
    for run in data.runs:
        for record in data.points.get(run.id, ()):
            found = {(each.bits, each.text): each for each in record.quantized}
            for bits in dict.fromkeys(each.bits for each in record.quantized):
                for domain in run.judged:
                    general, own = found[bits, GENERAL], found[bits, domain]
                    rows.append(
                        {
                            "domain": domain, "run": run.id, "size": run.size, "seed": str(run.seed),
                            "N": str(data.rungs[run.size].parameters), "D": str(record.tokens),
                            "r": f"{run.ratio:g}", "bits": str(bits), "format": own.format,
                            "size_bytes": str(own.size_bytes), **_damage("general", general), **_damage("domain", own),
                        }
                    )  # fmt: skip
    return rows


def _damage(name: str, found: QuantizedRecord) -> dict[str, str]:
    return {
        f"{name}_kl": f"{found.kl_nats:.6g}", f"{name}_kl_stderr": f"{found.kl_stderr_nats:.4g}",
        f"{name}_rise": f"{found.rise_nats:.6g}", f"{name}_rise_stderr": f"{found.rise_stderr_nats:.4g}",
    }  # fmt: skip


def feature_rows(data: SweepData) -> list[dict[str, str]]:
    """Early losses of every domain, from the run that was looked at early; domains without such a run are left out."""
    rows: list[dict[str, str]] = []
    for run in data.runs:
        looks = [record for record in data.points.get(run.id, ()) if not record.annealed]
        base = data.bases.get((run.size, run.seed))
        if len(looks) != 2 or base is None or not run.domain:
            continue
        middle, early = looks
        rows.append(
            {
                "domain": run.domain, "initial_nll": f"{base.losses[run.domain].value:.8g}",
                "middle_nll": f"{middle.losses[run.domain].value:.8g}",
                "early_nll": f"{early.losses[run.domain].value:.8g}",
                "size": run.size, "r": f"{run.ratio:g}", "early_tokens": str(early.tokens),
            }
        )  # fmt: skip
    return rows


def write_csv(columns: Sequence[str], rows: Iterable[Mapping[str, str]], comments: Sequence[str]) -> str:
    """Comments (each begins with #), header, rows."""
    buffer = io.StringIO()
    for line in comments:
        buffer.write(f"# {line}\n")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
