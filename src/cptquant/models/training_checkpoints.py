"""What trainings share: checkpoints that are whole or not there, and an end where a number is none.

`transformers.Trainer` writes a checkpoint file by file; a mark with the digests of all of them comes last, so that a
training which was killed at any moment goes on from one that is as it was written.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cptquant.core.artifact import output_error
from cptquant.core.written_files import digest_folder, list_damage

_MARK = "progress.json"


class Diverged(Exception):
    """The loss or a gradient is no number any more."""


def check_finite_step(
    loss: Tensor | float, parameters: Iterable[tuple[str, nn.Parameter]], step: int, steps: int
) -> None:
    """Refuse a loss or a gradient that is no number.

    Raises:
        Diverged: with the step and the cause.
    """
    what = "" if bool(torch.isfinite(torch.as_tensor(loss))) else f"the loss is {float(loss)}"
    if not what:
        for name, parameter in parameters:
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad.sum())):
                what = f"the gradient of {name} is not finite"
                break
    if what:
        raise Diverged(f"training stopped at step {step} of {steps}: {what}")


def mark_whole(folder: Path, state: dict[str, Any]) -> None:
    """Write the mark of a whole checkpoint, with what the training wants to know again."""
    # other processes write their generators' states when they get there
    files = {name: digest for name, digest in digest_folder(folder).items() if not name.startswith("rng_state_")}
    partial = folder / (_MARK + ".partial")
    partial.write_text(json.dumps({**state, "files": files}), encoding="utf-8")
    partial.replace(folder / _MARK)


def read_mark(folder: Path) -> dict[str, Any]:
    """What `mark_whole` was given."""
    return dict(json.loads((folder / _MARK).read_text(encoding="utf-8")))


def last_whole(folder: Path) -> Path | None:
    """The latest checkpoint that is whole; later ones, cut short or changed, are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if _is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def _is_whole(folder: Path) -> bool:
    """Whether every recorded file is what was written, by its digest."""
    try:
        return not list_damage(folder, dict(read_mark(folder)["files"]), {})
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Say clearly where a checkpoint could not be written.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise output_error(folder, error) from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):  # how torch.save says that the disk is full
            raise
        raise output_error(folder, OSError(str(error))) from None
