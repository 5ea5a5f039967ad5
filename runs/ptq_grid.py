"""Observations of the PTQ law on some models: features first, then every format and method quantized and measured.

    python runs/ptq_grid.py embedded:opt-mini --work build/ptq_grid
    python runs/ptq_grid.py embedded:opt-mini --methods "gptq + own text" --work build/ptq_grid   # only what is new
    python runs/ptq_grid.py --collect src/cptquant/laws/data/ptq_observations.csv --work build/ptq_grid

Text: calibration and test splits of the embedded text unless others are given. Features come from calibration
text, losses from test text (32 windows of 256 tokens), quantization as in `cptquant quantize`: GPTQ from 32 calibration
windows, with own text from 128 and the 256 that the model writes, which is the default of small models.
Collecting keeps the table's rows of what $WORK has not observed, digit for digit.
A uniform plan gives every site the format wherever the target can hold it, as `--allocator uniform` does. Mixed plans
draw a format a site; they hold what a sum over sites has to hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cptquant.core.forecast import FITTED_OWN_TEXT, METHODS, Method, PlanFeatures
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.provenance import installed_versions
from cptquant.evaluation.evaluate import evaluate
from cptquant.laws.ptq import fit_ptq_law
from cptquant.laws.ptq_features import ModelNoise, plan_features
from cptquant.laws.ptq_table import PtqObservation, read_observations, write_observations
from cptquant.models.corpus import Split
from cptquant.models.load import LoadedModel, load_model, read_layout
from cptquant.models.own_text import join_texts, write_own_text
from cptquant.models.text import TokenSet, load_tokens
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.sensitivity.model_noise import measure_model_noise
from cptquant.stages.predict import uniform_plan

CALIBRATION, TEST, LENGTH, SEED = 32, 32, 256, 0
GIVEN, OWN = 128, FITTED_OWN_TEXT
CORE = ("int3-g64", "int4-g64", "int2-g64", "int3-channel", "int4-channel", "int3-g32", "int6-g64", "int8-g64")
REST = (
    "int2-channel", "int2-g32", "int4-g32", "int3-g128", "int4-g128", "int2-g128", "int5-g64", "int7-g64",
)  # fmt: skip
MIXED, AT_ONCE = 3, 4
TOKENS_SEEN = {"embedded:opt-mini": 8.35e6, "reference-llama": 11.5e6, "reference-opt": 12e6}


class Weights(dict[str, QuantizedWeight]):
    """Quantized sites of one plan, as the evaluation reads them."""

    def quantized(self, site_name: str) -> QuantizedWeight | None:
        """Codes of a site."""
        return self.get(site_name)

    def weight(self, site_name: str) -> torch.Tensor | None:
        """Float32 weight of a site, (out_features, in_features)."""
        return self[site_name].dequantize() if site_name in self else None


def wait_while_quiet() -> None:
    """Somebody is timing something."""
    quiet = os.environ.get("QUIET")
    while quiet and Path(quiet).exists():
        time.sleep(5)


def make_plans(layout: ModelLayout, names: Sequence[str]) -> dict[str, dict[str, QuantFormat]]:
    """Uniform plans by format name, those that a smaller group makes equal once, and mixed ones.

    Mixed plans draw each site from the core formats, the second from 3 bits and more, the third from 4 and more.
    """
    plans: dict[str, dict[str, QuantFormat]] = {}
    for name in names:
        plan = uniform_plan(layout, QuantFormat.parse(name), "transformers")
        if plan not in plans.values():
            plans[name] = plan
    draw = random.Random(SEED)
    core = [QuantFormat.parse(name) for name in CORE]
    for number in range(MIXED):
        allowed = [uniform_plan(layout, fmt, "transformers") for fmt in core if fmt.code_bits >= 2 + number]
        plans[f"mixed-{number}"] = {site.name: draw.choice(allowed)[site.name] for site in layout.sites}
    return plans


def measure(
    model: LoadedModel,
    plans: dict[str, dict[str, QuantFormat]],
    texts: dict[str, TokenSet],
    features: dict[tuple[str, Method], PlanFeatures],
) -> list[PtqObservation]:
    """Quantize plans as `features` names them and judge them beside one pass of the original."""
    subjects: dict[str, Weights] = {}
    for name, method in features:
        formats = {site: fmt.name for site, fmt in plans[name].items()}
        plan = Plan.model_construct(formats=formats, target="transformers")
        weights = subjects[f"{name} {method}"] = Weights()
        quantize_sites(
            model, plan, find_quantizer(method.split()[0]),
            texts["own text" if method.endswith("own text") else "calibration"],
            lambda _index, block, _records, to=weights: to.update(block),
        )  # fmt: skip
    found = {(m.name, m.subject): m for m in evaluate(model, subjects, texts["test"])}
    observations: list[PtqObservation] = []
    for (name, method), row in features.items():
        kl, rise = (found[kind, f"{name} {method}"] for kind in ("kl_nats_per_token", "nll_increase_nats_per_token"))
        source = model_name(model.layout.source)
        observations.append(
            PtqObservation(
                model=source,
                family=source.removesuffix("-early").removesuffix("-last").removeprefix("embedded:"),
                plan=name,
                features=row,
                kl_nats=kl.value,
                kl_stderr_nats=kl.stderr or 0.0,
                rise_nats=rise.value,
                rise_stderr_nats=rise.stderr or 0.0,
                original_nll_nats=found["nll_nats_per_token", "original"].value,
                tokens=kl.n,
            )
        )
        print(
            f"{source} {name} {method}: taylor {row.taylor_kl_nats:.4f} KL {kl.value:.4f} rise {rise.value:.4f} "
            f"± {rise.stderr or 0:.4f}",
            flush=True,
        )
    return observations


def model_name(source: str) -> str:
    """Without the folders of this machine."""
    return source if source.startswith("embedded:") else Path(source).name


def observe(source: str, choices: argparse.Namespace) -> None:
    """One model: noise of what is missing, then a file for every few plans."""
    folder: Path = choices.work / "observations" / model_name(source).replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    layout = read_layout(source)
    plans = make_plans(layout, CORE if choices.core else (*CORE, *REST))
    known = {(name, row["features"]["method"]) for name, rows in _observed(folder).items() for row in rows}
    missing = [(name, method) for name in plans for method in choices.methods if (name, method) not in known]
    if not missing:
        return
    wait_while_quiet()
    model = load_model(source)
    texts = _texts(model, choices)
    noise = _noise(folder / "noise.json", model, texts["calibration"], plans, _tokens_seen(source))
    for start in range(0, len(missing), AT_ONCE):
        wait_while_quiet()
        began, part = time.process_time(), missing[start : start + AT_ONCE]
        features = {(name, method): plan_features(noise, layout, plans[name], method, name) for name, method in part}
        found = measure(model, plans, texts, features)
        record = {
            "versions": installed_versions(), "cpu_seconds": round(time.process_time() - began, 1),
            "observations": [observation.model_dump(mode="json") for observation in found],
        }  # fmt: skip
        path = folder / f"plans-{'-'.join(part[0]).replace(' ', '')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _texts(model: LoadedModel, choices: argparse.Namespace) -> dict[str, TokenSet]:
    """Calibration and test text, and calibration text with what the model writes where a method reads that."""

    def given(split: Split, sequences: int) -> TokenSet:
        source = choices.eval_text if split == "test" else choices.calibration
        return load_tokens(model, source, split, sequences=sequences, length=LENGTH, seed=SEED)

    texts = {"calibration": given("calibration", CALIBRATION), "test": given("test", TEST)}
    if any(method.endswith("own text") for method in choices.methods):
        text = given("calibration", GIVEN)
        texts["own text"] = join_texts(text, write_own_text(model, text, OWN, seed=SEED))
    return texts


def _observed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Plan name -> rows that stand already."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("plans-*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["observations"]:
            rows.setdefault(row["plan"], []).append(row)
    return rows


def _tokens_seen(source: str) -> float:
    training = Path(source) / "training.json"
    if training.exists():
        return float(json.loads(training.read_text(encoding="utf-8"))["tokens"])
    return TOKENS_SEEN[model_name(source)]


def _noise(
    path: Path, model: LoadedModel, tokens: TokenSet, plans: dict[str, dict[str, QuantFormat]], seen: float
) -> ModelNoise:
    """The noise file, with what further plans need added."""
    known = ModelNoise.load(path) if path.exists() else None
    missing = {name: plan for name, plan in plans.items() if known is None or name not in known.landscapes}
    if missing:
        found = measure_model_noise(model, tokens, missing, tokens_seen=seen)
        sites = {} if known is None else known.sites
        landscapes = {} if known is None else known.landscapes
        merged = {name: {**sites.get(name, {}), **found.sites.get(name, {})} for name in {**sites, **found.sites}}
        known = found.model_copy(update={"sites": merged, "landscapes": {**landscapes, **found.landscapes}})
        known.save(path)
    assert known is not None
    return known


def collect(folder: Path, output: Path, methods: Sequence[str]) -> None:
    """All models' observations into the shipped table; features are added up anew from the noise that was measured.

    Rows that stand in the table and were not observed again stay as they are.
    """
    records: list[dict[str, Any]] = []
    observations: list[PtqObservation] = []
    for path in sorted(folder.glob("*/noise.json")):
        noise = ModelNoise.load(path)
        layout = read_layout(noise.model)
        plans = make_plans(layout, (*CORE, *REST))
        records += [json.loads(part.read_text(encoding="utf-8")) for part in path.parent.glob("plans-*.json")]
        for name, rows in _observed(path.parent).items():
            for row in (row for row in rows if row["features"]["method"] in methods):
                features = plan_features(noise, layout, plans[name], row["features"]["method"], name)
                observations.append(PtqObservation.model_validate({**row, "features": features}))
    made = {(row.model, row.plan, row.features.method) for row in observations}
    before = read_observations(output) if output.exists() else ()
    kept = [row for row in before if (row.model, row.plan, row.features.method) not in made]
    observations = [*kept, *observations]
    versions = ", ".join(f"{name} {version}" for name, version in records[0]["versions"].items())
    models = len({observation.model for observation in observations})
    seconds = sum(record["cpu_seconds"] for record in records)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_observations(
        output,
        observations,
        [
            f"Observations of the PTQ law, made by runs/ptq_grid.sh: {models} models, {len(observations)} rows; the "
            f"last {len(made)} in {seconds:.0f} CPU seconds.",
            f"Versions: {versions}. Seed {SEED}.",
            f"Features: calibration text. Losses: {TEST} test windows of {LENGTH} tokens; nats per token; stderr "
            "clustered by document.",
            "Small models: runs/ptq_grid_models.py. reference-*: general English text beside the project.",
        ],
    )
    print(f"{output}: {len(observations)} rows")


def main() -> None:
    """Observe models, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--eval-text", default=None)
    parser.add_argument("--work", type=Path, default=Path("build/ptq_grid"))
    parser.add_argument("--core", action="store_true", help="only the formats that matter most")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, help="how to quantize; which rows to collect"
    )
    parser.add_argument("--collect", type=Path, default=None)
    choices = parser.parse_args()
    torch.set_num_threads(1)
    if choices.collect is not None:
        collect(choices.work / "observations", choices.collect, choices.methods)
        fit_ptq_law(choices.collect).save(choices.collect.with_name("ptq_law.json"))
    for source in choices.models:
        observe(source, choices)


if __name__ == "__main__":
    main()
