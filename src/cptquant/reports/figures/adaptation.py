"""The course of an adaptation: loss on each held-out text by tokens trained on."""

from collections.abc import Sequence

from cptquant.core.adaptation import AdaptationLook
from cptquant.reports.quantities import spell_count, spell_number
from cptquant.reports.svg import Canvas, Frame, Scale, draw_value_axis, tight_scale

_WIDTH, _HEIGHT = 520.0, 260.0


def draw_losses(looks: Sequence[AdaptationLook], name: str, label: str) -> str | None:
    """Loss on one held-out text with its standard error; None with fewer than two looks at it."""
    points = [(look.tokens, found) for look in looks if (found := look.held_out.get(name)) is not None]
    if len(points) < 2:
        return None
    ends = [(loss.nll_nats_per_token, loss.stderr or 0.0) for _, loss in points]
    return _draw(
        [(tokens, loss.nll_nats_per_token, loss.stderr or 0.0) for tokens, loss in points],
        [value + sign * error for value, error in ends for sign in (-1, 1)],
        label,
    )


def draw_training(looks: Sequence[AdaptationLook], label: str) -> str | None:
    """Cross entropy on what was trained on, mean since the look before; None with fewer than two."""
    points = [(look.tokens, look.training_nats_per_token) for look in looks]
    known = [(tokens, loss, 0.0) for tokens, loss in points if loss is not None]
    return _draw(known, [loss for _, loss, _ in known], label) if len(known) > 1 else None


def _draw(points: Sequence[tuple[int, float, float]], extent: Sequence[float], label: str) -> str:
    canvas = Canvas(_WIDTH, _HEIGHT, label)
    frame = Frame(60, 12, _WIDTH - 16, _HEIGHT - 46)
    scale = tight_scale(extent, frame.bottom, frame.top)
    across = Scale(0, max(tokens for tokens, _, _ in points), frame.left, frame.right)
    draw_value_axis(canvas, frame, scale)
    for tick in across.ticks(4):
        canvas.text(across(tick), frame.bottom + 17, spell_count(round(tick)), "tick mid")
    canvas.text(frame.right, frame.bottom + 36, "tokens trained on", "tick end")
    canvas.polyline([(across(tokens), scale(loss)) for tokens, loss, _ in points], "course c0")
    for tokens, loss, error in points:
        if error:
            canvas.line((across(tokens), scale(loss - error)), (across(tokens), scale(loss + error)), "whisker")
        title = f"{tokens:,} tokens: {spell_number(loss, 4)} nats per token"
        canvas.dot(across(tokens), scale(loss), 3.5, "s-quantized", title=title)
    return canvas.render()
