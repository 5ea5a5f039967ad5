"""The second pass of a quantizer that learns the whole model from a finished solution, and hands it over."""

from collections.abc import Callable

from cptquant.core.manifest import SiteRecord
from cptquant.models.load import LoadedModel
from cptquant.models.stream import read_weight
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.first_pass import FinishedSites, finished_records, with_learning
from cptquant.quantizers.kl_rounding import KlRounding, learn_model
from cptquant.quantizers.results import Sink

DIVERGENCE = "divergence of the outputs"
"""The objective in the records of what was learned."""


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
    record_of = finished_records(model, first)
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
                measure = (DIVERGENCE, learned.held_out_before, learned.held_out_after)
                record = with_learning(record, original, stored, found, measure)
                stored = found
            if stored is not None:
                weights[site.name] = stored
            records.append(record)
        sink(index, weights, records)
