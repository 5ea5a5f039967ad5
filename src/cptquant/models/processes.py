"""Several processes of one training, as torchrun and accelerate launch start them: the first decides and writes."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from cptquant.core.errors import UserError

Result = TypeVar("Result")


def process_count() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def check_launcher(command: str, reason: str) -> None:
    """Refuse kinds of training that the launcher asks for and that are not done here.

    Args:
        command: which does not do them. reason: why not.

    Raises:
        UserError: with the variable that asks.
    """
    for variable, what in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron"),
    ):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"{variable} asks for {what}, which {command} does not do: {reason}; launch it data parallel "
                "(torchrun, or accelerate launch with --multi_gpu or --multi_cpu)"
            )


def tell(value: object) -> Any:
    """The first process's value, in every process; waits until all have come here."""
    if process_count() == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())
    return cast(list[Any], broadcast_object_list([value]))[0]


def in_turn(make: Callable[[], Result]) -> Result:
    """Call in the first process, then in all others, which find the files that it left."""
    made = make() if is_first() else None
    tell(True)
    return make() if made is None else made
