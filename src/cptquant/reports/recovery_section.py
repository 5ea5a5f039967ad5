"""What a recovery did, arranged for the report."""

from dataclasses import dataclass

from cptquant.reports.figures.training import draw_training
from cptquant.reports.quantities import spell_seconds
from cptquant.reports.run_folder import RunRecord


@dataclass(frozen=True)
class RecoverySection:
    """Attributes: sentence: what happened. warning: why training ended early, or "". figure: SVG or None. facts: every
    choice that was made."""

    sentence: str
    warning: str
    figure: str | None
    facts: list[tuple[str, str]]


def recovery_section(record: RunRecord) -> RecoverySection | None:
    """None for a run that was not made by `cptquant recover`."""
    found = record.recovery
    if found is None:
        return None
    losses = [look.held_out_loss for look in found.looks]
    taken = (
        "no step was better on held-out training text than the start, which was kept"
        if found.best_step == 0 and found.looks
        else f"{found.codes_changed:.1%} of the codes differ from the parent's"
    )
    if found.blocks:
        better = sum(outcome.best_step is not None for outcome in found.blocks)
        before = sum(outcome.held_out_before for outcome in found.blocks) / len(found.blocks)
        after = sum(outcome.held_out_after for outcome in found.blocks) / len(found.blocks)
        taken = (
            f"Mean held-out error of a block {before:.4g} → {after:.4g}; {better} of {len(found.blocks)} blocks took "
            f"what training found, the others kept the start; {taken}"
        )
    course = (
        f"Held-out training loss {losses[0]:.4g} → {min(losses):.4g}, step {found.best_step} taken; "
        if found.looks
        else ""
    )
    facts = [("Parent", found.parent), *((name.capitalize(), text) for name, text in found.options.items())]
    facts.append(("Trained numbers", f"{found.moved_share:.2%} of the parameters"))
    if found.step_seconds is not None:
        facts.append(("One step", spell_seconds(found.step_seconds)))
    return RecoverySection(
        sentence=f"Trained further with {found.request.method} on the plan of its parent. {course}{taken}.",
        warning=found.stopped or " ".join(outcome.stopped for outcome in found.blocks if outcome.stopped),
        figure=draw_training(found.looks, found.best_step, f"{found.objective}, by step"),
        facts=facts,
    )
