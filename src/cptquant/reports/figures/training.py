"""The course of a training: loss on held-out text and on the text that was learned on, by step."""

from collections.abc import Sequence

from cptquant.core.recovery import RecoveryLook
from cptquant.reports.quantities import spell_tick
from cptquant.reports.svg import Canvas, Frame, Scale, draw_value_axis, value_scale

_WIDTH, _HEIGHT = 720.0, 260.0


def draw_training(looks: Sequence[RecoveryLook], best_step: int, label: str) -> str | None:
    """Two lines and a mark at the step that was taken; None with fewer than two looks."""
    if len(looks) < 2:
        return None
    canvas = Canvas(_WIDTH, _HEIGHT, label)
    frame = Frame(64, 14, _WIDTH - 16, _HEIGHT - 46)
    losses = [look.held_out_loss for look in looks] + [found for look in looks if (found := look.training_loss)]
    scale = value_scale(losses, frame.bottom, frame.top, logarithmic=False)
    across = Scale(0, looks[-1].step, frame.left, frame.right)
    draw_value_axis(canvas, frame, scale)
    for tick in across.ticks(6):
        canvas.text(across(tick), frame.bottom + 17, spell_tick(tick), "tick mid")
    canvas.text(frame.right, frame.bottom + 36, "optimizer steps", "tick end")
    learned = [(across(look.step), scale(look.training_loss)) for look in looks if look.training_loss is not None]
    canvas.polyline(learned, "course c7 dashed")
    canvas.polyline([(across(look.step), scale(look.held_out_loss)) for look in looks], "course c0")
    for look in looks:
        taken = look.step == best_step
        title = f"step {look.step}: {look.held_out_loss:.4g} on held-out text" + (" (taken)" if taken else "")
        canvas.dot(across(look.step), scale(look.held_out_loss), 6 if taken else 3.5, "s-quantized", title=title)
    return canvas.render()
