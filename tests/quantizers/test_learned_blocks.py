"""GPTQ, then Block-AP: what either reads, how long it trains, what it hands over and says."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantizers.blocks.toys import Changed, slow_errors
from quantizers.test_kl_rounding import POOR, TRAINED
from quantizers.test_quantize import Collected, assert_same_bits, make_model, make_plan, make_tokens, run

from cptquant.core.errors import ArtifactError, DataError
from cptquant.models.own_text import NO_DOCUMENT, join_texts
from cptquant.models.text import TokenSet
from cptquant.quantizers.blocks.block_ap import BlockAp
from cptquant.quantizers.first_pass import FinishedInMemory
from cptquant.quantizers.held_out import given_text, split_held_out
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.quantizers.learned_blocks import LearnedBlocks, learn_blocks
from cptquant.quantizers.methods import find_quantizer, first_pass, spelling_of
from cptquant.stages.quantize import _describe_learning


def own(sequences: int) -> TokenSet:
    """As if a model had written it."""
    text = make_tokens(sequences, seed=9)
    documents = torch.full((sequences,), NO_DOCUMENT)
    return TokenSet.build(text.input_ids, torch.ones_like(text.input_ids), None, documents, "own")


def test_gptq_reads_the_given_text_and_blocks_all_of_it(tmp_path: Path) -> None:
    model, given = make_model("llama", tmp_path), make_tokens()
    plan, both = make_plan(model, linear="int3-g16"), join_texts(given, own(84))
    assert torch.equal(given_text(both).input_ids, given.input_ids) and given_text(given) is given
    assert given_text(own(3)).sequence_count == 3
    start, text = first_pass(TRAINED, both)
    assert start is POOR and text.sequence_count == given.sequence_count
    trained, first = run(model, plan, TRAINED, both), run(model, plan, POOR, given)
    outer = {site.name for site in model.layout.sites if site.block_index is None}
    assert_same_bits(*({n: w for n, w in found.weights.items() if n in outer} for found in (trained, first)))
    alone = run(model, plan, TRAINED, given)
    assert any(not torch.equal(weight.codes, alone.weights[name].codes) for name, weight in trained.weights.items())
    # what each block's output loses on the sequences held out of training, by two plain streams
    pace = TRAINED.method.pace
    before, after = (slow_errors(model, Changed(found.weights, {}), both, pace) for found in (first, trained))
    assert after[0] < before[0] and after[-1] < before[-1]
    for site in model.layout.block_sites:
        told = trained.records[site.name].learning
        assert told is not None and told.objective == "squared error of the block's output" and not told.stopped
        assert told.held_out_after == pytest.approx(after[site.block_index], rel=1e-3)
    assert split_held_out(both, pace.held_out, 0)[0].sequence_count == 2  # of the given twelve, an eighth


def test_how_much_text_a_block_sees() -> None:
    method = LearnedBlocks()
    for sequences, passes in ((64, 2.0), (192, 2.0), (256, 1.5), (384, 1.0), (900, 1.0)):
        assert method.method_on(make_tokens(sequences, length=4)).pace.epochs == pytest.approx(passes)


def test_spellings() -> None:
    found = find_quantizer("block-ap")
    assert isinstance(found, LearnedBlocks) and spelling_of(found) == "block-ap"
    rounding = find_quantizer("kl-rounding")
    assert isinstance(rounding, KlRounding) and isinstance(rounding.start, LearnedBlocks)
    start, text = first_pass(rounding, join_texts(make_tokens(), own(4)))
    assert spelling_of(start) == "gptq" and text.sequence_count == 12
    plain = find_quantizer("rtn")
    assert first_pass(plain, text) == (plain, text)


def test_refused(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    plan = make_plan(model)
    with pytest.raises(DataError, match=r"--quantizer block-ap needs at least 2 calibration sequences, got 1"):
        run(model, plan, TRAINED, make_tokens().subset([0]))
    with pytest.raises(ArtifactError, match=r"the first pass has no record of .* sites are missing\); run the command"):
        learn_blocks(model, TRAINED, make_tokens(), FinishedInMemory(), lambda *_: None)


def test_a_loss_that_is_no_number_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model("llama", tmp_path), make_tokens()
    plan = make_plan(model, linear="int3-g16")
    monkeypatch.setattr(BlockAp, "loss", lambda _self, output, _targets: output.sum() * float("nan"))
    found, first = run(model, plan, TRAINED, tokens), run(model, plan, POOR, tokens)
    assert_same_bits(found.weights, first.weights)
    for site in model.layout.block_sites:
        learning = found.records[site.name].learning
        assert learning is not None and learning.stopped.startswith("training stopped at step 1 of ")
    told = _describe_learning(TRAINED, list(found.records.values()))["learning"]
    assert "the loss is nan" in told and f"(at {len(model.layout.block_sites)} sites)" in told


def test_where_no_step_helps_the_start_is_handed_over(tmp_path: Path) -> None:
    model, tokens = make_model("llama", tmp_path), make_tokens()
    plan = make_plan(model, linear="int3-g16", v_proj="bfloat16")
    wild = replace(TRAINED, method=replace(TRAINED.method, latent_rate=50.0))
    found, first = run(model, plan, wild, tokens), run(model, plan, POOR, tokens)
    assert_same_bits(found.weights, first.weights)
    for name, record in found.records.items():
        before: Mapping[str, object] = first.records[name].model_dump()
        assert record.model_copy(update={"learning": None}).model_dump() == before
    assert isinstance(found, Collected) and found.calls == [*range(model.layout.block_count), None]
