"""KL sketches: one forward pass for each site and format, kept as a short vector whose products are interactions.

Rounding one site to one format moves the logits z of every scored token by some dz. To second order

    KL(p ‖ q) ~ 1/2 dz' F dz,   F = diag(p) - p p' = A A',   A' dz = sqrt(p) (dz - <p, dz>) =: u

so a change is a vector u of tokens x vocabulary entries, its KL is 1/2 |u|^2, and where changes of several sites add up
in the logits the KL of a plan is

    1/2 |sum_l u_l|^2 = sum_l 1/2 |u_l|^2 + sum_{l < m} <u_l, u_m>

u itself is large; kept is a count sketch of it (Charikar, Chen, Farach-Colton 2002): every entry has a random sign and
is added to one of `width` places of its sequence. Products of sketches are unbiased estimates of products of vectors,
with relative standard error sqrt(2 / (sequences x width)) or less, and exact where everything has a place of its own.

Of a bare encoder u is the change of the normalised pooled embedding; 1 - cosine is 1/2 |u|^2 exactly.

Cost: half a forward pass for each site and format on average, because a change starts at its own block, on few tokens.
What is missing from the sum: everything beyond second order, and changes that are no sum in the logits. The score of a
single option is therefore not the sketch but the divergence itself, which the same pass gives (`diagonal`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cptquant.core.progress import Progress
from cptquant.models.load import LoadedModel
from cptquant.models.losses import sequence_kl
from cptquant.models.text import TokenSet
from cptquant.sensitivity.ablation import changes_of_block
from cptquant.sensitivity.estimates import Estimate, estimate_ratio
from cptquant.sensitivity.loss import Objective, pick_for_task, pose_question, random_signs
from cptquant.sensitivity.perturbation import BLOCK_SCORE_BITS, integer_formats, nearest_format
from cptquant.sensitivity.scores import Scores, SiteFormats
from cptquant.sensitivity.sweep import ChangedEnd, ChangeSweep

OUTPUT_ENTRIES = 1 << 24
"""Logits of the original that are kept, 64 MB in float32; with a larger vocabulary fewer positions are looked at."""
_SLICE_ENTRIES = 1 << 18  # logits per slice: 1 MB in float32, so that the passes over a slice stay in the cache
_FAR_NATS = 80.0


@dataclass(frozen=True)
class Sketch:
    """Hyper-parameters.

    Attributes:
        width: places in a sketch, for each sequence.
        sequences, examples: how much calibration text is used: windows for a language model, texts for a classifier or
            a bare encoder. Whole windows: the beginnings of more windows cost the same, and rank sites worse, since
            attention matters less there (docs/sensitivity.md).
        diagonal: score of a single option: its "divergence", or half the squared length of its "sketch".
        seed: of the random signs.
    """

    name: ClassVar[str] = "sketch"

    width: int = 2048
    sequences: int = 2
    examples: int = 32
    diagonal: Literal["divergence", "sketch"] = "divergence"
    seed: int = 0

    def __call__(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> Scores:
        """Divergence of each site and format; per block that of its sites together near 4 bits, by the sketches."""
        return self.measure(model, tokens, formats, progress).scores(model, formats)

    def measure(self, model: LoadedModel, tokens: TokenSet, formats: SiteFormats, progress: Progress) -> "Sketches":
        """The sketches themselves: interactions, and the divergence that a plan is expected to have."""
        chosen = integer_formats(formats, model.layout)
        used = pick_for_task(model, tokens, self.sequences, self.examples)
        question = pose_question(model, used)
        sweep = ChangeSweep(model, question.tokens)
        stride = -(-question.tokens.input_ids.numel() * max(1, model.layout.vocabulary_size) // OUTPUT_ENTRIES)
        objective = Objective(sweep.stream, question, stride=max(1, stride))
        end = sweep.original_end()
        judge = _Judge(objective, end, self)
        found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        total = sum(len(row) for row in chosen.values())

        def take(changed: ChangedEnd) -> None:
            ((name, fmt),) = changed.change.items()
            found[name, fmt.name] = judge.look(changed)
            progress("sketches", len(found), total)

        for changed in sweep.inside_blocks(lambda index: changes_of_block(model.layout, chosen, index)[0]):
            take(changed)
        for changed in sweep.outside_blocks(chosen, end):
            take(changed)
        options = tuple((name, fmt.name) for name, row in chosen.items() for fmt in row)
        return Sketches(
            options=options,
            vectors=torch.stack([found[option][0] for option in options]),
            divergences=torch.stack([found[option][1] for option in options]),
            counts=judge.counts,
            documents=question.tokens.documents,
            unit=objective.unit,
            method=self,
        )


@dataclass(frozen=True)
class Sketches:
    """What a pass for each option left behind.

    Attributes:
        options: (site name, format name), in the layout's order.
        vectors: (options, n, width) float32, sketches per sequence. divergences: (options, n) float64, summed per
            sequence. counts: (n,) int64, scored positions. documents: (n,) int64.
        unit: of divergences a count.
    """

    options: tuple[tuple[str, str], ...]
    vectors: Tensor
    divergences: Tensor
    counts: Tensor
    documents: Tensor
    unit: str
    method: Sketch

    @cached_property
    def place(self) -> dict[tuple[str, str], int]:
        """Option -> its row."""
        return {option: index for index, option in enumerate(self.options)}

    @cached_property
    def reliability(self) -> float:
        """How much of what one text says about pairs another text says too, in [0, 1]; 0 with fewer than two sequences.

        The correlation r of <u_a, u_b> / |u_a||u_b| between the halves of the sequences, over the options of different
        sites, and from it 2 r / (1 + r) for both halves together (Spearman and Brown, 1910). Pairs are far noisier than
        single options, and whoever chooses a plan by them as they are chooses the noise.
        """
        if len(self.counts) < 2 or len(self.options) < 2:
            return 0.0
        apart = torch.tensor([[a[0] != b[0] for b in self.options] for a in self.options])
        halves: list[Tensor] = []
        for part in (slice(0, None, 2), slice(1, None, 2)):
            unit = torch.nn.functional.normalize(self.vectors[:, part].flatten(1).double(), dim=1)
            halves.append((unit @ unit.t())[apart])
        scale = float(halves[0].norm() * halves[1].norm())
        correlation = float(halves[0] @ halves[1]) / scale if scale else 0.0
        return max(0.0, 2 * correlation / (1 + correlation)) if correlation > 0 else 0.0

    def interactions(self, *, shrunk: bool = True) -> Tensor:
        """(options, options) float64: G with 1/2 sum G_ab over a plan's options a, b the divergence of the plan.

        Off the diagonal <u_a, u_b> a scored position, times `reliability` if `shrunk`; on it twice the score of the
        option alone (`Sketch.diagonal`). Pairs of one site have a value too, which no plan uses.
        """
        flat = self.vectors.flatten(1).double()
        products = flat @ flat.t() / self.counts.sum()
        if shrunk:
            products *= self.reliability
        products.diagonal().copy_(2 * self._alone().sum(dim=1) / self.counts.sum())
        return products

    def plan(self, formats: Mapping[str, str], *, shrunk: bool = True) -> Estimate:
        """The divergence of a whole plan, with its interactions.

        Args:
            formats: site name -> format name; sites without a sketch in that format (16 bits) add nothing.
            shrunk: interactions count times `reliability`.
        """
        rows = [self.place[item] for item in formats.items() if item in self.place]
        vectors = self.vectors[rows].double()
        together = 0.5 * vectors.sum(dim=0).square().sum(dim=-1)
        apart = 0.5 * vectors.square().sum(dim=-1).sum(dim=0)
        sums = self._alone()[rows].sum(dim=0) + (self.reliability if shrunk else 1.0) * (together - apart)
        return estimate_ratio(sums, self.counts, self.documents).floored()

    def scores(self, model: LoadedModel, formats: SiteFormats) -> Scores:
        """The single options as a method's findings."""
        alone, layout, method = self._alone(), model.layout, self.method
        damages: dict[str, dict[str, Estimate]] = {}
        for (name, fmt), sums in zip(self.options, alone, strict=True):
            damages.setdefault(name, {})[fmt] = estimate_ratio(sums, self.counts, self.documents).floored()
        chosen = integer_formats(formats, layout)
        near = {name: nearest_format(row).name for name, row in chosen.items()}
        blocks = [
            {name: near[name] for name in near if layout.site_by_name[name].block_index == index}
            for index in range(layout.block_count)
        ]
        return Scores(
            unit=self.unit,
            damages=damages,
            block_scores=[self.plan(block, shrunk=False) for block in blocks],
            metadata={
                "diagonal": method.diagonal,
                "quantizer": "round to nearest",
                "width": method.width,
                "reliability_of_pairs": self.reliability,
                "positions": int(self.counts.sum()),
                "seed": method.seed,
                "stderr": "over sequences, clustered by document",
                "block_score": f"the block's sites together at the format nearest to {BLOCK_SCORE_BITS} bits, "
                "interactions by the sketches",
            },
        )

    def _alone(self) -> Tensor:
        """(options, n) float64: each option by itself, summed per sequence."""
        if self.method.diagonal == "divergence":
            return self.divergences
        return 0.5 * self.vectors.double().square().sum(dim=-1)


@dataclass(frozen=True)
class _Part:
    """What the original says to a part of a batch's positions.

    Attributes:
        output: (b, t, V). scored: (b, t) bool. p: (b, t, V) probabilities, 0 where nothing is scored; None for a bare
            encoder. signed: (b, t, V), sqrt(p), or 1 for a bare encoder, times the random signs.
    """

    output: Tensor
    scored: Tensor
    p: Tensor | None
    signed: Tensor


class _Judge:
    """Sets what a changed model says against what the original says."""

    def __init__(self, objective: Objective, end: Sequence[Tensor], method: Sketch) -> None:
        self._objective, self._width = objective, method.width
        generator = torch.Generator().manual_seed(method.seed)
        encoder = objective.unit == "one_minus_cosine"
        self._batches: list[list[_Part]] = []
        for index, hidden in enumerate(end):
            parts: list[_Part] = []
            with torch.no_grad():
                for output, scored in objective.outputs(index, hidden):
                    p = None if encoder else output.softmax(dim=-1).mul_(scored.unsqueeze(-1))
                    signs = random_signs(output.shape, generator)
                    parts.append(_Part(output.clone(), scored, p, signs if p is None else signs.mul_(p.sqrt())))
            self._batches.append(parts)
        self.counts = torch.cat(
            [torch.stack([part.scored.sum(dim=1) for part in parts]).sum(dim=0) for parts in self._batches]
        )

    @torch.no_grad()
    def look(self, end: ChangedEnd) -> tuple[Tensor, Tensor]:
        """(n, width) float32 sketch, (n,) float64 summed divergence."""
        sketches: list[Tensor] = []
        divergences: list[Tensor] = []
        for index, (hidden, parts) in enumerate(zip(end.hidden, self._batches, strict=True)):
            sketch = torch.zeros(len(hidden), self._width)
            divergence = torch.zeros(len(hidden), dtype=torch.float64)
            outputs = self._objective.outputs(index, hidden, changed=end.stream)
            for part, (output, _) in zip(parts, outputs, strict=True):
                step = max(1, _SLICE_ENTRIES // output.shape[-1])
                for row in range(len(hidden)):
                    for start in range(0, output.shape[1], step):
                        spot = (row, slice(start, start + step))
                        change, divergence_here = self._compare(part, spot, output[spot])
                        divergence[row] += divergence_here
                        sketch[row] += count_sketch(change, self._width)
            sketches.append(sketch)
            divergences.append(divergence)
        return torch.cat(sketches), torch.cat(divergences)

    @staticmethod
    def _compare(
        part: _Part,
        spot: tuple[int, slice],
        output: Tensor,  # (t, V) of one sequence
    ) -> tuple[Tensor, float]:
        """(t, V): u with its signs; and the summed divergence.

        With c = dz - <p, dz>, KL = log sum p exp(c) = log(1 + sum p (exp(c) - 1 - c)): a sum of terms that are never
        negative, so nothing cancels where c is small.
        """
        change = output - part.output[spot]
        if part.p is None:
            return change * part.signed[spot], 0.5 * float(change.double().square().sum())
        p = part.p[spot]
        change -= torch.einsum("tv,tv->t", p, change).unsqueeze(-1)
        if float(change.max()) > _FAR_NATS:  # exp would overflow
            divergence = float(sequence_kl(part.output[spot][None], output[None], part.scored[spot][None]).sums)
        else:
            excess = torch.einsum("tv,tv->t", p, torch.expm1(change).sub_(change))
            divergence = float(excess.double().log1p().sum())
        return change.mul_(part.signed[spot]), divergence


def count_sketch(
    signed: Tensor,  # (t, V): entries of one sequence times their random signs
    width: int,
) -> Tensor:
    """(width,): the entries dealt to the places in turn and added up."""
    flat = signed.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % width))
    return padded.view(-1, width).sum(dim=0)
