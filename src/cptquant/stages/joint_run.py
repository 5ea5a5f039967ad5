"""Carry a point of a joint plan out: train its run, and judge what was written beside what was predicted."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cptquant.core.artifact import write_whole
from cptquant.core.joint import JointPlan, JointPoint, Measured
from cptquant.core.mixture import check_epochs
from cptquant.core.sweep import GENERAL
from cptquant.models.load import load_any, load_model
from cptquant.stages.joint_plan import PlanRequest, open_finished, planned_texts
from cptquant.stages.sweep_point import ADAPTED, RunChoice, choice_mixture, train_point
from cptquant.stages.sweep_task import judge_on, load_windows

_CALIBRATION_WINDOWS = 2048


@dataclass(frozen=True)
class Adapted:
    """A point after its training.

    Attributes:
        folder: of this run; the model is in `model`. calibration: text of its mixture, for quantizing.
        seconds: of the training. tokens: that it really read, in whole steps.
    """

    folder: Path
    calibration: Path
    tokens: int
    seconds: float

    @property
    def model(self) -> Path:
        """Hugging Face folder of the adapted model."""
        return self.folder / ADAPTED


def adapt_point(request: PlanRequest, plan: JointPlan, point: JointPoint) -> Adapted:
    """Train a point's run as the sweep trains its runs, up to one anneal, and keep the model.

    Goes on where a killed call stopped; a finished one is not trained again.
    """
    sweep, domain = open_finished(request.sweep, plan.domain)
    texts = planned_texts(request, sweep, domain)
    choice = RunChoice(
        point.size, domain, point.ratio, point.tokens, request.seed, keep=True, sources=tuple(texts.values())
    )
    mixture = choice_mixture(sweep, choice)
    flags = {domain: "--domain", GENERAL: "--general"}
    check_epochs(mixture.counts(), (request.max_epochs or sweep.record.plan.max_epochs) * 1.01, flags)
    began = time.perf_counter()
    record, folder = train_point(sweep, choice, request.output, point.label.replace(" ", "-"))
    calibration = folder / "calibration.jsonl"
    tokenizer = load_model(folder / ADAPTED).require_tokenizer()
    rows = [tokenizer.decode(mixture[index].input_ids) for index in range(min(len(mixture), _CALIBRATION_WINDOWS))]
    write_whole(calibration, "".join(json.dumps({"text": row}) + "\n" for row in rows).encode())
    return Adapted(folder, calibration, record.tokens, time.perf_counter() - began)


def judge_point(
    request: PlanRequest, plan: JointPlan, point: JointPoint, adapted: Adapted, checkpoint: Path, size_bytes: int
) -> Measured:
    """Losses of what was written and of the adapted model, on the sweep's validation windows."""
    sweep, domain = open_finished(request.sweep, plan.domain)
    held = {name: load_windows(sweep.held(name)) for name in (GENERAL, domain)}
    before = judge_on(load_model(adapted.model).module.float(), held)
    after = before if checkpoint == adapted.model else judge_on(load_any(checkpoint).module.float(), held)
    return Measured(
        label=point.label,
        folder=str(checkpoint),
        tokens=adapted.tokens,
        size_bytes=size_bytes,
        domain_nll=after[domain].value,
        domain_stderr=after[domain].stderr,
        general_nll=after[GENERAL].value,
        general_stderr=after[GENERAL].stderr,
        float_domain_nll=before[domain].value,
        float_general_nll=before[GENERAL].value,
        seconds=adapted.seconds,
    )


def validation_text(request: PlanRequest, plan: JointPlan) -> str | None:
    """Held-out domain text of the sweep (None: embedded); its test part is what a quantized run reports on."""
    sweep, domain = open_finished(request.sweep, plan.domain)
    corpus = sweep.record.plan.domains[domain]
    return None if corpus.is_embedded else corpus.valid
