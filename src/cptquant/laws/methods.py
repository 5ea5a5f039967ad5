"""The spellings of laws: `law fit NAME`, `law compare --forms NAME,...`."""

from cptquant.core.errors import UserError
from cptquant.laws.chinchilla import CHINCHILLA
from cptquant.laws.critical_ratio import CRITICAL_RATIO
from cptquant.laws.cross_domain import VARIANTS
from cptquant.laws.dcpt import FORGETTING, INFLECTION, L1, L2, L3, L4, L5
from cptquant.laws.forms import Form
from cptquant.laws.repetition import REPETITION

FORMS: dict[str, Form] = {
    "dcpt": L3,
    "l1": L1,
    "l2": L2,
    "l4": L4,
    "l5": L5,
    "dcpt-inflection": INFLECTION,
    "dcpt-forgetting": FORGETTING,
    "chinchilla": CHINCHILLA,
    "repetition": REPETITION,
    "cmr": CRITICAL_RATIO,
}
"""Laws that are fitted to each loss column by itself."""


def find_form(name: str) -> Form:
    """A law by the name in law.json: of `FORMS`, `l3` for `dcpt`, or a variant of the cross-domain law.

    Raises:
        UserError: no such law.
    """
    known = FORMS | {"l3": L3} | VARIANTS
    if name not in known:
        raise UserError(f"law {name!r} is unknown; choose one of: {', '.join(FORMS)}")
    return known[name]
