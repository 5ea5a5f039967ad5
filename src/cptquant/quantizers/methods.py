"""The spellings of `--quantizer`."""

from cptquant.core.errors import UserError
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.rtn import Rtn

QUANTIZERS: dict[str, Gptq | Rtn] = {"gptq": Gptq(), "rtn": Rtn()}


def find_quantizer(name: str) -> Gptq | Rtn:
    """A quantizer with its default hyper-parameters.

    Raises:
        UserError: no such quantizer.
    """
    if name not in QUANTIZERS:
        raise UserError(f"--quantizer {name!r} is unknown; choose one of: {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
