"""What a student is trained on: the loss of its predictions, beside the original's or beside the text's own tokens.

    L = w_kl KL(p_teacher || p) + w_ce CE(p) + w_s mean over blocks b of  mean ||h_b - h_b(teacher)||^2 / spread_b

KL to the full-precision teacher is KD-QAT's (arXiv 2403.18159) and DWQ's loss, CE that of EfficientQAT's second phase
(arXiv 2407.11062, section 3.3), the last term a relative of distillation with hidden states (arXiv 1909.10351,
equation 8), as in `quantizers/kl_rounding.py`.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptquant.core.layout import Task
from cptquant.models.arithmetic import coarse_products
from cptquant.models.losses import IGNORED, cosine_distance, pooled_embedding

_TINY = 1e-30


@dataclass(frozen=True)
class Weights:
    """Of the terms of the loss; `kl` is 1 - cosine of the pooled embeddings for a bare encoder."""

    kl: float = 1.0
    ce: float = 0.0
    states: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether the original has to run beside the student."""
        return self.kl > 0 or self.states > 0

    def describe(self) -> str:
        """The loss in words, with its unit."""
        names = {"kl": "KL from the teacher", "ce": "cross-entropy of the text", "states": "distance of hidden states"}
        parts = [
            text if weight == 1 else f"{weight:g} x {text}"
            for name, text in names.items()
            if (weight := getattr(self, name)) > 0
        ]
        return f"{' + '.join(parts)}, nats a token"


class Lesson(nn.Module):
    """A student with its teacher; forward gives the mean loss of a batch.

    Args:
        student: what is trained. teacher: never trained, and no part of this module's parameters.
        coarse: let products round their factors to bfloat16 where that is faster.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, task: Task, weights: Weights, *, coarse: bool) -> None:
        super().__init__()
        self.student = student
        object.__setattr__(self, "teacher", teacher)  # not saved, not wrapped, not moved into an optimizer
        self._task, self._weights, self._coarse = task, weights, coarse

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Mean loss over what is judged: positions of `targets` that are not IGNORED, or rows.

        Args:
            input_ids, attention_mask: (b, T). targets: (b, T) next or hidden tokens, (b,) classes.
        """
        weights = self._weights
        with coarse_products(self._coarse):
            student = self._run(self.student, input_ids, attention_mask)
            teacher = None
            if weights.needs_teacher:
                with torch.no_grad():
                    teacher = self._run(self._teacher_on(input_ids.device), input_ids, attention_mask)
        losses = {"kl": self._divergence(student, teacher, attention_mask, targets)} if weights.kl > 0 else {}
        if weights.ce > 0:
            logits = student.logits.float()
            losses["ce"] = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
        if weights.states > 0:
            assert teacher is not None
            losses["states"] = _state_distance(student.hidden_states, teacher.hidden_states, attention_mask)
        total = sum((getattr(weights, name) * value for name, value in losses.items()), torch.zeros(()))
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def _teacher_on(self, device: torch.device) -> nn.Module:
        """The teacher, beside the student; it is moved once, since no wrapper knows of it."""
        teacher = cast(nn.Module, object.__getattribute__(self, "teacher"))
        first = next(teacher.parameters(), None)
        return teacher if first is None or first.device == device else teacher.to(device)

    def _run(self, module: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return module(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True,
            output_hidden_states=self._weights.states > 0,
        )  # fmt: skip

    def _divergence(self, student: Any, teacher: Any, mask: Tensor, targets: Tensor) -> Tensor:
        if self._task == "encoder":
            before = pooled_embedding(teacher.last_hidden_state.float(), mask)
            return cosine_distance(before, pooled_embedding(student.last_hidden_state.float(), mask)).mean()
        judged = targets != IGNORED if targets.ndim == 2 else torch.ones_like(targets, dtype=torch.bool)
        p = torch.log_softmax(teacher.logits[judged].float(), dim=-1)
        q = torch.log_softmax(student.logits[judged].float(), dim=-1)
        return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1).mean()


def _state_distance(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Mean over blocks of the mean squared distance, in units of the teacher's own spread in this batch."""
    counted = mask.bool()
    total = torch.zeros((), device=mask.device)
    for found, wanted in zip(student[1:], teacher[1:], strict=True):
        reference = wanted[counted].float()
        spread = (reference - reference.mean(dim=0)).square().sum(dim=-1).mean().clamp(min=_TINY)
        total = total + (found[counted].float() - reference).square().sum(dim=-1).mean() / spread
    return total / (len(teacher) - 1)
