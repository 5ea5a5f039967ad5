"""Windows, examples and passages: what is measured on, and what is refused."""

import dataclasses
import gzip
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cptquant.core.errors import DataError, ModelError, UserError
from cptquant.models.corpus import CHUNK_CHARACTERS, PIECE_CHARACTERS, read_texts
from cptquant.models.embedded import embedded_model_path
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.text import load_tokens, tokenize

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards hex two jovial pigs in public".split()


def prose(lines: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (lines, 12), generator=generator)
    return [" ".join(WORDS[index] for index in row) for row in picks.tolist()]


@pytest.fixture(scope="module")
def opt() -> LoadedModel:
    return load_model("embedded:opt-mini")


@pytest.fixture(scope="module")
def bert() -> LoadedModel:
    return load_model("embedded:bert-mini")


@pytest.fixture
def toy_with_tokenizer(save_toy):
    """A small random BERT of a task with the embedded tokenizer beside it."""

    def load(name: str) -> LoadedModel:
        folder = save_toy(name, vocab_size=4096)
        AutoTokenizer.from_pretrained(embedded_model_path("embedded:bert-mini")).save_pretrained(folder)
        return load_model(str(folder))

    return load


@pytest.fixture
def write(tmp_path: Path):
    def to(name: str, content: str | list[dict]) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "\n".join(json.dumps(row) for row in content))
        return path

    return to


def _refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_tokens(*arguments, **{"sequences": 8, "length": 32, "seed": 0, **options})
    assert caught.value.exit_code == 2
    return str(caught.value)


def _stream(model: LoadedModel, documents: list[str]) -> list[int]:
    ids = []
    for text in documents:
        ids += [*model.tokenizer(text, add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
    return ids


def test_plain_text_is_evaluated_in_consecutive_windows_from_its_beginning(opt, write):
    text = "\n".join(prose(400))
    tokens = load_tokens(opt, write("eval.txt", text), "test", sequences=20, length=64, seed=3)
    whole = opt.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens.input_ids.flatten().tolist() == whole[: 20 * 64]
    assert tokens.attention_mask.all()
    assert tokens.labels is None
    assert tokens.description == "eval.txt (first two thirds): 20 windows of 64 tokens"


def test_calibration_windows_are_random_seeded_and_do_not_overlap(opt, write):
    documents = prose(60)
    path = write("calibration.jsonl", [{"text": text} for text in documents])
    tokens = load_tokens(opt, path, "calibration", sequences=40, length=32, seed=1)
    stream = _stream(opt, documents)
    starts = []
    for window in tokens.input_ids.tolist():
        starts += [start for start in range(len(stream) - 31) if stream[start : start + 32] == window][:1]
    assert len(starts) == 40 < len(stream) // 32
    assert all(later - earlier >= 32 for earlier, later in itertools.pairwise(starts))

    again = load_tokens(opt, path, "calibration", sequences=40, length=32, seed=1)
    other = load_tokens(opt, path, "calibration", sequences=40, length=32, seed=2)
    assert again.digest == tokens.digest
    assert torch.equal(again.input_ids, tokens.input_ids)
    assert other.digest != tokens.digest


def test_documents_are_separated_by_the_end_of_sequence_token(opt, write):
    documents = prose(40)
    path = write("eval.jsonl", [{"text": text, "document": 0} for text in documents])
    tokens = load_tokens(opt, path, "test", sequences=8, length=16, seed=0)
    separators = int((tokens.input_ids == opt.tokenizer.eos_token_id).sum())
    assert 0 < separators < 30


def test_evaluation_windows_are_spread_over_the_documents(opt):
    tokens = load_tokens(opt, None, "test", sequences=64, length=128, seed=0)
    assert len(tokens.documents.unique()) > 30
    assert tokens.documents.tolist() == sorted(tokens.documents.tolist())


def test_windows_of_one_document_share_its_number(opt, write):
    rows = [{"text": " ".join(prose(20, seed=index)), "document": f"d{index // 2}"} for index in range(6)]
    tokens = load_tokens(opt, write("c.jsonl", rows), "calibration", sequences=30, length=32, seed=0)
    assert set(tokens.documents.tolist()) == {0, 1, 2}


def test_plain_text_is_clustered_by_chunks(opt, write):
    text = "\n".join(prose(1200))
    tokens = load_tokens(opt, write("eval.txt", text), "test", sequences=60, length=128, seed=0)
    position = 0
    for window, cluster in zip(tokens.input_ids.tolist(), tokens.documents.tolist(), strict=True):
        assert abs(cluster - position / CHUNK_CHARACTERS) < 1.2  # positions are proportional, not exact
        position += len(opt.tokenizer.decode(window))
    assert len(tokens.documents.unique()) > 3


def test_a_large_file_is_tokenized_only_as_far_as_needed(opt, write, monkeypatch):
    text = "\n".join(prose(20_000))
    path = write("large.txt", text)
    assert len(text) > 16 * PIECE_CHARACTERS
    seen = 0
    tokenizer = opt.tokenizer

    def count(texts, **options):
        nonlocal seen
        seen += sum(map(len, texts))
        return tokenizer(texts, **options)

    watched = dataclasses.replace(opt, tokenizer=_Watched(tokenizer, count))
    for split in ("calibration", "test"):
        tokens = load_tokens(watched, path, split, sequences=8, length=64, seed=0)
        assert tokens.sequence_count == 8
    assert 0 < seen < len(text) // 2


class _Watched:
    def __init__(self, tokenizer, call):
        self._tokenizer, self._call = tokenizer, call

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments, **options):
        return self._call(*arguments, **options)


def test_length_is_capped_by_the_positions_of_the_model(opt):
    tokens = load_tokens(opt, None, "calibration", sequences=4, length=100_000, seed=0)
    assert tokens.input_ids.shape == (4, opt.layout.max_positions)


def test_one_file_gives_test_and_validation_without_overlap(opt, write):
    text = "\n".join(prose(600))
    path = write("eval.txt", text)
    parts = {split: "".join(d.text for d in read_texts(path, split, "causal_lm").documents)
             for split in ("test", "validation", "calibration")}  # fmt: skip
    assert parts["test"] + parts["validation"] == text == parts["calibration"]
    assert 0.6 < len(parts["test"]) / len(text) < 0.7
    assert parts["test"].endswith("\n")

    rows = [{"text": line, "document": str(index // 4)} for index, line in enumerate(prose(60))]
    path = write("eval.jsonl", rows)
    test, validation = (read_texts(path, split, "causal_lm") for split in ("test", "validation"))
    assert len(test.documents) + len(validation.documents) == 60
    assert not {d.cluster for d in test.documents} & {d.cluster for d in validation.documents}
    assert len(validation.documents) == 20


# --- masked language models, classifiers, encoders ---


def test_masked_language_model_windows_stand_between_their_special_tokens(toy_with_tokenizer):
    model = toy_with_tokenizer("bert-mlm")
    tokens = load_tokens(model, None, "calibration", sequences=6, length=48, seed=0)
    ids = tokens.input_ids
    assert ids.shape == (6, 48)
    assert (ids[:, 0] == model.tokenizer.cls_token_id).all()
    assert (ids[:, -1] == model.tokenizer.sep_token_id).all()
    assert not torch.isin(
        ids[:, 1:-1], torch.tensor([model.tokenizer.cls_token_id, model.tokenizer.pad_token_id])
    ).any()


def test_classifier_examples_are_the_tokenizers_own_padded_on_the_right(bert, write):
    rows = [{"text": line, "label": "email"} for line in prose(9)] + [{"text": "short", "label": 1}]
    path = write("c.jsonl", rows)
    tokens = load_tokens(bert, path, "calibration", sequences=10, length=16, seed=0)
    expected = bert.tokenizer([row["text"] for row in rows], truncation=True, max_length=16, padding=True)
    assert tokens.input_ids.tolist() == expected["input_ids"]
    assert tokens.attention_mask.tolist() == expected["attention_mask"]
    assert tokens.labels.tolist() == [bert.module.config.label2id["email"]] * 9 + [1]
    assert tokens.documents.tolist() == list(range(10))
    assert tokens.token_count == sum(map(sum, expected["attention_mask"]))


def test_classifier_rows_are_a_random_choice_in_file_order(bert, write):
    rows = [{"text": line, "label": index // 20} for index, line in enumerate(prose(200))]  # sorted by label
    tokens = load_tokens(bert, write("c.jsonl", rows), "calibration", sequences=50, length=64, seed=0)
    labels = tokens.labels.tolist()
    assert set(labels) == set(range(10))  # the first 50 rows would show three
    assert labels == sorted(labels)
    assert tokens.documents.tolist() == sorted(set(tokens.documents.tolist()))


def test_embedded_examples_show_every_label_and_many_modules(bert):
    tokens = load_tokens(bert, None, "test", sequences=200, length=64, seed=0)
    assert len(set(tokens.labels.tolist())) >= 8
    assert len(tokens.documents.unique()) > 20


def test_bare_encoder_gets_every_part_of_a_long_document(toy_with_tokenizer, write):
    model = toy_with_tokenizer("bert-encoder")
    long = " ".join(prose(20))
    tokens = load_tokens(model, write("c.jsonl", [{"text": long}, {"text": "a dog"}]), "calibration",
                         sequences=4, length=64, seed=0)  # fmt: skip
    body = model.tokenizer(long, add_special_tokens=False)["input_ids"]
    rows = load_tokens(model, write("d.jsonl", [{"text": long}]), "calibration",
                       sequences=-(-len(body) // 62), length=64, seed=0)  # fmt: skip
    pieces = [row[mask.bool()][1:-1].tolist() for row, mask in zip(rows.input_ids, rows.attention_mask, strict=True)]
    assert list(itertools.chain.from_iterable(pieces)) == body
    assert tokens.sequence_count == 4


def test_bare_encoder_takes_one_example_a_line(toy_with_tokenizer, write):
    model = toy_with_tokenizer("bert-encoder")
    lines = prose(12)
    tokens = load_tokens(model, write("s.txt", "\n\n".join(lines)), "calibration", sequences=12, length=64, seed=0)
    assert tokens.input_ids.tolist() == model.tokenizer(lines, padding=True)["input_ids"]
    assert len(tokens.documents.unique()) == 12


def test_subset_keeps_rows_together_and_changes_the_digest(bert):
    tokens = load_tokens(bert, None, "validation", sequences=20, length=64, seed=0)
    part = tokens.subset([7, 3])
    assert torch.equal(part.input_ids, tokens.input_ids[[7, 3]])
    assert part.labels.tolist() == [int(tokens.labels[7]), int(tokens.labels[3])]
    assert part.documents.tolist() == tokens.documents[[7, 3]].tolist()
    assert part.digest != tokens.digest
    assert tokens.subset(range(20)).digest == tokens.digest
    assert tokens.subset(slice(0, 5)).sequence_count == 5


def test_gzipped_lines_read_like_plain_ones(opt, tmp_path, write):
    rows = [{"text": text} for text in prose(50)]
    plain = write("a.jsonl", rows)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, other = (load_tokens(opt, p, "calibration", sequences=8, length=16, seed=0) for p in (plain, packed))
    assert one.digest == other.digest


def test_datasets_folder_with_and_without_splits(opt, bert, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    names = list(bert.module.config.label2id)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names[::-1])})
    table = datasets.Dataset.from_dict({"text": prose(30), "label": [0, 1, 2] * 10}, features=features)
    table.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": table, "test": table.select(range(10))}).save_to_disk(str(tmp_path / "splits"))

    tokens = load_tokens(bert, tmp_path / "single", "calibration", sequences=30, length=32, seed=0)
    assert tokens.labels[:3].tolist() == [len(names) - 1, len(names) - 2, len(names) - 3]  # by name, not by number
    assert load_tokens(bert, tmp_path / "splits", "test", sequences=10, length=32, seed=0).sequence_count == 10
    assert load_tokens(opt, tmp_path / "splits", "calibration", sequences=4, length=32, seed=0).sequence_count == 4
    assert "has the splits train, test, but no validation" in _refusal(bert, tmp_path / "splits", "validation")


def test_datasets_folder_without_the_package(opt, tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert _refusal(opt, tmp_path, "calibration") == (
        f'--calibration {tmp_path} needs the package datasets; install it with: pip install "cptquant[datasets]", or '
        "give a .txt or .jsonl file"
    )


# --- refusals ---


def test_calibration_text_that_is_too_short(opt, write):
    path = write("short.txt", "one two three")
    found = len(opt.tokenizer("one two three")["input_ids"]) + 1
    assert _refusal(opt, path, "calibration") == (
        f"short.txt is too short: {found} tokens found, 256 (8 windows of 32) needed; give more text with "
        "--calibration, or ask for fewer or shorter sequences"
    )


def test_evaluation_text_may_be_shorter_than_asked_but_not_too_short(opt, write):
    path = write("eval.txt", "\n".join(prose(60)))
    tokens = load_tokens(opt, path, "test", sequences=10_000, length=32, seed=0)
    assert 8 <= tokens.sequence_count < 200
    assert f": {tokens.sequence_count} (of 10000 asked) windows of 32 tokens" in tokens.description
    assert re.search(
        r"\(first two thirds\) is too short: [\d,]+ tokens found, 4,096 \(8 windows of 512\) needed; give more "
        r"text with --eval-text", _refusal(opt, path, "test", sequences=64, length=512)
    )  # fmt: skip


def test_too_few_examples(bert, write):
    path = write("few.jsonl", [{"text": "a", "label": "xml"}] * 3)
    assert _refusal(bert, path, "calibration") == (
        "few.jsonl is too short: 3 examples found, 8 needed; give more text with --calibration, or ask for fewer or "
        "shorter sequences"
    )


def test_unknown_label_is_named_with_its_line(bert, write):
    path = write("l.jsonl", [{"text": "a", "label": "xml"}] * 9 + [{"text": "b", "label": "xmls"}])
    message = _refusal(bert, path, "calibration", sequences=10)
    assert message.startswith(
        f"--calibration {path}, line 10: label 'xmls' is unknown to embedded:bert-mini; it knows asyncio, "
    )
    assert message.endswith("(id2label in config.json), or their numbers 0 to 9")
    path = write("n.jsonl", [{"text": "a", "label": 10}] * 9)
    assert "line 1: label 10 is unknown" in _refusal(bert, path, "calibration")


def test_classifier_text_without_labels(bert, write):
    path = write("l.jsonl", [{"text": "a", "label": "xml"}, {"text": "b"}])
    assert _refusal(bert, path, "calibration") == (
        f'--calibration {path}, line 2: no "label", which a classifier needs; give .jsonl lines '
        '{"text": ..., "label": ...}'
    )
    assert 'no "label"' in _refusal(bert, write("l.txt", "a\nb\n"), "calibration")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not valid JSON (Expecting ',' delimiter at column 13)"),
        ('["a"]', 'line 2: a JSON list, expected an object with "text"'),
        ('{"txt": "a"}', 'line 2: no "text" among [\'txt\'], expected {"text": "..."}'),
        ('{"text": 3}', 'line 2: text is 3, expected {"text": "..."}'),
        ('{"text": "a", "label": [1]}', "line 2: label is [1], expected a class name or its number"),
        ('{"text": "a", "label": true}', "line 2: label is True, expected a class name or its number"),
    ],
)
def test_line_that_cannot_be_read(opt, write, line, message):
    path = write("bad.jsonl", '{"text": "fine"}\n' + line + "\n")
    assert _refusal(opt, path, "calibration") == f"--calibration {path}, {message}"


def test_files_that_are_not_text(opt, tmp_path, write):
    assert _refusal(opt, tmp_path / "no.txt", "test").startswith(
        f"--eval-text {tmp_path / 'no.txt'} does not exist; give"
    )
    assert "has an unknown ending '.csv'; give a UTF-8 .txt file" in _refusal(opt, write("a.csv", "a"), "test")
    assert "holds no text; give a UTF-8 .txt file" in _refusal(opt, write("e.txt", " \n"), "calibration")
    assert "is a folder, but not one that datasets.save_to_disk wrote" in _refusal(opt, tmp_path, "calibration")
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in _refusal(opt, binary, "calibration")
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(b"no gzip")
    assert "cannot be read after line 0 (Not a gzipped file" in _refusal(opt, broken, "calibration")


def test_tokenizer_of_another_model(save_toy):
    folder = save_toy("opt")  # 96 tokens
    AutoTokenizer.from_pretrained(embedded_model_path("embedded:opt-mini")).save_pretrained(folder)
    model = load_model(str(folder))
    assert re.fullmatch(
        re.escape(str(folder)) + r": the tokenizer gives token \d+, but the model knows only 96; they do not belong "
        "together: copy the original's tokenizer files", _refusal(model, None, "calibration"),
    )  # fmt: skip


def test_text_without_a_tokenizer(save_toy):
    model = load_model(str(save_toy("opt")))
    with pytest.raises(ModelError, match="has no tokenizer, and text is needed"):
        load_tokens(model, None, "calibration", sequences=4, length=16, seed=0)


def test_no_sequences_at_all(opt):
    with pytest.raises(DataError, match="0 sequences of 16 tokens were asked for"):
        tokenize(read_texts(None, "test", "causal_lm"), opt, sequences=0, length=16, seed=0)
