"""Tiny models with weights large enough that their predictions are not flat, and texts for them."""

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from cptquant.core.formats import QuantFormat
from cptquant.core.targets import candidate_formats, find_target
from cptquant.models.load import load_model
from cptquant.models.text import TokenSet

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `oracles`, whatever way pytest is started

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
WIDE = {**SMALL, "max_position_embeddings": 64, "intermediate_size": 64, "initializer_range": 0.2}
BUILDERS = {
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SMALL, max_position_embeddings=64, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2)
    ),
    "opt-projected": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **SMALL,
            max_position_embeddings=64,
            ffn_dim=64,
            word_embed_proj_dim=16,
            init_std=0.2,
            do_layer_norm_before=False,
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE, num_key_value_heads=2, tie_word_embeddings=False)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2)
    ),
    "classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDE, num_labels=5)),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**WIDE)),
    "encoder": lambda: hf.BertModel(hf.BertConfig(**WIDE), add_pooling_layer=False),
}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """name -> LoadedModel; saved and loaded through the real path, once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            BUILDERS[name]().save_pretrained(folder)
            model = load_model(str(folder))
            if name == "masked":
                model = dataclasses.replace(
                    model, tokenizer=SimpleNamespace(mask_token_id=3, all_special_ids=[0, 1, 2, 3])
                )
            made[name] = model
        return made[name]

    return make


@pytest.fixture
def text():
    """task -> tokens, one sequence padded."""

    def make(task="causal_lm", sequences=6, length=20, seed=1):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.ones(sequences, length, dtype=torch.int64)
        mask[sequences // 2, length // 2 :] = 0
        labels = torch.randint(0, 5, (sequences,), generator=generator) if task == "sequence_classification" else None
        ids = torch.randint(5, 96, (sequences, length), generator=generator)
        return TokenSet.build(ids, mask, labels, torch.arange(sequences), "random tokens")

    return make


@pytest.fixture
def candidates():
    """(model, names) -> legal formats of every site."""

    def make(model, names=("int2-g16", "int4-g16", "int8-g16")):
        formats = [QuantFormat.parse(name) for name in names]
        target = find_target("transformers")
        keep = model.layout.keep_format
        # Measuring is not bound by what a target can hold: GPT-2's output projections are measured in every format.
        return {
            site.name: (*formats, keep) if site.transposed else candidate_formats(site, model.layout, target, formats)
            for site in model.layout.sites
        }

    return make


@pytest.fixture
def fragile():
    """(model, block index) -> a copy in which that block's matrices carry a few huge weights on ordinary columns.

    The outliers stretch the grid of their group, so quantizing this block alone does outsized harm.
    """

    def make(model, block_index, size=12.0):
        module = copy.deepcopy(model.module)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for site in model.layout.block_sites:
                if site.block_index != block_index:
                    continue
                weight = module.get_submodule(site.name).weight
                spots = torch.randint(0, weight.shape[1], (weight.shape[0],), generator=generator)
                weight[torch.arange(weight.shape[0]), spots] *= size
        return dataclasses.replace(model, module=module)

    return make
