"""`cptquant adapt` from text to a model that everything else takes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cptquant.core.adaptation import AdaptationReport
from cptquant.core.written_files import digest_folder
from cptquant.models.embedded import embedded_text_path
from cptquant.models.rows import json_rows

Command = Callable[..., Any]


def embedded(split: str, first: int, count: int) -> list[str]:
    rows = json_rows(embedded_text_path(split, labelled=False), "--domain", "")
    return [row.fields["text"] for row in rows][first : first + count]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Domain in two forms, general text, chat records."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "domain.txt").write_text("\n\n".join(embedded("calibration", 0, 12)), encoding="utf-8")
    more = [json.dumps({"text": text}) for text in embedded("calibration", 12, 12)]
    (folder / "more.jsonl").write_text("\n".join(more), encoding="utf-8")
    (folder / "general.txt").write_text("\n\n".join(embedded("calibration", 40, 20)), encoding="utf-8")
    asked = [
        {"instruction": f"What is {n} plus {n}?", "response": f"It is {2 * n}, as one can count."} for n in range(90)
    ]
    (folder / "i.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    chosen = [{"prompt": f"Say {n} politely.", "chosen": f"Of course: {n}.", "rejected": f"No {n}!"} for n in range(90)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
    return {path.stem: path for path in folder.iterdir()}


def flags(texts: dict[str, Path], output: Path, **changes: object) -> list[object]:
    given: dict[str, object] = {
        "--domain": texts["domain"], "--general": texts["general"], "--instructions": texts["i"],
        "--preferences": texts["p"], "--ratio": 0.6, "--tokens": "4k", "--window": 32, "--batch": 4,
        "--eval-sequences": 8, "--looks": 2, "--learning-rate": 3e-3, "--output": output,
        **{f"--{name.replace('_', '-')}": value for name, value in changes.items()},
    }  # fmt: skip
    return [part for flag, value in given.items() if value is not None for part in (flag, value)]


def test_a_domain_is_learned_and_the_model_works_everywhere(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"query": "import", "choices": ["os", "return"], "gold": 0}\n' * 3, encoding="utf-8")
    more = ["--domain", texts["more"], "--teacher-cache", 16, "--tasks", quiz]
    done = cptquant("adapt", folder, *flags(texts, output), *more)
    assert done.code == 0, done.err
    report = AdaptationReport.load(output / "adaptation.json")
    assert [source.name for source in report.sources] == ["domain", "general", "instructions", "preferences"]
    assert sum(source.count.tokens for source in report.sources) == report.tokens == 4000 // 128 * 128
    for source in report.sources:
        assert abs(source.count.tokens - source.count.share * report.tokens) < 32
    found = {(each.name, each.subject): each for each in report.measurements}
    for text in ("domain", "general"):
        before, after = (found[f"{text}_nll_nats_per_token", s] for s in ("original", "adapted"))
        assert after.value < before.value and before.n == 8 * 31 and before.stderr is not None
        assert report.looks[0].held_out[text].nll_nats_per_token == pytest.approx(before.value, rel=1e-4)
        assert report.looks[-1].held_out[text].nll_nats_per_token == pytest.approx(after.value, rel=1e-3)
    assert found["quiz_answer_nats_per_token", "adapted"].n == 3 and "quiz accuracy" in done.out
    teacher = report.teacher
    assert teacher is not None and teacher.kind == "cache of the top 16" and 0 < teacher.share < 1
    assert teacher.discarded_mass is not None and f"discarded mass {teacher.discarded_mass:.3f}" in done.out
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert torch.isfinite(model(**tokenizer("import os", return_tensors="pt")).logits).all()
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "not trained on" not in page or "tail" in page
    for words in ("Sources", "Course", "Teacher", "discarded mass", "domain text, held out", "<svg", "after stage 1"):
        assert words in page
    assert not (output / "work").exists()
    assert cptquant("inspect", output / "model", "--output", tmp_path / "look").code == 0
    again = cptquant("adapt", folder, *flags(texts, output), *more, "--json")
    assert again.code == 0 and json.loads(again.out)["steps"] == report.steps
    assert AdaptationReport.load(output / "adaptation.json") == report  # nothing was done again
    weights = output / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cptquant("adapt", folder, *flags(texts, output), *more).code == 0
    assert digest_folder(output / "model") == report.files, "a damaged model is made again, with the same bits"
    quiz.write_text('{"query": "import", "choices": ["os", "return"], "gold": 1}\n' * 4, encoding="utf-8")
    assert cptquant("adapt", folder, *flags(texts, output), *more).code == 0
    asked = {each.name: each.n for each in AdaptationReport.load(output / "adaptation.json").measurements}
    assert asked["quiz_accuracy"] == 4, "questions are known by what is in them, not by their file's name"


def test_the_tail_is_held_out_and_overlap_is_dropped(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in texts["more"].read_text(encoding="utf-8").splitlines()]
    with texts["more"].open("a", encoding="utf-8") as file:
        file.writelines(f"\n{json.dumps(row)}" for row in [{"text": "A new text, of few words."}, rows[2], rows[3]])
    output = tmp_path / "run"
    done = cptquant(
        "adapt", folder, *flags(texts, output, domain=texts["more"], eval_domain=texts["domain"], method="replay",
                                instructions=None, preferences=None),
    )  # fmt: skip
    assert done.code == 0, done.err
    domain, general = AdaptationReport.load(output / "adaptation.json").sources
    assert domain.held_out == 0 and domain.dropped == 0 and general.held_out > 0
    texts["more"].write_text("\n".join(json.dumps({"text": text}) for text in embedded("calibration", 8, 30)), "utf-8")
    output = tmp_path / "overlapping"  # documents 8 to 11 stand in the evaluation text, and two share much with it
    done = cptquant(
        "adapt", folder, *flags(texts, output, domain=texts["more"], eval_domain=texts["domain"], method="cpt",
                                ratio=None, instructions=None, preferences=None),
    )  # fmt: skip
    assert done.code == 0, done.err
    (domain,) = AdaptationReport.load(output / "adaptation.json").sources
    assert (domain.documents, domain.dropped) == (30, 6)
    quiz = tmp_path / "quiz.jsonl"  # and questions count as evaluation text
    quiz.write_text(json.dumps({"context": embedded("calibration", 20, 1)[0], "continuation": "end"}), encoding="utf-8")
    done = cptquant(
        "adapt", folder, *flags(texts, tmp_path / "asked", domain=texts["more"], eval_domain=texts["domain"],
                                method="cpt", ratio=None, instructions=None, preferences=None, tokens=512, tasks=quiz),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert AdaptationReport.load(tmp_path / "asked" / "adaptation.json").sources[0].dropped == 7


def test_format_alignment_is_reported(cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = flags(texts, output, tokens=512, align_instructions=4, align_preferences=4, align_rate=1e-2)
    done = cptquant("adapt", folder, *given)
    assert done.code == 0, done.err
    report = AdaptationReport.load(output / "adaptation.json")
    assert [(each.kind, each.chosen, each.candidates) for each in report.alignment] == [
        ("instructions", 4, 32), ("preferences", 4, 32),
    ]  # fmt: skip
    for each in report.alignment:
        lines = (output / each.indices_file).read_text(encoding="utf-8").splitlines()
        assert len(lines) == 4 and each.score_before == pytest.approx(
            sum(json.loads(line)["format_score"] for line in lines) / 4
        )
        assert each.score_after != each.score_before and each.held_out_count == 4
    values = {each.subject: each.value for each in report.measurements if each.name == "domain_nll_nats_per_token"}
    assert list(values) == ["original", "adapted", "aligned"] and values["aligned"] != values["adapted"]
    assert "Format alignment on preferences: samples 4 of 32" in done.out
    assert "chat template" in report.options
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert "### assistant" in str(tokenizer.chat_template)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Format alignment on instructions" in page and "after format alignment" in page


def test_embedded_text_stands_in_for_general_text(cptquant: Command, texts: dict[str, Path], tmp_path: Path) -> None:
    done = cptquant(
        "adapt", "embedded:opt-mini",
        *flags(texts, tmp_path / "run", general=None, instructions=None, preferences=None, tokens=512, looks=1),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (
        "no --general text was given: the embedded text (modules of the Python standard library) stands in" in done.out
    )
    report = AdaptationReport.load(tmp_path / "run" / "adaptation.json")
    assert [source.files for source in report.sources] == [(str(texts["domain"]),), ("embedded text",)]


def test_killed_it_goes_on_with_the_same_bits(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    def given(output: Path) -> list[object]:
        return [folder, *flags(texts, output, tokens="10k", instructions=None, preferences=None)]

    process = subprocess.Popen(
        [sys.executable, "-m", "cptquant", "adapt", *map(str, given(broken))],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(broken.glob("work/*/training/checkpoint-*/progress.json")) and time.monotonic() < deadline:
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(broken.glob("work/*/training/checkpoint-*")) and not (broken / "adaptation.json").exists()
    for output in (straight, broken):
        done = cptquant("adapt", *given(output))
        assert done.code == 0, done.err
    first, second = ((path / "model" / "model.safetensors").read_bytes() for path in (straight, broken))
    assert first == second
    reports = [AdaptationReport.load(path / "adaptation.json") for path in (straight, broken)]
    assert reports[0].looks == reports[1].looks and reports[0].measurements == reports[1].measurements


@pytest.mark.slow
def test_killed_in_both_trainings_of_stage_2_it_goes_on_with_the_same_bits(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    def given(output: Path) -> list[object]:
        more = {"align_instructions": 8, "align_preferences": 8, "align_epochs": 6, "align_rate": 1e-3}
        return [folder, *flags(texts, output, tokens=512, **more)]

    for kind in ("instructions", "preferences"):
        process = subprocess.Popen(
            [sys.executable, "-m", "cptquant", "adapt", *map(str, given(broken))],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        pattern = f"work/*/align-{kind}/training/checkpoint-*/progress.json"
        while not list(broken.glob(pattern)) and time.monotonic() < deadline:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert list(broken.glob(pattern)) and not (broken / "adaptation.json").exists()
    assert list(broken.glob("work/*/align-*/selection.json")) and list(broken.glob("work/*/measured-adapted.json"))
    for output in (straight, broken):
        done = cptquant("adapt", *given(output))
        assert done.code == 0, done.err
    assert digest_folder(straight / "model") == digest_folder(broken / "model")
    reports = [AdaptationReport.load(path / "adaptation.json") for path in (straight, broken)]
    assert reports[0].measurements == reports[1].measurements
    alignments = [[each.model_copy(update={"seconds": 0.0}) for each in report.alignment] for report in reports]
    assert alignments[0] == alignments[1] and len(alignments[0]) == 2
    assert reports[1].alignment[0].seconds > 0


def test_text_that_stands_is_used_again(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """A refused call leaves its tokens, any model may have the folder, and changed text is tokenised anew."""
    output = tmp_path / "run"
    refused = cptquant("adapt", folder, *flags(texts, output, tokens="200k"))
    assert refused.code == 2 and "above --max-epochs 4" in refused.err
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("work/text/*/tokens.i32")}
    first = {path.name for path in output.glob("work/text/*")}
    assert len(first) == 4 and kept
    before = {path: path.stat().st_ino for path in output.glob("work/text/*/tokens.i32")}
    assert cptquant("adapt", folder, *flags(texts, output, tokens="200k", ratio=0.5)).code == 2
    assert {path: path.stat().st_ino for path in output.glob("work/text/*/tokens.i32")} == before
    texts["domain"].write_text(texts["domain"].read_text(encoding="utf-8") + "\nmore = 1\n", encoding="utf-8")
    assert cptquant("adapt", folder, *flags(texts, output, tokens="200k")).code == 2
    second = {path.name for path in output.glob("work/text/*")}
    assert len(second) == 4 and len({name for name in second - first if name.startswith("domain-")}) == 1
    other = cptquant("adapt", "embedded:opt-mini", *flags(texts, output, tokens="200k"))
    assert other.code == 2 and "above --max-epochs 4" in other.err


@pytest.mark.slow
def test_two_processes_train_the_same(folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.0}), encoding="utf-8")

    def train(output: Path, *launcher: str) -> AdaptationReport:
        given = flags(texts, output, tokens=512, teacher_cache=8, looks=4)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "cptquant", "adapt", str(folder), *map(str, given)],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return AdaptationReport.load(output / "adaptation.json")

    one = train(tmp_path / "one")
    two = train(tmp_path / "two", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    losses = [[look.training_nats_per_token for look in report.looks[1:]] for report in (one, two)]
    assert len(losses[0]) == 4 and losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert one.sources == two.sources and one.steps == two.steps


REFUSALS: list[tuple[dict[str, object], str]] = [
    ({"ratio": 1.2}, "--ratio 1.2 is no share of the tokens; give a number from 0 to 1"),
    ({"chat_share": -1}, "--chat-share -1 is no share of the tokens"),
    ({"distil_weight": 2}, "--distil-weight 2 is no share of the tokens"),
    ({"tokens": "many"}, "--tokens 'many' is no number of tokens; give e.g. 300k, 20M, 1.5B"),
    ({"tokens": 100}, "--tokens 100 do not fill one step of --batch 4 windows of --window 32 tokens (128)"),
    ({"tokens": "200k"}, "epochs, above --max-epochs 4; give more text with --"),
    ({"window": 65, "tokens": "1k"}, "--window 65 is longer than the 64 positions"),
    ({"method": "magic"}, "--method 'magic' is unknown; choose one of: mix-cpt, kl, replay, cpt"),
    ({"method": "cpt"}, "--ratio 0.6 leaves tokens to other text, and --method cpt trains on the domain alone"),
    ({"method": "replay"}, "--instructions has no use: --method replay mixes no chat data"),
    ({"schedule": "linear"}, "--schedule 'linear' is unknown; choose one of: cosine, constant"),
    ({"learning_rate": 0}, "--learning-rate 0 is out of range; give a number above 0"),
    ({"micro_batch": 3}, "--micro-batch 3 does not divide the 4 windows of --batch 4"),
    ({"teacher_bits": 4}, "--teacher-bits 4 is not offered; give 8, or 16"),
    ({"teacher_cache": 4096}, "--teacher-cache 4096 is more than the 2,048 tokens of the vocabulary"),
    ({"distil_weight": 0, "teacher_cache": 8}, "--teacher-cache has no use without a teacher (--distil-weight is 0)"),
    ({"chat_template": "x"}, "--chat-template x does not exist"),
    ({"align_instructions": 4, "instructions": None}, "--align-instructions 4 needs samples; give them with"),
    ({"align_rate": 0}, "--align-rate 0 is out of range"),
    ({"domain": None}, "no domain text; give it with --domain"),
    ({"domain": "gone.txt"}, "--domain gone.txt does not exist"),
    ({"eval_general": "gone.txt"}, "--eval-general gone.txt does not exist"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    output = tmp_path / "run"
    done = cptquant("adapt", folder, *flags(texts, output, **changes))
    assert done.code == 2 and message in done.err, done.err
    assert not (output / "adaptation.json").exists()


def test_refused_texts(cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    def refuse(message: str, **changes: object) -> None:
        done = cptquant("adapt", folder, *flags(texts, tmp_path / "run", **changes))
        assert done.code == 2 and message in done.err, done.err

    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    refuse("empty.txt holds no text; give UTF-8 .txt files", domain=tmp_path / "empty.txt")
    (tmp_path / "tiny.txt").write_text("A few words only.", encoding="utf-8")
    refuse("tiny.txt is too small for a held-out tail; give held-out text with --eval-domain",
           domain=tmp_path / "tiny.txt")  # fmt: skip
    refuse("domain text holds 8 tokens, less than one window of 32; give more of it, or a smaller --window",
           domain=tmp_path / "tiny.txt", eval_domain=texts["more"])  # fmt: skip
    refuse("is too short: 8 tokens found, 256 (8 windows of 32) needed; give more text with --eval-domain",
           eval_domain=tmp_path / "tiny.txt")  # fmt: skip
    refuse("--domain: every document overlaps with the evaluation text", eval_domain=texts["domain"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n', encoding="utf-8"
    )
    refuse("bad.jsonl, line 2: no \"rejected\" among ['chosen', 'prompt']", preferences=bad)


def test_refused_models_and_teachers(cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    given = flags(texts, tmp_path / "run")
    done = cptquant("adapt", "embedded:bert-mini", *given)
    assert done.code == 2 and "cptquant adapt trains causal language models" in done.err
    done = cptquant("adapt", folder, *flags(texts, tmp_path / "other", teacher="embedded:bert-mini"))
    assert done.code == 2 and "--teacher embedded:bert-mini is for" in done.err
    smaller = AutoModelForCausalLM.from_pretrained(folder)
    smaller.resize_token_embeddings(2000)
    smaller.save_pretrained(tmp_path / "smaller")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "smaller")
    done = cptquant("adapt", folder, *flags(texts, tmp_path / "third", teacher=tmp_path / "smaller"))
    assert done.code == 2 and f"knows 2,000 tokens, {folder} 2,048; give a teacher with the same tokenizer" in done.err
    done = cptquant("adapt", folder, *flags(texts, tmp_path / "apart"), "--keep-documents-apart")
    assert done.code == 2 and "(OPTForCausalLM) attends across documents whatever its position_ids say" in done.err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    done = cptquant("adapt", folder, *flags(texts, tmp_path / "fourth"))
    assert done.code == 2 and "has no tokenizer, and text is needed" in done.err


def test_a_launcher_that_spreads_the_model_is_refused(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    done = cptquant("adapt", folder, *flags(texts, tmp_path / "run"))
    assert done.code == 2 and "ACCELERATE_USE_FSDP asks for FSDP, which cptquant adapt does not do" in done.err


def test_refused_folders(cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    done = cptquant("adapt", folder, *flags(texts, tmp_path / "file"))
    assert done.code == 2 and "is a file; choose a folder" in done.err
    full = tmp_path / "full"
    full.mkdir()
    (full / "thing").write_text("x", encoding="utf-8")
    done = cptquant("adapt", folder, *flags(texts, full))
    assert done.code == 2 and "is not empty and holds no adaptation; choose an empty folder" in done.err
    (full / "adaptation-of.json").write_text('{"model": "another"}', encoding="utf-8")
    done = cptquant("adapt", folder, *flags(texts, full))
    assert done.code == 2 and "holds an adaptation of 'another', not of" in done.err


def test_a_rate_that_is_too_high_stops_with_step_and_cause(
    cptquant: Command, folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    done = cptquant("adapt", folder, *flags(texts, tmp_path / "run", learning_rate=1e20))
    assert done.code == 2 and "error: training stopped at step" in done.err
    assert "lower --learning-rate 1e+20 and run again" in done.err
    assert not (tmp_path / "run" / "model").exists()
