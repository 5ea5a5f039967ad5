"""The spellings of `--quantizer`."""

from cptquant.core.errors import UserError
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.signround import SignRound

Quantizer = Gptq | Rtn | SignRound | KlRounding

QUANTIZERS: dict[str, Quantizer] = {
    "gptq": Gptq(),
    "rtn": Rtn(),
    "signround": SignRound(),
    "kl-rounding": KlRounding(),
}


def find_quantizer(name: str) -> Quantizer:
    """A quantizer with its default hyper-parameters.

    Raises:
        UserError: no such quantizer.
    """
    if name not in QUANTIZERS:
        raise UserError(f"--quantizer {name!r} is unknown; choose one of: {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


def spelling_of(quantizer: Quantizer) -> str:
    """How `--quantizer` spells a method, whatever its hyper-parameters."""
    return next(name for name, known in QUANTIZERS.items() if type(known) is type(quantizer))
