"""What `--method` of `cptquant adapt` can be."""

from dataclasses import dataclass

from cptquant.adaptation.logit_swap import LossShape
from cptquant.core.errors import UserError


@dataclass(frozen=True)
class AdaptationMethod:
    """What is mixed and what is learned.

    Attributes:
        general, chat: whether general text and chat data (instructions, preferences) belong to the mixture.
        ratio: default of `--ratio`. distil_weight: default lam; None where there is no teacher at all.
        swap: exchange the teacher's logits of gold and maximum.
    """

    sentence: str
    general: bool
    chat: bool
    ratio: float
    distil_weight: float | None
    swap: bool = True

    def shape(self, distil_weight: float | None, temperature: float) -> LossShape:
        """The loss with a person's weight, or the method's own."""
        weight = self.distil_weight if distil_weight is None else distil_weight
        return LossShape(weight or 0.0, temperature, self.swap)


METHODS = {
    "mix-cpt": AdaptationMethod("knowledge mixture with logit swap self-distillation", True, True, 0.5, 0.5),
    "kl": AdaptationMethod("the same with plain distillation, no swap", True, True, 0.5, 0.5, swap=False),
    "replay": AdaptationMethod("continued pre-training on domain and general text", True, False, 0.5, None),
    "cpt": AdaptationMethod("continued pre-training on the domain alone", False, False, 1.0, None),
}


def find_method(name: str) -> AdaptationMethod:
    """The method of a name.

    Raises:
        UserError: unknown.
    """
    if name not in METHODS:
        raise UserError(f"--method {name!r} is unknown; choose one of: {', '.join(METHODS)}")
    return METHODS[name]
