"""Training with a constant rate and branches: the trunk of a sweep's run, and the short anneals that leave it.

Losses in the middle of a run whose rate decays are not those of a shorter run, so no law can be fitted to them
together. Here the rate stays constant after a short warm-up, and at every evaluation point a copy of model and
optimizer leaves the trunk and lets the rate fall linearly to zero over the last `anneal` share of its D tokens. The
annealed copy is what a run of D tokens with a warm-up-stable-decay schedule ends with, to the bit: it is evaluated and
thrown away, and the trunk goes on from where the copy left. So all points of all runs have the same state of their
schedule, at the cost of the anneals alone.

The loop is our own because a branch needs model and optimizer side by side, and its state has to be the same wherever
the run was interrupted; it is data parallel where torchrun started it (every process takes its part of each batch, and
gradients are summed).
"""

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from cptquant.adaptation.mixture import Mixture
from cptquant.core.artifact import output_error
from cptquant.core.sweep import EvaluationPoint, learning_rate
from cptquant.models.arithmetic import coarse_products
from cptquant.models.losses import IGNORED
from cptquant.models.processes import is_first, process_count
from cptquant.models.training_checkpoints import Diverged

_BETAS, _CLIP = (0.9, 0.95), 1.0
_STATE = "trunk.safetensors"
_STEP = "step"


@dataclass(frozen=True)
class TrunkSettings:
    """How a trunk is trained.

    Attributes:
        batch: windows of a step. peak_rate: of AdamW (betas 0.9 and 0.95, gradients clipped to norm 1).
        warm_up: steps. weight_decay: of matrices; vectors have none. save_steps: how often the state is kept between
            branches, 0 for never.
    """

    batch: int
    peak_rate: float
    warm_up: int
    weight_decay: float
    save_steps: int = 0


class Trunk:
    """A model in training: weights, moments of AdamW, steps done.

    Args:
        model: float32, changed in place. mixture: step k reads windows k * batch to (k + 1) * batch.
    """

    def __init__(self, model: PreTrainedModel, mixture: Mixture, settings: TrunkSettings) -> None:
        self.model, self.mixture, self.settings, self.step = model, mixture, settings, 0
        self.device = next(model.parameters()).device
        trained = dict(model.named_parameters())  # a tied tensor once
        matrices = [p for p in trained.values() if p.dim() > 1]
        vectors = [p for p in trained.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=settings.peak_rate, betas=_BETAS, fused=True
        )

    def run_to(
        self, last_step: int, branch_step: int | None = None, told: Callable[[int], None] = lambda step: None
    ) -> None:
        """Train until `last_step` steps are done; from `branch_step` on the rate falls to zero at `last_step`.

        Raises:
            Diverged: the loss or the norm of the gradient is no number.
        """
        settings = self.settings
        while self.step < last_step:
            rate = learning_rate(self.step, settings.peak_rate, settings.warm_up, branch_step, last_step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
            if not (bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))):
                raise Diverged(
                    f"training stopped at step {self.step + 1}: loss {float(loss):.4g}, gradient norm "
                    f"{float(norm):.4g} at rate {rate:.3g}; lower learning_rate or raise warm_up"
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            told(self.step)

    def branch(self) -> "Trunk":
        """A copy that goes its own way."""
        other = Trunk(copy.deepcopy(self.model), self.mixture, self.settings)
        other.load_state_(self.state())
        return other

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and step, by name; copies."""
        found = {_STEP: torch.tensor(self.step)}
        for name, parameter in self.model.named_parameters():
            found[f"weight.{name}"] = parameter.detach().clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{key}.{name}"] = cast(Tensor, value).detach().clone()
        return found

    def load_state_(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.step = int(state[_STEP])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[f"weight.{name}"])
                moments = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
                if moments["step"] in state:
                    self.optimizer.state[parameter] = {
                        key: state[where].clone().to(self.device) for key, where in moments.items()
                    }

    def _backward(self) -> Tensor:
        """Gradient of the mean loss over the counted tokens of this step's windows; that loss."""
        batch, processes = self.settings.batch, process_count()
        first = self.step * batch
        windows = [self.mixture[index] for index in range(first, first + batch)]
        counted = sum(int((window.labels[1:] != IGNORED).sum()) for window in windows)
        mine = windows[int(os.environ.get("RANK", "0")) :: processes]
        ids, labels = self._stack([w.input_ids for w in mine]), self._stack([w.labels for w in mine])
        positions = [window.position_ids for window in mine if window.position_ids is not None]
        given = {"position_ids": self._stack(positions)} if positions else {}
        with _fast(self.device):
            logits = self.model(input_ids=ids, use_cache=False, **given).logits
        total = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = total / counted
        loss.backward()
        loss = loss.detach()
        if processes > 1:
            loss = self._sum_over_processes(loss)
        return loss

    def _stack(self, rows: list[NDArray[np.int64]]) -> Tensor:
        return torch.stack([torch.from_numpy(row) for row in rows]).to(self.device)

    def _sum_over_processes(self, loss: Tensor) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[0]


def _fast(device: torch.device) -> AbstractContextManager[object]:
    """Products of bfloat16 where the processor has them; weights, sums and the loss stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else coarse_products()


def run_trunk(
    trunk: Trunk,
    points: tuple[EvaluationPoint, ...],
    folder: Path,
    judge: Callable[[int, PreTrainedModel], None],
    *,
    finished: Callable[[int], bool] = lambda index: False,
    told: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Train a trunk with an anneal at every point, and hand each annealed model to `judge`.

    The trunk's state is kept in `folder` before every anneal (and every `save_steps`), so a killed run goes on from its
    last point with the same result, bit for bit on the same kind of machine. Its last state is removed at the end.

    Args:
        judge: called with the index of the point and the model; keeps what it finds before it returns.
        finished: whether a point stands already. told: called with the steps done, anneals included.

    Raises:
        Diverged: the loss is no number. OutputError: the folder cannot be written.
    """
    left = [index for index in range(len(points)) if not finished(index)]
    if not left:
        return
    _load(trunk, folder, points[left[0]].branch_step)
    for index in left:
        point = points[index]
        _run_saving(trunk, point.branch_step, folder, told)
        _save(trunk, folder)
        branch = trunk.branch() if index != left[-1] else trunk  # nobody needs the trunk after its last point
        branch.run_to(point.last_step, point.branch_step, told)
        judge(index, branch.model)
    if is_first():
        (folder / _STATE).unlink(missing_ok=True)


def _run_saving(trunk: Trunk, last_step: int, folder: Path, told: Callable[[int], None]) -> None:
    every = trunk.settings.save_steps
    while trunk.step < last_step:
        stop = last_step if every <= 0 else min(last_step, (trunk.step // every + 1) * every)
        trunk.run_to(stop, None, told)
        if stop < last_step:
            _save(trunk, folder)


def _save(trunk: Trunk, folder: Path) -> None:
    if not is_first():
        return
    partial = folder / (_STATE + ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in trunk.state().items()}, partial)
        partial.replace(folder / _STATE)
    except (OSError, SafetensorError) as error:
        raise output_error(folder, error) from None


def _load(trunk: Trunk, folder: Path, furthest: int) -> None:
    """Take up the kept state, unless it lies beyond the first point that is left (its record was removed)."""
    try:
        state = load_file(folder / _STATE)
    except (OSError, SafetensorError):  # none, or one that was damaged: from the beginning, with the same result
        return
    if int(state[_STEP]) <= furthest:
        trunk.load_state_(state)
