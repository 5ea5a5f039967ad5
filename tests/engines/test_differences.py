"""What fails an export, and what it says."""

import math
from pathlib import Path

import pytest

from cptquant.core.engine_export import EngineComparison, SiteRoundTrip
from cptquant.core.errors import EngineError
from cptquant.stages.engine_check import refuse_differences

FILE = Path("run/checkpoint/model.gguf")
SAME = SiteRoundTrip(site="a.q", format="Q4_K", largest_error=0.0)


def way(kl: float | None, bound: float | None = 1e-3, cosine: float | None = None) -> EngineComparison:
    return EngineComparison(arithmetic="float activations", kl_nats=kl, cosine=cosine, n=9, bound=bound)


def test_what_is_within_the_bound_passes() -> None:
    refuse_differences(FILE, [way(1e-3), way(0.7, None), way(None, 1e-3, 0.9995)], [SAME], "")
    refuse_differences(FILE, [], [SAME], "")
    original = way(math.nan, None).model_copy(update={"weights": "original"})
    refuse_differences(FILE, [way(0.0), original], [SAME], "")
    just_over = math.nextafter(1e-3, 1)  # the first call's list with one value a step further: it was looked at
    with pytest.raises(EngineError, match=r"float activations: 0\.001 nats, allowed 0\.001"):
        refuse_differences(FILE, [way(just_over), way(0.7, None), way(None, 1e-3, 0.9995)], [SAME], "")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            way(math.nan),
            r"\(float activations: nan nats, allowed 0\.001\); every quantized tensor reads back exactly, so",
        ),
        (way(math.nan, None), r"\(float activations: nan nats, a finite value is expected\); every"),
        (way(None, 1e-3, math.nan), r"\(float activations: nan of 1 - cosine, allowed 0\.001\)"),
        (way(None, 1e-3), r"\(float activations: nan of 1 - cosine, allowed 0\.001\)"),
        (way(math.inf), r"inf nats, allowed 0\.001"),
        (way(math.inf, None), r"inf nats, a finite value is expected"),
        (way(1.1e-3), r"\(float activations: 0\.0011 nats, allowed 0\.001\)"),
        (way(None, 1e-3, 0.998), r"0\.002 of 1 - cosine, allowed 0\.001"),
    ],
)
def test_not_a_number_never_passes(found: EngineComparison, message: str) -> None:
    with pytest.raises(EngineError, match=rf"^run/checkpoint/model\.gguf is not our model in the engine .*{message}"):
        refuse_differences(FILE, [way(0.0), found], [SAME], "")


@pytest.mark.parametrize("error", [0.25, math.inf, math.nan])
def test_a_tensor_that_differs_is_named_with_or_without_an_engine(error: float) -> None:
    other = SiteRoundTrip(site="b.up", format="Q2_K", largest_error=error)
    named = rf"tensors that differ from ours: b\.up \(by up to {error:.3g}\); the files are kept for a look, do not use"
    with pytest.raises(EngineError, match=rf"\(read back from the file\); {named}"):
        refuse_differences(FILE, [], [SAME, other], "")
    with pytest.raises(EngineError, match=rf"\(float activations: 2 nats, allowed 0\.001\); {named}"):
        refuse_differences(FILE, [way(2.0)], [SAME, other], "")


def test_token_ids_alone_fail_it() -> None:
    with pytest.raises(EngineError, match=r"is not our model in the engine; ids differ; the files are kept for a look"):
        refuse_differences(FILE, [way(0.0)], [SAME], "ids differ")
