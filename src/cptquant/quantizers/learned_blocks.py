"""GPTQ, then Block-AP: weights, steps and zero points of one block after the other trained on the block's output.

GPTQ's solution is the start of EfficientQAT's first phase (arXiv 2407.11062, section 3.2; blocks/block_ap.py), with one
pass over the given text and what the model writes itself (models/own_text.py). On that text it comes close to rounding
learned on the KL of the whole model in less than half the time, and a block at a time bounds its memory
(docs/decisions/0012).

GPTQ reads the given text alone: own text in its second moments as well was no clear gain for what is trained after it.
Blocks are trained after GPTQ has gone through all of them, not by turns, so that the first pass can be kept, shared and
judged: a baseline that is hopeless after GPTQ is not trained (stages/variants.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from cptquant.core.errors import DataError
from cptquant.models.load import LoadedModel
from cptquant.models.stream import read_weight
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.quantizers.blocks.block_ap import BlockAp
from cptquant.quantizers.blocks.block_training import BlockLook, FinishedBlock, Pace
from cptquant.quantizers.blocks.blockwise import Start, train_blocks
from cptquant.quantizers.first_pass import FinishedSites, finished_records, with_learning
from cptquant.quantizers.goes_on import GoesOn
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.results import Sink
from cptquant.quantizers.site_task import BlockWeights

_OBJECTIVE = "squared error of the block's output"


@dataclass(frozen=True)
class LearnedBlocks(GoesOn):
    """Hyper-parameters.

    Attributes:
        start: makes the solution training starts from, on the given text.
        method: what moves in a block, how fast and how long.
        sequences: that a block sees at least; fewer are passed over again, twice in all at most.
    """

    start: Gptq | GoesOn = field(default_factory=Gptq)
    method: BlockAp = field(
        default_factory=lambda: BlockAp(pace=Pace(batch_sequences=8, held_out=1 / 16, checks=4), latent_rate=0.0035)
    )
    sequences: int = 384

    def method_on(self, text: TokenSet) -> BlockAp:
        """The method with as many passes as that text needs."""
        return replace(self.method, pace=replace(self.method.pace, epochs=self.passes(text.sequence_count)))

    def passes(self, sequences: int) -> float:
        """Over so much text."""
        return min(2.0, max(1.0, self.sequences / max(1, sequences)))


def learn_blocks(
    model: LoadedModel,
    method: LearnedBlocks,
    tokens: TokenSet,
    first: FinishedSites,
    sink: Sink,
    *,
    resume: Mapping[int, BlockWeights] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train the blocks' sites from a finished first pass and hand everything to `sink`, blocks in order, then the rest.

    Args:
        model: never changed. tokens: calibration text, with what the model wrote itself.
        resume: blocks that are finished already; `sink` is not called for them again, and the rest has the same bits.
        progress: called with (steps done, steps in all).

    Raises:
        DataError: fewer than two sequences. ArtifactError: the first pass is not finished.
    """
    if tokens.sequence_count < 2:
        raise DataError(
            f"--quantizer block-ap needs at least 2 calibration sequences, got {tokens.sequence_count}: one to learn "
            "on, one to judge by; raise --calibration-sequences"
        )
    record_of = finished_records(model, first)

    def keep(index: int, weights: dict[str, StoredWeight], _kept: dict[str, Tensor], look: BlockLook) -> None:
        measure = (_OBJECTIVE, look.held_out_start, look.held_out_end)
        records = []
        for site in (site for site in model.layout.sites if site.block_index == index):
            record, start, found = record_of[site.name], first.quantized(site.name), weights.get(site.name)
            if start is not None and found is not None:
                original = read_weight(model.module.get_submodule(site.name), site).detach()
                record = with_learning(record, original, start, found, measure, stopped=look.stopped)
            records.append(record)
        sink(index, weights, records)

    train_blocks(
        model, Start(first, {}), method.method_on(tokens), tokens, keep,
        resume={index: FinishedBlock(weights, {}) for index, weights in (resume or {}).items()},
        progress=progress or (lambda _done, _total: None),
    )  # fmt: skip
    outer = [site.name for site in model.layout.sites if site.block_index is None]
    stored = {name: weight for name in outer if (weight := first.quantized(name)) is not None}
    sink(None, stored, [record_of[name] for name in outer])
