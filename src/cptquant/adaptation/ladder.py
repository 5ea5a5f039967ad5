"""A ladder of models of one family: the same architecture and tokenizer in several sizes.

A rung that is no folder gets its shape from the family's own config: widths are multiples of the family's head width
(so that heads keep it), the inner width of the feed-forward layer keeps its ratio to the hidden one, rounded to a
multiple of 64 so that groups of 64 columns divide it, and key-value heads keep their ratio to the heads. Where only
the parameters of the blocks are given, of all (hidden, layers) whose blocks have about as many the shape nearest to
the family's own hidden-to-layers ratio is taken. Weights are drawn anew, the residual projections scaled down by the
square root of twice the depth (GPT-2's rule); nothing of the family's weights is kept.
"""

import copy
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from cptquant.core.errors import ModelError, UserError
from cptquant.core.sweep import SizeSpec
from cptquant.core.written_files import digest_folder, list_damage
from cptquant.models.load import LoadedModel, load_model, quiet_transformers
from cptquant.models.source import ModelFolder, find_model

_INNER_MULTIPLE = 64
_INNER_FIELDS = ("intermediate_size", "ffn_dim", "n_inner")
_MOST_LAYERS = 512
_FACTS = "training.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model",
    "added_tokens.json",
)  # fmt: skip
_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight", "c_proj.weight", "dense.weight",
             "dense_4h_to_h.weight")  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One size of the ladder.

    Attributes:
        name: as in the plan. config: JSON of the model's config. parameters: all of them, shared tensors once: the N
            of the law. block_parameters: those of the blocks. path: folder of an existing model, else None.
        architecture: its class in transformers.
    """

    name: str
    config: str
    architecture: str
    parameters: int
    block_parameters: int
    path: str | None = None


def build_ladder(family: str, sizes: tuple[SizeSpec, ...]) -> tuple[Rung, ...]:
    """The rungs of a plan, in its order; no weights are loaded.

    Raises:
        ModelError: the family is no causal language model, or one whose sizes have no known names; a rung of another
            architecture or vocabulary than the family's. UserError: a rung as wide as no head.
    """
    with quiet_transformers():
        folder = find_model(family)
        if folder.task != "causal_lm":
            raise ModelError(
                f"family: {family} is for {folder.task}; a sweep continues pre-training, which needs a causal language "
                "model"
            )
        return tuple(_rung(folder, size, index) for index, size in enumerate(sizes))


def _rung(folder: ModelFolder, size: SizeSpec, index: int) -> Rung:
    if size.path is not None:
        return _existing(folder, size, index)
    if size.hidden is not None and size.layers is not None:
        hidden, layers = size.hidden, size.layers
        head = head_width(folder.config)
        if hidden % head:
            raise UserError(
                f"sizes[{index}].hidden is {hidden}; the heads of {folder.source} are {head} wide: give a multiple "
                f"of {head}"
            )
    else:
        hidden, layers = choose_shape(folder.config, folder.architecture, size.parameters or 0)
    config = scale_config(folder.config, hidden, layers)
    total, blocks = count_parameters(config, folder.architecture)
    return Rung(size.name, config.to_json_string(use_diff=False), folder.architecture, total, blocks)


def _existing(folder: ModelFolder, size: SizeSpec, index: int) -> Rung:
    found = find_model(size.path or "")
    where = f"sizes[{index}] {size.path}"
    if found.architecture != folder.architecture:
        raise ModelError(f"{where} is {found.architecture}, the family {folder.source} {folder.architecture}; a ladder "
                         "has one architecture")  # fmt: skip
    if found.config.vocab_size != folder.config.vocab_size:
        raise ModelError(
            f"{where} knows {found.config.vocab_size:,} tokens, the family {folder.source} "
            f"{folder.config.vocab_size:,}; losses compare only with one tokenizer"
        )
    ours, theirs = folder.path / "tokenizer.json", found.path / "tokenizer.json"
    if ours.is_file() and theirs.is_file() and _vocabulary(ours) != _vocabulary(theirs):
        raise ModelError(
            f"{where} has another tokenizer than the family {folder.source}, of the same size; losses compare only "
            "with one tokenizer: copy the files of the family's, if it was trained with that"
        )
    total, blocks = count_parameters(found.config, found.architecture)
    return Rung(size.name, found.config.to_json_string(use_diff=False), found.architecture, total, blocks, size.path)


def _vocabulary(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8")).get("model", {}).get("vocab")


def head_width(config: PretrainedConfig) -> int:
    """Columns of one attention head."""
    width = getattr(config, "head_dim", None)
    return width if isinstance(width, int) and width > 0 else config.hidden_size // config.num_attention_heads


def scale_config(config: PretrainedConfig, hidden: int, layers: int) -> PretrainedConfig:
    """The family's config at another width and depth, everything else kept.

    Raises:
        ModelError: its feed-forward width has no known name.
    """
    scaled: Any = copy.deepcopy(config)
    head, heads = head_width(config), config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    inner_field = next((name for name in _INNER_FIELDS if hasattr(config, name)), None)
    if inner_field is None:
        raise ModelError(
            f"family: {type(config).__name__} names no feed-forward width ({', '.join(_INNER_FIELDS)}); give sizes as "
            "folders of existing models"
        )
    inner = getattr(config, inner_field)
    if inner is not None:
        ratio = inner / config.hidden_size
        setattr(scaled, inner_field, max(_INNER_MULTIPLE, round(hidden * ratio / _INNER_MULTIPLE) * _INNER_MULTIPLE))
    scaled.hidden_size, scaled.num_hidden_layers = hidden, layers
    scaled.num_attention_heads = max(1, hidden // head)
    if isinstance(kv_heads, int) and hasattr(scaled, "num_key_value_heads"):
        wanted = max(1, round(kv_heads / heads * scaled.num_attention_heads))
        scaled.num_key_value_heads = next(
            count for count in range(wanted, 0, -1) if scaled.num_attention_heads % count == 0
        )
    if hasattr(scaled, "word_embed_proj_dim"):
        scaled.word_embed_proj_dim = hidden
    if getattr(scaled, "layer_types", None):
        scaled.layer_types = [scaled.layer_types[index % len(scaled.layer_types)] for index in range(layers)]
    return scaled


def choose_shape(config: PretrainedConfig, architecture: str, parameters: int) -> tuple[int, int]:
    """(hidden, layers) whose blocks have about that many parameters, nearest to the family's proportions.

    Cost of a shape: |ln of its parameters over those wanted| + 0.3 |ln of its hidden/layers over the family's|.

    Raises:
        UserError: none comes within a factor of 1.5.
    """
    step = head_width(config)
    own = config.hidden_size / config.num_hidden_layers
    best: tuple[float, int, int, int] | None = None
    for hidden in range(step, 64 * step + 1, step):
        one = count_parameters(scale_config(config, hidden, 1), architecture)[1]
        for layers in {max(1, math.floor(parameters / one)), max(1, math.ceil(parameters / one))}:
            if layers > _MOST_LAYERS:
                continue
            miss = abs(math.log(layers * one / parameters))
            cost = miss + 0.3 * abs(math.log(hidden / layers / own))
            if miss <= math.log(1.5) and (best is None or cost < best[0]):
                best = (cost, hidden, layers, layers * one)
        if one > 1.5 * parameters:
            break
    if best is None:
        smallest = count_parameters(scale_config(config, step, 1), architecture)[1]
        raise UserError(
            f"sizes: no shape of this family has about {parameters:,} parameters in its blocks (one block of width "
            f"{step} has {smallest:,}); give another number, or hidden and layers"
        )
    return best[1], best[2]


def count_parameters(config: PretrainedConfig, architecture: str) -> tuple[int, int]:
    """(all, of the blocks); shared tensors count once. Nothing is allocated."""
    model = _skeleton(config, architecture)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    outside = {id(p): p.numel() for module in (embedding, head) if module is not None for p in module.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    positions = sum(
        parameter.numel() for name, parameter in model.named_parameters()
        if ("embed_positions" in name or ".wpe." in name) and id(parameter) not in outside
    )  # fmt: skip
    return total, total - sum(outside.values()) - positions


def _skeleton(config: PretrainedConfig, architecture: str) -> PreTrainedModel:
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ModelError(f"family: transformers has no class {architecture}; give a model that comes with it")
    with torch.device("meta"):
        return model_class(config)


def new_model(rung: Rung, seed: int) -> PreTrainedModel:
    """A rung with weights drawn anew, float32.

    Raises:
        ModelError: the rung is an existing model.
    """
    if rung.path is not None:
        raise ModelError(f"{rung.name} is the model {rung.path}, which has weights")
    config = read_config(rung)
    torch.manual_seed(seed)
    with quiet_transformers():
        model: PreTrainedModel = getattr(transformers, rung.architecture)(config).float()
    depth = config.num_hidden_layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.endswith(_RESIDUAL):
                parameter.div_(math.sqrt(2 * depth))
    return model


def read_config(rung: Rung) -> PretrainedConfig:
    """The config of a rung."""
    raw: dict[str, Any] = json.loads(rung.config)
    kind: Any = type(transformers.AutoConfig.for_model(raw["model_type"]))
    return kind.from_dict(raw)


def save_rung(model: PreTrainedModel, family: str, folder: Path, facts: dict[str, Any]) -> None:
    """Weights, the family's tokenizer and facts (training.json); the folder appears when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(partial)
        source = find_model(family).path
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    facts = {**facts, "files": digest_folder(partial)}
    (partial / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def is_whole(folder: Path) -> bool:
    """Whether `save_rung` wrote this folder and every file still is what it wrote."""
    try:
        return not list_damage(folder, dict(json.loads((folder / _FACTS).read_text(encoding="utf-8"))["files"]), {})
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_trainable(folder: str | Path) -> LoadedModel:
    """A model to be trained further, float32, every parameter with a gradient.

    It stays in evaluation mode, so dropout is off: the steps then depend on the data alone, and a run that is resumed
    or repeated elsewhere makes the same ones.
    """
    loaded = load_model(folder)
    loaded.module.float()
    loaded.module.requires_grad_(True)
    return loaded
