"""`cptquant recover`: a run of its own, judged beside its parent, resumable, exported, refused kindly."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cptquant.core.engine_export import ExportRecord
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.manifest import Manifest
from cptquant.core.plan import Plan
from cptquant.core.recovery import RecoveryRecord, RecoveryRequest
from cptquant.stages.recover import own_text_for

TEXT = ("--calibration-sequences", 8, "--eval-sequences", 8, "--sequence-length", 32)
NO_OWN = ("--own-text", 0)
FAST = ("--steps", 6, "--sequences", 24, "--batch-sequences", 4, *NO_OWN)
EVERY_MEASURE = ("nll_nats_per_token", "kl_nats_per_token")


@pytest.fixture
def parent(cptquant: Callable, folder: Path, tmp_path: Path) -> Path:
    """A finished run at 2 to 4 bits of an untrained model with larger weights, so that bits matter."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("weight") and ".layers." in name and tensors[name].dim() == 2:
            tensors[name] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return quantized(cptquant, folder, tmp_path / "parent")


def quantized(cptquant: Callable, model: Path, run: Path, *flags: object) -> Path:
    budget = () if "--budget" in flags else ("--budget", "2.4bpw@sites")
    budget += () if "--quantizer" in flags else ("--quantizer", "gptq")  # which leaves more to win than training does
    outcome = cptquant(
        "quantize", model, *budget, *flags, "--output", run, "--no-predict", "--baselines", "uniform", *TEXT
    )
    assert outcome.code == 0, outcome.err
    return run


def measured(run: Path) -> EvaluationReport:
    return EvaluationReport.load(run / "evaluation.json")


@pytest.mark.parametrize("method", ["blockwise", "clipping", "norms"])
def test_block_by_block(method: str, cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    run, cut = tmp_path / "run", tmp_path / "cut"
    flags = ("--method", method, "--sequences", 24, "--epochs", 2)
    outcome = cptquant("recover", parent, "--output", run, *flags)
    assert outcome.code == 0, outcome.err
    record, evaluation = RecoveryRecord.load(run / "recovery.json"), measured(run)
    assert [found.block_index for found in record.blocks] == [0, 1] and not record.looks
    assert all(found.held_out_after <= found.held_out_before for found in record.blocks)
    assert method == "clipping" or any(found.best_step for found in record.blocks)
    assert (record.codes_changed > 0) == (method != "norms" and any(found.best_step for found in record.blocks))
    theirs = measured(parent).find("kl_nats_per_token", "quantized")
    assert evaluation.find("kl_nats_per_token", "parent").value == pytest.approx(theirs.value, rel=1e-6)
    assert f"Trained further with {method}" in (run / "report.html").read_text()
    # cut after the first block: the second is trained, with the same bits
    shutil.copytree(run, cut)
    folder = cut / "work" / record.pieces
    for path in (*folder.glob("block-0001*"), *folder.glob("kept0001*"), folder / "outer.safetensors"):
        path.unlink()
    (cut / "recovery.json").unlink()
    stamp = (folder / "block-0000.safetensors").stat().st_mtime_ns
    outcome = cptquant("recover", parent, "--output", cut, *flags)
    assert outcome.code == 0, outcome.err
    assert (folder / "block-0000.safetensors").stat().st_mtime_ns == stamp
    for path in folder.glob("*.safetensors"):
        one, other = load_file(path), load_file(run / "work" / record.pieces / path.name)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), path.name
    again = tmp_path / "again"
    assert cptquant("recover", run, "--output", again, *FAST, "--method", "scales").code == 0
    found = measured(again).find("kl_nats_per_token", "parent").value
    assert found == pytest.approx(evaluation.find("kl_nats_per_token", "quantized").value, rel=1e-6)


@pytest.mark.parametrize("method", ["qat", "scales", "multipliers", "pv"])
def test_the_whole_chain(method: str, cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    far = ("--latent-rate", 0.02) if method == "qat" else ()  # six steps that reach another code
    outcome = cptquant("recover", parent, "--output", run, "--method", method, *FAST, *far)
    assert outcome.code == 0, outcome.err
    assert "Parent run" in outcome.out
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before  # never changed
    record, evaluation = RecoveryRecord.load(run / "recovery.json"), measured(run)
    assert Plan.load(run / "plan.json").formats == Plan.load(parent / "plan.json").formats
    assert record.request.method == method and record.parent == str(parent) and not record.stopped
    assert record.looks[0].step == 0 and record.looks[0].training_loss is None and record.looks[-1].step == 6
    assert (record.codes_changed > 0) == (method in ("qat", "pv") and record.best_step > 0)
    for name in EVERY_MEASURE:
        ours, theirs = evaluation.find(name, "parent"), measured(parent).find(name, "quantized")
        assert ours is not None and theirs is not None and ours.value == pytest.approx(theirs.value, rel=1e-6)
    assert "on validation text: trained" in evaluation.guard and ", the parent " in evaluation.guard
    sizes = [evaluation.find("weight_bytes", subject) for subject in ("quantized", "parent")]
    assert sizes[0].value == sizes[1].value == Plan.load(run / "plan.json").size_bytes
    assert Manifest.load(run / "manifest.json").quantizer == f"gptq + own text + {method}"
    page = (run / "report.html").read_text()
    assert f"Trained further with {method} on the plan of its parent." in page and "Parent run" in page


def test_training_wins_back_loss_and_stock_transformers_agrees(
    cptquant: Callable, parent: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = cptquant("recover", parent, "--output", run, "--steps", 30,
                       "--sequences", 64, "--batch-sequences", 4, *NO_OWN)  # fmt: skip
    assert outcome.code == 0, outcome.err
    evaluation = measured(run)
    found, start = (evaluation.find("kl_nats_per_token", name) for name in ("quantized", "parent"))
    assert evaluation.written == "quantized" and found.value < 0.9 * start.value
    # norms moved, and they are in the checkpoint
    stored, original = load_file(run / "checkpoint/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    norm = "model.decoder.final_layer_norm.bias"
    assert not torch.equal(stored[norm].float(), original[norm].float())
    # the evaluation above read it from the checkpoint; stock transformers gives the same loss
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
    evaluated = cptquant("evaluate", run / "checkpoint", "--original", tmp_path / "model", "--json", *TEXT[2:])
    assert evaluated.code == 0, evaluated.err
    again = {(m["name"], m["subject"]): m["value"] for m in json.loads(evaluated.out)["measurements"]}
    assert again["kl_nats_per_token", "quantized"] == pytest.approx(found.value, rel=1e-3)
    assert model.config.num_hidden_layers == 2


def test_the_same_command_again_trains_nothing_and_other_flags_do(
    cptquant: Callable, parent: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("recover", parent, "--output", run, *FAST)
    assert cptquant(*flags).code == 0
    stamps = {path: path.stat().st_mtime_ns for path in (run / "work").rglob("*") if path.is_file()}
    record = RecoveryRecord.load(run / "recovery.json")
    outcome = cptquant(*flags)
    assert outcome.code == 0 and "train (qat)" not in outcome.err
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    outcome = cptquant(*flags, "--seed", 1)
    assert outcome.code == 0
    assert RecoveryRecord.load(run / "recovery.json").pieces != record.pieces
    # a damaged piece is made anew, with the same bits
    folder = run / "work" / RecoveryRecord.load(run / "recovery.json").pieces
    content = {path.name: load(path.read_bytes()) for path in folder.iterdir()}
    (folder / "block-0001.safetensors").write_bytes(b"half")
    outcome = cptquant(*flags, "--seed", 1)
    assert outcome.code == 0, outcome.err
    for name, tensors in content.items():
        again = load_file(folder / name)
        assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_killed_while_training_it_goes_on_with_the_same_bits(cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["recover", str(parent), "--steps", "30", "--sequences", "64", "--batch-sequences", "4", "--own-text", "0"]
    assert cptquant(*flags, "--output", whole).code == 0
    command = [sys.executable, "-m", "cptquant", *flags, "--output", str(cut)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ})
    while process.poll() is None and not list(cut.glob("work/*-training/checkpoint-*/progress.json")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -9, "it finished before it could be killed"
    assert not (cut / "recovery.json").exists()
    outcome = cptquant(*flags, "--output", cut)
    assert outcome.code == 0, outcome.err
    one, other = (load_file(run / "checkpoint/model.safetensors") for run in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not list(cut.glob("work/*-training"))


def test_where_training_does_not_help_the_parent_is_written(cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = cptquant("recover", parent, "--output", run, *FAST, "--norm-rate", 1e30)
    assert outcome.code == 0, outcome.err
    record = RecoveryRecord.load(run / "recovery.json")
    assert record.stopped.startswith("training stopped at step ") and record.best_step == 0
    assert "training stopped at step" in outcome.err
    one, other = (load_file(path / "checkpoint/model.safetensors") for path in (run, parent))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert "training stopped at step" in (run / "report.html").read_text()


def test_norms_that_are_lost_are_not_replaced_by_the_originals(
    cptquant: Callable, parent: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for method in (("--method", "norms", "--sequences", 24), FAST):
        assert cptquant("recover", parent, "--output", run, *method).code == 0
        record = RecoveryRecord.load(run / "recovery.json")
        assert record.norms
        lost = run / "work" / record.pieces / f"{record.norms[0]}.safetensors"
        content = load(lost.read_bytes())
        lost.write_bytes(b"half")
        for _ in range(2):  # the damaged piece is removed when it is found: the second look must miss it too
            outcome = cptquant("evaluate", run)
            assert outcome.code == 2 and "make it anew with: cptquant recover" in outcome.err, outcome.err
        assert cptquant("recover", parent, "--output", run, *method).code == 0
        again = load(lost.read_bytes())
        assert again.keys() == content.keys() and all(torch.equal(again[key], content[key]) for key in content)


def test_labels_are_not_made_up(cptquant: Callable, tmp_path: Path) -> None:
    run = quantized(
        cptquant, "embedded:bert-mini", tmp_path / "parent", "--allocator", "uniform", "--formats", "int4-g64",
        "--budget", "4.5bpw@sites",
    )  # fmt: skip
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"import os{number}"}) + "\n" for number in range(40)))
    flags = ("recover", run, "--output", tmp_path / "run", "--data", text, *FAST)
    outcome = cptquant(*flags, "--loss", "ce")
    assert outcome.code == 2 and ("label" in outcome.err), outcome.err


def test_learning_the_text_is_judged_by_the_text(cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = cptquant(
        "recover", parent, "--output", run, "--loss", "ce", "--steps", 20, "--sequences", 64, "--norm-rate", 0.02
    )
    assert outcome.code == 0, outcome.err
    record, evaluation = RecoveryRecord.load(run / "recovery.json"), measured(run)
    assert record.objective == "cross-entropy of the text, nats a token" and record.options["teacher"] == "none"
    assert evaluation.guard.startswith("nll_nats_per_token on validation text") and evaluation.written == "quantized"
    ours, theirs = (evaluation.find("nll_nats_per_token", name) for name in ("quantized", "parent"))
    assert ours.value < theirs.value - 0.03  # an untrained model has everything to learn


def test_verbs_of_a_recovered_run(cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cptquant("recover", parent, "--output", run, *FAST).code == 0
    before = measured(run)
    outcome = cptquant("evaluate", run, "--eval-sequences", 10)
    assert outcome.code == 0, outcome.err
    assert measured(run).find("kl_nats_per_token", "parent").n > before.find("kl_nats_per_token", "parent").n
    assert cptquant("report", run).code == 0 and cptquant("explain", run).code == 0
    outcome = cptquant("quantize", run)
    assert outcome.code == 2 and "was trained by cptquant recover, which quantizing again would undo" in outcome.err
    again = tmp_path / "again"
    outcome = cptquant("recover", run, "--output", again, "--method", "scales", *FAST)
    assert outcome.code == 0, outcome.err
    assert Manifest.load(again / "manifest.json").quantizer == "gptq + own text + qat + scales"
    for name in EVERY_MEASURE:
        first, second = measured(run).find(name, "quantized"), measured(again).find(name, "parent")
        assert first.value == pytest.approx(second.value, rel=0.2)
    plan = Plan.load(run / "plan.json")
    site = next(name for name, fmt in plan.formats.items() if fmt.startswith("int"))
    plan.model_copy(update={"formats": {**plan.formats, site: "bfloat16"}}).save(run / "plan.json")
    outcome = cptquant("evaluate", run)
    assert outcome.code == 2 and "plan.json was changed after its weights were trained" in outcome.err


def test_the_engines_file_holds_what_was_trained(cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    gguf = quantized(cptquant, model, tmp_path / "gguf", "--target", "gguf", "--budget", "6bpw")
    run = tmp_path / "run"
    outcome = cptquant("recover", gguf, "--output", run, *FAST)
    assert outcome.code == 0, outcome.err
    assert ExportRecord.load(run / "export/gguf/export.json").round_trip[0].largest_error == 0
    outcome = cptquant("recover", gguf, "--output", tmp_path / "scales", *FAST, "--method", "scales")
    assert outcome.code == 2 and "--method scales" in outcome.err and "steps are fixed" in outcome.err


def test_llama_and_a_float32_original(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, path / name)
    run = quantized(cptquant, path, tmp_path / "parent", "--budget", "3bpw@sites")
    outcome = cptquant("recover", run, "--output", tmp_path / "run", *FAST, "--freeze", "v_proj,o_proj")
    assert outcome.code == 0, outcome.err
    assert "4 sites frozen" in RecoveryRecord.load(tmp_path / "run/recovery.json").options["moves"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--method", "magic"), "--method 'magic' is unknown; choose one of: qat, scales"),
        (("--method", "scales", "--rounding", "sigmoid"), "--rounding belongs to --method qat"),
        (("--method", "blockwise", "--loss", "ce"), "--loss has no meaning for --method blockwise"),
        (("--method", "norms", "--time", "1min"), "--time has no meaning for --method norms"),
        (("--method", "clipping", "--rounding", "sigmoid"), "--rounding has no meaning for --method clipping"),
        (("--epochs", "2"), "--epochs belongs to the block-wise methods"),
        (("--rounding", "round"), "--rounding 'round'"),
        (("--clamp", "rigid"), "--clamp 'rigid'"),
        (("--sharpness", "-1"), "--sharpness -1"),
        (("--loss", "mse"), "--loss 'mse' is unknown; choose one of: kl, ce, both"),
        (("--steps", "5", "--time", "1min"), "--steps and --time were both given"),
        (("--time", "soon"), "--time 'soon' is no duration from a second to a year; give e.g. 90s, 20min, 2h"),
        (("--data", "missing.txt"), "--data 'missing.txt' does not exist"),
        (("--freeze", "qkv"), "--freeze 'qkv' names no linear layer; this model's are: fc1, fc2, k_proj"),
        (("--sequences", "4", "--batch-sequences", "9"), "--batch-sequences 9 is more than the 3 sequences"),
        (("--teacher", "embedded:bert-mini"), "--teacher embedded:bert-mini is for sequence_classification"),
        (("--teacher", "embedded:opt-mini"), "has 12 blocks of width 128, the run's model 2 of 64"),
        (("--teacher", "embedded:opt-mini", "--loss", "ce"), "--teacher has no use with --loss ce"),
        (("--seed", "-1"), "--seed -1 is out of range"),
        (("--latent-rate", "inf"), "--latent-rate inf is out of range"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_trained(
    flags: tuple[str, ...], said: str, cptquant: Callable, parent: Path, tmp_path: Path
) -> None:
    outcome = cptquant("recover", parent, "--output", tmp_path / "run", *NO_OWN, *flags)
    assert outcome.code == 2 and said in outcome.err, outcome.err
    assert not (tmp_path / "run/recovery.json").exists()


def test_bad_places_and_texts_are_refused(cptquant: Callable, parent: Path, tmp_path: Path) -> None:
    outcome = cptquant("recover", parent, "--output", parent)
    assert outcome.code == 2 and "is the run to be trained; choose another folder" in outcome.err
    outcome = cptquant("recover", tmp_path / "nothing", "--output", tmp_path / "run")
    assert outcome.code == 2 and "does not exist; make a run with: cptquant quantize" in outcome.err
    outcome = cptquant("recover", tmp_path / "model", "--output", tmp_path / "run")
    assert outcome.code == 2 and "holds no cptquant run" in outcome.err
    for name, text, said in (
        ("empty.txt", "", "--data"),
        ("short.txt", "a few words", "is too short"),
        ("bad.jsonl", '{"txt": 1}\n', "line 1"),
    ):
        path = tmp_path / name
        path.write_text(text)
        outcome = cptquant("recover", parent, "--output", tmp_path / "run", "--data", path)
        assert outcome.code == 2 and said in outcome.err and name in outcome.err, outcome.err


def test_two_processes_train_together(parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "cptquant", "recover",
        str(parent), "--output", str(run), *map(str, FAST[:-1]), "4",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint ") == 1
    record = RecoveryRecord.load(run / "recovery.json")
    assert record.looks[-1].step == 6 and record.options["steps"].startswith("6 of 4 sequences")
    fsdp = subprocess.run(
        [sys.executable, "-m", "cptquant", "recover", str(parent), "--output", str(run)],
        capture_output=True, text=True, env={**environment, "ACCELERATE_USE_FSDP": "true"}, timeout=300,
    )  # fmt: skip
    assert (
        fsdp.returncode == 2 and "ACCELERATE_USE_FSDP asks for FSDP, which cptquant recover does not do" in fsdp.stderr
    )


def test_the_model_writes_text_where_its_predictions_are_learned() -> None:
    default = RecoveryRequest()
    assert own_text_for(default, "causal_lm") == 512 and own_text_for(default, "sequence_classification") == 0
    for changed in ({"data": "text.txt"}, {"loss": "ce"}, {"loss": "both"}, {"method": "blockwise"}):
        assert own_text_for(RecoveryRequest(**changed), "causal_lm") == 0
    assert own_text_for(RecoveryRequest(own_text=7, data="text.txt"), "causal_lm") == 7
