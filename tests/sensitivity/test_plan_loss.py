"""KL of many plans in one walk: the same as each plan evaluated by itself."""

import pytest
import torch

from cptquant.core.errors import UserError
from cptquant.core.formats import QuantFormat
from cptquant.evaluation.scored_text import prepare_text
from cptquant.models.losses import sequence_kl
from cptquant.models.stream import ModelStream
from cptquant.quantizers.rtn import Rtn
from cptquant.sensitivity.perturbation import original_weight
from cptquant.sensitivity.plan_loss import PlanLoss


class Weights:
    def __init__(self, found):
        self.found = found

    def weight(self, site):
        return self.found.get(site)


def rounded(model, name, fmt="int4-g16"):
    weight = original_weight(model, model.layout.site_by_name[name]).float()
    return Rtn()(weight, QuantFormat.parse(fmt), torch.float16).dequantize()


def slowly(model, weights, tokens):
    """Each model run as a whole and compared position by position."""
    text = prepare_text(model, tokens)
    logits = []
    for source in (None, weights):
        stream = ModelStream(model, text.tokens, weights=source, batch_size=64)
        for _ in range(model.layout.block_count):
            stream.advance(stream.load_block())
        with torch.no_grad():
            logits.append(stream.finish(0, stream.hidden[0]))
    kl = sequence_kl(*logits, text.scored)
    return (kl.sums / kl.counts)[kl.counts > 0]


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "masked", "classifier"])
def test_equals_every_plan_by_itself(name, toy, text):
    model = toy(name)
    tokens = text(model.layout.task)
    sites = [site.name for site in model.layout.block_sites]
    heads = [site.name for site in model.layout.sites if site.role == "head"]
    base = {site: rounded(model, site, "int3-g16") for site in sites} | {
        head: rounded(model, head, "int8-channel") for head in heads
    }
    changes = [{}, {sites[0]: rounded(model, sites[0])}, {sites[-1]: rounded(model, sites[-1], "int8-g16")},
               {sites[2]: rounded(model, sites[2]), sites[-2]: rounded(model, sites[-2])}]  # fmt: skip
    loss = PlanLoss(model, Weights(base), tokens)
    every = range(loss.sequence_count)
    found = torch.from_numpy(loss.losses(changes, every))
    for row, change in zip(found, changes, strict=True):
        assert row == pytest.approx(slowly(model, Weights({**base, **change}), tokens), rel=2e-4, abs=3e-6)
    assert len({round(float(row.mean()), 9) for row in found}) == len(changes)
    some = [3, 0]
    assert torch.from_numpy(loss.losses(changes, some)).numpy() == pytest.approx(found[:, some].numpy(), rel=1e-3)


def test_stored_weights_are_dequantized_where_they_are_run(toy, text):
    model, tokens = toy("llama"), text()
    site = next(site for site in model.layout.block_sites)
    stored = Rtn()(original_weight(model, site), QuantFormat.parse("int3-g16"), torch.float16)
    loss = PlanLoss(model, Weights({}), tokens)
    found = loss.losses([{site.name: stored}, {site.name: stored.dequantize()}, {}], [0, 1])
    assert (found[0] == found[1]).all() and (found[0] > found[2]).all()


def test_chunks_do_not_matter(toy, text, monkeypatch):
    model, tokens = toy("llama"), text()
    sites = [site.name for site in model.layout.block_sites]
    changes = [{name: rounded(model, name)} for name in sites[::5]]
    loss = PlanLoss(model, Weights({}), tokens)
    whole = loss.losses(changes, [1, 2, 4])
    monkeypatch.setattr("cptquant.sensitivity.plan_loss._VARIANT_BYTES", 1)
    monkeypatch.setattr("cptquant.sensitivity.plan_loss._LOGITS_AT_ONCE", 500)
    assert loss.losses(changes, [1, 2, 4]) == pytest.approx(whole, rel=1e-4, abs=1e-7)


def test_refusals(toy, text):
    with pytest.raises(UserError, match="--refine-swaps judges swaps by the KL of predictions, and a bare encoder"):
        PlanLoss(toy("encoder"), Weights({}), text("encoder"))
    model = toy("llama")
    head = next(site.name for site in model.layout.sites if site.role == "head")
    with pytest.raises(ValueError, match=f"{head} lies outside the blocks, where swaps do not reach"):
        PlanLoss(model, Weights({}), text()).losses([{head: rounded(model, head)}], [0])
