"""Realistic artifacts of runs that never happened, of any depth, for tests of everything that shows them."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from cptquant.core.artifact import digest_json
from cptquant.core.evaluation import EvaluationReport, Measurement
from cptquant.core.forecast import Interval
from cptquant.core.formats import QuantFormat
from cptquant.core.frontier import BudgetPoint, DamageCalibration, Frontier, FrontierVertex, MeasuredLoss
from cptquant.core.layout import KeptTensor, ModelLayout, Role, Site, Task
from cptquant.core.manifest import CheckpointRecord, Manifest, SiteOutcome, SiteRecord
from cptquant.core.plan import Plan, SolverStatus
from cptquant.core.provenance import Provenance
from cptquant.core.sensitivity import BlockScore, Damage, SensitivityTable

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64")
_OPT_ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "up", "down")
_TABLE_UNITS = {
    "tdmpq": "nll_nats_per_token",
    "cmpq": "relative",
    "pmpq": "nll_nats_per_token_times_relative_error",
    "ablation": "kl_nats_per_token",
}
_LLAMA_ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class FakeRun:
    """A run of a model with this shape."""

    source: str = "embedded:opt-mini"
    task: Task = "causal_lm"
    block_count: int = 12
    hidden_size: int = 128
    vocabulary_size: int = 2048
    roles: tuple[Role, ...] = _OPT_ROLES
    shared_head: bool = True
    methods: tuple[str, ...] = ("tdmpq", "cmpq", "pmpq")
    guard_prefers_uniform: bool = False

    @property
    def layout(self) -> ModelLayout:
        sites = [
            Site(
                name=f"model.decoder.layers.{block}.{role}_proj",
                out_features=self.hidden_size * (4 if role in ("up", "gate") else 1),
                in_features=self.hidden_size * (4 if role == "down" else 1),
                block_index=block,
                role=role,
            )
            for block in range(self.block_count)
            for role in self.roles
        ]
        embedding = Site(
            name="model.decoder.embed_tokens", out_features=self.vocabulary_size, in_features=self.hidden_size,
            role="embedding", kind="embedding",
        )  # fmt: skip
        sites.insert(0, embedding)
        if self.task == "causal_lm":
            head = Site(name="lm_head", out_features=self.vocabulary_size, in_features=self.hidden_size, role="head")
            sites.append(head)
        elif self.task == "sequence_classification":
            sites.append(
                Site(name="pooler.dense", out_features=self.hidden_size, in_features=self.hidden_size, role="pooler")
            )
            sites.append(Site(name="classifier", out_features=8, in_features=self.hidden_size, role="head"))
        is_shared = self.shared_head and self.task == "causal_lm"
        width = self.hidden_size
        kept = tuple(
            KeptTensor(name=f"model.decoder.layers.{block}.norm.weight", shape=(width,), stored_bytes=2 * width)
            for block in range(self.block_count)
        )
        weights = sum(site.weight_count for site in sites) - (embedding.weight_count if is_shared else 0)
        parameters = weights + self.block_count * self.hidden_size
        return ModelLayout(
            architecture="OPTForCausalLM" if self.task == "causal_lm" else "BertModel",
            model_type="opt" if self.task == "causal_lm" else "bert",
            task=self.task,
            source=self.source,
            source_digest="ab" * 32,
            source_dtype="float16",
            storage_dtype="float16",
            source_bytes=2 * parameters,
            parameters=parameters,
            block_count=self.block_count,
            hidden_size=self.hidden_size,
            max_positions=512,
            vocabulary_size=self.vocabulary_size,
            sites=tuple(sites),
            shared_head=("model.decoder.embed_tokens", "lm_head") if is_shared else None,
            kept=kept,
            inputs={"model": "ab" * 32},
            provenance=_provenance(0.41, "inspect"),
        )

    def table(self, method: str) -> SensitivityTable:
        layout, draw = self.layout, random.Random(f"{method}{self.block_count}")
        damages: dict[str, dict[str, Damage]] = {}
        scores: list[BlockScore] = []
        for block in range(self.block_count):
            value = (
                self._depth(block)
                * draw.uniform(0.7, 1.4)
                * {"tdmpq": 0.02, "cmpq": 0.3, "pmpq": 0.05}.get(method, 0.01)
            )
            scores.append(BlockScore(block_index=block, value=value, stderr=value * draw.uniform(0.05, 0.2), n=128))
        for site in layout.sites:
            scale = 0.02 if site.block_index is None else scores[site.block_index].value
            scale *= {"down": 2.5, "v": 1.6, "o": 1.2, "k": 0.5, "q": 0.4, "head": 3.0}.get(site.role, 1.0)
            names = ("int8-channel-plain",) if site.kind == "embedding" else FORMATS
            damages[site.name] = {"float16": Damage(value=0.0)}
            for name in names:
                value = scale * draw.uniform(0.8, 1.25) * 4.0 ** (4 - QuantFormat.parse(name).code_bits)
                damages[site.name][name] = Damage(value=value, stderr=value * 0.12, n=128)
        curves: dict[str, dict[str, float]] = {}
        if method == "pmpq":
            curves = {
                f"loss_increase_at_sparsity_{sparsity}": {
                    str(s.block_index): s.value * sparsity**2 * 11 for s in scores
                }
                for sparsity in (0.1, 0.3, 0.5)
            }
        return SensitivityTable(
            method=method,
            unit=_TABLE_UNITS[method],
            damages=damages,
            block_scores=tuple(scores),
            metadata={"rule": "block score × relative output error", "sparsity": 0.3, "ridge": None, "masked": True},
            curves=curves,
            inputs={"layout": layout.digest(), "tokens": "cd" * 32},
            provenance=_provenance(14.2, "measure"),
        )  # fmt: skip

    def plan(self, name: str = "quantized") -> Plan:
        layout, draw = self.layout, random.Random(f"{name}{self.block_count}")
        formats: dict[str, str] = {}
        for site in layout.sites:
            if site.kind == "embedding":
                formats[site.name] = "int8-channel-plain"
            elif name == "uniform":
                formats[site.name] = "int3-g64"
            else:
                share = self._depth(site.block_index or 0) + (0.4 if site.role in ("down", "v", "head") else 0.0)
                level = draw.random() * 1.35 if name == "random" else share * draw.uniform(0.85, 1.15)
                formats[site.name] = FORMATS[min(5, max(0, round(level * 1.1)))] if site.role != "pooler" else "float16"
        parsed = {site: QuantFormat.parse(spelled) for site, spelled in formats.items()}
        size_bytes, site_bytes = layout.plan_bytes(parsed), layout.block_site_bytes(parsed)
        weights = sum(site.weight_count for site in layout.block_sites)
        is_own = name == "quantized"
        return Plan(
            target="transformers",
            allocator="knapsack" if is_own else name,
            budget="4bpw" if is_own else f"{size_bytes} bytes (file), as the plan",
            budget_scope="file",
            limit_bytes=size_bytes + 812,
            formats=formats,
            size_bytes=size_bytes,
            site_bytes=site_bytes,
            bits_per_weight=8 * size_bytes / layout.parameters,
            bits_per_weight_sites=8 * site_bytes / weights,
            sensitivity_method=self.methods[0] if is_own and self.methods else None,
            damage_unit="nll_nats_per_token" if is_own else None,
            predicted_damage=0.0421 if is_own else None,
            status=SolverStatus.OPTIMAL if is_own else SolverStatus.HEURISTIC,
            optimality_gap=0.0 if is_own else None,
            notes=("the embedding is stored by itself because the head has fewer bits",) if is_own else (),
            inputs={"layout": layout.digest(), "budget": "4bpw"},
            provenance=_provenance(0.08, "allocate"),
        )

    def manifest(self, name: str = "quantized") -> Manifest:
        plan, draw = self.plan(name), random.Random(3)
        records: list[SiteRecord] = []
        for index, site in enumerate(self.layout.sites):
            fmt = plan.quant_formats[site.name]
            error = 0.0 if fmt.is_float else 0.6 * 4.0 ** (1 - fmt.code_bits) * draw.uniform(0.6, 1.6)
            outcome = SiteOutcome.KEPT_BY_PLAN if fmt.is_float else SiteOutcome.NOMINAL
            if site.kind == "embedding":
                outcome = SiteOutcome.ROUNDED_TO_NEAREST
            elif index % 31 == 9:
                outcome = SiteOutcome.DEAD_INPUTS
            elif index % 37 == 11:
                outcome = SiteOutcome.RANK_DEFICIENT_HESSIAN_DAMPED
            has_inputs = outcome is not SiteOutcome.ROUNDED_TO_NEAREST
            records.append(
                SiteRecord(
                    site=site.name,
                    format=fmt.name,
                    outcome=outcome,
                    relative_weight_error=error * 1.7,
                    relative_output_error=error * self._depth(site.block_index or 0) * 0.4 if has_inputs else None,
                    damping=0.01 if has_inputs and error else None,
                )
            )
        return Manifest(
            quantizer="gptq",
            settings={"options": "Gptq(damping=0.01)"},
            sites=tuple(records),
            tensor_bytes=plan.size_bytes,
            plan_digest=plan.digest(),
            parameters=self.layout.parameters,
            inputs={"plan": digest_json(dict(plan.formats)), "tokens": "cd" * 32},
            provenance=_provenance(11.7, "quantize"),
        )

    def evaluation(self) -> EvaluationReport:
        layout = self.layout
        own = self.plan("uniform" if self.guard_prefers_uniform else "quantized")
        sizes = {"original": layout.source_bytes, "quantized": own.size_bytes}
        sizes |= {name: self.plan(name).size_bytes for name in ("uniform", "random")}
        measurements = [
            *_quality_measurements(self.task),
            *(
                measurement
                for subject, size_bytes in sizes.items()
                for measurement in _size_measurements(layout, subject, size_bytes)
            ),
        ]
        written = "uniform" if self.guard_prefers_uniform else "quantized"
        verdict = (
            "uniform bits are better, so uniform bits were written"
            if self.guard_prefers_uniform
            else "the plan is no worse, so the plan was written"
        )
        return EvaluationReport(
            measurements=tuple(measurements),
            settings={"text": "embedded text, test split", "sequences": 128, "documents": 41},
            written=written,
            guard=f"KL on validation text: plan 0.0213 ± 0.0006, uniform 0.0341 ± 0.0009 (n = 16320): {verdict}",
            inputs={"plan quantized": digest_json(dict(own.formats)), "tokens": "ef" * 32},
            provenance=_provenance(9.3, "evaluate"),
        )  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Every file of a finished run."""
        folder.mkdir(parents=True, exist_ok=True)
        self.layout.save(folder / "layout.json")
        for index, method in enumerate(self.methods):
            table = self.table(method)
            table.save(folder / f"sensitivity-{method}.json")
            if index == 0:
                table.save(folder / "sensitivity.json")
        self.plan().save(folder / "plan.json")
        self.manifest().save(folder / "manifest.json")
        for name in ("uniform", "random"):
            self.plan(name).save(folder / f"plan-{name}.json")
        self.manifest("uniform").save(folder / "manifest-uniform.json")
        written = self.plan("uniform" if self.guard_prefers_uniform else "quantized")
        CheckpointRecord(
            tensor_bytes=written.size_bytes, header_bytes=7432, files={"model.safetensors": "12" * 32},
            provenance=_provenance(0.6, "quantize"),
        ).save(folder / "checkpoint.json")  # fmt: skip
        self.evaluation().save(folder / "evaluation.json")
        return folder

    def _depth(self, block: int) -> float:
        """High at both ends, as the paper claims."""
        return 0.35 + 1.3 * abs(math.cos(math.pi * (block + 0.5) / self.block_count)) ** 2


def frontier(*, calibrated: bool = True, inside: bool = True) -> Frontier:
    """Five vertices of 1 to 5 MB, the last without damage, and two measured points of three."""
    calibration = DamageCalibration(
        center=0.0, mean=(-0.7, 1.0), covariance=(0.1, 0.0, 0.1), scatter=0.1, degrees=4.0, quantile=2.13,
        damages=(0.03, 0.5), points=2, prior="made",
    )  # fmt: skip

    def predict(damage: float) -> Interval | None:
        return calibration.predict(damage) if calibrated else None

    damages = (1.0, 1 / 8, 1 / 27, 1 / 64, 0.0)
    vertices = tuple(
        FrontierVertex(
            size_bytes=1_000_000 * i, site_bytes=800_000 * i, bits_per_weight=2.0 * i, bits_per_weight_sites=1.9 * i,
            damage=damage, gain_per_byte=damage / 1e6, predicted=predict(damage),
            extrapolated=not calibrated or calibration.extrapolates(damage), changes={f"block.{i}": "int4-g64"},
            plan_digest=str(i),
        )
        for i, damage in enumerate(damages, start=1)
    )  # fmt: skip
    points = tuple(
        BudgetPoint(
            budget=f"{2 * i + 1}bpw", plan_file=f"frontier/plan-{2 * i + 1}bpw.json", plan_digest=str(i),
            size_bytes=1_500_000 * i, site_bytes=1_200_000 * i, bits_per_weight=2.0 * i + 1,
            bits_per_weight_sites=1.9 * i + 1, damage=damage, predicted=predict(damage),
            measured=None if i == 2 else MeasuredLoss(value=damage / 2, stderr=damage / 50, n=16320),
            check=None if i == 2 or not calibrated else Interval(
                value=damage / 2, low=damage / 3, high=damage if inside else damage / 2.5
            ),
        )
        for i, damage in enumerate((0.5, 0.1, 0.03), start=1)
    )  # fmt: skip
    return Frontier(
        model="made<b>", target="transformers", scope="file", sensitivity_method="tdmpq",
        damage_unit="loss_nats_per_token", measure="kl_nats_per_token", quantizer="gptq", text="made text",
        formats=("int2-g64", "int4-g64", "float16"), parameters=4_000_000, block_weights=3_000_000, vertices=vertices,
        points=points, calibration=calibration if calibrated else None,
        provenance=_provenance(1.0, "cptquant frontier made"),
    )  # fmt: skip


def _provenance(seconds: float, command: str) -> Provenance:
    return Provenance(
        versions={"python": "3.11.2", "cptquant": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        command=f"cptquant {command} embedded:opt-mini --budget 4bpw --output runs/first",
        seed=0,
        threads=2,
        wall_seconds=seconds,
        cpu_seconds=seconds * 1.7,
        peak_memory_bytes=812_000_000,
    )


def _quality_measurements(task: Task) -> list[Measurement]:
    found: list[Measurement] = []

    def add(name: str, unit: str, value: float, stderr: float, n: int = 32640) -> None:
        found.append(Measurement(name=name, subject=subject, value=value, unit=unit, n=n, stderr=stderr, note="a note"))

    for subject, harm in {"original": 0.0, "quantized": 1.0, "uniform": 1.6, "random": 3.4}.items():
        if task in ("causal_lm", "masked_lm"):
            nll = 3.1314 + 0.0208 * harm
            add("nll_nats_per_token", "nats/token", nll, 0.0123)
            add("perplexity", "perplexity", math.exp(nll), 0.28)
        elif task == "sequence_classification":
            add("accuracy", "fraction", 0.8123 - 0.004 * harm, 0.0124, n=1000)
        if subject == "original":
            continue
        if task == "causal_lm":
            add("nll_increase_nats_per_token", "nats/token", 0.0208 * harm, 0.00092)
        if task == "encoder":
            add("embedding_cosine", "cosine", 1 - 0.0021 * harm, 0.00007, n=1000)
            add("embedding_cosine_distance", "1 - cosine", 0.0021 * harm, 0.00007, n=1000)
        else:
            per = "example" if task == "sequence_classification" else "token"
            add(f"kl_nats_per_{per}", f"nats/{per}", 0.02134 * harm, 0.00061 * harm)
            add("top1_agreement", "fraction", 0.9412 - 0.01 * harm, 0.0013)
    return found


def _size_measurements(layout: ModelLayout, subject: str, size_bytes: int) -> list[Measurement]:
    values = {
        "weight_bytes": (size_bytes, "bytes"),
        "parameters": (layout.parameters, "weights"),
        "bits_per_weight": (8 * size_bytes / layout.parameters, "bits/weight"),
        "compression_vs_float16": (layout.bytes_at_16_bit / size_bytes, "ratio"),
        "compression_vs_float32": (layout.bytes_at_32_bit / size_bytes, "ratio"),
    }
    return [
        Measurement(name=name, subject=subject, value=value, unit=unit)  # type: ignore[arg-type]
        for name, (value, unit) in values.items()
    ]


OPT = FakeRun()
CLASSIFIER = FakeRun(source="embedded:bert-mini", task="sequence_classification", methods=("cmpq",))
ENCODER = FakeRun(
    source="all-MiniLM-L6-v2", task="encoder", block_count=6, hidden_size=384, vocabulary_size=30522,
    methods=("tdmpq",),
)  # fmt: skip
HUGE = FakeRun(
    source="some-org/large-model-70b", block_count=80, hidden_size=8192, vocabulary_size=128_256, roles=_LLAMA_ROLES,
    shared_head=False, methods=("tdmpq", "cmpq", "pmpq", "ablation"),
)  # fmt: skip
