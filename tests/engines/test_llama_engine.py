"""llama.cpp behind `engines`: the worker's requests, and export, generate and bench from the command line."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from engines_models.llamacpp_here import needs_llamacpp
from exporters.gguf_toys import quantize_toy, save_toy

from cptquant.cli.main import main
from cptquant.core.bench import BenchRecord
from cptquant.core.engine_export import ExportRecord
from cptquant.core.errors import EngineError
from cptquant.core.evaluation import EvaluationReport
from cptquant.engines import llamacpp_python
from cptquant.engines.process import run_engine
from cptquant.exporters.gguf.tokenizer import GgufVocabulary
from cptquant.exporters.gguf.write import write_gguf

pytestmark = [pytest.mark.engines, needs_llamacpp]

TEXT = ["--calibration-sequences", "4", "--eval-sequences", "4", "--sequence-length", "32"]
QUICK = ["--quantizer", "rtn", "--allocator", "random", "--baselines", "random", *TEXT]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> .gguf of a toy, made once."""
    made = {}

    def get(name):
        if name not in made:
            work = tmp_path_factory.mktemp(name)
            toy = quantize_toy(save_toy(name, work / "model"), work / "work")
            write_gguf(toy.model, toy.plan, toy.shards, work / "files")
            made[name] = work / "files" / "model.gguf"
        return made[name]

    return get


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> run folder for --target gguf, made once through the command line."""
    made = {}

    def get(name):
        if name not in made:
            work = tmp_path_factory.mktemp(f"run-{name}")
            model, run = save_toy(name, work / "model"), work / "run"
            arguments = ["quantize", str(model), "--target", "gguf", "--budget", "6bpw", "--output", str(run), *QUICK]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["cptquant", *arguments])
                try:
                    main()
                except SystemExit as leave:
                    assert not leave.code
            made[name] = run
        return made[name]

    return get


def outputs(file, ids, tmp_path, mask=None, **request):
    folder = tmp_path / "outputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    np.save(tmp_path / "ids.npy", np.array(ids, np.int64))
    np.save(tmp_path / "mask.npy", np.ones_like(ids) if mask is None else np.array(mask, np.int64))
    run_engine("llamacpp", file, "outputs", ids=f"{tmp_path}/ids.npy", mask=f"{tmp_path}/mask.npy",
               outputs=str(folder), **request)  # fmt: skip
    return [np.load(folder / f"{index}.npy") for index in range(len(ids))]


def test_generating_token_by_token_is_the_whole_sequence_at_once(files, tmp_path):
    prompt = [5, 700, 41, 9, 1200]
    answer = run_engine("llamacpp", files("llama"), "generate", context=20, ids=prompt, tokens=10, stop=[])
    assert answer["version"].startswith("llama-cpp-python ") and answer["peak_bytes"] > answer["base_bytes"] > 1e7
    made = answer["ids"]
    (logits,) = outputs(files("llama"), [prompt + made], tmp_path, float_cache=False)
    assert logits.shape == (15, 2048)
    assert logits[4:14].argmax(-1).tolist() == made
    stopped = run_engine("llamacpp", files("llama"), "generate", context=20, ids=prompt, tokens=10, stop=[made[3]])
    assert stopped["ids"] == made[: made.index(made[3])]


def test_a_float_cache_rounds_less(files, tmp_path):
    ids = [list(range(5, 45))]
    (rounded,), (exact,) = (outputs(files("qwen2"), ids, tmp_path, float_cache=kind) for kind in (False, True))
    assert 0 < np.abs(rounded - exact).max() < 0.2


def test_an_encoder_gives_pooled_embeddings_and_padding_is_cut(files, tmp_path):
    ids = [[2, 40, 41, 42, 43, 3, 0, 0], [2, 50, 51, 52, 53, 54, 55, 3]]
    mask = [[1] * 6 + [0] * 2, [1] * 8]
    padded = outputs(files("bert"), ids, tmp_path, mask)
    short = outputs(files("bert"), [ids[0][:6]], tmp_path)
    assert padded[0].shape == (64,)
    np.testing.assert_allclose(padded[0], short[0], atol=1e-6)
    assert np.abs(padded[0] - padded[1]).max() > 1e-3


def test_what_does_not_fit_is_refused(files, tmp_path):
    with pytest.raises(EngineError, match=r"^--context 65 is longer than the 64 positions of .*model\.gguf$"):
        run_engine("llamacpp", files("llama"), "fill", context=65)
    with pytest.raises(EngineError, match=r"^9 tokens do not fit the context of 8$"):
        run_engine("llamacpp", files("llama"), "generate", context=8, ids=list(range(5, 14)), tokens=1, stop=[])
    with pytest.raises(EngineError, match="is an encoder, which continues no prompt"):
        run_engine("llamacpp", files("bert"), "generate", ids=[5], tokens=1, stop=[])


def test_a_failure_while_running_does_not_blame_the_file(files, tmp_path):
    with pytest.raises(EngineError) as caught:
        run_engine("llamacpp", files("llama"), "generate", context=8, ids=[999_999], tokens=1, stop=[])
    message = str(caught.value)
    assert "in the request 'generate'" in message and "whole" not in message
    assert "Error: " in message or "ended by" in message


def test_a_file_cut_short_is_blamed(files, tmp_path):
    content = files("llama").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[: len(content) - 100_000])
    with pytest.raises(
        EngineError, match=r"model\.gguf .*is the file whole\? Write it again with: cptquant export RUN"
    ):
        run_engine("llamacpp", tmp_path / "model.gguf", "fill")
    with pytest.raises(EngineError, match=r"other\.gguf does not exist; write it with: cptquant export RUN"):
        run_engine("llamacpp", tmp_path / "other.gguf", "fill")


def test_a_decoder_goes_the_whole_way(runs, cptquant, tmp_path):
    run = runs("llama")
    record = ExportRecord.load(run / "export/gguf/export.json")
    exact, rounded, alone = record.comparisons
    assert exact.kl_nats < 1e-5 and exact.bound == 1e-3 and exact.n == 4 * 31 and exact.stderr is not None
    assert rounded.kl_nats > exact.kl_nats and rounded.bound is None
    assert record.tokens_equal is True and record.engine.startswith("llama-cpp-python ")
    assert record.memory.measured_bytes > 1e7 and record.memory.context == 64
    assert alone.weights == "original" and alone.bound is None and 0 < alone.kl_nats < rounded.kl_nats
    page = (run / "report.html").read_text()
    assert "In the engine" in page and record.engine in page
    first = cptquant("generate", run, "--prompt", "def f(x):", "--engine", "llamacpp", "--tokens", 6)
    again = cptquant("generate", run, "--prompt", "def f(x):", "--engine", "llamacpp", "--tokens", 6)
    assert first.code == 0 and first.out == again.out and first.out.startswith("def f(x):")
    copied = shutil.copytree(run, tmp_path / "run")
    outcome = cptquant("bench", copied, "--engines", "llamacpp", "--rounds", 1, "--seconds", 0.02)
    assert outcome.code == 0, outcome.err
    variant = BenchRecord.load(copied / "bench.json").variants[-1]
    assert variant.name == "llamacpp" and not variant.problem and variant.bandwidth_share is not None
    assert variant.figures["decode_tokens_per_second"].median > 0


def test_an_encoder_goes_the_whole_way(runs, cptquant, tmp_path):
    run = runs("bert")
    record = ExportRecord.load(run / "export/gguf/export.json")
    exact, rounded, alone = record.comparisons
    assert exact.kl_nats is None and exact.top1_agreement is None and exact.bound == 1e-3 and exact.n == 4
    assert 1 >= exact.cosine >= exact.cosine_lowest > 0.999
    assert 0.9 < rounded.cosine_lowest <= rounded.cosine < exact.cosine and rounded.bound is None
    assert record.tokens_equal is True and record.memory.measured_bytes is not None
    assert record.memory.cache_bytes == 0
    evaluation = EvaluationReport.load(run / "evaluation.json")
    assert evaluation.find("embedding_cosine", "quantized") is not None
    assert alone.weights == "original" and rounded.cosine < alone.cosine <= 1
    assert "Cosine to ours" in (run / "report.html").read_text()
    outcome = cptquant("export", run)
    assert outcome.code == 0 and "float activations: cosine to our model 1.0000" in outcome.out
    assert ", lowest " in outcome.out and "n = 4, 1 - cosine allowed 0.001" in outcome.out
    copied = shutil.copytree(run, tmp_path / "run")
    outcome = cptquant("bench", copied, "--engines", "llamacpp", "--rounds", 1, "--seconds", 0.02)
    assert outcome.code == 0, outcome.err
    (variant,) = BenchRecord.load(copied / "bench.json").variants
    assert variant.problem == "" and variant.figures["peak_bytes"].median > 1e7
    prompt = cptquant("generate", run, "--prompt", "The cat", "--engine", "llamacpp", "--tokens", 5)
    assert prompt.code == 2 and "is for encoder; only causal language models continue a prompt" in prompt.err


def test_a_file_written_without_the_engine_is_checked_once_there_is_one(runs, cptquant, monkeypatch, tmp_path):
    copied = shutil.copytree(runs("llama"), tmp_path / "run")
    with monkeypatch.context() as without:
        without.delenv(llamacpp_python.PYTHON_VARIABLE, raising=False)
        without.setattr(llamacpp_python, "find_spec", lambda name: None)
        assert "engine     not run: llama-cpp-python is not installed" in cptquant("export", copied).out
    assert "float activations: KL(ours" in cptquant("export", copied).out


def test_other_token_ids_fail_an_export_and_keep_the_file(runs, cptquant, monkeypatch, tmp_path):
    copied = shutil.copytree(runs("llama"), tmp_path / "run")
    (copied / "export/gguf/export.json").unlink()
    (copied / "checkpoint/model.gguf").unlink()  # so that it is written anew
    write = GgufVocabulary.write
    monkeypatch.setattr(
        GgufVocabulary, "write", lambda self, writer: write(replace(self, merges=self.merges[:100]), writer)
    )
    outcome = cptquant("export", copied)
    assert outcome.code == 2, outcome.out
    assert "the engine's tokenizer cuts \"<html>" in outcome.err and "unlike Hugging Face's: first at" in outcome.err
    assert "the files are kept for a look" in outcome.err
    assert (copied / "checkpoint/model.gguf").exists() and not (copied / "export/gguf/export.json").exists()
