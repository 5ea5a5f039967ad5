"""The methods of `cptquant recover`, by the names of `--method`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from cptquant.core.errors import UserError
from cptquant.core.recovery import RecoveryRequest
from cptquant.quantizers.blocks.block_ap import BlockAp
from cptquant.quantizers.blocks.block_training import BlockMethod
from cptquant.quantizers.blocks.surrogates import Surrogate
from cptquant.quantizers.blocks.trained_layer import Trains
from cptquant.recovery.clipping import LearnedClipping
from cptquant.recovery.code_steps import CodeSteps
from cptquant.recovery.end_to_end import EndToEnd
from cptquant.recovery.lesson import Weights
from cptquant.recovery.norm_tweaking import NormTweaking
from cptquant.recovery.student import StudentOptions
from cptquant.recovery.training import Schedule

_SCALES = Trains(latent=False)
_MULTIPLIERS = Trains(latent=False, multipliers=True)
_KINDS = (
    EndToEnd("qat", StudentOptions(Trains()), Weights(states=1.0), Schedule(steps=600)),
    EndToEnd("scales", StudentOptions(_SCALES, others=False), Weights(), Schedule(steps=300)),
    EndToEnd("multipliers", StudentOptions(_MULTIPLIERS, others=False), Weights(), Schedule(steps=300)),
    EndToEnd("pv", StudentOptions(_SCALES), Weights(states=1.0), Schedule(steps=600), CodeSteps()),
)
END_TO_END: Mapping[str, EndToEnd] = {method.name: method for method in _KINDS}
"""What `--method` stands for; flags that are given go before it."""

BLOCK_BY_BLOCK: Mapping[str, BlockMethod] = {
    method.flag: method for method in (BlockAp(), LearnedClipping(), NormTweaking())
}
METHODS = (*END_TO_END, *BLOCK_BY_BLOCK)

_OF_LATENTS = ("rounding", "sharpness", "clamp", "gate", "gate_beta", "soft_forward", "latent_rate")


def end_to_end(request: RecoveryRequest) -> EndToEnd:
    """The method with the request's flags in place.

    Raises:
        UserError: a flag that the method has no use for, or a value out of range.
    """
    method = END_TO_END[request.method]
    if request.epochs is not None:
        raise UserError("--epochs belongs to the block-wise methods; give --steps or --time instead")
    if request.method != "qat":
        plain = RecoveryRequest()
        idle = [name for name in _OF_LATENTS if getattr(request, name) != getattr(plain, name)]
        if idle:
            raise UserError(
                f"--{idle[0].replace('_', '-')} belongs to --method qat, which trains latent weights; leave it out of "
                f"--method {request.method}"
            )
    options = replace(
        method.options,
        surrogate=_surrogate(request),
        frozen=request.freeze,
        activation_bits=request.activation_bits,
        others=method.options.others if request.norms is None else request.norms,
    )
    return replace(method, options=options, weights=_weights(method, request), schedule=_schedule(method, request))


_NOT_OF_BLOCKS = (
    "loss", "states", "teacher", "steps", "seconds", "norm_rate", "activation_bits", "norms", "step_rate",
    "gradient_checkpointing",
)  # fmt: skip


def block_by_block(request: RecoveryRequest) -> BlockMethod:
    """The block-wise method with the request's flags in place.

    Raises:
        UserError: a flag that the method has no use for, or a value out of range.
    """
    method, plain = BLOCK_BY_BLOCK[request.method], RecoveryRequest()
    idle = [name for name in _NOT_OF_BLOCKS if getattr(request, name) != getattr(plain, name)]
    if not isinstance(method, BlockAp):
        idle += [name for name in _OF_LATENTS if getattr(request, name) != getattr(plain, name)]
    if idle:
        flag = {"seconds": "time", "norms": "train-norms"}.get(idle[0], idle[0].replace("_", "-"))
        raise UserError(
            f"--{flag} has no meaning for --method {request.method}, which trains block by block on the blocks' own "
            "outputs; leave it out"
        )
    given = {"batch_sequences": request.batch_sequences, "epochs": request.epochs}
    pace = replace(method.pace, seed=request.seed, **{k: v for k, v in given.items() if v is not None})
    if isinstance(method, BlockAp):
        rate = method.latent_rate if request.latent_rate is None else request.latent_rate
        return replace(method, pace=pace, surrogate=_surrogate(request), latent_rate=rate)
    return cast(BlockMethod, replace(cast(Any, method), pace=pace))


def _surrogate(request: RecoveryRequest) -> Surrogate:
    return Surrogate(
        rounding=request.rounding, sharpness=request.sharpness, clamp=request.clamp, gate=request.gate,
        beta=request.gate_beta, soft_forward=request.soft_forward,
    )  # fmt: skip


def _weights(method: EndToEnd, request: RecoveryRequest) -> Weights:
    states = method.weights.states if request.states is None else request.states
    if request.loss == "ce":
        return Weights(kl=0.0, ce=1.0, states=0.0 if request.states is None else states)
    return Weights(kl=1.0, ce=1.0 if request.loss == "both" else 0.0, states=states)


def _schedule(method: EndToEnd, request: RecoveryRequest) -> Schedule:
    given = {
        "steps": request.steps,
        "batch_sequences": request.batch_sequences,
        "latent_rate": request.latent_rate,
        "step_rate": request.step_rate,
        "other_rate": request.norm_rate,
        "gradient_checkpointing": request.gradient_checkpointing,
        "seed": request.seed,
    }
    return replace(method.schedule, **{name: value for name, value in given.items() if value is not None})
