"""The lockstep pass against the whole Hugging Face model run directly, with plain loops over positions."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import plain_evaluation as oracle
from small_models import block_formats, quantized_sites, random_tokens

from cptquant.core.errors import DataError, ModelError
from cptquant.core.evaluation import DAMAGE_NAMES, Measurement
from cptquant.core.formats import QuantFormat
from cptquant.evaluation import lockstep
from cptquant.evaluation.evaluate import evaluate
from cptquant.evaluation.perplexity import token_bytes
from cptquant.evaluation.scored_text import evaluation_settings
from cptquant.models.checkpoint_weights import MemoryWeights
from cptquant.models.load import LoadedModel
from cptquant.models.losses import IGNORED, mask_tokens
from cptquant.models.stream import WeightSource
from cptquant.models.text import TokenSet

Tiny = Callable[..., LoadedModel]


class Nothing:
    """A source that changes nothing."""

    def weight(self, site_name: str) -> None:
        return None


def coarse(model: LoadedModel, *names: str) -> MemoryWeights:
    return MemoryWeights(quantized_sites(model, block_formats(model.layout, *(names or ("int4-g16",)))))


def find(measurements: list[Measurement], name: str, subject: str = "quantized") -> Measurement:
    (found,) = [m for m in measurements if m.name == name and m.subject == subject]
    return found


def outputs(model: LoadedModel, weights: WeightSource, tokens: TokenSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Original's and changed model's outputs, the whole model at once."""
    original = oracle.substituted(model, lambda _: None)
    changed = oracle.substituted(model, weights.weight)
    arguments = tokens.input_ids, tokens.attention_mask
    return oracle.run(original, *arguments), oracle.run(changed, *arguments)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_causal_losses_equal_plain_loops_over_the_whole_model(name: str, tiny: Tiny):
    model, tokens = tiny(name), random_tokens(padded=True)
    weights = coarse(model)
    original, changed = outputs(model, weights, tokens)
    nll, kl, agree, documents = [], [], [], []
    for row in range(tokens.sequence_count):
        for place in range(int(tokens.attention_mask[row].sum()) - 1):
            target = int(tokens.input_ids[row, place + 1])
            nll.append((oracle.nll_nats(original[row, place], target), oracle.nll_nats(changed[row, place], target)))
            kl.append(oracle.kl_nats(original[row, place], changed[row, place]))
            agree.append(int(original[row, place].argmax()) == int(changed[row, place].argmax()))
            documents.append(row // 3)
    found = evaluate(model, {"quantized": weights}, tokens, batch_size=4)
    for index, subject in enumerate(("original", "quantized")):
        expected = sum(pair[index] for pair in nll) / len(nll)
        assert find(found, "nll_nats_per_token", subject).value == pytest.approx(expected, rel=1e-5)
        assert find(found, "perplexity", subject).value == pytest.approx(math.exp(expected), rel=1e-5)
        assert find(found, "nll_nats_per_token", subject).n == len(nll)
    increase = find(found, "nll_increase_nats_per_token")
    assert increase.value == pytest.approx(sum(b - a for a, b in nll) / len(nll), abs=1e-5)
    assert find(found, "kl_nats_per_token").value == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert find(found, "top1_agreement").value == pytest.approx(sum(agree) / len(agree))
    by_document = [[value for value, d in zip(kl, documents, strict=True) if d == g] for g in range(3)]
    mean = sum(kl) / len(kl)
    spread = sum((sum(part) - mean * len(part)) ** 2 for part in by_document)
    assert find(found, "kl_nats_per_token").stderr == pytest.approx(math.sqrt(3 / 2 * spread) / len(kl), rel=1e-3)


def test_perplexity_is_the_exponential_of_transformers_own_loss(tiny: Tiny):
    model, tokens = tiny("opt"), random_tokens()
    with torch.no_grad():
        loss = oracle.substituted(model, lambda _: None)(input_ids=tokens.input_ids, labels=tokens.input_ids).loss
    found = evaluate(model, {}, tokens)
    perplexity = find(found, "perplexity", "original")
    assert perplexity.value == pytest.approx(math.exp(loss.item()), rel=1e-6)
    nll = find(found, "nll_nats_per_token", "original")
    assert nll.stderr is not None
    assert perplexity.stderr == pytest.approx(perplexity.value * nll.stderr)
    assert nll.note == (
        "9 disjoint windows of 16 tokens, the first token of each unscored; standard error over 3 documents"
    )


def test_the_original_is_at_distance_zero_from_itself(tiny: Tiny):
    for name in ("opt", "masked", "classifier", "encoder"):
        model, tokens = tiny(name), random_tokens(padded=name != "opt", labels=name == "classifier")
        found = evaluate(model, {"quantized": Nothing()}, tokens, batch_size=4)
        assert find(found, DAMAGE_NAMES[model.layout.task]).value == 0.0
        if name != "encoder":
            assert find(found, "top1_agreement").value == 1.0


def test_the_noise_floor_of_kl_is_below_a_nanonat(tiny: Tiny):
    """Float32 rounding of the weights, far below any quantization, must not show as divergence."""
    model, tokens = tiny("opt"), random_tokens(sequences=12)
    state = model.module.state_dict()

    class Jittered:
        def weight(self, site_name: str) -> torch.Tensor:
            weight = state[f"{site_name}.weight"].float()
            return weight * (1 + 6e-8 * torch.sign(weight))

    found = evaluate(model, {"quantized": Jittered()}, tokens)
    kl = find(found, "kl_nats_per_token").value
    assert 0 <= kl < 1e-9


def test_finishing_a_sequence_at_a_time_changes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    model, tokens = tiny("gpt2"), random_tokens()
    weights = {"quantized": coarse(model), "uniform": coarse(model, "int3-g16")}
    together = evaluate(model, weights, tokens, batch_size=4)
    monkeypatch.setattr(lockstep, "_OUTPUT_LIMIT_BYTES", 1)
    apart = evaluate(model, weights, tokens, batch_size=4)
    for one, other in zip(together, apart, strict=True):
        assert (one.name, one.subject, one.n) == (other.name, other.subject, other.n)
        assert other.value == pytest.approx(one.value, rel=1e-4, abs=1e-6)


def test_only_a_batch_of_logits_is_finished_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    finish = lockstep.ModelStream.finish

    def watch(self: lockstep.ModelStream, batch_index: int, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return finish(self, batch_index, hidden)

    monkeypatch.setattr(lockstep.ModelStream, "finish", watch)
    monkeypatch.setattr(lockstep, "_OUTPUT_LIMIT_BYTES", 2 * 16 * 97 * 4)  # two sequences of logits
    model = tiny("opt")
    evaluate(model, {"quantized": coarse(model)}, random_tokens(), batch_size=5)
    assert max(sizes) == 2
    assert sum(sizes) == 2 * 9  # every sequence once for each of the two models


def test_one_block_of_one_model_is_in_memory_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    import gc
    import weakref

    alive: list[weakref.ref[torch.nn.Module]] = []
    counts: list[int] = []
    load_block = lockstep.ModelStream.load_block

    def watch(self: lockstep.ModelStream) -> torch.nn.Module:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        block = load_block(self)
        alive.append(weakref.ref(block))
        return block

    monkeypatch.setattr(lockstep.ModelStream, "load_block", watch)
    model = tiny("gpt2")
    steps: list[tuple[str, int, int]] = []
    evaluate(
        model, {"quantized": coarse(model), "uniform": Nothing()}, random_tokens(),
        progress=lambda stage, done, total: steps.append((stage, done, total)),
    )  # fmt: skip
    assert counts == [0] * 9
    assert steps == [("evaluate", done, 9) for done in range(1, 10)]


def test_masked_models_are_scored_at_hidden_tokens_only(tiny: Tiny):
    model, tokens = tiny("masked"), random_tokens(padded=True)
    weights = coarse(model)
    masked, targets = mask_tokens(tokens, mask_token_id=3, special_ids=torch.arange(5))
    original, changed = outputs(model, weights, masked)
    places = (targets != IGNORED).nonzero().tolist()
    nll = [oracle.nll_nats(changed[row, place], int(targets[row, place])) for row, place in places]
    kl = [oracle.kl_nats(original[row, place], changed[row, place]) for row, place in places]
    found = evaluate(model, {"quantized": weights}, tokens, batch_size=4)
    assert find(found, "nll_nats_per_token").value == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert find(found, "kl_nats_per_token").value == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert find(found, "kl_nats_per_token").n == len(places) < tokens.token_count


def test_classifiers_are_scored_on_their_labels(tiny: Tiny):
    model, tokens = tiny("classifier"), random_tokens(padded=True, labels=True)
    weights = coarse(model, "int3-g16")
    original, changed = outputs(model, weights, tokens)
    assert tokens.labels is not None
    labels = tokens.labels.tolist()
    found = evaluate(model, {"quantized": weights}, tokens, batch_size=4)
    right = [int(row.argmax()) == label for row, label in zip(changed, labels, strict=True)]
    nll = [oracle.nll_nats(row, label) for row, label in zip(changed, labels, strict=True)]
    kl = [oracle.kl_nats(one, other) for one, other in zip(original, changed, strict=True)]
    assert find(found, "accuracy").value == pytest.approx(sum(right) / 9)
    assert find(found, "nll_nats_per_example").value == pytest.approx(sum(nll) / 9, rel=1e-5)
    assert find(found, "kl_nats_per_example").value == pytest.approx(sum(kl) / 9, rel=1e-4)
    assert find(found, "kl_nats_per_example").n == 9
    assert 0 < find(found, "accuracy_mcnemar_p").value <= 1


def test_accuracy_follows_the_labels(tiny: Tiny):
    model, tokens = tiny("classifier"), random_tokens(padded=True, labels=True)
    answers = oracle.run(oracle.substituted(model, lambda _: None), tokens.input_ids, tokens.attention_mask).argmax(-1)
    all_right = evaluate(model, {}, replace(tokens, labels=answers))
    assert find(all_right, "accuracy", "original").value == 1.0
    two_wrong = answers.clone()
    two_wrong[[1, 5]] = (answers[[1, 5]] + 1) % 4
    assert find(evaluate(model, {}, replace(tokens, labels=two_wrong)), "accuracy", "original").value == 7 / 9


def test_without_labels_a_classifier_is_compared_but_not_graded(tiny: Tiny):
    model = tiny("classifier")
    found = evaluate(model, {"quantized": coarse(model)}, random_tokens())
    assert [m.name for m in found] == ["kl_nats_per_example", "top1_agreement"]
    assert "9 examples without labels: accuracy is not measured" in found[0].note


def test_encoders_are_compared_by_pooled_normalised_embeddings(tiny: Tiny):
    model, tokens = tiny("encoder"), random_tokens(padded=True)
    weights = coarse(model)
    original, changed = outputs(model, weights, tokens)
    cosines = []
    for row in range(9):
        real = int(tokens.attention_mask[row].sum())
        one, other = original[row, :real].mean(dim=0), changed[row, :real].mean(dim=0)
        cosines.append(torch.nn.functional.cosine_similarity(one, other, dim=0).item())
    found = evaluate(model, {"quantized": weights}, tokens, batch_size=4)
    cosine = find(found, "embedding_cosine")
    expected = torch.tensor(cosines)
    assert cosine.value == pytest.approx(expected.mean().item(), abs=1e-6)
    assert cosine.stderr == pytest.approx(expected.std().item() / 3, rel=1e-3)
    assert cosine.n == 9
    assert find(found, "embedding_cosine_min").value == pytest.approx(min(cosines), abs=1e-6)
    assert min(cosines) <= find(found, "embedding_cosine_percentile1").value < sorted(cosines)[1]
    assert find(found, "embedding_cosine_distance").value == pytest.approx(1 - cosine.value, abs=1e-9)
    assert not [m for m in found if m.subject == "original"]


def test_fewer_bits_are_further_away(tiny: Tiny):
    model = tiny("opt")
    subjects = {name: coarse(model, f"int{bits}-g16") for name, bits in (("a", 8), ("b", 5), ("c", 3))}
    found = evaluate(model, subjects, random_tokens())
    values = [find(found, "kl_nats_per_token", name).value for name in "abc"]
    assert values[0] < values[1] < values[2]


def test_the_paired_increase_is_surer_than_the_difference_of_two_values(tiny: Tiny):
    model = tiny("opt")
    found = evaluate(model, {"quantized": coarse(model, "int8-g16")}, random_tokens(sequences=30))
    increase, nll = find(found, "nll_increase_nats_per_token"), find(found, "nll_nats_per_token")
    assert increase.stderr is not None and nll.stderr is not None
    assert 0 < increase.stderr < nll.stderr / 5


def test_a_shared_head_may_part_from_its_embedding(tiny: Tiny):
    model, tokens = tiny("opt"), random_tokens()
    assert model.layout.shared_head is not None
    embedding, head = model.layout.shared_head
    formats = {embedding: QuantFormat.parse("int8-channel-plain"), head: QuantFormat.parse("int4-g16")}
    weights = MemoryWeights(quantized_sites(model, formats))
    original, changed = outputs(model, weights, tokens)
    kl = [oracle.kl_nats(original[row, place], changed[row, place]) for row in range(9) for place in range(15)]
    found = evaluate(model, {"quantized": weights}, tokens)
    assert find(found, "kl_nats_per_token").value == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def test_bits_per_byte_counts_the_bytes_of_scored_tokens():
    from cptquant.models.load import load_model

    model = load_model("embedded:opt-mini")
    tokenizer = model.require_tokenizer()
    text = 'def größe(pfad: str) -> int:\n    """Bytes → Zahl."""\n    return os.stat(pfad).st_size\n'
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    lengths = token_bytes(tokenizer)
    assert lengths is not None
    assert int(lengths[ids].sum()) == len(text.encode())
    tokens = TokenSet.build(ids, torch.ones_like(ids), None, torch.zeros(1, dtype=torch.int64), "one line")
    found = evaluate(model, {}, tokens)
    nll, bits = find(found, "nll_nats_per_token", "original"), find(found, "bits_per_byte", "original")
    assert bits.n == len(text.encode()) - int(lengths[ids[0, 0]])
    assert bits.value == pytest.approx(nll.value * nll.n / math.log(2) / bits.n)
    assert bits.stderr is None and nll.stderr is None  # a single window has no spread
    assert nll.note.endswith("no standard error: only one sequence")


def test_settings_say_what_must_agree(tiny: Tiny):
    tokens = random_tokens()
    settings = evaluation_settings("masked_lm", tokens)
    assert settings["text_digest"] == tokens.digest
    assert (settings["sequences"], settings["tokens_per_sequence"], settings["documents"]) == (9, 16, 3)
    assert (settings["masked_fraction"], settings["mask_seed"]) == (0.15, 0)
    assert "masked_fraction" not in evaluation_settings("causal_lm", tokens)


def test_windows_longer_than_the_model_are_refused(tiny: Tiny):
    with pytest.raises(DataError, match=r"windows of 40 tokens are longer than the 32 positions.*--sequence-length 32"):
        evaluate(tiny("gpt2"), {}, random_tokens(length=40))


def test_text_of_another_tokenizer_is_refused(tiny: Tiny):
    tokens = random_tokens()
    tokens.input_ids[0, 0] = 97
    with pytest.raises(ModelError, match=r"token 97, .* has 97 tokens; the text was made with another model's"):
        evaluate(tiny("opt"), {}, tokens)


def test_text_with_nothing_to_predict_is_refused(tiny: Tiny):
    with pytest.raises(DataError, match="with nothing to predict; a window needs at least 2 real tokens"):
        evaluate(tiny("opt"), {}, random_tokens(length=1))
    with pytest.raises(DataError, match="--eval-text gives no sequence"):
        evaluate(tiny("opt"), {}, random_tokens(sequences=0))


def test_labels_that_are_no_class_are_refused(tiny: Tiny):
    tokens = random_tokens(labels=True)
    assert tokens.labels is not None
    tokens.labels[4] = 7
    with pytest.raises(DataError, match=r"label 7, .* has classes 0 to 3; correct the labels"):
        evaluate(tiny("classifier"), {}, tokens)


def test_regression_heads_are_refused(tiny: Tiny):
    with pytest.raises(ModelError, match=r"has one output \(regression\)"):
        evaluate(tiny("regression"), {}, random_tokens(labels=True))


def test_a_masked_model_without_mask_token_is_refused(tiny: Tiny):
    model = replace(tiny("masked"), tokenizer=None)
    with pytest.raises(ModelError, match="its tokenizer is missing or has no mask token"):
        evaluate(model, {}, random_tokens())


def test_outputs_that_are_not_finite_are_named(tiny: Tiny):
    class Broken:
        def weight(self, site_name: str) -> torch.Tensor | None:
            return torch.full((32, 32), float("nan")) if site_name.endswith("1.self_attn.v_proj") else None

    with pytest.raises(ModelError, match="outputs of the uniform model are NaN or infinite on 9 of 9 sequences"):
        evaluate(tiny("opt"), {"uniform": Broken()}, random_tokens())


def test_the_original_cannot_be_a_subject(tiny: Tiny):
    with pytest.raises(ValueError, match="'original' is measured by itself"):
        evaluate(tiny("opt"), {"original": Nothing()}, random_tokens())


def test_standard_errors_are_clustered_by_the_tokens_documents(tiny: Tiny):
    model, tokens = tiny("opt"), random_tokens(sequences=12)
    by_document = evaluate(model, {}, tokens)
    by_window = evaluate(model, {}, replace(tokens, documents=torch.zeros(12, dtype=torch.int64)))
    first, second = (find(found, "nll_nats_per_token", "original") for found in (by_document, by_window))
    assert first.value == second.value and first.stderr != second.stderr
    assert second.note.endswith("standard error over 12 windows of a single document")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["reference-llama", "reference-opt"])
def test_trained_models_are_judged_as_transformers_runs_them(name: str):
    from cptquant.models.load import load_model

    shared = Path(__file__).parents[3] / "shared"
    if not (shared / "models" / name).is_dir():
        pytest.skip(f"no {name} beside the project")
    model = load_model(str(shared / "models" / name))
    text = (shared / "data" / "text" / "general" / "test.txt").read_text(encoding="utf-8")[:6000]
    ids = torch.tensor(model.require_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"][: 6 * 64])
    ids = ids.reshape(6, 64)
    tokens = TokenSet.build(ids, torch.ones_like(ids), None, torch.arange(6), "general")
    weights = coarse(model, "int4-g64")
    original, changed = outputs(model, weights, tokens)
    log_p, log_q = (torch.log_softmax(logits[:, :-1].double(), dim=-1) for logits in (original, changed))
    found = evaluate(model, {"quantized": weights}, tokens, batch_size=4)
    nll = -log_q.gather(2, ids[:, 1:, None]).mean().item()
    assert find(found, "nll_nats_per_token").value == pytest.approx(nll, rel=1e-5)
    kl = find(found, "kl_nats_per_token")
    assert kl.value == pytest.approx((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item(), rel=1e-4)
    assert kl.stderr is not None and 0.003 < kl.value < 0.012 and kl.stderr < kl.value / 5
