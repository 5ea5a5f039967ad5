from collections.abc import Callable

import pytest
import torch
from small_models import block_formats, quantized_sites, random_tokens

from cptquant.evaluation import lockstep
from cptquant.evaluation.engine import EngineOutputs, compare_engine
from cptquant.evaluation.evaluate import evaluate
from cptquant.evaluation.scored_text import ScoredText, prepare_text
from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, WeightSource


def coarse(model: LoadedModel) -> MemoryWeights:
    return MemoryWeights(quantized_sites(model, block_formats(model.layout, "int4-g16")))


def whole_outputs(model: LoadedModel, text: ScoredText, weights: WeightSource | None = None) -> torch.Tensor:
    stream = ModelStream(model, text.tokens, weights=weights)
    for _ in range(model.layout.block_count):
        stream.advance(stream.load_block())
    with torch.no_grad():
        return torch.cat([stream.finish(index, hidden) for index, hidden in enumerate(stream.hidden)])


@pytest.mark.parametrize("limit", [1, 5 * 97 * 4, 1 << 30], ids=["a token", "parts of a sequence", "whole"])
def test_an_engine_is_judged_as_evaluate_does_however_little_is_held(
    tiny: Callable[[str], LoadedModel], limit: int, monkeypatch: pytest.MonkeyPatch
):
    """The "engine" gives the original's logits; KL(coarse ‖ original) is then known from a plain computation."""
    model, tokens = tiny("gpt2"), random_tokens()
    text = prepare_text(model, tokens)
    outputs = whole_outputs(model, text)
    monkeypatch.setattr(lockstep, "_OUTPUT_LIMIT_BYTES", limit)
    same, other = (
        compare_engine(model, weights, text, [EngineOutputs("float activations", True, lambda row: outputs[row])])[0]
        for weights in (_Original(), coarse(model))
    )
    assert same.kl_nats is not None and same.kl_nats < 1e-9 and same.top1_agreement == 1
    ours = whole_outputs(model, text, coarse(model))
    scored = text.scored
    log_p, log_q = ours[scored].double().log_softmax(-1), outputs[scored].double().log_softmax(-1)
    assert other.kl_nats == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert other.n == int(scored.sum())
    found = evaluate(model, {"quantized": coarse(model)}, tokens)
    agreement = next(m for m in found if m.name == "top1_agreement")
    assert other.top1_agreement == pytest.approx(agreement.value)


class _Original:
    def weight(self, site_name: str) -> None:
        return None
