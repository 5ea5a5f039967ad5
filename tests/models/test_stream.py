"""ModelStream against the model's own forward pass."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from cptquant.core.errors import ModelError
from cptquant.models import large_weights
from cptquant.models import stream as stream_module
from cptquant.models.load import LoadedModel, load_model
from cptquant.models.stream import ModelStream, read_weight, site_modules, write_weight_
from cptquant.models.text import TokenSet

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {**SMALL, "max_position_embeddings": 64, "intermediate_size": 48}
GROUPED = {**WIDE, "num_key_value_heads": 2}
MODELS = {
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, max_position_embeddings=64, ffn_dim=48,
                                                  word_embed_proj_dim=32)),
    "opt-post-norm": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, max_position_embeddings=64, ffn_dim=48,
                                                            word_embed_proj_dim=16, do_layer_norm_before=False)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "mistral-window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
    "qwen2-mixed-windows": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE)),
    "bert-classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDE, num_labels=5)),
    "bert-masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**WIDE)),
    "bert-encoder": lambda: hf.BertModel(hf.BertConfig(**WIDE)),
}  # fmt: skip


def make_model(name: str, folder: Path) -> LoadedModel:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    return load_model(str(folder))


def make_tokens(sequences: int = 5, length: int = 16) -> TokenSet:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(sequences, length, dtype=torch.int64)
    mask[2, 10:] = 0
    return TokenSet(
        input_ids=torch.randint(5, 90, (sequences, length), generator=generator),
        attention_mask=mask,
        labels=None,
        documents=torch.arange(sequences),
        digest="test",
        description="random tokens",
    )


def run_stream(stream: ModelStream) -> Tensor:
    while stream.block_index < stream.layout.block_count:
        stream.advance(stream.load_block())
    with torch.no_grad():
        return torch.cat([stream.finish(index, hidden) for index, hidden in enumerate(stream.hidden)])


def run_whole(model: LoadedModel, tokens: TokenSet) -> Tensor:
    with torch.no_grad():
        output = model.module(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return output.last_hidden_state if model.layout.task == "encoder" else output.logits


def real_positions(output: Tensor, tokens: TokenSet) -> Tensor:
    return output[tokens.attention_mask.bool()] if output.dim() == 3 else output


@pytest.mark.parametrize("large_tables", [False, True], ids=["small-tables", "large-tables"])
@pytest.mark.parametrize("name", MODELS)
def test_stream_equals_the_models_own_forward(
    name: str, large_tables: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large_tables:  # embeddings and heads stay in their stored form, rows upcast on use
        monkeypatch.setattr(stream_module, "_LARGE_WEIGHT_ENTRIES", 1000)
        monkeypatch.setattr(large_weights, "_HEAD_CHUNK_ENTRIES", 700)
    model, tokens = make_model(name, tmp_path), make_tokens()
    streamed = run_stream(ModelStream(model, tokens, batch_size=2))
    torch.testing.assert_close(
        real_positions(streamed, tokens), real_positions(run_whole(model, tokens), tokens), rtol=0, atol=2e-6
    )


class _Substitutes:
    """Every site's weight, changed; also written into a copy of the model for comparison."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def weight(self, site_name: str) -> Tensor | None:
        return self.weights.get(site_name)


@pytest.mark.parametrize("large_tables", [False, True], ids=["small-tables", "large-tables"])
@pytest.mark.parametrize("name", ["opt", "llama-tied", "gpt2", "bert-classifier", "bert-masked"])
def test_substituted_sites_change_the_output_as_in_a_changed_model(
    name: str, large_tables: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large_tables:
        monkeypatch.setattr(stream_module, "_LARGE_WEIGHT_ENTRIES", 1000)
    model, tokens = make_model(name, tmp_path), make_tokens()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    weights = {
        site.name: torch.randn(site.out_features, site.in_features, generator=generator) / 8
        for site in model.layout.sites
    }
    streamed = run_stream(ModelStream(model, tokens, weights=_Substitutes(weights), batch_size=2))
    after = model.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "the model itself was changed"

    for parameter in model.module.parameters():  # what 16-bit storage does to everything that is no site
        parameter.data = parameter.data.half().float()
    for site in model.layout.sites:  # untie, then write
        module = model.module.get_submodule(site.name)
        module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        write_weight_(module, site, weights[site.name])
        assert torch.equal(read_weight(module, site), weights[site.name])
    expected = run_whole(model, tokens)
    torch.testing.assert_close(real_positions(streamed, tokens), real_positions(expected, tokens), rtol=1e-5, atol=1e-5)


def test_blocks_are_private_copies_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MODELS["opt"]().bfloat16().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    stream = ModelStream(model, make_tokens())
    block = stream.load_block()
    modules = site_modules(block, model.layout, 0)
    assert [name.rsplit(".", 1)[-1] for name in modules] == ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
    original = model.module.get_submodule(next(iter(modules))).weight
    assert original.dtype == torch.bfloat16
    write_weight_(modules[next(iter(modules))], model.layout.block_sites[0], torch.zeros(32, 32))
    assert original.abs().sum() > 0


def test_gradients_reach_the_blocks_input_and_weights(tmp_path: Path) -> None:
    model, tokens = make_model("llama-tied", tmp_path), make_tokens()
    stream = ModelStream(model, tokens, batch_size=5)
    while stream.block_index < 2:
        stream.advance(stream.load_block())
    block = stream.load_block().requires_grad_(True)
    hidden = stream.hidden[0].clone().requires_grad_(True)
    loss = stream.finish(0, stream.run_block(block, 0, hidden)).square().mean()
    loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    # Finite difference along the gradient of one weight: central, step 1e-2 of its norm.
    weight = next(iter(site_modules(block, model.layout, 2).values())).weight
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight += sign * 1e-2 * direction
            losses.append(stream.finish(0, stream.run_block(block, 0, hidden)).double().square().mean())
            weight -= sign * 1e-2 * direction
    assert float(losses[0] - losses[1]) / 2e-2 == pytest.approx(float(weight.grad.norm()), rel=0.02)


def test_no_block_is_left_after_the_last(tmp_path: Path) -> None:
    stream = ModelStream(make_model("opt", tmp_path), make_tokens())
    run_stream(stream)
    with pytest.raises(IndexError, match="all 3 blocks have been run"):
        stream.load_block()


class _Norms:
    """A source that changes norms and biases alone."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def weight(self, site_name: str) -> Tensor | None:
        return None

    def kept(self) -> dict[str, Tensor]:
        return self._tensors


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_biases_of_a_source_are_the_ones_that_run(name: str, tmp_path: Path) -> None:
    model, tokens = make_model(name, tmp_path), make_tokens()
    generator = torch.Generator().manual_seed(3)
    changed = {
        key: (parameter + torch.randn(parameter.shape, generator=generator) / 8).half()
        for key, parameter in model.module.named_parameters()
        if parameter.ndim == 1
    }
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    streamed = run_stream(ModelStream(model, tokens, weights=_Norms(changed), batch_size=2))
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in before.items())
    for key, parameter in model.module.named_parameters():
        parameter.data = changed[key].float() if key in changed else parameter.data.half().float()
    expected = run_whole(model, tokens)
    torch.testing.assert_close(real_positions(streamed, tokens), real_positions(expected, tokens), rtol=1e-5, atol=1e-5)


def test_a_norm_of_another_shape_is_refused_not_spread(tmp_path: Path) -> None:
    model = make_model("opt", tmp_path)
    name = "model.decoder.layers.1.final_layer_norm.weight"
    stream = ModelStream(model, make_tokens(), weights=_Norms({name: torch.ones(1)}))
    stream.advance(stream.load_block())
    with pytest.raises(ModelError, match=rf"{name} has shape \(1,\), the model's is \(32,\)"):
        stream.load_block()
