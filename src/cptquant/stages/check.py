"""What can be known to be wrong before any compute is spent. Loads no framework."""

import contextlib
from pathlib import Path

from cptquant.allocation.methods import find_allocator
from cptquant.core.engine_memory import parse_memory
from cptquant.core.errors import DataError, MissingEngineError, ModelError, UserError
from cptquant.core.layout import ModelLayout
from cptquant.core.settings import BASELINES, RunSettings
from cptquant.core.targets import find_target
from cptquant.engines.llamacpp_python import find_llamacpp

SENSITIVITY_METHODS = ("cmpq", "pmpq", "tdmpq", "path", "sketch", "ablation")
QUANTIZERS = ("gptq", "rtn", "signround", "block-ap", "kl-rounding")
_LARGEST_SEED = 2**63 - 1
"""Larger ones overflow the frameworks' generators."""
_MOST_OWN_TEXT = 65_536
"""Far beyond what helps; more would fill the memory before it is used."""
TEXTS = ("calibration", "eval_text")


def check_choices(settings: RunSettings, texts: tuple[str, ...] = TEXTS) -> None:
    """Check names, formats, limits and the existence of text files.

    Args:
        texts: fields that name text files to look for; others are ignored.

    Raises:
        UserError: the first thing that is wrong, with what is allowed and the flag.
    """
    if settings.budget is not None and settings.memory is not None:
        raise UserError("--budget and --memory were both given; --memory already decides the bytes of the weights")
    if settings.budget is not None:
        _ = settings.parsed_budget
    if settings.memory is not None:
        parse_memory(settings.memory)
    find_target(settings.target)
    settings.check_formats()
    find_allocator(settings.allocator)
    _check_name("--sensitivity", settings.sensitivity, SENSITIVITY_METHODS)
    if settings.quantizer is not None:
        _check_name("--quantizer", settings.quantizer, QUANTIZERS)
    check_seed(settings.seed)
    if settings.own_text is not None and not 0 <= settings.own_text <= _MOST_OWN_TEXT:
        raise UserError(
            f"--own-text {settings.own_text} is out of range; give the number of sequences, 0 (none) to "
            f"{_MOST_OWN_TEXT}"
        )
    if settings.refine_swaps and settings.memory is not None:
        raise UserError(
            "--refine-swaps keeps the bytes of the weights, not the engine's memory; give --budget instead of "
            "--memory, or leave --refine-swaps out"
        )
    for name in settings.baselines or ():
        _check_name("--baselines", name, BASELINES)
    if "preset" in (settings.baselines or ()) and settings.target != "gguf":
        raise UserError(
            f"--baselines preset compares with llama.cpp's types, and --target {settings.target} is another engine; "
            "leave it out, or use --target gguf"
        )
    for field in TEXTS:
        flag, text = f"--{field.replace('_', '-')}", getattr(settings, field)
        if field in texts and text is not None and not Path(text).exists():
            raise DataError(f"{flag} {text!r} does not exist; give a .txt, a .jsonl or a saved `datasets` folder")


def check_seed(seed: int) -> None:
    """Refuse a seed that not every generator takes.

    Raises:
        UserError: below 0, or above 2**63 - 1.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"--seed {seed} is out of range; give 0 to {_LARGEST_SEED}, e.g. --seed 1")


def check_target(layout: ModelLayout, name: str) -> None:
    """Refuse a model that the target's engine cannot run, as soon as its layout is known.

    Raises:
        ModelError: with what the engine can run. EngineError: an engine was named that is not there or too old; none at
        all is no error.
    """
    refusal = find_target(name).refuse_model(layout)
    if refusal is not None:
        raise ModelError(refusal)
    if name == "gguf":
        with contextlib.suppress(MissingEngineError):
            find_llamacpp()


def _check_name(flag: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise UserError(f"{flag} {name!r} is unknown; choose one of: {', '.join(allowed)}")
