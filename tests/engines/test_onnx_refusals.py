"""What ONNX cannot hold is refused before anything is quantized; damaged files are named; nothing half stays."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from engines_models.tiny_models import EMBEDDED, MODELS, quantize, save_model

from cptquant.core.engine_export import ExportRecord
from cptquant.core.errors import ArtifactError, CptquantError
from cptquant.models.load import load_model

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.engines

QUICK = ("--calibration-sequences", 4, "--eval-sequences", 4, "--sequence-length", 32, "--quantizer", "rtn",
         "--allocator", "random", "--baselines", "random", "--no-predict")  # fmt: skip


def save_changed(name: str, folder: Path, **changes: object) -> Path:
    architecture, fields = MODELS[name]
    model_class = getattr(transformers, architecture)
    model_class(model_class.config_class(**{**fields, **changes})).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / "opt-mini" / file, folder / file)
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"activation_function": "mish"}, "--target onnx does not know the activation 'mish' of OPTForCausalLM"),
        ("mistral", {"sliding_window": 48}, "the last 48 tokens only, and the context is 64; --target onnx holds full"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "--target onnx does not know rotary positions of type 'dynamic'; it knows default, linear, llama3, yarn"),
        ("qwen3", {"head_dim": 24}, "turns 24 entries of each head by their position; ONNX Runtime needs a mul"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "with scale_attn_by_inverse_layer_idx = true; use -"),
    ],
)  # fmt: skip
def test_refused_before_compute(
    cptquant: Callable, tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    model, run = save_changed(name, tmp_path / "model", **changes), tmp_path / "run"
    outcome = cptquant("quantize", model, "--target", "onnx", "--budget", "7bpw", "--output", run, *QUICK)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert not (run / "plan.json").exists() and not (run / "work").exists()
    assert not (run / "checkpoint.partial").exists()


def test_the_context_that_the_message_names_is_written(cptquant: Callable, tmp_path: Path) -> None:
    model, run = save_changed("mistral", tmp_path / "model", sliding_window=48), tmp_path / "run"
    common = ("quantize", model, "--target", "onnx", "--budget", "7bpw", "--output", run, *QUICK)
    assert "pass --context 48" in cptquant(*common).err
    outcome = cptquant(*common, "--context", 48)
    assert outcome.code == 0, outcome.err
    record = ExportRecord.load(run / "export/onnx/export.json")
    assert record.context == 48 and record.memory is not None and record.memory.context == 48
    long = cptquant("generate", run, "--prompt", "def", "--engine", "onnx", "--tokens", 60)
    assert long.code == 2 and "do not fit the context of 48; lower --tokens" in long.err
    settings = (run / "settings.json").read_bytes()
    beyond = cptquant("export", run, "--context", 64)
    assert beyond.code == 2 and "the last 48 tokens only, and the context is 64" in beyond.err
    assert (run / "settings.json").read_bytes() == settings, "a refused flag was kept"
    assert cptquant("export", run).code == 0
    shorter = cptquant("export", run, "--context", 40)
    assert shorter.code == 0, shorter.err
    assert ExportRecord.load(run / "export/onnx/export.json").context == 40


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    from cptquant.exporters.onnx.export import export_onnx

    work = tmp_path_factory.mktemp("onnx")
    model = load_model(save_model("opt", work / "model"))
    formats, weights = quantize(model, ["int8-g32"])
    export_onnx(model, formats, weights, work / "files")
    return model, formats, weights, work / "files"


@pytest.mark.parametrize("content", [b"", b"not a model", None], ids=["empty", "text", "truncated"])
def test_a_damaged_graph_is_named(written, tmp_path: Path, content: bytes | None) -> None:
    from cptquant.exporters.onnx.export import write_float_twin
    from cptquant.exporters.onnx.read_back import read_sites

    model, formats, _, folder = written
    file = shutil.copytree(folder, tmp_path / "files") / "model.onnx"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    wanted = r"model.onnx (is missing, cut short|holds no graph).*; write it again with: cptquant export RUN"
    with pytest.raises(ArtifactError, match=wanted):
        list(read_sites(file, model.layout, formats))
    with pytest.raises(ArtifactError, match=wanted):
        write_float_twin(file)


def test_a_damaged_data_file_is_named(written, tmp_path: Path) -> None:
    from cptquant.exporters.onnx.read_back import read_sites

    model, formats, _, folder = written
    files = shutil.copytree(folder, tmp_path / "files")
    data = files / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(ArtifactError, match=r"model.onnx.data is cut short: .* needs \d+ bytes; write it again with"):
        list(read_sites(files / "model.onnx", model.layout, formats))
    data.unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx.data cannot be read \(No such file or directory\); write it"):
        list(read_sites(files / "model.onnx", model.layout, formats))


def test_a_wrong_size_leaves_what_stood(written, tmp_path: Path) -> None:
    from cptquant.exporters.onnx.export import export_onnx

    model, formats, weights, folder = written
    stood = shutil.copytree(folder, tmp_path / "files")
    before = {path.name: path.read_bytes() for path in stood.iterdir()}
    with pytest.raises(CptquantError, match=r"model.onnx holds \d+ bytes of tensors, the plan says 17$"):
        export_onnx(model, formats, weights, stood, tensor_bytes=17)
    assert {path.name: path.read_bytes() for path in stood.iterdir()} == before
    assert not (tmp_path / "files.partial").exists()


def test_nothing_half_stays_after_any_failure(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cptquant.exporters.onnx import export

    model, formats, weights, _ = written

    def fail(*_: object) -> None:
        raise RuntimeError("a fault in the middle")

    monkeypatch.setattr(export, "_build", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        export.export_onnx(model, formats, weights, tmp_path / "files")
    assert list(tmp_path.iterdir()) == []
