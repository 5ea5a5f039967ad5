"""The verb `quantize_sites`: carry out a plan, block after block, on the stream the quantized model really produces."""

from collections.abc import Callable, Mapping

from cptquant.core.errors import DataError
from cptquant.core.plan import Plan
from cptquant.models.arithmetic import coarse_products
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream
from cptquant.models.text import TokenSet
from cptquant.quantizers.first_pass import FinishedInMemory
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.quantizers.learned_blocks import LearnedBlocks, learn_blocks
from cptquant.quantizers.methods import Quantizer, spelling_of, start_of, start_text
from cptquant.quantizers.refine import refine_sites
from cptquant.quantizers.results import Sink
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.signround import SignRound
from cptquant.quantizers.site_task import BlockWeights, SiteTask, outer_sites, sites_of_block
from cptquant.quantizers.slim import Slim


def quantize_sites(
    model: LoadedModel,
    plan: Plan,
    quantizer: Quantizer | Slim,
    tokens: TokenSet | None,
    sink: Sink,
    *,
    resume: Mapping[int, BlockWeights] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Quantize every site as the plan says and hand each block to `sink` as soon as it is done.

    GPTQ goes through the blocks in order; each sees the inputs that the blocks before it, already quantized, produce.
    Embeddings come first (they are the stream's input) and are rounded to nearest. Round-to-nearest looks at no text.
    SignRound learns each block after GPTQ. Block-AP trains block after block once GPTQ has gone through all, on the
    given text (`learn_blocks`). KL rounding learns all blocks after the last, from Block-AP (`refine_sites`), so it
    hands nothing over before.

    The result depends on model, plan, quantizer and tokens only: a run resumed after any block gives the same bits.
    Memory: one block in float32, the Hessians of its inputs, and the stream (tokens x width float32).

    Args:
        model: never changed. plan: a format for every site. tokens: calibration text, needed by GPTQ.
        quantizer: GPTQ does SliM-LLM on sites with groups of mixed width; give `Slim` to set its options.
        sink: called once per block in order, then once with None for the sites outside the blocks.
        resume: blocks that are finished already; `sink` is not called for them again. Block-AP makes its first pass
            again; KL rounding resumes from a finished one, see `refine_sites`, and ignores this.
        progress: called with (blocks done, blocks in all) after each block.

    Raises:
        DataError: GPTQ without tokens, or text on which the model overflows.
        ModelError: a weight is NaN or infinite; names the site.
    """
    slim = quantizer if isinstance(quantizer, Slim) else None
    quantizer = quantizer.gptq if isinstance(quantizer, Slim) else quantizer
    if isinstance(quantizer, Rtn):
        _round_everything(SiteTask(model, plan, quantizer, sink, dict(resume or {})), model, progress)
        return
    if tokens is None:
        raise DataError(
            f"--quantizer {spelling_of(quantizer)} needs calibration text: give --calibration FILE, or use "
            "--quantizer rtn"
        )
    if isinstance(quantizer, LearnedBlocks | KlRounding):
        first = FinishedInMemory()
        quantize_sites(model, plan, start_of(quantizer), start_text(quantizer, tokens), first.keep)
        if isinstance(quantizer, LearnedBlocks):
            learn_blocks(model, quantizer, tokens, first, sink, resume=resume, progress=progress)
        else:
            refine_sites(model, quantizer, tokens, first, sink, progress)
        return
    start = quantizer.first if isinstance(quantizer, SignRound) else quantizer
    task = SiteTask(model, plan, start, sink, dict(resume or {}))
    task.slim = slim or task.slim
    _go_through_blocks(task, model, tokens, quantizer if isinstance(quantizer, SignRound) else None, progress)


def _go_through_blocks(
    task: SiteTask,
    model: LoadedModel,
    tokens: TokenSet,
    learning: SignRound | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """GPTQ block by block on the quantized stream, each learned further where asked."""
    count = model.layout.block_count
    outer = task.quantize_entry(tokens)
    stream = ModelStream(model, tokens, weights=task)
    original = None if learning is None else ModelStream(model, tokens)
    if original is not None and len(original.batches) < 2:
        raise DataError(
            "--quantizer signround needs two batches of calibration text, one to learn on and one to judge by; "
            f"{tokens.sequence_count} sequences are one batch: raise --calibration-sequences to 16 or more"
        )
    for index in range(count):
        block = stream.load_block()  # with its quantized weights, if it is finished already
        if original is not None:
            with coarse_products(task.uses_coarse_products):
                original.advance(original.load_block())
        if index not in task.resume:
            results = task.quantize_block(index, block, stream)
            if original is not None and learning is not None:
                task.learn_(results, block, stream, original.hidden, learning)
            task.hand_over(index, results)
        with coarse_products(task.uses_coarse_products):
            stream.advance(block)
        del block
        if progress is not None:
            progress(index + 1, count)
    outer.extend(task.quantize_exit(stream))
    task.hand_over(None, outer)


def _round_everything(task: SiteTask, model: LoadedModel, progress: Callable[[int, int], None] | None) -> None:
    count = model.layout.block_count
    for index in range(count):
        if index not in task.resume:
            task.hand_over(index, task.round_all(sites_of_block(model, index)))
        if progress is not None:
            progress(index + 1, count)
    entry, leaving = outer_sites(model)
    task.hand_over(None, task.round_all([*entry, *leaving]))
