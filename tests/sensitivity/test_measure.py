"""The verb: what it refuses, what it promises for every method."""

import dataclasses

import pytest
import torch

from cptquant.core.errors import DataError, ModelError, UserError
from cptquant.core.sensitivity import SensitivityTable
from cptquant.models.losses import IGNORED
from cptquant.sensitivity.ablation import Ablation
from cptquant.sensitivity.correlation import Cmpq
from cptquant.sensitivity.loss import Objective, pick_for_task, pick_sequences, pose_question, probe_logits
from cptquant.sensitivity.measure import measure_sensitivity
from cptquant.sensitivity.methods import METHODS, find_method
from cptquant.sensitivity.path_integral import PathIntegral
from cptquant.sensitivity.pruning import Pmpq
from cptquant.sensitivity.sketch import Sketch
from cptquant.sensitivity.taylor import Tdmpq
from cptquant.stages.check import SENSITIVITY_METHODS

FAST = {
    "cmpq": Cmpq(pool_tokens=5, jackknife_groups=3),
    "pmpq": Pmpq(curve=()),
    "tdmpq": Tdmpq(),
    "path": PathIntegral(points=1),
    "sketch": Sketch(),
    "ablation": Ablation(sequences=4),
}


@pytest.mark.parametrize("name", list(FAST))
def test_every_method_leaves_a_table_that_saves_and_loads_and_a_model_unchanged(toy, text, candidates, name, tmp_path):
    model = toy("llama")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    steps = []
    table = measure_sensitivity(
        model, text(), candidates(model), FAST[name], progress=lambda stage, done, total: steps.append((done, total))
    )
    table.save(tmp_path / "sensitivity.json")
    assert SensitivityTable.load(tmp_path / "sensitivity.json") == table
    assert table.method == name
    assert set(table.damages) == set(model.layout.site_by_name)
    assert [score.block_index for score in table.block_scores] == [0, 1, 2, 3]
    assert all(score.n > 0 and score.stderr is not None for score in table.block_scores)
    assert table.metadata["tokens"] == "random tokens"
    assert steps
    assert all(done <= total for done, total in steps)
    assert all(torch.equal(before[key], value) for key, value in model.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_method_names_are_spelled_once():
    assert list(METHODS) == ["cmpq", "pmpq", "tdmpq", "path", "sketch", "ablation"] == list(SENSITIVITY_METHODS)
    assert find_method("pmpq") == Pmpq()
    with pytest.raises(
        UserError, match="--sensitivity 'hessian' is unknown; choose one of: cmpq, pmpq, tdmpq, path, sketch, ablation"
    ):
        find_method("hessian")


def test_formats_must_name_the_models_sites(toy, text, candidates):
    model = toy("opt")
    formats = candidates(model)
    del formats["lm_head"]
    with pytest.raises(ValueError, match="missing or unknown: lm_head"):
        measure_sensitivity(model, text(), formats, Cmpq())


def test_no_text_and_no_labels_are_refused(toy, text, candidates):
    model = toy("classifier")
    formats = candidates(model)
    with pytest.raises(DataError, match="gives no sequence; give more text with --calibration"):
        measure_sensitivity(model, text().subset([]), formats, Cmpq())
    with pytest.raises(DataError, match="a classifier is measured on labelled text"):
        measure_sensitivity(model, text(), formats, Pmpq())


def test_a_model_that_overflows_is_named(toy, text, candidates):
    model = toy("opt")
    import copy

    broken = copy.deepcopy(model.module)
    broken.model.decoder.final_layer_norm.weight.data[:] = float("inf")
    with pytest.raises(ModelError, match=r"the sensitivity of block 0 .* the model overflows on the calibration text"):
        measure_sensitivity(dataclasses.replace(model, module=broken), text(), candidates(model), Pmpq())


def test_a_masked_model_needs_a_mask_token(toy, text, candidates):
    model = dataclasses.replace(toy("masked"), tokenizer=None)
    with pytest.raises(ModelError, match="its tokenizer is missing; its loss is measured on masked tokens"):
        measure_sensitivity(model, text(), candidates(model), Pmpq())


def test_fewer_sequences_are_spread_over_the_text(text):
    tokens = text(sequences=9)
    assert pick_sequences(tokens, 3).documents.tolist() == [0, 4, 8]
    assert pick_sequences(tokens, 20) is tokens


def test_a_model_that_answers_each_text_once_is_measured_on_more_of_them(toy, text):
    tokens = text(sequences=9)
    assert pick_for_task(toy("llama"), tokens, 3, 6).sequence_count == 3
    assert pick_for_task(toy("masked"), tokens, 3, 6).sequence_count == 3
    assert pick_for_task(toy("encoder"), tokens, 3, 6).sequence_count == 6


def test_logits_in_slices_change_nothing(toy, text, monkeypatch):
    model, tokens = toy("llama"), text()
    from cptquant.models.stream import ModelStream
    from cptquant.sensitivity.perturbation import run_to_end

    question = pose_question(model, tokens)
    stream = ModelStream(model, tokens, batch_size=4)
    whole = [list(stream.hidden)]
    run_to_end(stream, 0, whole)
    objective, shifted = Objective(stream, question), [hidden + 0.01 for hidden in whole[0]]

    def judge():
        generator = torch.Generator().manual_seed(0)
        return (
            objective.losses(shifted, whole[0]).sums,
            objective.divergences(shifted, whole[0]).sums,
            objective.gradient(0, shifted[0], "empirical", generator)[0],
        )

    before = judge()
    monkeypatch.setattr("cptquant.sensitivity.loss._LOGITS_AT_ONCE", 96 * 4 * 3)
    for first, second in zip(before, judge(), strict=True):
        torch.testing.assert_close(first, second)
    counts = objective.losses(shifted, whole[0]).counts
    assert counts.tolist() == (question.targets != IGNORED).sum(1).tolist()


def test_probes_have_the_covariance_of_the_labels():
    logits = torch.tensor([0.0, 1.0, 4.0]).expand(1, 40000, 3)
    scored = torch.ones(1, 40000, dtype=torch.bool)
    scored[0, 0] = False
    found = probe_logits(logits, scored, torch.Generator().manual_seed(0))[0]
    assert found[0].tolist() == [0, 0, 0]
    p = logits[0, 0].softmax(-1)
    torch.testing.assert_close(found.t() @ found / 39999, p.diag() - p.outer(p), atol=2e-3, rtol=0)
