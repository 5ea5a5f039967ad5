"""export, generate and bench from the command line, on a small OPT, with the real engine."""

import json
import shutil

import pytest
from engines_models.tiny_models import save_model

from cptquant.cli.main import main
from cptquant.core.bench import BenchRecord
from cptquant.core.engine_export import ExportRecord
from cptquant.core.errors import EngineError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.engines

TEXT = ["--calibration-sequences", "4", "--eval-sequences", "8", "--sequence-length", "32"]
QUICK = ["--quantizer", "rtn", "--allocator", "random", "--baselines", "random", *TEXT]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run for --target onnx, made once through the command line."""
    work = tmp_path_factory.mktemp("commands")
    model, run = save_model("opt", work / "model"), work / "run"
    arguments = ["quantize", str(model), "--target", "onnx", "--budget", "6bpw", "--output", str(run), *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cptquant", *arguments])
        try:
            main()
        except SystemExit as leave:
            assert not leave.code
    return run


@pytest.fixture
def copied(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


def test_quantize_checks_the_file_in_the_engine(run_folder):
    record = ExportRecord.load(run_folder / "export/onnx/export.json")
    exact, rounded = record.comparisons
    assert (exact.arithmetic, rounded.arithmetic) == ("float activations", "int8 activations")
    assert exact.kl_nats is not None and exact.kl_nats < 1e-7 and exact.bound == 1e-3 and exact.n == 8 * 31
    assert rounded.kl_nats is not None and rounded.kl_nats > exact.kl_nats and rounded.bound is None
    assert record.round_trip and all(site.largest_error == 0 for site in record.round_trip)
    assert record.entry == "checkpoint/model.onnx" and record.engine.startswith("onnxruntime ")
    assert record.memory is not None and record.memory.measured_bytes is not None
    assert record.memory.cache_bytes == 64 * 2 * 2 * 64 * 4
    plan = json.loads((run_folder / "plan.json").read_text())
    assert record.tensor_bytes == plan["size_bytes"]


def test_export_prints_what_was_found(cptquant, run_folder):
    (run_folder / "report.html").unlink()
    outcome = cptquant("export", run_folder)
    assert outcome.code == 0
    assert "float activations: KL(ours ‖ engine)" in outcome.out and "allowed 0.001" in outcome.out
    assert "quantized matrices exact" in outcome.out and "measured" in outcome.out
    page = (run_folder / "report.html").read_text()
    assert "In the engine" in page and "float activations</td>" in page and "onnxruntime " in page


def test_a_truncated_data_file_is_written_again(cptquant, copied):
    data = copied / "checkpoint/model.onnx.data"
    before = data.read_bytes()
    data.write_bytes(before[:-4000])
    outcome = cptquant("generate", copied, "--prompt", "The cat", "--engine", "onnx")
    assert outcome.code == 2 and f"write it again with: cptquant export {copied} --target onnx" in outcome.err
    outcome = cptquant("export", copied)
    assert outcome.code == 0 and f"made anew: {data} has" in outcome.err
    assert data.read_bytes() == before


def test_a_changed_tensor_is_named(cptquant, copied, monkeypatch):
    monkeypatch.setattr("cptquant.stages.quantize.list_damage", lambda *_: [])  # as if the record knew the change
    (copied / "export/onnx/export.json").unlink()
    data = copied / "checkpoint/model.onnx.data"
    content = bytearray(data.read_bytes())
    from cptquant.exporters.onnx.read_back import _TensorFile

    tensors = _TensorFile(copied / "checkpoint/model.onnx").tensors
    sites = json.loads((copied / "plan.json").read_text())["formats"]
    site = next(name for name in sites if f"{name}.codes" in tensors)  # has a matrix of its own, in one width
    proto = tensors[f"{site}.codes"]
    offset = next(int(entry.value) for entry in proto.external_data if entry.key == "offset")
    content[offset] ^= 0x11
    data.write_bytes(bytes(content))
    outcome = cptquant("export", copied)
    assert outcome.code == 2
    assert "tensors that differ from ours: " in outcome.err and f"{site} (by up to" in outcome.err
    assert data.exists()


def test_another_target_says_what_is_illegal_there(cptquant, run_folder):
    outcome = cptquant("export", run_folder, "--target", "transformers")
    assert outcome.code == 2
    assert "was made for --target onnx and is illegal under --target transformers:" in outcome.err
    assert "nearest legal format:" in outcome.err


def test_generate_continues_and_refuses(cptquant, run_folder):
    first = cptquant("generate", run_folder, "--prompt", "The cat", "--engine", "onnx", "--tokens", 5)
    again = cptquant("generate", run_folder, "--prompt", "The cat", "--engine", "onnx", "--tokens", 5)
    assert first.code == 0 and first.out == again.out and first.out.startswith("The cat")
    long = cptquant("generate", run_folder, "--prompt", "The cat", "--engine", "onnx", "--tokens", 100)
    assert long.code == 2 and "do not fit the context of 64; lower --tokens" in long.err
    other = cptquant("generate", run_folder, "--prompt", "The cat", "--engine", "llamacpp", "--tokens", 5)
    assert other.code == 2 and "holds no files for llamacpp; its plan was made for --target onnx" in other.err


def test_bench_compares_engines(cptquant, copied):
    outcome = cptquant("bench", copied, "--engines", "transformers,onnx", "--rounds", 1, "--seconds", 0.02)
    assert outcome.code == 0, outcome.err
    record = BenchRecord.load(copied / "bench.json")
    assert [variant.name for variant in record.variants] == ["transformers fp32", "transformers bf16", "onnx"]
    for variant in record.variants:
        assert variant.figures["decode_tokens_per_second"].median > 0 and variant.figures["peak_bytes"].median > 1e7
    assert record.variants[1].ratios["decode_tokens_per_second"].median == 1
    assert record.variants[2].bandwidth_share is not None
    page = (copied / "bench.html").read_text()
    assert "<svg" in page and "http" not in page.split("</style>")[1]
    assert "transformers bf16" in outcome.out


def test_bench_refuses_nonsense(cptquant, copied):
    assert "give either a RUN folder or --synthetic" in cptquant("bench").err
    unknown = cptquant("bench", copied, "--engines", "tensorrt")
    assert (
        unknown.code == 2 and "--engines 'tensorrt' is unknown; choose of: transformers, onnx, llamacpp" in unknown.err
    )
    missing = cptquant("bench", copied, "--engines", "llamacpp")
    assert missing.code == 2 and "--target gguf" in missing.err
    none = cptquant("bench", copied, "--engines", "")
    assert none.code == 2 and "--engines names no engine; choose of: transformers, onnx, llamacpp" in none.err
    assert not (copied / "bench.json").exists()
    shape = cptquant("bench", "--synthetic", "gpt-9", "--output", copied / "x")
    assert (
        shape.code == 2
        and "--synthetic 'gpt-9' is unknown; choose one of: llama-0.3b, opt-125m, bert-base" in shape.err
    )


def test_a_bench_without_a_figure_keeps_the_old_one(cptquant, copied, monkeypatch):
    (copied / "bench.json").write_text("earlier figures")
    monkeypatch.setattr("cptquant.stages.bench._measure", refuse_to_run)
    outcome = cptquant("bench", copied, "--engines", "onnx", "--rounds", 1, "--seconds", 0.02)
    assert outcome.code == 2
    assert "no engine could be measured, and no bench.json was written; onnx: the engine is broken" in outcome.err
    assert (copied / "bench.json").read_text() == "earlier figures"


def test_a_bench_that_lacks_one_engine_says_so_and_keeps_the_others(cptquant, copied, monkeypatch):
    import cptquant.stages.bench as stage

    measure = stage._measure
    monkeypatch.setattr(
        stage, "_measure", lambda who, *rest: refuse_to_run() if who.name == "onnx" else measure(who, *rest)
    )
    outcome = cptquant("bench", copied, "--engines", "transformers,onnx", "--rounds", 1, "--seconds", 0.02)
    assert outcome.code == 2 and "error: 1 of 3 could not be measured; onnx: the engine is broken" in outcome.err
    record = BenchRecord.load(copied / "bench.json")
    assert [bool(variant.figures) for variant in record.variants] == [True, True, False]


def refuse_to_run(*_):
    raise EngineError("the engine is broken")


@pytest.mark.parametrize("command", [("export",), ("bench",), ("generate", "--prompt", "x", "--engine", "onnx")])
def test_a_run_that_does_not_exist(cptquant, tmp_path, command):
    name, *flags = command
    missing = cptquant(name, tmp_path / "nowhere", *flags)
    assert missing.code == 2
    assert f"{tmp_path}/nowhere does not exist; make a run with: cptquant quantize MODEL --budget" in missing.err
    assert not (tmp_path / "nowhere").exists()
    empty = cptquant(name, tmp_path, *flags)
    assert empty.code == 2 and f"{tmp_path} holds no cptquant run; make one with: cptquant quantize" in empty.err
    model = save_model("opt", tmp_path / "model")
    assert cptquant("inspect", model, "--output", tmp_path / "run").code == 0
    early = cptquant(name, tmp_path / "run", *flags)
    assert early.code == 2
    assert "without a finished checkpoint (no checkpoint.json); finish it with: cptquant quantize" in early.err


def test_export_refuses_a_context_and_keeps_nothing(cptquant, copied):
    settings = (copied / "settings.json").read_bytes()
    for context, message in (
        (99999, "--context 99999 is outside the model's range of 2 to 64"),
        (1, "--context 1 is outside the model's range of 2 to 64"),
        (0, "Input should be greater than or equal to 1"),
    ):
        outcome = cptquant("export", copied, "--context", context)
        assert outcome.code == 2 and message in outcome.err
        assert (copied / "settings.json").read_bytes() == settings
    assert cptquant("export", copied).code == 0
    assert cptquant("export", copied, "--target", "vllm").code == 2
    assert (copied / "settings.json").read_bytes() == settings
    unknown = cptquant("export", copied, "--target", "tpu")
    assert unknown.code == 2 and "--target 'tpu' is unknown" in unknown.err
    assert "--engine 'tpu' is unknown; choose one of: transformers" in (
        cptquant("generate", copied, "--prompt", "x", "--engine", "tpu").err
    )


def test_memory_becomes_a_budget(cptquant, tmp_path):
    model = save_model("opt", tmp_path / "model")
    refused = cptquant("quantize", model, "--target", "onnx", "--memory", "1MB", "--output", tmp_path / "run", *QUICK)
    assert refused.code == 2 and "--memory 1MB leaves nothing for the weights:" in refused.err
    both = cptquant("quantize", model, "--memory", "1GB", "--budget", "4bpw", "--output", tmp_path / "both")
    assert both.code == 2 and "--budget and --memory were both given" in both.err
    beyond = cptquant(
        "quantize", model, "--target", "onnx", "--memory", "1GB", "--context", 65, "--output", tmp_path / "long", *QUICK
    )
    assert beyond.code == 2 and "--context 65 is outside the model's range of 2 to 64 tokens" in beyond.err
