"""The spellings of `--sensitivity`."""

from cptquant.core.errors import UserError
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.correlation import Cmpq
from cptquant.sensitivity.path_integral import PathIntegral
from cptquant.sensitivity.pruning import Pmpq
from cptquant.sensitivity.scores import SensitivityMethod
from cptquant.sensitivity.sketch import Sketch
from cptquant.sensitivity.taylor import Tdmpq

METHODS: dict[str, SensitivityMethod] = {
    "cmpq": Cmpq(),
    "pmpq": Pmpq(),
    "tdmpq": Tdmpq(),
    "path": PathIntegral(),
    "sketch": Sketch(),
    "ablation": Ablation(),
}


def find_method(name: str) -> SensitivityMethod:
    """A method with its default hyper-parameters.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        raise UserError(f"--sensitivity {name!r} is unknown; choose one of: {', '.join(METHODS)}")
    return METHODS[name]
