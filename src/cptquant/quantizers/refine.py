"""The second pass of a quantizer that starts from a finished solution: learn, compare, hand over, say what happened."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from cptquant.core.errors import ArtifactError
from cptquant.core.manifest import LearningRecord, SiteRecord
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource, read_weight
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.kl_rounding import KlRounding, learn_model
from cptquant.quantizers.results import Sink, relative_error


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


def refine_sites(
    model: LoadedModel,
    method: KlRounding,
    tokens: TokenSet,
    first: FinishedSites,
    sink: Sink,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Learn the blocks' sites from a finished first pass and hand everything to `sink`, blocks in order, then the rest.

    Raises:
        DataError: too few sequences. ArtifactError: the first pass is not finished.
    """
    record_of = {record.site: record for record in first.records()}
    absent = [site.name for site in model.layout.sites if site.name not in record_of]
    if absent:
        raise ArtifactError(
            f"the first pass has no record of {absent[0]} ({len(absent)} sites are missing); run the command again"
        )
    learned = learn_model(model, first, method, tokens, progress)
    for index in [*range(model.layout.block_count), None]:
        sites = [site for site in model.layout.sites if site.block_index == index]
        weights: dict[str, StoredWeight] = {}
        records: list[SiteRecord] = []
        for site in sites:
            stored, record = first.quantized(site.name), record_of[site.name]
            found = learned.weights.get(site.name)
            if stored is not None and found is not None:
                original = read_weight(model.module.get_submodule(site.name), site).detach()
                measure = ("divergence of the outputs", learned.held_out_before, learned.held_out_after)
                record = with_learning(record, original, stored, found, measure)
                stored = found
            if stored is not None:
                weights[site.name] = stored
            records.append(record)
        sink(index, weights, records)


def with_learning(
    record: SiteRecord,
    original: Tensor,  # (out_features, in_features), any float dtype
    start: StoredWeight,
    learned: StoredWeight,
    measure: tuple[str, float, float],  # what was minimised; its held-out value before and after
) -> SiteRecord:
    """A record of the first pass, with what learning changed; errors that no longer hold are dropped."""
    changed = float((start.codes != learned.codes).float().mean())
    name, before, after = measure
    learning = LearningRecord(objective=name, held_out_before=before, held_out_after=after, codes_changed=changed)
    if learned is start:
        return record.model_copy(update={"learning": learning})
    error = relative_error(original, learned)
    return record.model_copy(
        update={"learning": learning, "relative_weight_error": error, "relative_output_error": None}
    )
