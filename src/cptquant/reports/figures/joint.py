"""A joint plan: the domain loss of the best run of every size and width, against the bytes of its file."""

from cptquant.core.joint import JointPlan, JointPoint
from cptquant.reports.figures.law import spell_large
from cptquant.reports.quantities import spell_decimal_bytes, spell_number
from cptquant.reports.svg import Canvas, Frame, draw_value_axis, tight_scale

_WIDTH, _HEIGHT = 620.0, 320.0


def draw_candidates(plan: JointPlan) -> str:
    """One dot with its 90 % interval for every size and bits; sizes in colours, the recommended one ringed.

    Points that were carried out are drawn as open marks at what was measured.
    """
    canvas = Canvas(_WIDTH, _HEIGHT, f"Domain loss against bytes, {plan.domain}")
    frame = Frame(56, 14, 500, _HEIGHT - 44)
    points = [*plan.candidates, plan.best]
    scale = tight_scale(
        [end for point in points for end in (point.domain_nll.low, point.domain_nll.high)], frame.bottom, frame.top
    )
    draw_value_axis(canvas, frame, scale)
    across = tight_scale([float(point.size_bytes) for point in points], frame.left, frame.right)
    canvas.line((frame.left, frame.bottom), (frame.right, frame.bottom), "axis")
    for tick in across.ticks(6):
        canvas.line((across(tick), frame.bottom), (across(tick), frame.bottom + 4), "axis")
        canvas.text(across(tick), frame.bottom + 17, spell_decimal_bytes(tick), "tick mid")
    canvas.text(frame.right, frame.bottom + 34, "bytes of the written file", "tick end")
    sizes = list(dict.fromkeys(point.size for point in points))
    for point in plan.candidates:
        colour = f"c{sizes.index(point.size) % 8}"
        x = across(point.size_bytes)
        canvas.line((x, scale(point.domain_nll.low)), (x, scale(point.domain_nll.high)), f"law {colour}")
        canvas.dots([(x, scale(point.domain_nll.value), _title(point))], 4.0, colour)
    best = plan.best
    canvas.dot(across(best.size_bytes), scale(best.domain_nll.value), 7, "s-uniform", title=_title(best))
    labelled = {point.label: point for point in (plan.best, *plan.neighbours)}
    for found in plan.measured:
        title = f"measured, {found.label}: {spell_number(found.domain_nll, 4)}"
        if found.label in labelled:
            canvas.dot(across(found.size_bytes), scale(found.domain_nll), 4, "s-quantized", title=title)
    for index, size in enumerate(sizes):
        canvas.dots([(frame.right + 16, frame.top + 10 + 18 * index, size)], 4.0, f"c{index % 8}")
        canvas.text(frame.right + 26, frame.top + 14 + 18 * index, f"size {size}", "tick")
    return canvas.render()


def _title(point: JointPoint) -> str:
    return (
        f"size {point.size}, {point.format}, share {point.ratio:.2f}, {spell_large(point.tokens)} tokens: "
        f"{spell_number(point.domain_nll.value, 4)}"
    )
