"""A file that was written and then deleted, cut short or altered is noticed, and the same command mends it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exporters.gguf_toys import save_toy
from safetensors.torch import load_file

from cptquant.core.manifest import CheckpointRecord
from cptquant.exporters import compressed_tensors
from cptquant.pipeline import quantize_model

QUICK = {
    "calibration_sequences": 4, "eval_sequences": 4, "sequence_length": 32, "allocator": "random",
    "baselines": ("random",), "quantizer": "rtn", "predict": False,
}  # fmt: skip
FILES = {"transformers": "model.safetensors", "gguf": "model.gguf"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run for a target, made once."""
    made: dict[str, Path] = {}

    def make(target: str) -> Path:
        if target not in made:
            work = tmp_path_factory.mktemp(target)
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("CPTQUANT_LLAMACPP_PYTHON", raising=False)
                quantize_model(str(save_toy("llama", work / "model")), "8bpw", work / "run", target=target, **QUICK)
            made[target] = work / "run"
        return made[target]

    return make


@pytest.fixture
def copy(runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.delenv("CPTQUANT_LLAMACPP_PYTHON", raising=False)
    return lambda target: shutil.copytree(runs(target), tmp_path / target)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-999])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-500] ^= 0x21
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("command", "target", "damage", "said"),
    [
        ("quantize", "transformers", Path.unlink, "is missing"),
        ("quantize", "transformers", _flip, "its sha256 differs"),
        ("quantize", "gguf", _truncate, "were written"),
        ("export", "gguf", _flip, "its sha256 differs"),
    ],
)
def test_weights_are_written_again(
    cptquant: Callable, copy: Callable, command: str, target: str, damage: Callable[[Path], None], said: str
) -> None:
    run = copy(target)
    path = run / "checkpoint" / FILES[target]
    before = path.read_bytes()
    damage(path)
    outcome = cptquant(command, run)
    assert outcome.code == 0, outcome.err
    assert f"made anew: {path} " in outcome.err and said in outcome.err
    assert path.read_bytes() == before
    assert not (run / "checkpoint.partial").exists()


@pytest.mark.parametrize(
    ("command", "record"), [("quantize", "checkpoint.json"), ("export", "export/gguf/export.json")]
)
@pytest.mark.parametrize("content", ['{"schema": ', "[]", '{"schema_version": 1}'])
def test_a_damaged_record_is_made_again(
    cptquant: Callable, copy: Callable, command: str, record: str, content: str
) -> None:
    run = copy("gguf")
    before = (run / "checkpoint/model.gguf").read_bytes()
    (run / record).write_text(content)
    outcome = cptquant(command, run)
    assert outcome.code == 0, outcome.err
    assert "made anew: " in outcome.err and record in outcome.err
    assert (run / "checkpoint/model.gguf").read_bytes() == before
    assert cptquant(command, run).code == 0


def test_a_record_that_points_elsewhere_is_refused(cptquant: Callable, copy: Callable) -> None:
    run = copy("gguf")
    path = run / "export/gguf/export.json"
    record = json.loads(path.read_text())
    for change, fragment in (
        ({"entry": "../../../etc/passwd"}, "names no files of this run (entry '../../../etc/passwd')"),
        ({"files": {}}, "names no files of this run"),
        ({"files": {"x" * 5000: "0"}}, "cannot be read (File name too long)"),
    ):
        path.write_text(json.dumps(record | change))
        outcome = cptquant("generate", run, "--prompt", "x", "--engine", "llamacpp")
        assert outcome.code == 2 and fragment in outcome.err, outcome.err


def test_whole_files_are_left_alone(cptquant: Callable, copy: Callable) -> None:
    run = copy("gguf")
    before = (run / "checkpoint/model.gguf").stat().st_ino
    outcome = cptquant("export", run)
    assert outcome.code == 0 and "made anew" not in outcome.err
    assert (run / "checkpoint/model.gguf").stat().st_ino == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_config_and_tokenizer_are_written_again(cptquant: Callable, copy: Callable, name: str) -> None:
    run = copy("transformers")
    path = run / "checkpoint" / name
    before = path.read_bytes()
    path.write_text("{}")
    outcome = cptquant("quantize", run)
    assert outcome.code == 0 and f"made anew: {path} has 2 bytes" in outcome.err
    assert path.read_bytes() == before


def test_one_of_several_weight_files(cptquant: Callable, copy: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_tensors, "_MAX_FILE_BYTES", 1 << 16)
    run = copy("transformers")
    shutil.rmtree(run / "checkpoint")
    assert cptquant("quantize", run).code == 0
    record = CheckpointRecord.load(run / "checkpoint.json")
    pieces = sorted(name for name in record.files if name.endswith(".safetensors"))
    assert len(pieces) > 2 and "model.safetensors.index.json" in record.files
    path = run / "checkpoint" / pieces[1]
    before = path.read_bytes()
    _truncate(path)
    outcome = cptquant("quantize", run)
    assert outcome.code == 0 and f"made anew: {path} has" in outcome.err
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [_truncate, _flip], ids=["truncated", "altered"])
def test_a_piece_of_the_work_folder_is_quantized_again(
    cptquant: Callable, copy: Callable, damage: Callable[[Path], None]
) -> None:
    run = copy("transformers")
    pieces = run / "work" / CheckpointRecord.load(run / "checkpoint.json").inputs["pieces"]
    path = pieces / "block-0001.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is mapped
    kept = (pieces / "block-0000.safetensors").stat().st_mtime_ns
    written = (run / "checkpoint/model.safetensors").read_bytes()
    damage(path)
    outcome = cptquant("quantize", run)
    assert outcome.code == 0, outcome.err
    assert f"made anew: {path} was cut short or changed after it was written" in outcome.err
    after = load_file(path)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert (run / "checkpoint/model.safetensors").read_bytes() == written
    assert (pieces / "block-0000.safetensors").stat().st_mtime_ns == kept


def test_generate_refuses_a_damaged_checkpoint(cptquant: Callable, copy: Callable) -> None:
    run = copy("transformers")
    _truncate(run / "checkpoint" / "model.safetensors")
    refused = cptquant("generate", run, "--prompt", "def", "--tokens", 2)
    assert refused.code == 2 and "bytes," in refused.err
    assert f"were written; write it again with: cptquant quantize {run}" in refused.err


def test_exports_of_other_weights_are_dropped(cptquant: Callable, copy: Callable) -> None:
    run = copy("gguf")
    record = run / "export/gguf/export.json"
    assert record.is_file()
    outcome = cptquant("generate", run, "--prompt", "def")
    assert outcome.code == 2
    assert "checkpoint was written for --target gguf and holds no checkpoint of transformers" in outcome.err
    text = record.read_text()
    settings = ("--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--allocator", "random",
                "--baselines", "random", "--quantizer", "rtn", "--no-predict")  # fmt: skip
    other = cptquant("quantize", _model_of(run), "--budget", "9bpw", "--output", run, *settings)
    assert other.code == 0, other.err
    assert "dropped export/gguf/export.json: it described other weights" in other.err and not record.exists()
    record.write_text(text)  # as an older version would have left it
    stale = cptquant("bench", run, "--engines", "llamacpp")
    assert stale.code == 2
    assert "export.json describes files of other weights than the run has now (it was quantized anew);" in stale.err
    record.unlink()
    missing = cptquant("bench", run, "--engines", "llamacpp")
    assert missing.code == 2 and "holds no files for llamacpp; its plan was made for --target transformers and is" in (
        missing.err
    )


def _model_of(run: Path) -> str:
    from cptquant.core.settings import RunSettings

    return RunSettings.load(run / "settings.json").model
