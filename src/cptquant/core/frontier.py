"""The trade of size against loss for every budget: exact vertices, a calibrated band, and points that were measured."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.forecast import Interval

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BandPrior(Frozen):
    """What is expected of ln(loss) = intercept + slope (ln damage - center) before a point was measured.

    Attributes:
        intercept_std, slope_std: standard deviations between models. scatter: of ln(loss) around a model's own line.
        degrees: how many residuals the expectation of `scatter` counts for.
        informed: whether it says enough for a band without any measured point.
        source: where it comes from, for people.
    """

    center: float
    intercept: float
    intercept_std: float
    slope: float
    slope_std: float
    scatter: float
    degrees: float
    informed: bool
    source: str


class DamageCalibration(Frozen):
    """From a table's damage to the loss that quantizing really costs: ln(loss) = a + b (ln damage - center) + scatter.

    A Bayesian straight line (normal, inverse gamma): predictions follow Student's t.

    Attributes:
        mean: of (a, b). covariance: of (a, b) over the square of `scatter`: (aa, ab, bb).
        scatter: of ln(loss). quantile: two-sided 90 % quantile of Student's t with `degrees` degrees of freedom.
        damages: smallest and largest damage among the measured points; None without one.
        points: how many were measured. prior: its source.
    """

    LEVEL: ClassVar[float] = 0.9

    center: float
    mean: tuple[float, float]
    covariance: tuple[NonNegative, float, NonNegative]
    scatter: NonNegative
    degrees: float
    quantile: float
    damages: tuple[float, float] | None
    points: int
    prior: str

    def predict(self, damage: float) -> Interval:
        """Loss of a plan with that damage and its 90 % band; 0 for damage 0, which is 16 bits everywhere."""
        if damage <= 0:
            return Interval(value=0.0, low=0.0, high=0.0)
        x = math.log(damage) - self.center
        aa, ab, bb = self.covariance
        width = self.quantile * self.scatter * math.sqrt(1 + aa + 2 * x * ab + x * x * bb)
        return _log_interval(self.mean[0] + self.mean[1] * x, width)

    def change(self, before: float, after: float, shared: float = 0.0) -> Interval:
        """Ratio of the losses of two plans, after over before, with its 90 % band.

        Args:
            shared: share of the larger damage that comes from sites with one format in both plans, 0 to 1. What the
                line misses there it misses in both, so the scatter of the ratio is that of the rest.
        """
        if before <= 0 or after <= 0:
            raise ValueError(f"a ratio needs damages above 0, got {before} and {after}")
        step = math.log(after / before)
        width = self.quantile * self.scatter * math.sqrt(2 * (1 - shared) + step * step * self.covariance[2])
        return _log_interval(self.mean[1] * step, width)

    def extrapolates(self, damage: float) -> bool:
        """Whether the damage lies outside those that were measured."""
        return self.damages is None or not self.damages[0] <= damage <= self.damages[1]


def _log_interval(log_value: float, width: float) -> Interval:
    low, value, high = (math.exp(min(log_value + part, 700.0)) for part in (-width, 0.0, width))
    return Interval(value=value, low=low, high=high)


class FrontierVertex(Frozen):
    """A plan that no mixture of other plans beats: fewest bytes for its damage, least damage for its bytes.

    Attributes:
        size_bytes: the whole file. site_bytes: the blocks' linear sites.
        damage: sum of the table's damages. predicted: the loss, calibrated; None where nothing calibrates it.
        gain_per_byte: damage that each byte of the next vertex's step avoids; 0 at the last one.
        changes: site -> format where it differs from the vertex before; every site at the first one.
        plan_digest: sha256 of the plan's formats.
    """

    size_bytes: int
    site_bytes: int
    bits_per_weight: float
    bits_per_weight_sites: float
    damage: float
    gain_per_byte: float
    predicted: Interval | None
    extrapolated: bool
    changes: dict[str, str]
    plan_digest: str


class MeasuredLoss(Frozen):
    """Held-out loss of one plan that was really quantized: mean over n tokens (or examples), standard error."""

    value: float
    stderr: float | None
    n: int


class BudgetPoint(Frozen):
    """The exact plan of one budget.

    Attributes:
        budget: as written. plan_file: in the run folder. plan_digest: sha256 of the plan's formats.
        predicted: with all measured points, this one included. measured: None where it was not quantized.
        check: what the other measured points predict here; None where it was not measured, or too few were.
    """

    budget: str
    plan_file: str
    plan_digest: str
    size_bytes: int
    site_bytes: int
    bits_per_weight: float
    bits_per_weight_sites: float
    damage: float
    predicted: Interval | None
    measured: MeasuredLoss | None = None
    check: Interval | None = None

    @property
    def inside(self) -> bool | None:
        """Whether the measured loss lies in the band that the other points gave; None where that was not checked."""
        if self.measured is None or self.check is None:
            return None
        return self.check.low <= self.measured.value <= self.check.high


class Frontier(Artifact):
    """Result of `frontier` (frontier.json).

    Attributes:
        scope: what budgets count: the whole file, or the blocks' linear sites.
        damage_unit: of the table. measure: name of the measured loss, e.g. `kl_nats_per_token`.
        text: held-out text of the measured points. formats: candidates beside 16 bits.
        vertices: from few bytes to many. points: the budgets asked for, from few bytes to many.
    """

    SCHEMA: ClassVar[str] = "cptquant.frontier"
    MADE_BY: ClassVar[str] = "cptquant frontier MODEL --output RUN"

    model: str
    target: str
    scope: Literal["file", "sites"]
    sensitivity_method: str
    damage_unit: str
    measure: str
    quantizer: str
    text: str
    formats: tuple[str, ...]
    parameters: int
    block_weights: int
    vertices: Annotated[tuple[FrontierVertex, ...], Field(min_length=1)]
    points: tuple[BudgetPoint, ...]
    calibration: DamageCalibration | None

    @property
    def checked(self) -> int:
        """Points whose measured loss was compared with a band from the others."""
        return sum(point.inside is not None for point in self.points)

    @property
    def covered(self) -> int:
        """How many of them lie inside."""
        return sum(point.inside is True for point in self.points)

    def formats_at(self, index: int) -> Mapping[str, str]:
        """Site -> format of a vertex, every site of the layout."""
        formats: dict[str, str] = {}
        for vertex in self.vertices[: index + 1 if index >= 0 else len(self.vertices) + index + 1]:
            formats |= vertex.changes
        return formats
