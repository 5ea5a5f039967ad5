"""A quantized run -> weights trained further block by block; every finished block is kept."""

from pathlib import Path

from torch import Tensor

from cptquant.core.artifact import digest_json, write_whole
from cptquant.core.recovery import BlockOutcome, RecoveryRecord, RecoveryRequest
from cptquant.models.arithmetic import describe_arithmetic
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.blocks.block_training import BlockLook, BlockMethod, FinishedBlock
from cptquant.quantizers.blocks.blockwise import Start, train_blocks
from cptquant.recovery.methods import block_by_block
from cptquant.recovery.student import frozen_sites
from cptquant.stages.own_text import with_own_text
from cptquant.stages.quantize import Variant, block_label
from cptquant.stages.recovery_pieces import (
    RECORD,
    Learned,
    Parent,
    block_records,
    changed_share,
    lost_norms,
    pieces_of,
    write_manifest,
)
from cptquant.stages.run import Run

OBJECTIVE = "squared error of the block's output, relative"


def recover_blocks_stage(run: Run, parent: Parent, request: RecoveryRequest, text: TokenSet) -> Variant:
    """As `recover_stage`, for block-wise methods; a killed call goes on after the last finished block.

    Raises:
        UserError: a form that the method cannot train, or a pattern that freezes nothing. DataError: too little text.
    """
    method = block_by_block(request)
    tokens = with_own_text(run, text, request.own_text or 0, request.seed)
    inputs = {
        "parent": parent.shards.folder.name,
        "plan": digest_json(parent.plan.formats),
        "layout": parent.layout.digest(),
        "request": request.model_dump_json(),
        "method": repr(method),
        "tokens": tokens.digest,
        "arithmetic": describe_arithmetic(coarse=True),
    }
    shards = pieces_of(run, parent.layout, parent.plan, digest_json(inputs)[:16])

    def make() -> RecoveryRecord:
        _train(run, parent, request, method, tokens, shards)
        outcomes = _outcomes(parent, shards)
        for outcome in outcomes:
            if outcome.stopped:
                run.progress(outcome.stopped, 1, 1)
        return RecoveryRecord(
            parent=str(parent.run.folder),
            parent_name=parent.name,
            parent_pieces=parent.shards.folder.name,
            parent_norms=parent.shards.kept_labels,
            pieces=shards.folder.name,
            norms=shards.kept_labels,
            request=request,
            options={
                "method": request.method,
                "options": repr(method),
                "loss": OBJECTIVE,
                "learned on": tokens.description,
                "arithmetic": inputs["arithmetic"],
            },
            objective=OBJECTIVE,
            blocks=outcomes,
            best_step=sum(outcome.best_step or 0 for outcome in outcomes),
            moved_share=sum(outcome.moved for outcome in outcomes) / parent.layout.parameters,
            codes_changed=changed_share(parent, shards),
        )

    labels = {block_label(index) for index in range(parent.layout.block_count)} | {block_label(None)}
    if not shards.labels.issuperset(labels):
        (run.folder / RECORD).unlink(missing_ok=True)
    record = run.stage(RECORD, RecoveryRecord, inputs, make, damage=lambda found: lost_norms(shards, found))
    write_manifest(run, parent, shards, record)
    return Variant(parent.plan, shards)


def _train(
    run: Run, parent: Parent, request: RecoveryRequest, method: BlockMethod, tokens: TokenSet, shards: ShardFolder
) -> None:
    layout, others = parent.layout, parent.shards.kept()
    start = Start(parent.shards, others, frozen_sites(layout, request.freeze))

    def keep(index: int, weights: dict[str, StoredWeight], kept: dict[str, Tensor], look: BlockLook) -> None:
        prefix = f"{run.model.blocks_path}.{index}."
        mine = {name: tensor for name, tensor in others.items() if name.startswith(prefix)} | kept
        outcome = BlockOutcome(
            block_index=index, held_out_before=look.held_out_start, held_out_after=look.held_out_end,
            best_step=look.best_step, steps=look.steps, moved=look.moved, norms=len(mine), stopped=look.stopped,
        )  # fmt: skip
        write_whole(_outcome_path(shards, index), outcome.model_dump_json().encode())
        if mine:
            shards.save_kept(mine, f"{index:04d}")
        learned = Learned(OBJECTIVE, look.held_out_start, look.held_out_end)
        shards.save(block_label(index), weights, block_records(run, parent, index, weights, learned))

    finished = {
        index: FinishedBlock(dict(shards.piece(block_label(index))), shards.kept(f"{index:04d}"))
        for index in range(layout.block_count)
        if _is_finished(shards, index)
    }
    train_blocks(
        run.model, start, method, tokens, keep, resume=finished,
        progress=lambda done, total: run.progress(f"train ({request.method})", done, total),
    )  # fmt: skip
    outer = {site.name: parent.shards.quantized(site.name) for site in layout.sites if site.block_index is None}
    beside = tuple(f"{run.model.blocks_path}.{index}." for index in range(layout.block_count))
    rest = {name: tensor for name, tensor in others.items() if not name.startswith(beside)}
    if rest:
        shards.save_kept(rest)
    stored = {name: weight for name, weight in outer.items() if weight is not None}
    shards.save(block_label(None), stored, block_records(run, parent, None, {}, Learned(OBJECTIVE, 0, 0)))


def _outcome_path(shards: ShardFolder, index: int) -> Path:
    return shards.folder / f"{block_label(index)}.json"


def _outcome(shards: ShardFolder, index: int) -> BlockOutcome | None:
    """None where there is none, or it is damaged."""
    try:
        return BlockOutcome.model_validate_json(_outcome_path(shards, index).read_bytes())
    except (OSError, ValueError):
        return None


def _is_finished(shards: ShardFolder, index: int) -> bool:
    found = _outcome(shards, index)
    return found is not None and block_label(index) in shards.labels and len(shards.kept(f"{index:04d}")) == found.norms


def _outcomes(parent: Parent, shards: ShardFolder) -> tuple[BlockOutcome, ...]:
    found = [_outcome(shards, index) for index in range(parent.layout.block_count)]
    return tuple(outcome for outcome in found if outcome is not None)
