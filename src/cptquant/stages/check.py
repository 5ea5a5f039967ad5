"""What can be known to be wrong before any compute is spent. Loads no framework."""

from pathlib import Path

from cptquant.allocation.methods import find_allocator
from cptquant.core.errors import DataError, ModelError, UserError
from cptquant.core.layout import ModelLayout
from cptquant.core.settings import BASELINES, RunSettings
from cptquant.core.targets import find_target

SENSITIVITY_METHODS = ("cmpq", "pmpq", "tdmpq", "ablation")
QUANTIZERS = ("gptq", "rtn", "signround", "kl-rounding")


def check_choices(settings: RunSettings) -> None:
    """Check names, formats, budget and the existence of text files.

    Raises:
        UserError: the first thing that is wrong, with what is allowed and the flag.
    """
    if settings.budget is not None:
        _ = settings.parsed_budget
    _ = settings.quant_formats
    find_target(settings.target)
    find_allocator(settings.allocator)
    _check_name("--sensitivity", settings.sensitivity, SENSITIVITY_METHODS)
    _check_name("--quantizer", settings.quantizer, QUANTIZERS)
    for name in settings.baselines or ():
        _check_name("--baselines", name, BASELINES)
    for flag, text in (("--calibration", settings.calibration), ("--eval-text", settings.eval_text)):
        if text is not None and not Path(text).exists():
            raise DataError(f"{flag} {text!r} does not exist; give a .txt, a .jsonl or a saved `datasets` folder")


def check_target(layout: ModelLayout, name: str) -> None:
    """Refuse a model that the target's engine cannot run, as soon as its layout is known.

    Raises:
        ModelError: with what the engine can run.
    """
    refusal = find_target(name).refuse_model(layout)
    if refusal is not None:
        raise ModelError(refusal)


def _check_name(flag: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise UserError(f"{flag} {name!r} is unknown; choose one of: {', '.join(allowed)}")
