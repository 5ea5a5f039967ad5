"""The main path end to end: chain, stages one by one, resume, the checkpoint in a process without cptquant."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

import cptquant
from cptquant.allocation.methods import find_allocator
from cptquant.core.evaluation import EvaluationReport
from cptquant.core.manifest import CheckpointRecord
from cptquant.core.plan import Plan
from cptquant.models.load import load_model
from cptquant.models.stream import read_weight, write_weight_
from cptquant.packing.shards import ShardFolder

QUICK = (
    "--calibration-sequences", 8, "--eval-sequences", 8, "--sequence-length", 32, "--sensitivity", "tdmpq",
    "--own-text", 0,
)  # fmt: skip
BUDGET = "10bpw"
STOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cptquant":
            raise ImportError("cptquant must not be needed")
sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import save_file
import transformers
model = getattr(transformers, sys.argv[3]).from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(5, 45).reshape(2, 20)
with torch.no_grad():
    output = model(input_ids=ids)
result = output.logits if hasattr(output, "logits") else output.last_hidden_state
save_file({"result": result.contiguous()}, sys.argv[2])
assert "cptquant" not in sys.modules
"""


def run_stock(checkpoint: Path, auto_class: str, tmp_path: Path) -> torch.Tensor:
    """What stock transformers makes of the checkpoint, in a process in which cptquant cannot be imported."""
    out = tmp_path / "stock.safetensors"
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    subprocess.run(
        [sys.executable, "-c", STOCK, str(checkpoint), str(out), auto_class],
        check=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    return load_file(out)["result"]


def run_ours(source: Path, run: Path) -> torch.Tensor:
    """The original with our dequantized weights put in, everything else rounded to 16 bits, in float32."""
    model = load_model(str(source))
    plan = written_plan(run)
    layout = model.layout
    shapes = {site.name: (site.out_features, site.in_features) for site in layout.sites}
    pieces = json.loads((run / "checkpoint.json").read_text())["inputs"]["pieces"]
    shards = ShardFolder(run / "work" / pieces, plan.quant_formats, shapes)
    module = model.module.float()
    storage = torch.float16 if layout.storage_dtype == "float16" else torch.bfloat16
    for parameter in module.parameters():
        parameter.data = parameter.data.to(storage).float()
    for site in layout.sites:
        weight = shards.weight(site.name)
        if weight is not None:
            linear = module.get_submodule(site.name)
            linear.weight = torch.nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            write_weight_(linear, site, weight)
            assert torch.equal(read_weight(linear, site), weight)
    with torch.no_grad():
        output = module(input_ids=torch.arange(5, 45).reshape(2, 20))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def written_plan(run: Path) -> Plan:
    """The plan of what stands in checkpoint/: on untrained models the guard may well choose uniform bits."""
    written = EvaluationReport.load(run / "evaluation.json").written
    return Plan.load(run / ("plan-uniform.json" if written == "uniform" else "plan.json"))


def check_on_disk(run: Path) -> None:
    plan, record = written_plan(run), CheckpointRecord.load(run / "checkpoint.json")
    tensors = [load_file(path) for path in (run / "checkpoint").glob("*.safetensors")]
    stored = sum(tensor.numel() * tensor.element_size() for piece in tensors for tensor in piece.values())
    assert stored == plan.size_bytes == record.tensor_bytes <= plan.limit_bytes
    files = sum(path.stat().st_size for path in (run / "checkpoint").glob("*.safetensors"))
    assert files == stored + record.header_bytes


def quantize(call: Callable, source: object, run: Path, budget: str = BUDGET, *flags: object) -> None:
    outcome = call("quantize", source, "--budget", budget, "--output", run, *QUICK, *flags)
    assert outcome.code == 0, outcome.err


def test_checkpoint_loads_in_stock_transformers(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quantize(cptquant, folder, run)
    evaluation = EvaluationReport.load(run / "evaluation.json")
    assert evaluation.written == "quantized", evaluation.guard
    check_on_disk(run)
    plan = Plan.load(run / "plan.json")
    assert len({name for name in plan.formats.values()}) > 2, "a plan of one format would not test mixed groups"
    ours, stock = run_ours(folder, run), run_stock(run / "checkpoint", "AutoModelForCausalLM", tmp_path)
    assert float((ours - stock).abs().max() / ours.abs().max()) <= 1e-3
    names = {(found.name, found.subject) for found in evaluation.measurements}
    for subject in ("original", "quantized", "uniform"):
        for name in ("nll_nats_per_token", "perplexity", "weight_bytes", "parameters"):
            assert (name, subject) in names
    for name in ("kl_nats_per_token", "top1_agreement"):
        assert (name, "quantized") in names and (name, "uniform") in names
    assert "http" not in (run / "report.html").read_text().replace("http://www.w3.org", "")


def test_float32_source_is_rounded_where_it_is_kept(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    """Half the matrices stay in 16 bits: they and the norms must be what the evaluation saw."""
    run = tmp_path / "run"
    quantize(cptquant, folder, run, "14bpw")
    assert "float16" in Plan.load(run / "plan.json").formats.values()
    ours, stock = run_ours(folder, run), run_stock(run / "checkpoint", "AutoModelForCausalLM", tmp_path)
    assert float((ours - stock).abs().max() / ours.abs().max()) <= 1e-3


def _tokenizer_into(folder: Path) -> None:
    embedded = Path(cptquant.__file__).parent / "models/embedded_data/opt-mini"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded / name, folder / name)


def test_gpt2_is_written_as_gpt_bigcode(cptquant: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=2048, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    _tokenizer_into(tmp_path / "model")
    quantize(cptquant, tmp_path / "model", tmp_path / "run")
    check_on_disk(tmp_path / "run")
    stock = run_stock(tmp_path / "run/checkpoint", "AutoModelForCausalLM", tmp_path)
    ours = run_ours(tmp_path / "model", tmp_path / "run")
    assert float((ours - stock).abs().max() / ours.abs().max()) <= 1e-3
    assert json.loads((tmp_path / "run/checkpoint/config.json").read_text())["model_type"] == "gpt_bigcode"


@pytest.mark.parametrize(
    ("build", "auto_class", "damage"),
    [
        (lambda config: BertForSequenceClassification(config), "AutoModelForSequenceClassification", "accuracy"),
        (lambda config: BertModel(config), "AutoModel", "embedding_cosine"),
    ],
    ids=["classifier", "encoder"],
)
def test_bert(cptquant: Callable, tmp_path: Path, build: Callable, auto_class: str, damage: str) -> None:
    torch.manual_seed(0)
    labels = {0: "a", 1: "b", 2: "c"}
    config = BertConfig(
        vocab_size=2048, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, pad_token_id=0, id2label=labels, label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    build(config).save_pretrained(tmp_path / "model")
    _tokenizer_into(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": f"import module{i}  # {i * i}", "label": "abc"[i % 3]}) for i in range(60))
    )
    quantize(cptquant, tmp_path / "model", tmp_path / "run", "10bpw", "--calibration", text, "--eval-text", text)
    check_on_disk(tmp_path / "run")
    stock = run_stock(tmp_path / "run/checkpoint", auto_class, tmp_path)
    ours = run_ours(tmp_path / "model", tmp_path / "run")
    assert float((ours - stock).abs().max() / ours.abs().max()) <= 1e-3
    assert EvaluationReport.load(tmp_path / "run/evaluation.json").find(damage, "quantized") is not None


def test_stages_one_by_one_give_the_same_files(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    whole, steps = tmp_path / "whole", tmp_path / "steps"
    quantize(cptquant, folder, whole)
    common = QUICK[:2] + QUICK[4:6]
    for command in (
        ("inspect", folder, "--output", steps),
        ("measure", steps, "--sensitivity", "tdmpq", *common),
        ("allocate", steps, "--budget", BUDGET),
        ("quantize", steps, *QUICK[2:4], *QUICK[8:]),
        ("evaluate", steps),
        ("report", steps),
    ):
        outcome = cptquant(*command)
        assert outcome.code == 0, (command, outcome.err)
        assert outcome.out
    for name in ("layout.json", "sensitivity.json", "plan.json", "manifest.json", "evaluation.json"):
        one, two = (json.loads((run / name).read_text()) for run in (whole, steps))
        one.pop("provenance"), two.pop("provenance")
        assert one == two, name
    assert (whole / "checkpoint/model.safetensors").read_bytes() == (
        steps / "checkpoint/model.safetensors"
    ).read_bytes()


def test_an_edited_plan_is_carried_out(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quantize(cptquant, folder, run)
    plan = Plan.load(run / "plan.json")
    layout = cptquant_layout(folder)
    site = "model.decoder.layers.0.fc1"
    formats = {**plan.quant_formats, site: cptquant_format("int8-g64")}
    edited = plan.model_copy(
        update={"formats": {name: fmt.name for name, fmt in formats.items()}, "size_bytes": layout.plan_bytes(formats)}
    )
    edited.save(run / "plan.json")
    outcome = cptquant("quantize", run)
    assert outcome.code == 0, outcome.err
    assert load_file(run / "checkpoint/model.safetensors")[f"{site}.weight_packed"].shape == (64, 16)


def cptquant_layout(folder: Path) -> "cptquant.ModelLayout":
    return cptquant.read_layout(str(folder))


def cptquant_format(name: str) -> "cptquant.QuantFormat":
    return cptquant.QuantFormat.parse(name)


def test_nothing_is_done_twice(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quantize(cptquant, folder, run)
    kept = [path for path in run.rglob("*") if path.is_file() and path.name not in ("settings.json", "report.html")]
    before = {path: path.stat().st_mtime_ns for path in kept if path.name != "sensitivity.json"}
    quantize(cptquant, folder, run)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("quantizer", ("gptq", "kl-rounding"))
def test_a_killed_run_goes_on_with_the_same_bits(
    cptquant: Callable, folder: Path, tmp_path: Path, quantizer: str
) -> None:
    quantize(cptquant, folder, tmp_path / "whole", BUDGET, "--quantizer", quantizer)
    run = tmp_path / "killed"
    command = [
        sys.executable, "-c", "from cptquant.cli.main import main; main()", "quantize", str(folder), "--budget", BUDGET,
        "--output", str(run), *map(str, QUICK), "--quantizer", quantizer,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(run.glob("work/*/block-0000.safetensors")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = next(iter(run.glob("work/*/block-0000.safetensors")))
    stamp = first.stat().st_mtime_ns
    quantize(cptquant, folder, run, BUDGET, "--quantizer", quantizer)
    assert first.stat().st_mtime_ns == stamp, "the finished block was made again"
    one, two = (path / "checkpoint/model.safetensors" for path in (tmp_path / "whole", run))
    assert one.read_bytes() == two.read_bytes()


def test_learning_goes_on_from_a_damaged_first_pass(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    """KL rounding's pieces are gone and one of GPTQ's is cut short: it is made again before anything is learned."""
    run = tmp_path / "run"
    quantize(cptquant, folder, run, BUDGET, "--quantizer", "kl-rounding")
    whole = (run / "checkpoint/model.safetensors").read_bytes()
    pieces = {path.parent: path for path in run.glob("work/*/block-0001.safetensors")}
    learned = {home for home, path in pieces.items() if b"held_out_before" in path.read_bytes()}
    assert learned and learned != set(pieces)
    for home in learned:
        shutil.rmtree(home)
    for home in set(pieces) - learned:
        content = pieces[home].read_bytes()
        pieces[home].write_bytes(content[:-50])
    for path in (*run.glob("manifest*.json"), run / "checkpoint.json", run / "evaluation.json"):
        path.unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoint")
    quantize(cptquant, folder, run, BUDGET, "--quantizer", "kl-rounding")
    assert (run / "checkpoint/model.safetensors").read_bytes() == whole


def test_guard_writes_uniform_bits_when_the_plan_is_worse(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    """A damage table made up to spend the bits on q and k gives a bad plan; uniform bits must be written instead."""
    run = tmp_path / "run"
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:  # larger weights, so that bits matter on this untrained model
        if name.endswith("weight") and ".layers." in name and tensors[name].dim() == 2:
            tensors[name] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert cptquant("inspect", folder, "--output", run).code == 0
    assert cptquant("measure", run, *QUICK[:2], *QUICK[4:8]).code == 0
    path = run / "sensitivity.json"
    table = json.loads(path.read_text())
    for site, row in table["damages"].items():
        wanted = "int8" if site.endswith(("q_proj", "k_proj")) else "int4" if site == "lm_head" else "int2"
        for name, damage in row.items():
            damage["value"] = 0.0 if name.startswith(wanted) else 1.0
    path.write_text(json.dumps(table))
    assert cptquant("allocate", run, "--budget", "12bpw").code == 0
    outcome = cptquant("quantize", run, *QUICK[2:4], *QUICK[8:])
    assert outcome.code == 0, outcome.err
    evaluation = EvaluationReport.load(run / "evaluation.json")
    assert evaluation.written == "uniform" and "uniform bits were written" in evaluation.guard
    uniform = Plan.load(run / "plan-uniform.json")
    assert CheckpointRecord.load(run / "checkpoint.json").tensor_bytes == uniform.size_bytes
    assert "uniform bits were written" in outcome.out.replace("\n", " ")
    chosen, baseline = (evaluation.find("kl_nats_per_token", name) for name in ("quantized", "uniform"))
    assert chosen is not None and baseline is not None and chosen.value == baseline.value


def test_any_folder_is_judged_by_the_same_ruler(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quantize(cptquant, folder, run)
    outcome = cptquant("evaluate", run / "checkpoint", "--original", folder, "--json", *QUICK[2:6])
    assert outcome.code == 0, outcome.err
    judged = {(m["name"], m["subject"]): m["value"] for m in json.loads(outcome.out)["measurements"]}
    own = EvaluationReport.load(run / "evaluation.json").find("kl_nats_per_token", "quantized")
    assert own is not None
    assert judged["kl_nats_per_token", "quantized"] == pytest.approx(own.value, rel=1e-4)


def test_dry_run_spends_and_writes_nothing(cptquant: Callable, folder: Path, tmp_path: Path) -> None:
    outcome = cptquant("quantize", folder, "--budget", BUDGET, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    estimate = json.loads(outcome.out)
    assert estimate["smallest_bytes"] <= estimate["limit_bytes"] <= estimate["largest_bytes"]
    assert estimate["wall_seconds"] > 0 and estimate["peak_memory_bytes"] > estimate["source_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    shown = cptquant("quantize", folder, "--budget", BUDGET, "--dry-run")
    assert shown.code == 0 and "MB" in shown.out


@pytest.mark.parametrize("method", ["path", "sketch"])
def test_scores_that_hold_at_low_bits_are_methods_like_the_others(
    cptquant: Callable, folder: Path, tmp_path: Path, method: str
) -> None:
    dry = cptquant("quantize", folder, "--budget", BUDGET, "--sensitivity", method, "--dry-run", "--json")
    assert dry.code == 0 and json.loads(dry.out)["wall_seconds"] > 0
    run = tmp_path / "run"
    assert cptquant("inspect", folder, "--output", run).code == 0
    outcome = cptquant("measure", run, *QUICK[:2], *QUICK[4:6], "--sensitivity", method)
    assert outcome.code == 0, outcome.err
    table = json.loads((run / f"sensitivity-{method}.json").read_text())
    assert table["method"] == method and table["unit"] == "kl_nats_per_token"
    planned = cptquant("allocate", run, "--budget", BUDGET)
    assert planned.code == 0, planned.err
    assert json.loads((run / "plan.json").read_text())["sensitivity_method"] == method


def test_python_door(folder: Path, tmp_path: Path) -> None:
    result = cptquant.quantize_model(
        str(folder), BUDGET, tmp_path / "run", calibration_sequences=8, eval_sequences=8, sequence_length=32,
        sensitivity="cmpq", baselines=("uniform",),
    )  # fmt: skip
    assert result.checkpoint.is_dir()
    assert result.plan.size_bytes <= result.plan.limit_bytes
    assert result.evaluation.find("perplexity", "quantized") is not None
    assert all(hasattr(cptquant, name) for name in cptquant.__all__)


def test_quantizing_leaves_a_float32_model_as_it_was(folder: Path) -> None:
    """Casting a float32 weight to float32 is no copy: an operation in place on it would change the original."""
    model = load_model(str(folder))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    layout, target = model.layout, cptquant.find_target("transformers")
    tokens = cptquant.load_tokens(model, None, "calibration", sequences=4, length=32, seed=0)
    for quantizer in (cptquant.Gptq(), cptquant.Rtn()):
        plan = cptquant.allocate(
            layout, None, cptquant.Budget.parse("14bpw"), target, find_allocator("random"),
            formats=[cptquant.QuantFormat.parse(name) for name in ("int3-g64", "int8-g64")],
        )  # fmt: skip
        cptquant.quantize_sites(model, plan, quantizer, tokens, lambda *_: None)
        after = model.module.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), quantizer
