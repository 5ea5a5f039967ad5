"""Per site and format: how wrong rounding makes the weight and its output, and how much of that GPTQ would leave."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import Site
from cptquant.core.progress import Progress, ignore_progress
from cptquant.laws.ptq_features import SiteNoise
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian import InputHessians, collect_block_hessians, collect_outer_hessians
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.perturbation import integer_formats, original_weight, perturb
from cptquant.sensitivity.relative_error import embedding_errors
from cptquant.sensitivity.scores import SiteFormats
from cptquant.sensitivity.taylor import Tdmpq


def measure_noise(
    model: LoadedModel,
    tokens: TokenSet,
    formats: SiteFormats,
    *,
    sequences: int = 16,
    known_taylor: Mapping[str, Mapping[str, float]] | None = None,
    progress: Progress = ignore_progress,
) -> dict[str, dict[str, SiteNoise]]:
    """Measure every integer format of every site, one forward and one backward pass for all of them.

    Args:
        model: never changed. tokens: calibration text; all of it serves the input moments, `sequences` of it the
            Taylor expansion. formats: site name -> candidate formats.
        known_taylor: second-order KL of every site and format, where TDMPQ has measured it already.

    Returns:
        Site name -> format name -> noise.
    """
    chosen = integer_formats(formats, model.layout)
    taylor = known_taylor
    if taylor is None:
        method = Tdmpq(sequences=sequences, outside_sequences=sequences)
        damages = method(model, tokens, chosen, progress).damages
        taylor = {name: {fmt: found.value for fmt, found in row.items()} for name, row in damages.items()}
    errors = _Errors(model, chosen)
    errors.run(tokens, progress)
    return {
        name: {
            fmt.name: SiteNoise(**errors.found[name][fmt.name], taylor_kl_nats=taylor[name][fmt.name]) for fmt in row
        }
        for name, row in chosen.items()
    }


class _Errors:
    """One forward pass of the original that sets every rounding error against the second moments of its input."""

    def __init__(self, model: LoadedModel, formats: Mapping[str, tuple[QuantFormat, ...]]) -> None:
        self._model, self._layout, self._formats = model, model.layout, formats
        self.found: dict[str, dict[str, dict[str, float]]] = {}

    def run(self, tokens: TokenSet, progress: Progress) -> None:
        stream = ModelStream(self._model, tokens)
        for index in range(self._layout.block_count):
            block = stream.load_block()
            modules = {n: m for n, m in site_modules(block, self._layout, index).items() if n in self._formats}
            if modules:
                self._take(collect_block_hessians(stream, block, modules), modules)
            stream.advance(block)
            progress("quantization noise", index + 1, self._layout.block_count)
        outside = {name: module for name, module in stream.outer_modules().items() if name in self._formats}
        linear = {n: m for n, m in outside.items() if self._layout.site_by_name[n].kind == "linear"}
        if linear:
            self._take(collect_outer_hessians(stream, linear), linear)
        for name in outside.keys() - linear.keys():
            self._take_embedding(name, tokens)

    def _take(self, hessians: InputHessians, modules: Mapping[str, nn.Module]) -> None:
        diagonals: dict[str, Tensor] = {}
        for name in modules:
            site = self._layout.site_by_name[name]
            if not hessians.has(name):  # the text never reached this site; rounding is judged by the weights alone
                moment = torch.eye(site.in_features)
                diagonal = moment.diagonal()
            else:
                leader, moment = hessians.leader[name], hessians.hessian(name)
                if leader not in diagonals:
                    diagonals[leader] = conditional_moments(moment, Gptq().damping)
                diagonal = diagonals[leader]
            self.found[name] = self._site(site, moment, diagonal)

    def _site(
        self,
        site: Site,
        moment: Tensor,  # (in_features, in_features)
        diagonal: Tensor,  # (in_features,)
    ) -> dict[str, dict[str, float]]:
        weight = original_weight(self._model, site).float()
        norm, power = _sum(weight * weight), _sum((weight @ moment) * weight)
        row: dict[str, dict[str, float]] = {}
        for fmt in self._formats[site.name]:
            change = perturb(weight, fmt, self._layout, Rtn())
            output = max(0.0, _sum((change @ moment) * change))
            compensated = _sum(change.square().sum(dim=0) * diagonal)
            row[fmt.name] = {
                "weight_error": _sum(change * change) / norm if norm else 0.0,
                "output_error": output / power if power > 0 else 0.0,
                "gptq_ratio": min(1.0, compensated / output) if output > 0 else 1.0,
            }
        return row

    def _take_embedding(self, name: str, tokens: TokenSet) -> None:
        site, row = self._layout.site_by_name[name], self._formats[name]
        counts = torch.bincount(tokens.input_ids[tokens.attention_mask.bool()], minlength=site.out_features)
        output = embedding_errors(self._model, site, row, counts)
        plain = embedding_errors(self._model, site, row, torch.ones(site.out_features, dtype=torch.int64))
        self.found[name] = {
            fmt.name: {"weight_error": plain[fmt.name], "output_error": output[fmt.name], "gptq_ratio": 1.0}
            for fmt in row
        }


def conditional_moments(
    moment: Tensor,  # (in_features, in_features): mean of x x'
    damping: float,
) -> Tensor:
    """D_j: second moment of input j left once inputs j+1, j+2, ... are known linearly, (in_features,) float32.

    The squared diagonal of R in R R' = H + damping * mean(diag H) I, R upper triangular. Inputs that are always zero
    get 0.
    """
    diagonal = moment.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        return torch.zeros_like(diagonal)
    mean = float(diagonal[~dead].mean())
    damped = moment.double().clone()
    damped.diagonal().add_(damping * mean)
    damped.diagonal()[dead] = mean  # keeps the factorisation alive; nothing is read from these
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    return torch.where(dead, 0.0, lower.flip(0, 1).diagonal().square().float())


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
