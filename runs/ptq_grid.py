"""Observations of the PTQ law on one model: features first, then every format and method quantized and measured.

    python runs/ptq_grid.py embedded:opt-mini --family opt-mini --work build/ptq_grid
    python runs/ptq_grid.py --collect src/cptquant/laws/data/ptq_observations.csv --work build/ptq_grid

Text: calibration and test splits of the embedded text unless others are given. Features come from calibration text,
losses from test text (32 windows of 256 tokens), quantization as in `cptquant quantize` but from 64 calibration windows.
A uniform plan gives every site the format wherever the target can hold it, as `--allocator uniform` does. Mixed plans
draw a format a site; they hold what a sum over sites has to hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from cptquant.core.forecast import PlanFeatures
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.plan import Plan
from cptquant.core.provenance import installed_versions
from cptquant.core.targets import candidate_formats, find_target
from cptquant.evaluation.evaluate import evaluate
from cptquant.laws.ptq_features import METHODS, ModelNoise, plan_features
from cptquant.laws.ptq_table import PtqObservation, write_observations
from cptquant.models.load import LoadedModel, load_model, read_layout
from cptquant.models.text import TokenSet, load_tokens
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.quantizers.methods import find_quantizer
from cptquant.quantizers.quantize import quantize_sites
from cptquant.sensitivity.model_noise import measure_model_noise

CALIBRATION, TEST, LENGTH, SEED = 64, 32, 256, 0
FORMATS = tuple(
    QuantFormat.parse(name)
    for name in (
        *(f"int{bits}-{group}" for bits in (2, 3, 4) for group in ("g32", "g64", "channel")),
        "int3-g128", "int5-g64", "int6-g64", "int7-g64", "int8-g64",
    )
)  # fmt: skip
MIXED = 3


class Weights(dict[str, QuantizedWeight]):
    """Quantized sites of one plan, as the evaluation reads them."""

    def quantized(self, site_name: str) -> QuantizedWeight | None:
        return self.get(site_name)

    def weight(self, site_name: str) -> torch.Tensor | None:
        return self[site_name].dequantize() if site_name in self else None


def wait_while_quiet() -> None:
    """Somebody is timing something."""
    quiet = os.environ.get("QUIET")
    while quiet and Path(quiet).exists():
        time.sleep(5)


def make_plans(layout: ModelLayout) -> dict[str, dict[str, QuantFormat]]:
    """Uniform plans by format name, those that a smaller group makes equal once, and mixed ones."""
    target = find_target("transformers")
    plans: dict[str, dict[str, QuantFormat]] = {}
    for fmt in FORMATS:
        plan = {site.name: candidate_formats(site, layout, target, [fmt])[0] for site in layout.sites}
        if plan not in plans.values():
            plans[fmt.name] = plan
    draw = random.Random(SEED)
    uniform = list(plans.values())
    for number in range(MIXED):
        lowest = uniform[number * len(uniform) // (2 * MIXED) :]
        plans[f"mixed-{number}"] = {site.name: draw.choice(lowest)[site.name] for site in layout.sites}
    return plans


def measure(model: LoadedModel, plans: dict[str, dict[str, QuantFormat]], calibration: TokenSet, test: TokenSet,
            choices: argparse.Namespace, features: dict[str, dict[str, PlanFeatures]]) -> list[PtqObservation]:  # fmt: skip
    """Quantize and judge every plan by every method."""
    observations: list[PtqObservation] = []
    for name, formats in plans.items():
        wait_while_quiet()
        subjects: dict[str, Weights] = {}
        for method in METHODS:
            plan = Plan.model_construct(formats={site: fmt.name for site, fmt in formats.items()})
            weights = subjects[method] = Weights()
            quantize_sites(
                model, plan, find_quantizer(method), calibration, lambda _i, block, _r, to=weights: to.update(block)
            )
        found = {(m.name, m.subject): m for m in evaluate(model, subjects, test)}
        for method in METHODS:
            kl, rise = (found[kind, method] for kind in ("kl_nats_per_token", "nll_increase_nats_per_token"))
            observation = PtqObservation(
                model=model_name(choices.model), family=choices.family, plan=name, features=features[name][method],
                kl_nats=kl.value, kl_stderr_nats=kl.stderr or 0.0, rise_nats=rise.value,
                rise_stderr_nats=rise.stderr or 0.0, tokens=kl.n,
                original_nll_nats=found["nll_nats_per_token", "original"].value,
            )  # fmt: skip
            observations.append(observation)
            print(f"{observation.model} {name} {method}: taylor {observation.features.taylor_kl_nats:.4f} KL {kl.value:.4f} "
                  f"rise {rise.value:.4f} +- {rise.stderr or 0:.4f}", flush=True)  # fmt: skip
    return observations


def model_name(source: str) -> str:
    """Without the folders of this machine."""
    return source if source.startswith("embedded:") else Path(source).name


def observe(choices: argparse.Namespace) -> None:
    """All of one model, into its own JSON file."""
    path = choices.work / "observations" / f"{model_name(choices.model).replace(':', '-')}.json"
    if path.exists():
        return
    began = time.process_time()
    model = load_model(choices.model)
    texts: dict[str, TokenSet] = {
        split: load_tokens(model, source, split, sequences=count, length=LENGTH, seed=SEED)
        for split, source, count in (
            ("calibration", choices.calibration, CALIBRATION), ("test", choices.eval_text, TEST),
        )
    }  # fmt: skip
    training = Path(choices.model) / "training.json"
    seen = choices.tokens_seen or float(json.loads(training.read_text(encoding="utf-8"))["tokens"])
    plans = make_plans(model.layout)
    noise: ModelNoise = measure_model_noise(model, texts["calibration"], plans, tokens_seen=seen)
    path.parent.mkdir(parents=True, exist_ok=True)
    noise.save(path.with_suffix(".noise"))
    features = {
        name: {method: plan_features(noise, model.layout, plan, method, name) for method in METHODS}
        for name, plan in plans.items()
    }
    took = time.process_time() - began
    observations = measure(model, plans, texts["calibration"], texts["test"], choices, features)
    record = {
        "versions": installed_versions(), "features_cpu_seconds": round(took, 1),
        "cpu_seconds": round(time.process_time() - began, 1), "text": texts["test"].description,
        "calibration": texts["calibration"].description,
        "observations": [observation.model_dump(mode="json") for observation in observations],
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def collect(folder: Path, output: Path) -> None:
    """All models' observations into the shipped table; features are added up anew from the noise that was measured."""
    records: list[dict[str, Any]] = []
    observations: list[PtqObservation] = []
    for path in sorted(folder.glob("*.json")):
        records.append(json.loads(path.read_text(encoding="utf-8")))
        noise = ModelNoise.load(path.with_suffix(".noise"))
        layout = read_layout(noise.model)
        plans = make_plans(layout)
        for row in records[-1]["observations"]:
            features = plan_features(noise, layout, plans[row["plan"]], row["features"]["method"], row["plan"])
            observations.append(PtqObservation.model_validate({**row, "features": features}))
    versions = ", ".join(f"{name} {version}" for name, version in records[0]["versions"].items())
    seconds = sum(record["cpu_seconds"] for record in records)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_observations(
        output,
        observations,
        [
            f"Observations of the PTQ law, made by runs/ptq_grid.sh: {len(records)} models, {len(observations)} rows, "
            f"{seconds:.0f} CPU seconds.",
            f"Versions: {versions}. Seed {SEED}.",
            f"Features: calibration text. Losses: {TEST} test windows of {LENGTH} tokens; nats per token; stderr "
            "clustered by document.",
            "Small models: runs/ptq_grid_models.py. reference-*: general English text beside the project.",
        ],
    )
    print(f"{output}: {len(observations)} rows")


def main() -> None:
    """Observe one model, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--family", default="")
    parser.add_argument("--tokens-seen", type=float, default=None)
    parser.add_argument("--calibration", default=None)
    parser.add_argument("--eval-text", default=None)
    parser.add_argument("--work", type=Path, default=Path("build/ptq_grid"))
    parser.add_argument("--collect", type=Path, default=None)
    choices = parser.parse_args()
    torch.set_num_threads(1)
    if choices.collect is not None:
        collect(choices.work / "observations", choices.collect)
    else:
        observe(choices)


if __name__ == "__main__":
    main()
