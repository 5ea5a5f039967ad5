"""The frozen teacher: live, in 8 bits, or as a cache."""

import copy
import json
from pathlib import Path

import pytest
import torch
from adaptation_toys import VOCABULARY, mixture, toy

from cptquant.adaptation.logit_swap import LossShape, TopTargets, swapped_log_probabilities
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.teacher import CachedTeacher, EightBitLinear, LiveTeacher, build_cache, round_to_8_bits_
from cptquant.models.load import load_model
from cptquant.models.losses import IGNORED

SHAPE = LossShape(0.5)


def cached(mixed: Mixture, folder: Path, k: int, **other: str) -> CachedTeacher:
    return build_cache(toy().eval(), mixed, SHAPE, k, folder, teacher_digest=other.get("digest", "toy"))


def read(teacher: CachedTeacher, index: int) -> TopTargets:
    return teacher.targets({}, {name: value[None] for name, value in teacher.stored(index).items()})


@pytest.mark.parametrize("apart", [False, True])
def test_the_cache_holds_the_largest_swapped_probabilities(tmp_path: Path, apart: bool) -> None:
    mixed = mixture(apart=apart)
    teacher = cached(mixed, tmp_path, 5)
    live = LiveTeacher(toy().eval())
    rest, counted = 0.0, 0
    for index in range(len(mixed)):
        window, found = mixed[index], read(teacher, index)
        ids = {"input_ids": torch.from_numpy(window.input_ids)[None]}
        if window.position_ids is not None:
            ids["position_ids"] = torch.from_numpy(window.position_ids)[None]
        logits = live.targets(ids, {}).logits[0, :-1]
        gold = torch.from_numpy(window.labels[1:])
        wanted = swapped_log_probabilities(logits, gold.clamp(min=0), SHAPE).exp()
        for place in range(len(gold)):
            top, kept = wanted[place].topk(5), found.probabilities[0, place].sort(descending=True)
            if gold[place] == IGNORED:
                assert kept.values.sum() == 0 and found.rest[0, place] == 0
                continue
            torch.testing.assert_close(kept.values, top.values, rtol=1e-5, atol=1e-7)
            assert set(found.indices[0, place].tolist()) == set(top.indices.tolist()) and gold[place] in top.indices
            assert float(found.rest[0, place]) == pytest.approx(1 - float(top.values.sum()), abs=1e-6)
            rest, counted = rest + float(found.rest[0, place]), counted + 1
    assert teacher.discarded_mass == pytest.approx(rest / counted, rel=1e-5) and teacher.discarded_mass > 0.1
    assert teacher.kind == "cache of the top 5" and teacher.seconds > 0
    assert teacher.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_the_whole_vocabulary_discards_nothing(tmp_path: Path) -> None:
    assert cached(mixture(), tmp_path, VOCABULARY).discarded_mass == 0


def test_windows_read_twice_are_stored_once(tmp_path: Path) -> None:
    mixed = mixture(windows=60)
    teacher = cached(mixed, tmp_path, 2)
    places = {mixed.place(index) for index in range(60)}
    assert len(places) < 60
    assert teacher._rows.keys() == places and sorted(teacher._rows.values()) == list(range(len(places)))


def test_a_cache_is_computed_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cptquant.adaptation.teacher._SHARD_TOKENS", 12 * 4)
    mixed = mixture()
    whole = cached(mixed, tmp_path, 3)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(before) == 6
    cached(mixed, tmp_path, 3)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before
    content = (tmp_path / "00002.safetensors").read_bytes()
    (tmp_path / "00002.safetensors").write_bytes(content[:-4])  # cut short
    (tmp_path / "00004.safetensors").unlink()
    again = cached(mixed, tmp_path, 3)
    now = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert {name for name in now if now[name] != before[name]} == {"00002.safetensors", "00004.safetensors"}
    assert (tmp_path / "00002.safetensors").read_bytes() == content
    assert again.discarded_mass == whole.discarded_mass
    other = cached(mixed, tmp_path, 3, digest="another teacher")
    assert json.loads((tmp_path / "cache.json").read_text())["digest"] and other.seconds > 0
    assert all(path.stat().st_mtime_ns != now[path.name] for path in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_live_teacher_gives_no_gradient(kind: str) -> None:
    found = LiveTeacher(toy(kind).eval()).targets({"input_ids": torch.ones(1, 4, dtype=torch.int64)}, {})
    assert found.logits.shape == (1, 4, VOCABULARY) and not found.logits.requires_grad


def test_eight_bits() -> None:
    model = load_model("embedded:opt-mini")
    exact = model.module.float()
    rounded = copy.deepcopy(exact)
    count = round_to_8_bits_(rounded, model.layout)
    linear = [site for site in model.layout.sites if site.kind == "linear" and site.block_index is not None]
    assert count == len(linear) > 0
    for site in linear:
        layer, weight = rounded.get_submodule(site.name), exact.get_submodule(site.name).weight
        assert isinstance(layer, EightBitLinear)
        found = layer.get_buffer("codes").float() * layer.get_buffer("scales")
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert bool(((found - weight).abs() <= 0.51 * step).all())
    ids = torch.arange(40)[None] + 5
    with torch.no_grad():
        p = torch.log_softmax(exact(input_ids=ids).logits, -1)
        q = torch.log_softmax(rounded(input_ids=ids).logits, -1)
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.002
