"""SBA, which group of a matrix gets which width (SliM-LLM, arXiv 2405.14917, section 3.2 and equation 4).

Groups of input columns are ranked by mean salience. With p pairs, the p lowest get N-1 bits and the p highest N+1, the
others N, so the average stays N; p is the smallest minimiser of

    KL( softmax(x W' + b) || softmax(x Q_p(W)' + b) ),   p = 0 .. floor(groups / 2)

averaged over the tokens of a sequence, then over sequences. Q_p rounds each group to nearest with one scale a row: no
GPTQ, no scale search.

What we changed, after reading the authors' code: p = 0 and p = groups / 2 are tried; the KL has the direction of the
paper's equation (the code's is reversed, after a clamp at 1e-6); the bias is on both sides (the code leaves it out of
the quantized side); means are over a part of the calibration sequences, and some tokens of each (`Sample`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.packing.segments import group_size
from cptquant.quantizers.slim_scale import ScaleSearch, fit_scale

Ranking = Literal["salience", "magnitude", "random"]
Objective = Literal["kl", "mse"]


@dataclass(frozen=True)
class BitAllocation:
    """Widths of a matrix's groups.

    Attributes:
        widths: bits of each group; they average N. pairs: p.
        scores: mean of the objective for p = 0, 1, ... over sequences, nats a token ("kl") or mean squared output
            error ("mse"). stderrs: of the difference of each score to that of p = 0, over sequences; nan of one.
    """

    widths: tuple[int, ...]
    pairs: int
    scores: tuple[float, ...]
    stderrs: tuple[float, ...]


def widths_for(ranking: Sequence[int], pairs: int, bits: int) -> tuple[int, ...]:
    """Widths with `pairs` groups at either end of a ranking (group numbers, least salient first) moved by one bit."""
    widths = [bits] * len(ranking)
    for group in ranking[:pairs]:
        widths[group] = bits - 1
    for group in ranking[len(ranking) - pairs :]:
        widths[group] = bits + 1
    return tuple(widths)


@torch.no_grad()
def allocate_bits(
    weight: Tensor,  # (out_features, in_features) float32
    bias: Tensor | None,  # (out_features,)
    inputs: Sequence[Tensor],  # per sequence (tokens, in_features) float32
    ranking: Sequence[int],
    fmt: QuantFormat,
    *,
    objective: Objective = "kl",
    importance: Tensor | None = None,  # (in_features,)
) -> BitAllocation:
    """Choose p for a ranking of the groups (least salient first).

    Args:
        importance: round with the scale of least squared error weighed by this; None takes the min-max scale.

    Raises:
        ValueError: no inputs.
    """
    if not inputs:
        raise ValueError("choosing the number of pairs needs inputs")
    size, bits, groups = group_size(fmt), fmt.code_bits, len(ranking)
    narrower, same, wider = (_round(weight, width, size, importance) for width in (bits - 1, bits, bits + 1))
    constant = 0.0 if bias is None else bias.float()
    lengths = [len(tokens) for tokens in inputs]
    tokens = torch.cat(list(inputs)).float()
    reference = tokens @ weight.t() + constant
    output = tokens @ same.t() + constant
    scores = [_score(reference, output, lengths, objective)]
    for pair in range(groups // 2):
        low, high = ranking[pair], ranking[groups - 1 - pair]
        for group, change in ((low, narrower - same), (high, wider - same)):
            columns = slice(group * size, (group + 1) * size)
            output.addmm_(tokens[:, columns], change[:, columns].t())
        scores.append(_score(reference, output, lengths, objective))
    per_sequence = torch.stack(scores)  # (candidates, sequences)
    means = per_sequence.mean(dim=1)
    pairs = int(means.argmin())
    gains = per_sequence - per_sequence[0]
    spread = gains.std(dim=1) / len(lengths) ** 0.5 if len(lengths) > 1 else torch.full_like(means, torch.nan)
    return BitAllocation(widths_for(ranking, pairs, bits), pairs, tuple(means.tolist()), tuple(spread.tolist()))


def _round(weight: Tensor, bits: int, size: int, importance: Tensor | None) -> Tensor:
    """Round to nearest, scales in float32; values float32 (out_features, in_features)."""
    rows, clip = weight.reshape(-1, size), importance is not None
    per_row = None if importance is None else importance.reshape(-1, size).repeat(weight.shape[0], 1)
    search = ScaleSearch(start="search" if clip else "minmax", steps=0, diagonal_importance=clip)
    grid = fit_scale(rows, bits, torch.float32, search, importance=per_row)
    return grid.value(grid.round(rows)).reshape(weight.shape)


def _score(
    reference: Tensor,  # (tokens, out_features)
    output: Tensor,  # (tokens, out_features)
    lengths: Sequence[int],
    objective: Objective,
) -> Tensor:
    """Mean per sequence, (sequences,) float64."""
    if objective == "mse":
        per_token = (output - reference).square().mean(dim=1)
    else:
        log_p = reference.log_softmax(dim=1)
        per_token = (log_p.exp() * (log_p - output.log_softmax(dim=1))).sum(dim=1)
    return torch.stack([part.double().mean() for part in per_token.split(list(lengths))])
