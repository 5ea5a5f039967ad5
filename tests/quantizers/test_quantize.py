"""The verb: every site has its record, blocks see earlier ones quantized, and a killed run gives the same bits."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from cptquant.core.errors import DataError, ModelError
from cptquant.core.manifest import SiteOutcome, SiteRecord
from cptquant.core.plan import Plan, SolverStatus
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.stream import ModelStream, read_weight, site_modules, write_weight_
from cptquant.models.text import TokenSet
from cptquant.packing.quantized_weight import QuantizedWeight
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.hessian import collect_block_hessians
from cptquant.quantizers.quantize import quantize_sites
from cptquant.quantizers.rtn import Rtn

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False)
    ),
    "opt-projected": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False
        )
    ),
    "bert-classifier": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, num_labels=5)
    ),
}


def make_model(name: str, folder: Path) -> LoadedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # random models are otherwise almost linear and almost silent
        if parameter.ndim == 2:
            parameter.data.mul_(10)
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_model(str(folder))


def make_tokens(sequences: int = 12, length: int = 24, seed: int = 1) -> TokenSet:
    mask = torch.ones(sequences, length, dtype=torch.int64)
    mask[2, 10:] = 0
    ids = torch.randint(5, 90, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return TokenSet.build(ids, mask, None, torch.arange(sequences), "random tokens")


def make_plan(
    model: LoadedModel, linear: str = "int4-g16", embedding: str = "int8-channel-plain", **exact: str
) -> Plan:
    formats = {site.name: embedding if site.kind == "embedding" else linear for site in model.layout.sites}
    formats.update({name: fmt for name in formats for end, fmt in exact.items() if name.endswith(end)})
    return Plan(
        target="transformers", allocator="uniform", budget="4bpw", budget_scope="file", limit_bytes=0,
        formats=formats, size_bytes=0, site_bytes=0, bits_per_weight=4.0, bits_per_weight_sites=4.0,
        status=SolverStatus.HEURISTIC,
    )  # fmt: skip


class Collected:
    """A sink that keeps everything, and a source of weights for the stream."""

    def __init__(self) -> None:
        self.calls: list[int | None] = []
        self.blocks: dict[int | None, dict[str, QuantizedWeight]] = {}
        self.records: dict[str, SiteRecord] = {}

    def __call__(self, index: int | None, weights: dict[str, QuantizedWeight], records: list[SiteRecord]) -> None:
        self.calls.append(index)
        self.blocks[index] = weights
        self.records.update({record.site: record for record in records})

    @property
    def weights(self) -> dict[str, QuantizedWeight]:
        return {site: weight for block in self.blocks.values() for site, weight in block.items()}

    def weight(self, site_name: str) -> torch.Tensor | None:
        found = self.weights.get(site_name)
        return None if found is None else found.dequantize()


def run(model: LoadedModel, plan: Plan, quantizer: Rtn | Gptq, tokens: TokenSet | None, **options) -> Collected:
    collected = Collected()
    quantize_sites(model, plan, quantizer, tokens, collected, **options)
    return collected


def assert_same_bits(one: dict[str, QuantizedWeight], other: dict[str, QuantizedWeight]) -> None:
    assert list(one) and sorted(one) == sorted(other)
    for site, weight in one.items():
        assert torch.equal(weight.codes, other[site].codes) and torch.equal(weight.scales, other[site].scales), site


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantizer", [Rtn(), Gptq()], ids=["rtn", "gptq"])
def test_every_site_is_quantized_and_recorded(name: str, quantizer: Rtn | Gptq, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    plan, steps = make_plan(model), []
    done = run(model, plan, quantizer, make_tokens(), progress=lambda *step: steps.append(step))
    assert done.calls == [0, 1, 2, None] and steps == [(1, 3), (2, 3), (3, 3)]
    for site in model.layout.sites:
        weight, record = done.weights[site.name], done.records[site.name]
        assert weight.format.name == plan.formats[site.name] == record.format
        assert tuple(weight.codes.shape) == (site.out_features, site.in_features)
        assert weight.scales.dtype is torch.bfloat16
        original = read_weight(model.module.get_submodule(site.name), site).float()
        expected = float((weight.dequantize() - original).square().sum() / original.square().sum())
        assert record.relative_weight_error == pytest.approx(expected, rel=1e-5)
        assert record.relative_weight_error < (1e-3 if site.kind == "embedding" else 0.03)
        if isinstance(quantizer, Rtn):
            assert record.outcome is SiteOutcome.NOMINAL and record.relative_output_error is None
        elif site.kind == "embedding":
            assert record.outcome is SiteOutcome.ROUNDED_TO_NEAREST
        else:
            silent = site.name.endswith("fc2") and record.outcome is SiteOutcome.DEAD_INPUTS  # ReLU of a random model
            assert (record.outcome is SiteOutcome.NOMINAL or silent) and record.damping == 0.01
            assert record.relative_output_error is not None and 0 < record.relative_output_error < 0.03
    assert all(torch.equal(before[key], value) for key, value in model.module.state_dict().items())


def test_kept_sites_are_recorded_and_not_handed_over(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    plan = make_plan(model, embedding="bfloat16", q_proj="bfloat16", lm_head="bfloat16")
    done = run(model, plan, Gptq(), make_tokens())
    kept = {site for site, fmt in plan.formats.items() if fmt == "bfloat16"}
    assert len(kept) == 5 and not kept & set(done.weights)
    for site in kept:
        assert done.records[site].outcome is SiteOutcome.KEPT_BY_PLAN
        assert done.records[site].relative_weight_error == 0.0


def test_a_plan_that_keeps_everything_needs_no_hessian(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    done = run(model, make_plan(model, linear="bfloat16", embedding="bfloat16"), Gptq(), make_tokens())
    assert not done.weights and len(done.records) == len(model.layout.sites)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_resumed_run_gives_the_same_bits(name: str, finished: int, tmp_path: Path) -> None:
    model, tokens = make_model(name, tmp_path), make_tokens()
    plan = make_plan(model, linear="int3-g16", v_proj="int2-g16", query="int8-channel")
    whole = run(model, plan, Gptq(), tokens)
    head_start = {index: whole.blocks[index] for index in range(finished)}
    rest = run(model, plan, Gptq(), tokens, resume=head_start)
    assert rest.calls == [*range(finished, 3), None]
    assert_same_bits(
        {**rest.weights, **{s: w for block in head_start.values() for s, w in block.items()}}, whole.weights
    )
    assert all(rest.records[site] == whole.records[site] for site in rest.records)


def test_blocks_are_fitted_to_the_quantized_stream(tmp_path: Path) -> None:
    """The last block equals GPTQ on Hessians collected behind the first two blocks as written."""
    model, tokens = make_model("llama", tmp_path), make_tokens()
    plan = make_plan(model, linear="int2-g16")
    done = run(model, plan, Gptq(coarse_products=False), tokens)
    codes = {}
    for label, source in (("quantized", done), ("original", None)):
        stream = ModelStream(model, tokens, weights=source)
        for index in range(2):
            block = stream.load_block()
            if source is not None:
                for site, module in site_modules(block, model.layout, index).items():
                    write_weight_(module, model.layout.site_by_name[site], done.weights[site].dequantize())
            stream.advance(block)
        stream.weights = None  # the last block itself is still the original's
        block = stream.load_block()
        modules = site_modules(block, model.layout, 2)
        hessians = collect_block_hessians(stream, block, modules)
        site = next(name for name in modules if name.endswith("down_proj"))
        weight = read_weight(model.module.get_submodule(site), model.layout.site_by_name[site]).float()
        result = Gptq(coarse_products=False)(weight, hessians.hessian(site), plan.quant_formats[site], torch.bfloat16)
        codes[label] = result.weight.codes
    assert torch.equal(codes["quantized"], done.weights[site].codes)
    assert not torch.equal(codes["original"], done.weights[site].codes)


def test_a_mixed_plan_is_followed_among_sites_that_share_an_input(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    plan = make_plan(model, q_proj="int8-channel", k_proj="int2-g8", v_proj="int4-tensor-asym")
    done = run(model, plan, Gptq(), make_tokens())
    errors = {
        end: done.records[f"model.layers.1.self_attn.{end}"].relative_output_error for end in ("q_proj", "k_proj")
    }
    assert errors["q_proj"] is not None and errors["k_proj"] is not None and errors["q_proj"] < errors["k_proj"] / 50


def test_gptq_without_text_is_refused(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    with pytest.raises(DataError, match="--quantizer gptq needs calibration text: give --calibration FILE"):
        run(model, make_plan(model), Gptq(), None)
    assert run(model, make_plan(model), Rtn(), None).calls == [0, 1, 2, None]


@pytest.mark.parametrize("quantizer", [Rtn(), Gptq()], ids=["rtn", "gptq"])
def test_a_weight_that_is_no_number_is_named(quantizer: Rtn | Gptq, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    with torch.no_grad():
        model.module.get_submodule("model.layers.2.mlp.up_proj").weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\..*up_proj: a weight to quantize is NaN"):
        run(model, make_plan(model), quantizer, make_tokens())


def test_an_overflowing_activation_is_named(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    with torch.no_grad():
        model.module.get_submodule("model.layers.1.input_layernorm").weight.fill_(3e38)
    with pytest.raises(DataError, match=r"layers\.1\.self_attn\.q_proj.*: the calibration inputs .* NaN or infinite"):
        run(model, make_plan(model), Gptq(), make_tokens())
