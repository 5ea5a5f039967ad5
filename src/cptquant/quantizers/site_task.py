"""Sites under a plan, one block or one end of the model at a time: what `quantize_sites` does with each."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cptquant.core.errors import UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.manifest import SiteOutcome, SiteRecord
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, read_weight, site_modules, write_weight_
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.first_pass import with_learning
from cptquant.quantizers.gptq import Gptq, GptqResult
from cptquant.quantizers.hessian import InputHessians, Sample, collect_block_hessians, collect_outer_hessians
from cptquant.quantizers.learned_codes import Learnable, LearnedWeight
from cptquant.quantizers.results import Results, Sink, relative_error
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.signround import SignRound, learn_block
from cptquant.quantizers.slim import Slim
from cptquant.quantizers.variables import Variable

BlockWeights = Mapping[str, StoredWeight]
"""The quantized sites of one block, by site name."""

_EMBEDDING_SHARE = 0.1
"""Of the mean diagonal of the head's Hessian, added where the head is the embedding too."""


def shared_matrix(layout: ModelLayout, plan: Plan) -> tuple[str, str] | None:
    """(embedding, head) where the target keeps them one quantized tensor, else None."""
    if layout.shared_head is None or not find_target(plan.target).shares_head(layout):
        return None
    return None if plan.quant_formats[layout.shared_head[0]].is_float else layout.shared_head


def sites_of_block(model: LoadedModel, index: int) -> list[Site]:
    """Sites inside a block, in forward order."""
    return [site for site in model.layout.sites if site.block_index == index]


def outer_sites(model: LoadedModel) -> tuple[list[Site], list[Site]]:
    """Sites outside the blocks, before and after them; the layout lists sites in forward order."""
    sites = model.layout.sites
    first = next(position for position, site in enumerate(sites) if site.block_index is not None)
    entry = [site for site in sites[:first] if site.block_index is None]
    return entry, [site for site in sites[first:] if site.block_index is None]


class SiteTask:
    """What stays the same from block to block; also the stream's source of finished weights."""

    def __init__(
        self,
        model: LoadedModel,
        plan: Plan,
        quantizer: Rtn | Gptq,
        sink: Sink,
        resume: dict[int, BlockWeights],
    ) -> None:
        self._model, self._quantizer, self._sink = model, quantizer, sink
        self._formats = plan.quant_formats
        self._scale_dtype = torch.float16 if model.layout.storage_dtype == "float16" else torch.bfloat16
        self._entry: dict[str, StoredWeight] = {}
        self._shared = shared_matrix(model.layout, plan)
        self.resume = resume
        self.slim = Slim.like(quantizer) if isinstance(quantizer, Gptq) else Slim()

    @property
    def uses_coarse_products(self) -> bool:
        """Whether calibration multiplies in bfloat16."""
        return isinstance(self._quantizer, Gptq) and self._quantizer.coarse_products

    def format_of(self, site: Site) -> QuantFormat:
        """The plan's format of a site."""
        return self._formats[site.name]

    def hand_over(self, index: int | None, results: Results) -> None:
        """Give a finished block to the sink, its records in the layout's order."""
        order = {site.name: position for position, site in enumerate(self._model.layout.sites)}
        self._sink(index, results.weights, sorted(results.records, key=lambda record: order[record.site]))

    # The stream asks here for finished weights.

    def quantized(self, site_name: str) -> StoredWeight | None:
        """Codes of a finished site."""
        block_index = self._model.layout.site_by_name[site_name].block_index
        finished = self._entry if block_index is None else self.resume.get(block_index, {})
        return finished.get(site_name)

    def weight(self, site_name: str) -> Tensor | None:
        """Float32 weight (out_features, in_features) of a finished site."""
        quantized = self.quantized(site_name)
        return None if quantized is None else quantized.dequantize()

    # Quantizing.

    def quantize_entry(self, tokens: TokenSet) -> Results:
        """Sites the hidden states pass before the first block: embeddings, then projections of their width."""
        entry, _ = outer_sites(self._model)
        if self._shared is None:
            results = self.round_all([site for site in entry if site.kind == "embedding"])
        else:
            results = self._quantize_shared(self._shared, tokens)
            others = [site for site in entry if site.kind == "embedding" and site.name != self._shared[0]]
            results.extend(self.round_all(others))
        self._entry.update(results.weights)
        linear = [site for site in entry if site.kind == "linear"]
        if any(not self.format_of(site).is_float for site in linear):
            stream = ModelStream(self._model, tokens, weights=self)
            results.extend(self._apply_gptq_outside(linear, stream))
            self._entry.update(results.weights)
        else:
            results.extend(self.round_all(linear))
        return results

    def quantize_exit(self, stream: ModelStream) -> Results:
        """Sites after the last block: final projections, pooler, head."""
        _, leaving = outer_sites(self._model)
        if self._shared is None:
            return self._apply_gptq_outside(leaving, stream)
        results = self._apply_gptq_outside([site for site in leaving if site.name != self._shared[1]], stream)
        self._share_(results, self._entry[self._shared[0]])
        return results

    def _quantize_shared(self, shared: tuple[str, str], tokens: TokenSet) -> Results:
        """An embedding that is the head as well, by GPTQ for its use as a head.

        The Hessian is that of the original's last hidden states: the quantized ones exist only once the embedding is.
        A multiple of the identity is added for its use as an embedding, where every column counts alike.
        """
        embedding, head = (self._model.layout.site_by_name[name] for name in shared)
        stream = ModelStream(self._model, tokens)
        coarse = self.uses_coarse_products
        with coarse_products(coarse):
            for _ in range(self._model.layout.block_count):
                stream.advance(stream.load_block())
        hessians = collect_outer_hessians(stream, {head.name: stream.outer_modules()[head.name]}, coarse=coarse)
        hessian = hessians.hessian(head.name)
        hessian.diagonal().add_(_EMBEDDING_SHARE * hessian.diagonal().mean())
        return self._apply_gptq_to([embedding], hessian)

    def _share_(self, results: Results, weight: StoredWeight) -> None:
        """The head's entry: the embedding's tensor."""
        assert self._shared is not None
        head = self._model.layout.site_by_name[self._shared[1]]
        results.weights[head.name] = weight
        record = SiteRecord(
            site=head.name,
            format=self.format_of(head).name,
            outcome=SiteOutcome.SHARES_EMBEDDING,
            relative_weight_error=relative_error(self._original(head), weight),
        )
        results.records.append(record)

    def quantize_block(self, index: int, block: nn.Module, stream: ModelStream) -> Results:
        """The sites of one block, in place in `block` (a private copy) as well."""
        modules = site_modules(block, self._model.layout, index)
        sites = sites_of_block(self._model, index)
        wanted = {site.name: modules[site.name] for site in sites if not self.format_of(site).is_float}
        coarse = self.uses_coarse_products
        results = self.apply_gptq(
            sites,
            collect_block_hessians(stream, block, wanted, coarse=coarse, sample=self._sample(sites))
            if wanted
            else None,
        )
        for site in sites:
            if site.name in results.weights:
                write_weight_(modules[site.name], site, results.weights[site.name].dequantize())
        return results

    def learn_(
        self, results: Results, block: nn.Module, stream: ModelStream, targets: list[Tensor], method: SignRound
    ) -> None:
        """Go on from GPTQ's results of a block by SignRound, in `results` and in `block`."""
        layout = self._model.layout
        variables: list[Variable] = []
        for name, module in site_modules(block, layout, stream.block_index).items():
            stored, site = results.weights.get(name), layout.site_by_name[name]
            if isinstance(stored, Learnable):
                learned = LearnedWeight(stored, self._original(site), reach=method.reach)
                variables.append(Variable(site, module, learned))
        learned = learn_block(block, stream, targets, variables, method)
        measure = ("squared error of the block's output", learned.held_out_before, learned.held_out_after)
        for position, record in enumerate(results.records):
            found = learned.weights.get(record.site)
            if found is not None:
                original = self._original(layout.site_by_name[record.site])
                start = results.weights[record.site]
                results.records[position] = with_learning(record, original, start, found, measure)
        results.weights.update(learned.weights)

    def _apply_gptq_outside(self, sites: Sequence[Site], stream: ModelStream) -> Results:
        modules = stream.outer_modules()
        wanted = {site.name: modules[site.name] for site in sites if not self.format_of(site).is_float}
        coarse = self.uses_coarse_products
        if not wanted:
            return self.apply_gptq(sites, None)
        return self.apply_gptq(sites, collect_outer_hessians(stream, wanted, coarse=coarse, sample=self._sample(sites)))

    def _sample(self, sites: Sequence[Site]) -> Sample | None:
        """SBA by the output's divergence or error needs some inputs, not their second moments alone."""
        chooses = self.slim.fixed_pairs is None and self.slim.objective != "finished"
        return Sample() if chooses and any(self.format_of(site).storage == "segments" for site in sites) else None

    def _original(self, site: Site) -> Tensor:
        """The site's weight in the given model, (out_features, in_features), in its own dtype."""
        return read_weight(self._model.module.get_submodule(site.name), site).detach()

    def round_all(self, sites: Sequence[Site]) -> Results:
        """Sites that need no text: kept ones, embeddings, and all of them under round-to-nearest."""
        results = Results()
        for site in sites:
            if self._shared is not None and site.name == self._shared[1]:
                self._share_(results, results.weights[self._shared[0]])
            else:
                self._round(site, results, SiteOutcome.NOMINAL)
        return results

    def apply_gptq(self, sites: Sequence[Site], hessians: InputHessians | None) -> Results:
        """GPTQ on the sites the plan quantizes; those that read the same input in the same format go together."""
        if not isinstance(self._quantizer, Gptq):
            raise TypeError(f"expected a Gptq, got {type(self._quantizer).__name__}")
        results = Results()
        together: dict[tuple[str, QuantFormat], list[Site]] = {}
        for site in sites:
            fmt = self.format_of(site)
            if fmt.is_float:
                self._round(site, results, SiteOutcome.KEPT_BY_PLAN)
            elif hessians is None or not hessians.has(site.name):
                self._round(site, results, SiteOutcome.NO_CALIBRATION_INPUT)
            else:
                together.setdefault((hessians.leader[site.name], fmt), []).append(site)
        if hessians is None:
            return results
        for (leader, fmt), group in together.items():
            if fmt.storage == "segments":
                results.extend(self._apply_slim_to(group, hessians, leader))
            else:
                results.extend(self._apply_gptq_to(group, hessians.hessian(leader)))
        return results

    def _apply_slim_to(self, group: Sequence[Site], hessians: InputHessians, leader: str) -> Results:
        """SliM-LLM on sites that read the same input, one after the other: their widths differ."""
        results = Results()
        hessian, inputs = hessians.hessian(leader), hessians.kept_inputs(leader)
        if self.format_of(group[0]).halves:
            return self._apply_halves_to(group, hessian)
        for site in group:
            weight, bias = self._original(site), self._model.module.get_submodule(site.name).bias
            bias = None if not isinstance(bias, Tensor) else bias.detach().float()
            try:
                found = self.slim(weight, hessian, self.format_of(site), self._scale_dtype, inputs=inputs, bias=bias)
            except UserError as error:
                raise type(error)(f"{site.name}: {error}") from None
            self._keep(site, weight, found, results)
        return results

    def _apply_halves_to(self, group: Sequence[Site], hessian: Tensor) -> Results:
        """Sites that read the same input, with the same columns in either half."""
        results = Results()
        weights = [self._original(site) for site in group]
        try:
            found = self.slim.quantize_together(weights, hessian, self.format_of(group[0]), self._scale_dtype)
        except UserError as error:
            raise type(error)(f"{', '.join(site.name for site in group)}: {error}") from None
        for site, weight, result in zip(group, weights, found, strict=True):
            self._keep(site, weight, result, results)
        return results

    def _apply_gptq_to(self, group: Sequence[Site], hessian: Tensor) -> Results:
        """GPTQ on sites of one format that read the same input."""
        if not isinstance(self._quantizer, Gptq):
            raise TypeError(f"expected a Gptq, got {type(self._quantizer).__name__}")
        results = Results()
        weights = [self._original(site) for site in group]
        try:
            found = self._quantizer.quantize_together(weights, hessian, self.format_of(group[0]), self._scale_dtype)
        except UserError as error:
            raise type(error)(f"{', '.join(site.name for site in group)}: {error}") from None
        for site, weight, result in zip(group, weights, found, strict=True):
            self._keep(site, weight, result, results)
        return results

    def _keep(self, site: Site, weight: Tensor, result: GptqResult, results: Results) -> None:
        results.weights[site.name] = result.weight
        results.records.append(
            SiteRecord(
                site=site.name,
                format=self.format_of(site).name,
                outcome=result.outcome,
                relative_weight_error=relative_error(weight, result.weight),
                relative_output_error=result.relative_output_error,
                damping=result.damping,
            )
        )

    def _round(self, site: Site, results: Results, outcome: SiteOutcome) -> None:
        fmt, weight = self.format_of(site), self._original(site)
        if fmt.is_float:
            outcome = SiteOutcome.KEPT_BY_PLAN
            error = relative_error(weight, torch.float16 if fmt.storage == "float16" else torch.bfloat16)
        else:
            if site.kind == "embedding" and isinstance(self._quantizer, Gptq):
                outcome = SiteOutcome.ROUNDED_TO_NEAREST
            rtn = Rtn(clip_search=self._quantizer.clip_search)
            try:
                quantized = rtn(weight, fmt, self._scale_dtype)
            except UserError as error:
                raise type(error)(f"{site.name}: {error}") from None
            results.weights[site.name] = quantized
            error = relative_error(weight, quantized)
        results.records.append(
            SiteRecord(site=site.name, format=fmt.name, outcome=outcome, relative_weight_error=error)
        )
