"""How well each sensitivity method agrees with the oracle, and whether the ends of the stack are more sensitive.

    python benchmarks/sensitivity_agreement.py            # embedded models, and ../shared/models where they exist
    python benchmarks/sensitivity_agreement.py --models embedded:bert-mini --threads 2

Methods read calibration text, the oracle (KL to the original with one site quantized) reads validation text. Writes
benchmarks/results/sensitivity_agreement.json and the tables of docs/sensitivity.md between its markers. Finished tables
are kept in build/sensitivity_agreement and reused by the next run if they were made from the same model, text and
method, so that a killed run goes on where it was; --fresh measures everything again.
"""

import argparse
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from cptquant.core.formats import QuantFormat
from cptquant.core.progress import ignore_progress
from cptquant.core.provenance import Stopwatch, installed_versions
from cptquant.core.sensitivity import BlockScore, SensitivityTable
from cptquant.core.targets import candidate_formats, find_target
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.text import TokenSet, load_tokens
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.correlation import Cmpq
from cptquant.sensitivity.loss import pick_sequences
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.path_integral import PathIntegral
from cptquant.sensitivity.perturbation import integer_formats
from cptquant.sensitivity.pruning import Pmpq
from cptquant.sensitivity.relative_error import relative_errors
from cptquant.sensitivity.scores import SensitivityMethod
from cptquant.sensitivity.sketch import Sketch
from cptquant.sensitivity.taylor import Tdmpq

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sensitivity_agreement.json"
WORK = ROOT / "build" / "sensitivity_agreement"
PAGE = ROOT / "docs" / "sensitivity.md"
SHARED = ROOT.parent / "shared"
BITS = (2, 3, 4, 8)
LENGTHS = {"causal_lm": 256, "masked_lm": 128, "sequence_classification": 128, "encoder": 128}

METHODS: dict[str, SensitivityMethod] = {
    "CMPQ": Cmpq(),
    "CMPQ, first correlation (the paper's code)": Cmpq(weighting="first"),
    "CMPQ, SVCCA": Cmpq(weighting="svcca"),
    "CMPQ, PWCCA": Cmpq(weighting="pwcca"),
    "CMPQ x weight error": Cmpq(rule="weight"),
    "CMPQ, bare score": Cmpq(rule="bare"),
    "PMPQ": Pmpq(),
    "PMPQ, sparsity 0.5": Pmpq(sparsity=0.5, curve=()),
    "PMPQ, each site pruned": Pmpq(curve=(), granularity="site"),
    "PMPQ, bare score": Pmpq(curve=(), rule="bare"),
    "TDMPQ": Tdmpq(),
    "TDMPQ, diagonal": Tdmpq(curvature="diagonal"),
    "TDMPQ, projected": Tdmpq(curvature="projected"),
    "TDMPQ, empirical Fisher": Tdmpq(fisher="empirical"),
    "TDMPQ, diagonal empirical Fisher": Tdmpq(curvature="diagonal", fisher="empirical"),
    "TDMPQ, first order": Tdmpq(order="first"),
    "TDMPQ, first + second order": Tdmpq(order="sum"),
    "TDMPQ, input noise": Tdmpq(variant="input"),
    "path": PathIntegral(),
    "path, one point": PathIntegral(points=1),
    "path, curvature along 3 bits": PathIntegral(variant="curvature"),
    "sketch": Sketch(),
    "sketch, half its squared length": Sketch(diagonal="sketch"),
}
CONTROL = "no score: relative output error alone"
ORACLE = "oracle (ablation)"


@dataclass(frozen=True)
class Subject:
    """A model with text for the methods and held-out text for the oracle."""

    label: str
    source: str
    calibration: str | None
    validation: str | None


def find_subjects(wanted: list[str] | None) -> list[Subject]:
    subjects = [Subject(name, name, None, None) for name in ("embedded:opt-mini", "embedded:bert-mini")]
    text = SHARED / "data" / "text" / "general"
    for folder in sorted((SHARED / "models").glob("*/config.json")) if SHARED.is_dir() else []:
        subjects.append(
            Subject(folder.parent.name, str(folder.parent), str(text / "train.txt"), str(text / "valid.txt"))
        )
    return [subject for subject in subjects if not wanted or subject.label in wanted]


def table_path(subject: Subject, method: str) -> Path:
    """Where a method's finished table is kept."""
    return WORK / subject.label.replace(":", "-") / f"{re.sub(r'[^a-z0-9.]+', '-', method.lower())}.json"


def measure_once(
    path: Path, model: LoadedModel, tokens: TokenSet, candidates: dict, method: SensitivityMethod
) -> SensitivityTable:
    """The table at `path` if it was made from the same things, else a new one."""
    inputs = {
        "model": model.layout.source_digest,
        "tokens": tokens.digest,
        "method": repr(method),
        "formats": ",".join(sorted({fmt.name for row in candidates.values() for fmt in row})),
    }
    if path.exists():
        found = SensitivityTable.load(path)
        if found.inputs == inputs:
            return found
    watch = Stopwatch()
    table = measure_sensitivity(model, tokens, candidates, method)
    made = table.model_copy(update={"inputs": inputs, "provenance": watch.provenance(threads=torch.get_num_threads())})
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def measure_subject(subject: Subject, oracle_sequences: int, names: list[str]) -> dict[str, object]:
    """The figures of some methods; others' stay as they were."""
    model = load_model(subject.source)
    length = LENGTHS[model.layout.task]
    tokens = load_tokens(model, subject.calibration, "calibration", sequences=128, length=length, seed=0)
    held_out = load_tokens(model, subject.validation, "validation", sequences=128, length=length, seed=0)
    target = find_target("transformers")
    formats = [QuantFormat.parse(f"int{bits}-g64") for bits in BITS]
    candidates = {site.name: candidate_formats(site, model.layout, target, formats) for site in model.layout.sites}
    tables: dict[str, SensitivityTable] = {}
    wanted = {ORACLE: Ablation(sequences=oracle_sequences, examples=128), **{name: METHODS[name] for name in names}}
    seconds: dict[str, float] = {}
    for name, method in wanted.items():
        tables[name] = measure_once(
            table_path(subject, name), model, held_out if name == ORACLE else tokens, candidates, method
        )
        seconds[name] = tables[name].provenance.cpu_seconds or 0.0
        print(f"{subject.label}: {name}: {seconds[name]:.0f} CPU seconds", flush=True)
    oracle = tables[ORACLE]
    sites = [site.name for site in model.layout.block_sites if any(n != "float16" for n in oracle.damages[site.name])]
    control = control_damages(model, tokens, candidates)
    return {
        "blocks": model.layout.block_count,
        "sites": len(sites),
        "calibration": tokens.description,
        "held_out": held_out.description,
        "oracle_sequences": oracle.block_scores[0].n,
        "agreement": {
            CONTROL: agreement(control, oracle, sites),
            **{name: agreement(damages_of(table, sites), oracle, sites) for name, table in tables.items()},
        },
        "block_agreement": {name: block_agreement(table, oracle) for name, table in tables.items()},
        "depth": {name: depth_profile(table.block_scores) for name, table in tables.items()},
        "block_scores": {
            name: [[score.value, score.stderr, score.n] for score in table.block_scores]
            for name, table in tables.items()
        },
        "cpu_seconds": seconds,
    }


def control_damages(model: LoadedModel, tokens: TokenSet, candidates: dict) -> dict[int, list[float]]:
    """What the score has to beat: the same rule with every block's score equal."""
    chosen = integer_formats(candidates, model.layout)
    errors = relative_errors(model, pick_sequences(tokens, 32), chosen, "output", ignore_progress)
    names = [site.name for site in model.layout.block_sites]
    return {bits: [by_bits(errors[name])[bits] for name in names] for bits in BITS}


def by_bits(row: dict[str, float]) -> dict[int, float]:
    """Format name -> value, as code bits -> value; group sizes differ where 64 does not divide a row."""
    return {QuantFormat.parse(name).code_bits: value for name, value in row.items()}


def damages_of(table: SensitivityTable, sites: list[str]) -> dict[int, list[float]]:
    rows = [by_bits({name: damage.value for name, damage in table.damages[site].items()}) for site in sites]
    return {bits: [row[bits] for row in rows] for bits in BITS}


def agreement(found: dict[int, list[float]], oracle: SensitivityTable, sites: list[str]) -> dict[str, float]:
    """Spearman over sites at each width and over all pairs, and the typical ratio to the oracle and its spread."""
    truth = damages_of(oracle, sites)
    result = {f"spearman_{bits}_bits": correlate(found[bits], truth[bits]) for bits in BITS}
    flat, flat_truth = (np.concatenate([np.array(values[bits]) for bits in BITS]) for values in (found, truth))
    result["spearman_all_pairs"] = correlate(flat, flat_truth)
    ratios = np.log(np.maximum(found[4], 1e-300) / np.maximum(truth[4], 1e-300))
    result["median_ratio_4_bits"] = float(np.exp(np.median(ratios)))
    for bits in BITS:
        result[f"sum_ratio_{bits}_bits"] = float(np.sum(found[bits]) / np.sum(truth[bits]))
    return result


def correlate(first, second) -> float:
    value = float(spearmanr(first, second).statistic) if len(set(first)) > 1 else math.nan
    return round(value, 4)


def block_agreement(table: SensitivityTable, oracle: SensitivityTable) -> float:
    return correlate([score.value for score in table.block_scores], [score.value for score in oracle.block_scores])


def depth_profile(scores: tuple[BlockScore, ...]) -> dict[str, object]:
    """Mean score of the first 30 %, the middle and the last 30 % of the blocks, relative to the mean of all.

    The standard errors of blocks are combined as if independent; they share the text, so this is a rough guide. An end
    counts as more sensitive where it exceeds the middle by more than two standard errors of the difference.
    """
    count = len(scores)
    end = max(1, round(0.3 * count))
    parts = {"first": scores[:end], "middle": scores[end : count - end], "last": scores[count - end :]}
    overall = sum(score.value for score in scores) / count or 1.0
    means = {name: sum(score.value for score in part) / len(part) / overall for name, part in parts.items()}
    errors = {
        name: math.sqrt(sum((score.stderr or 0.0) ** 2 for score in part)) / len(part) / overall
        for name, part in parts.items()
    }
    above = {
        name: means[name] - means["middle"] > 2 * math.hypot(errors[name], errors["middle"])
        for name in ("first", "last")
    }
    verdict = {(True, True): "both ends", (True, False): "first only", (False, True): "last only"}.get(
        (above["first"], above["last"]), "neither"
    )
    return {"means": means, "stderr": errors, "blocks_per_end": end, "more_sensitive": verdict}


def write_tables(results: dict) -> None:
    lines = []
    for label, model in results["models"].items():
        lines += agreement_table(label, model)
    lines += depth_table(results["models"])
    page = PAGE.read_text(encoding="utf-8")
    start, end = (
        "<!-- begin benchmarks/sensitivity_agreement.py -->",
        "<!-- end benchmarks/sensitivity_agreement.py -->",
    )
    head, _, rest = page.partition(start)
    tail = rest.partition(end)[2]
    PAGE.write_text(head + start + "\n\n" + "\n".join(lines) + "\n" + end + tail, encoding="utf-8")


def agreement_table(label: str, model: dict) -> list[str]:
    lines = [
        f"**{label}** ({model['sites']} sites in {model['blocks']} blocks; oracle on {model['oracle_sequences']} "
        "held-out sequences)",
        "",
        "| method | 2 bit | 3 bit | 4 bit | 8 bit | all pairs | blocks | ratio at 4 bit | level: 2, 4, 8 bit | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in model["agreement"].items():
        if name == ORACLE:
            continue
        cells = [show(row[f"spearman_{bits}_bits"]) for bits in BITS] + [show(row["spearman_all_pairs"])]
        blocks = model["block_agreement"].get(name)
        cells.append("" if blocks is None else show(blocks))
        absolute = name.startswith(("TDMPQ", "path", "sketch")) and "input" not in name
        cells.append(f"{row['median_ratio_4_bits']:.2f}" if absolute else "")
        levels = [row.get(f"sum_ratio_{bits}_bits") for bits in (2, 4, 8)]
        cells.append(", ".join(f"{level:.2f}" for level in levels if level is not None) if absolute else "")
        cells.append(f"{model['cpu_seconds'][name]:.0f}" if name in model["cpu_seconds"] else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"The oracle itself took {model['cpu_seconds'][ORACLE]:.0f} CPU seconds.", ""]
    return lines


def show(value: float) -> str:
    return "constant" if math.isnan(value) else f"{value:.2f}"


def depth_table(models: dict) -> list[str]:
    names = [ORACLE, "CMPQ", "PMPQ", "TDMPQ"]
    lines = [
        "Mean block score of the first 30 % / middle / last 30 %, relative to the mean of all blocks (standard error):",
        "",
        "| model | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for label, model in models.items():
        cells = []
        for name in names:
            profile = model["depth"][name]
            means = " / ".join(
                f"{profile['means'][part]:.2f} ({profile['stderr'][part]:.2f})" for part in ("first", "middle", "last")
            )
            cells.append(f"{means}: {profile['more_sensitive']}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="labels to measure (default: all that are found)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="others stay as they are")
    parser.add_argument("--oracle-sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="measure again what the results already hold")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    results: dict = {"models": {}}
    for subject in find_subjects(options.models):
        found = measure_subject(subject, options.oracle_sequences, options.methods)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else results
        before = results["models"].get(subject.label, {})
        results["models"][subject.label] = {
            key: {**before.get(key, {}), **value} if isinstance(value, dict) else value for key, value in found.items()
        }
        results["versions"], results["threads"] = installed_versions(), options.threads
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results)


if __name__ == "__main__":
    main()
