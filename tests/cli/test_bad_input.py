"""The table of bad input: one clear message, the right exit code, no traceback, nothing finished is lost."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

QUICK = (
    "--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--sensitivity", "cmpq",
    "--baselines", "uniform", "--own-text", 0,
)  # fmt: skip


def refused(outcome, *fragments: str) -> None:
    assert outcome.code == 2, outcome.err
    assert [line for line in outcome.err.splitlines() if line.startswith("error: ")] == [outcome.err.splitlines()[-1]]
    for fragment in fragments:
        assert fragment in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--budget", "lots"), ("--budget 'lots' is not readable", "4bpw")),
        (("--budget", "0bpw"), ("--budget '0bpw' must be above zero",)),
        (("--budget", "3furlongs"), ("unknown unit 'furlongs'",)),
        (("--budget", "12MB@sites"), ("@sites goes with bpw only",)),
        (("--budget", "0.5bpw"), ("0.5bpw", "--budget")),
        (("--budget", "99%"), ("99%", "--budget")),
        (("--budget", "4bpw", "--formats", "int9-g64"), ("format 'int9-g64' is not readable", "int4-g64")),
        (("--budget", "4bpw", "--formats", ""), ("--formats names no format",)),
        (
            ("--budget", "4bpw", "--formats", "int4-g64-asym"),
            ("--formats int4-g64-asym is refused by --target transformers", "zero point"),
        ),
        (("--budget", "4bpw", "--target", "tpu"), ("--target 'tpu' is unknown", "transformers")),
        (("--budget", "4bpw", "--allocator", "magic"), ("--allocator 'magic' is unknown", "knapsack")),
        (("--budget", "4bpw", "--quantizer", "awq"), ("--quantizer 'awq' is unknown", "gptq")),
        (("--budget", "4bpw", "--sensitivity", "vibes"), ("--sensitivity 'vibes' is unknown", "tdmpq")),
        (("--budget", "10bpw", "--baselines", "best"), ("--baselines 'best' is unknown", "uniform")),
        (("--budget", "4bpw", "--calibration", "nowhere.txt"), ("--calibration 'nowhere.txt' does not exist",)),
        (("--budget", "4bpw", "--eval-text", "nowhere.txt"), ("--eval-text 'nowhere.txt' does not exist",)),
        (("--budget", "4bpw", "--seed", -1), ("--seed -1 is out of range; give 0 to 9223372036854775807",)),
        (("--budget", "4bpw", "--seed", 2**63), (f"--seed {2**63} is out of range", "--seed 1")),
        ((), ("no budget was given", "--budget")),
    ],
)
def test_choices(cptquant: Callable, folder: Path, tmp_path: Path, flags: tuple, fragments: tuple) -> None:
    refused(cptquant("quantize", folder, "--output", tmp_path / "run", *QUICK, *flags), *fragments)


def test_no_output_folder(cptquant: Callable, folder: Path) -> None:
    refused(cptquant("quantize", folder, "--budget", "10bpw"), "no output folder was given", "--output")


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_missing_model(cptquant: Callable, tmp_path: Path, command: str) -> None:
    flags = ("--budget", "10bpw", "--output", tmp_path / "run") if command == "quantize" else ()
    outcome = cptquant(command, tmp_path / "nowhere", *flags)
    refused(outcome, "nowhere")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _flip_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20] ^= 0x10
    path.write_bytes(data)


def _put(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.decoder.layers.1.fc1.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _remove_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda folder: shutil.rmtree(folder) or folder.mkdir(), ("config.json",)),
        (_truncate, ("model.safetensors",)),
        (_flip_header, ("model.safetensors",)),
        (_put(float("nan")), ("model.decoder.layers.1.fc1.weight", "NaN")),
        (_put(float("inf")), ("model.decoder.layers.1.fc1.weight", "infinite")),
        (_remove_tokenizer, ("no tokenizer",)),
        (lambda folder: (folder / "config.json").write_text("{not json"), ("config.json",)),
        (_config(hidden_size="wide"), ("config.json", "hidden_size")),
        (_config(architectures=["TeapotForCausalLM"], model_type="teapot"), ("eapot",)),
    ],
    ids=["empty", "truncated", "bit-flipped", "nan", "inf", "no-tokenizer", "broken-json", "wrong-type", "unknown"],
)  # fmt: skip
def test_damaged_model(cptquant: Callable, folder: Path, tmp_path: Path, damage: Callable, fragments: tuple) -> None:
    damage(folder)
    refused(cptquant("quantize", folder, "--budget", "10bpw", "--output", tmp_path / "run", *QUICK), *fragments)


def test_text_too_short(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hello")
    for flag in ("--calibration", "--eval-text"):
        run = tmp_path / flag.strip("-")
        outcome = cptquant("quantize", folder, "-b", "10bpw", "-o", run, *QUICK, flag, tmp_path / "short.txt")
        refused(outcome, flag, "tokens")
        assert not list(run.glob("sensitivity*")), "compute was spent before the text was read"


def test_output_not_empty(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    outcome = cptquant("quantize", folder, "--budget", "10bpw", "--output", tmp_path / "run", *QUICK)
    refused(outcome, "is not empty and holds no cptquant run")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_output_is_a_file(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    refused(cptquant("quantize", folder, "-b", "10bpw", "-o", tmp_path / "run", *QUICK), "is a file; choose a folder")


def test_output_of_another_model(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    assert cptquant("inspect", folder, "--output", tmp_path / "run").code == 0
    other = shutil.copytree(folder, tmp_path / "other")
    outcome = cptquant("quantize", other, "-b", "10bpw", "-o", tmp_path / "run", *QUICK)
    refused(outcome, "holds a run of", "choose another folder")


def test_stages_name_the_command_that_is_missing(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    refused(cptquant("measure", tmp_path), "settings.json does not exist", "cptquant inspect")
    assert cptquant("inspect", folder, "--output", tmp_path / "run").code == 0
    refused(cptquant("allocate", tmp_path / "run", "--budget", "10bpw"), "sensitivity.json", "cptquant measure")
    refused(cptquant("quantize", tmp_path / "run"), "plan.json does not exist", "cptquant allocate")
    refused(cptquant("evaluate", tmp_path / "run"), "evaluation.json does not exist", "cptquant")


@pytest.fixture
def finished(cptquant: Callable, folder: Path, tmp_path: Path) -> Path:
    """A finished quick run."""
    run = tmp_path / "run"
    outcome = cptquant("quantize", folder, "--budget", "10bpw", "--output", run, *QUICK)
    assert outcome.code == 0, outcome.err
    return run


@pytest.mark.parametrize(
    ("name", "change", "fragments"),
    [
        ("plan.json", {"size_bytes": "many"}, ("plan.json: field size_bytes", "'many'", "cptquant allocate")),
        ("plan.json", {"size_bytes": 1}, ("plan.json says size_bytes = 1", "its formats take")),
        ("plan.json", {"formats": {"nose": "int4-g64"}}, ("plan.json does not fit the model",)),
        ("plan.json", {"schema_version": 99}, ("schema_version 99", "cptquant allocate")),
        ("layout.json", {"parameters": None}, ("layout.json: field parameters", "cptquant inspect")),
        ("settings.json", {"seed": "zero"}, ("settings.json: field seed", "'zero'")),
    ],
)
def test_damaged_artifacts(
    cptquant: Callable, finished: Path, name: str, change: dict[str, object], fragments: tuple
) -> None:
    path = finished / name
    before = (finished / "checkpoint" / "model.safetensors").read_bytes()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(cptquant("quantize", finished), *fragments)
    path.write_text("{")
    refused(cptquant("quantize", finished), f"{name} is not valid JSON")
    assert (finished / "checkpoint" / "model.safetensors").read_bytes() == before


def test_sensitivity_of_wrong_types(cptquant: Callable, finished: Path) -> None:
    path = finished / "sensitivity.json"
    table = json.loads(path.read_text())
    table["damages"] = {site: {fmt: "bad" for fmt in row} for site, row in table["damages"].items()}
    path.write_text(json.dumps(table))
    refused(cptquant("allocate", finished, "--budget", "9bpw"), "sensitivity.json: field damages.", "cptquant measure")


def test_illegal_edit_of_a_plan_names_the_reason(cptquant: Callable, finished: Path) -> None:
    path = finished / "plan.json"
    plan = json.loads(path.read_text())
    plan["formats"]["model.decoder.layers.0.fc1"] = "int4-g48"
    path.write_text(json.dumps(plan))
    refused(cptquant("quantize", finished), "model.decoder.layers.0.fc1", "64 columns, groups of 48")


def test_disk_full_leaves_no_half_file(
    cptquant: Callable, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cptquant.exporters import compressed_tensors

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(compressed_tensors, "save_file", full)
        refused(cptquant("quantize", folder, "-b", "10bpw", "-o", run, *QUICK), "disk full", "finished stages are kept")
    assert not (run / "checkpoint").exists() and not list(run.glob("*.partial"))
    pieces = {path: path.stat().st_mtime_ns for path in (run / "work").rglob("*.safetensors")}
    assert pieces
    assert cptquant("quantize", folder, "-b", "10bpw", "-o", run, *QUICK).code == 0
    assert {path: path.stat().st_mtime_ns for path in pieces} == pieces, "finished blocks were made again"
    assert (run / "checkpoint" / "model.safetensors").exists()


def test_interruption_keeps_finished_stages(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", "from cptquant.cli.main import main; main()", "quantize", str(folder),
               "--budget", "10bpw", "--output", str(run), *map(str, QUICK)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (run / "layout.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "error: interrupted; finished stages are kept" in err and "Traceback" not in err
    assert (run / "layout.json").exists()
