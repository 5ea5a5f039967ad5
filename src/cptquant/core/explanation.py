"""Why a plan is as it is: records of `explain`, `what-if` and `diff`."""

from enum import StrEnum
from typing import Literal

from cptquant.core.artifact import Frozen
from cptquant.core.forecast import Interval


class Verdict(StrEnum):
    """What decided the format of a site."""

    PRICE = "price"
    WHOLE_BYTES = "whole_bytes"
    NOT_THE_PRICE = "not_the_price"
    ONLY_CHOICE = "only_choice"
    OUT_OF_SCOPE = "out_of_scope"

    @property
    def sentence(self) -> str:
        """For people."""
        return {
            Verdict.PRICE: "a larger format gains no more a byte than the price, a smaller one loses at least that",
            Verdict.WHOLE_BYTES: "not the price's choice: formats come in whole steps, this one uses the bytes left",
            Verdict.NOT_THE_PRICE: "the price would choose otherwise: edited, or made by an allocator that reads none",
            Verdict.ONLY_CHOICE: "the target allows nothing else",
            Verdict.OUT_OF_SCOPE: "outside the budget's scope, kept in 16 bits",
        }[self]


class FormatOffer(Frozen):
    """One format a site (with the sites tied to it) could have.

    Attributes:
        formats: of the group's sites, in its order. size_bytes, damage: of the whole group.
        gain_per_byte: damage avoided per byte from the chosen format to this one if it is larger; damage added per byte
            saved if it is smaller; None for the chosen one, or at equal bytes.
        chosen: whether the plan has it. at_price: whether it minimises damage + price x bytes.
    """

    formats: tuple[str, ...]
    size_bytes: int
    damage: float
    gain_per_byte: float | None
    chosen: bool
    at_price: bool


class Restriction(Frozen):
    """A requested format that a site did not get as it was asked for.

    Attributes:
        held: what takes its place there; None where the format is left out.
        reason: the rule, in words.
    """

    site: str
    requested: str
    held: str | None
    reason: str


class SiteExplanation(Frozen):
    """One site, or several that must share a format.

    Attributes:
        sites: chosen together. shared: why, if more than one. offers: from few bytes to many.
    """

    sites: tuple[str, ...]
    shared: str
    offers: tuple[FormatOffer, ...]
    verdict: Verdict
    restrictions: tuple[Restriction, ...]

    @property
    def chosen(self) -> FormatOffer:
        """What the plan has."""
        return next(offer for offer in self.offers if offer.chosen)


class NextStep(Frozen):
    """The best use of further bytes: the change that avoids most damage per byte."""

    sites: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    more_bytes: int
    gain: float
    gain_per_byte: float


class PlanExplanation(Frozen):
    """Result of `explain`.

    Attributes:
        price_per_byte: the budget's Lagrange multiplier: damage that one byte more would avoid at the relaxed optimum;
            None where no plan meets the limit.
        slack_bytes: left unused; negative where an edited plan exceeds its limit. damage: of the plan.
        least_damage: of the exact knapsack's plan under the same limit; None where no plan meets it.
        next_step: None if every site has its best format. groups: in the layout's order.
    """

    budget: str
    target: str
    allocator: str
    scope: Literal["file", "sites"]
    damage_unit: str
    sensitivity_method: str
    limit_bytes: int
    counted_bytes: int
    slack_bytes: int
    damage: float
    least_damage: float | None
    price_per_byte: float | None
    predicted: Interval | None
    next_step: NextStep | None
    groups: tuple[SiteExplanation, ...]
    notes: tuple[str, ...]


class SiteChange(Frozen):
    """One site whose format differs between two plans. Bytes are the site's own under each plan's target; None for an
    embedding and a head that are one tensor."""

    site: str
    before: str
    after: str
    bytes_before: int | None
    bytes_after: int | None


class PlanSummary(Frozen):
    """One of two plans that are compared.

    Attributes:
        predicted: loss with its 90 % band; None where nothing calibrates the damage. measured: on held-out text, with
            its standard error and n; None if it was not quantized.
    """

    label: str
    budget: str
    target: str
    size_bytes: int
    site_bytes: int
    bits_per_weight: float
    bits_per_weight_sites: float
    damage: float | None
    damage_unit: str | None
    predicted: Interval | None
    measured: float | None = None
    measured_stderr: float | None = None
    measured_n: int | None = None


class PlanComparison(Frozen):
    """Result of `diff` and of `what-if`: before and after.

    Attributes:
        measure: name of the loss. changes: sites whose formats differ, in the layout's order.
        ratio: predicted loss of `after` over `before`, with its 90 % band; None where nothing is known.
    """

    measure: str
    before: PlanSummary
    after: PlanSummary
    changes: tuple[SiteChange, ...]
    ratio: Interval | None
    notes: tuple[str, ...] = ()
