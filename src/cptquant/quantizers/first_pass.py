"""A finished first pass that learning goes on from, and what learning changes in its records."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.manifest import LearningRecord, SiteRecord
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.results import relative_error


@runtime_checkable
class FinishedSites(QuantizedSource, Protocol):
    """A finished first pass: weights and records of all sites."""

    def records(self) -> list[SiteRecord]:
        """One record a site."""
        ...


class FinishedInMemory:
    """A sink of `quantize_sites` that serves as a finished first pass."""

    def __init__(self) -> None:
        self._weights: dict[str, StoredWeight] = {}
        self._records: list[SiteRecord] = []

    def keep(self, block_index: int | None, weights: dict[str, StoredWeight], records: list[SiteRecord]) -> None:
        """Take a finished block."""
        self._weights.update(weights)
        self._records.extend(records)

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes and scales of a site."""
        return self._weights.get(site_name)

    def weight(self, site_name: str) -> Tensor | None:
        """Float32 (out_features, in_features)."""
        found = self.quantized(site_name)
        return None if found is None else found.dequantize()

    def records(self) -> list[SiteRecord]:
        """All records so far."""
        return self._records


def finished_records(model: LoadedModel, first: FinishedSites) -> dict[str, SiteRecord]:
    """Site -> its record.

    Raises:
        ArtifactError: the first pass is not finished.
    """
    record_of = {record.site: record for record in first.records()}
    absent = [site.name for site in model.layout.sites if site.name not in record_of]
    if absent:
        raise ArtifactError(
            f"the first pass has no record of {absent[0]} ({len(absent)} sites are missing); run the command again"
        )
    return record_of


def with_learning(
    record: SiteRecord,
    original: Tensor,  # (out_features, in_features), any float dtype
    start: StoredWeight,
    learned: StoredWeight,
    measure: tuple[str, float, float],  # what was minimised; its held-out value before and after
    *,
    stopped: str = "",  # why learning ended early
) -> SiteRecord:
    """A record of the first pass, with what learning changed; errors that no longer hold are dropped."""
    changed = float((start.codes != learned.codes).float().mean())
    name, before, after = measure
    learning = LearningRecord(
        objective=name, held_out_before=before, held_out_after=after, codes_changed=changed, stopped=stopped
    )
    if learned is start:
        return record.model_copy(update={"learning": learning})
    error = relative_error(original, learned)
    return record.model_copy(
        update={"learning": learning, "relative_weight_error": error, "relative_output_error": None}
    )
