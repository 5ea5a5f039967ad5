"""The page and the table of an adaptation, from made-up records."""

from pathlib import Path
from xml.etree import ElementTree

from cptquant.core.adaptation import (
    AdaptationLook,
    AdaptationReport,
    AdaptationRequest,
    AlignmentRecord,
    HeldOutLoss,
    SourceRecord,
    TeacherRecord,
)
from cptquant.core.evaluation import Measurement
from cptquant.core.mixture import SourceCount
from cptquant.reports.adaptation import adaptation_table, write_adaptation_report
from cptquant.reports.figures.adaptation import draw_losses, draw_training


def look(step: int, loss: float, training: float | None) -> AdaptationLook:
    held_out = {"domain": HeldOutLoss(nll_nats_per_token=loss, n=100, stderr=0.01)}
    return AdaptationLook(step=step, tokens=step * 1000, training_nats_per_token=training, held_out=held_out)


LOOKS = (look(0, 4.0, None), look(5, 3.5, 3.7), look(10, 3.25, 3.4))


def made() -> AdaptationReport:
    count = SourceCount(name="domain", share=0.6, windows=60, tokens=6000, held_tokens=4000)
    values = {"original": 4.0, "adapted": 3.25, "aligned": 3.3}
    return AdaptationReport(
        request=AdaptationRequest(model="<model>", tokens=10_000),
        options={"method": "mix-cpt: a mixture"},
        sources=(SourceRecord(name="domain", files=("a.txt",), documents=50, dropped=3, held_out=5, count=count),),
        steps=10,
        tokens=10_000,
        looks=LOOKS,
        measurements=(
            *(Measurement(name="domain_nll_nats_per_token", subject=s, value=v, unit="nats/token", n=100, stderr=0.01)
              for s, v in values.items()),
            Measurement(name="domain_nll_increase_nats_per_token", subject="aligned", value=-0.7, unit="nats/token",
                        n=100, stderr=0.02),
            Measurement(name="quiz_accuracy", subject="original", value=0.25, unit="share", n=40, stderr=0.07),
        ),
        teacher=TeacherRecord(
            kind="cache of the top 64", seconds=30, share=0.25, discarded_mass=0.1234, cache_bytes=10**6
        ),
        alignment=(
            AlignmentRecord(kind="instructions", candidates=64, dropped=16, chosen=8, steps=2, seconds=3.0,
                            indices_file="alignment-instructions.jsonl", score_before=1.1, score_after=1.05),
        ),
        notes=("a note",),
    )  # fmt: skip


def test_the_table_tells_everything() -> None:
    text = adaptation_table(made())
    for words in (
        "3 of 45", "1.50", "6,000", "before", "after stage 1", "after format alignment",
        "4.000 ± 0.010", "quiz accuracy", "a note",
        "cache of the top 64; time 30.0 s, 25% of stage 1; discarded mass 0.123",
        "samples 8 of 64, 16 left out", "format score 1.100 → 1.050",
    ):  # fmt: skip
        assert words in text, (words, text)


def test_the_page_is_whole_and_escapes(tmp_path: Path) -> None:
    write_adaptation_report(tmp_path / "report.html", made())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;model&gt; adapted" in page and "<model>" not in page
    for words in (
        "Read this first",
        "3 of 45",
        "−0.700 ± 0.020",
        "Tasks",
        "25% of stage 1",
        "alignment-instructions.jsonl",
    ):
        assert words in page, words
    assert page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "")


def test_drawings_have_a_dot_for_every_look() -> None:
    drawn = draw_losses(LOOKS, "domain", "label")
    assert drawn is not None
    titles = [element.text for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("title")]
    assert [title for title in titles if title and "tokens:" in title] == [
        "0 tokens: 4 nats per token", "5,000 tokens: 3.500 nats per token", "10,000 tokens: 3.250 nats per token",
    ]  # fmt: skip
    assert draw_losses(LOOKS, "general", "label") is None and draw_losses(LOOKS[:1], "domain", "label") is None
    assert draw_training(LOOKS, "label") is not None and draw_training(LOOKS[:2], "label") is None
