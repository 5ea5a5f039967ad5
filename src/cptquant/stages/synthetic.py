"""Models of a known shape with random weights, quantized and written for engines, to measure speed on."""

import shutil
from pathlib import Path
from typing import Any

import torch

from cptquant.allocation.allocate import allocate
from cptquant.allocation.random_fill import RandomFill
from cptquant.core.budget import Budget
from cptquant.core.engine_memory import find_context
from cptquant.core.errors import UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import SiteRecord
from cptquant.core.plan import Plan
from cptquant.core.targets import find_target
from cptquant.exporters.export import find_exporter
from cptquant.models.embedded import embedded_model_path
from cptquant.models.load import LoadedModel, load_model, quiet_transformers
from cptquant.packing.quantized_weight import StoredWeight
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.quantize import quantize_sites
from cptquant.quantizers.rtn import Rtn

SHAPES: dict[str, dict[str, Any]] = {
    "llama-0.3b": {
        "model_type": "llama", "architecture": "LlamaForCausalLM", "vocab_size": 32000, "hidden_size": 1024,
        "intermediate_size": 2816, "num_hidden_layers": 22, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "opt-125m": {
        "model_type": "opt", "architecture": "OPTForCausalLM", "vocab_size": 50272, "hidden_size": 768,
        "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048,
        "word_embed_proj_dim": 768,
    },
    "bert-base": {
        "model_type": "bert", "architecture": "BertModel", "vocab_size": 30522, "hidden_size": 768,
        "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
    },
}  # fmt: skip
"""Name of `--synthetic` -> configuration."""


def make_model(shape: str, folder: Path) -> Path:
    """Write a bfloat16 model of that shape with random weights, and a tokenizer that it needs in name only.

    Raises:
        UserError: no such shape.
    """
    if shape not in SHAPES:
        raise UserError(f"--synthetic {shape!r} is unknown; choose one of: {', '.join(SHAPES)}")
    import transformers

    fields = dict(SHAPES[shape])
    architecture = fields.pop("architecture")
    torch.manual_seed(0)
    with quiet_transformers():
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = getattr(transformers, architecture)._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    embedded = embedded_model_path("embedded:opt-mini" if architecture != "BertModel" else "embedded:bert-mini")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded / name, folder / name)
    return folder


def write_for_target(
    model: LoadedModel, target_name: str, budget: str, folder: Path, formats: tuple[str, ...] = ()
) -> tuple[Path, Plan]:
    """Round the model to a random mixed plan of the budget and write it for a target's engine.

    Random weights have no sensitive layers, so the plan is `--allocator random`: widths mixed as in practice.

    Returns:
        The file an engine is given, and the plan.
    """
    layout: ModelLayout = model.layout
    target, exporter = find_target(target_name), find_exporter(target_name)
    context = find_context(layout, None)
    exporter.check(model, context)
    offered = tuple(QuantFormat.parse(name) for name in formats or target.formats_for(layout))
    plan = allocate(layout, None, Budget.parse(budget), target, RandomFill(), formats=offered)
    shapes = {site.name: (site.out_features, site.in_features) for site in layout.sites}
    shards = ShardFolder(folder / "work", plan.quant_formats, shapes)

    def save(index: int | None, weights: dict[str, StoredWeight], records: list[SiteRecord]) -> None:
        shards.save("outer" if index is None else f"block-{index:04d}", weights, records)

    quantize_sites(model, plan, Rtn(clip_search=False), None, save)
    written = exporter.write(model, plan, shards, folder / "files", context)
    shutil.rmtree(folder / "work")
    return written.folder / exporter.entry if exporter.entry else written.folder, plan


def load_synthetic(folder: Path) -> LoadedModel:
    """The model that `make_model` wrote."""
    return load_model(folder)
