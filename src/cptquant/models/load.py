"""Load a model for measuring and quantizing: in its own dtype, in evaluation mode, never changed afterwards."""

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from cptquant.core.errors import ModelError
from cptquant.core.layout import ModelLayout
from cptquant.core.targets.torch_segments import METHOD
from cptquant.models.layout import build_layout
from cptquant.models.source import ModelFolder, find_model
from cptquant.models.weights import WeightFiles, WeightScan, check_finite, read_weight_files, scan_weights

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_KNOWN_UNUSED = re.compile(
    r"(^|\.)(pooler\.|cls\.seq_relationship\.|position_ids$|token_type_ids$|rotary_emb\.inv_freq$|attn\.bias$|"
    r"attn\.masked_bias$|attention\.bias$|attention\.masked_bias$)"
)
"""Tensors that published checkpoints carry and their own class does not use: pre-training heads, constant buffers."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be run; no stage changes it.

    Attributes:
        module: evaluation mode, weights in their own dtype, requires_grad False.
        tokenizer: None if the folder has none. layout: what `inspect` finds.
        blocks_path: module path of the list of blocks, e.g. `model.decoder.layers`.
        path: the folder the weights came from.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layout: ModelLayout
    blocks_path: str
    path: Path

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ModelError: the folder has none.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"{self.layout.source} has no tokenizer, and text is needed; copy the original's tokenizer files "
                f"(tokenizer.json, tokenizer_config.json) into {self.path}"
            )
        return self.tokenizer


@dataclass(frozen=True)
class _Opened:
    """A model folder with everything known short of its weights."""

    folder: ModelFolder
    weights: WeightFiles
    scan: WeightScan
    arguments: dict[str, Any]
    layout: ModelLayout
    blocks_path: str


def read_layout(source: str | Path, *, trust_remote_code: bool = False) -> ModelLayout:
    """Describe a model without loading it (the `inspect` stage).

    Args:
        source: local folder, hub id, or `embedded:opt-mini`, `embedded:bert-mini`.
        trust_remote_code: allow the model folder's own Python code to run.

    Raises:
        ModelError: nothing usable there, damaged or non-finite weights, or an architecture that cannot be handled.
    """
    with quiet_transformers():
        return _open(source, trust_remote_code=trust_remote_code, allow_quantized=False).layout


def load_model(source: str | Path, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load a float model to be measured or quantized.

    Weights stay mapped from their files until they are used. Attention is torch's scaled_dot_product_attention where
    the class supports it (equal to the eager one within float32 rounding, padding included; tested), else eager.

    Args:
        source: local folder, hub id, or `embedded:opt-mini`, `embedded:bert-mini`.
        trust_remote_code: allow the model folder's own Python code to run.

    Raises:
        ModelError: nothing usable there; no safetensors; damaged, missing, superfluous or non-finite weights; an
            architecture that cannot be handled; an already quantized checkpoint.
    """
    with quiet_transformers():
        opened = _open(source, trust_remote_code=trust_remote_code, allow_quantized=False)
        module = _load_module(opened, dtype=getattr(torch, opened.layout.source_dtype))
        return _finish(opened, module)


def load_any(source: str | Path, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load any Hugging Face folder for evaluation; a compressed-tensors checkpoint comes dequantized to float32.

    float32 because a product of code and scale is not in general a 16-bit float: the ruler must not add rounding.

    Raises:
        ModelError: as `load_model`; or a quantization method that cannot be dequantized here.
    """
    with quiet_transformers():
        opened = _open(source, trust_remote_code=trust_remote_code, allow_quantized=True)
        if opened.folder.quantization_method is None:
            module = _load_module(opened, dtype=getattr(torch, opened.layout.source_dtype))
        else:
            module = _dequantized(_load_module(opened, dtype=torch.float32), opened)
        return _finish(opened, module)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, log lines and warnings; what matters is checked and raised instead."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _open(source: str | Path, *, trust_remote_code: bool, allow_quantized: bool) -> _Opened:
    folder = find_model(source, trust_remote_code=trust_remote_code)
    method = folder.quantization_method
    if method is not None and not allow_quantized:
        raise ModelError(
            f"{source} is already quantized ({method}); give the original float model "
            "(cptquant evaluate takes quantized folders too)"
        )
    if method == METHOD:
        raise ModelError(
            f"{source} was written for --target torch, which only cptquant.load_segmented opens; evaluate its run "
            "folder instead: cptquant evaluate RUN"
        )
    if method not in (None, "compressed-tensors"):
        raise ModelError(
            f"{source} is quantized with {method}; evaluate reads compressed-tensors checkpoints and float models: "
            "save it dequantized"
        )
    weights = read_weight_files(folder.path)
    scan = scan_weights(weights)
    check_finite(scan, str(source))
    arguments = _class_arguments(folder, weights)
    layout, blocks_path = build_layout(folder, _skeleton(folder, arguments), weights, scan)
    return _Opened(folder, weights, scan, arguments, layout, blocks_path)


def _class_arguments(folder: ModelFolder, weights: WeightFiles) -> dict[str, Any]:
    """A bare encoder saved without its pooler is built without one, instead of getting a random one."""
    if folder.task == "encoder" and not any("pooler." in name for name in weights.tensors):
        model_class = getattr(transformers, folder.architecture, None)
        if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
            return {"add_pooling_layer": False}
    return {}


def _skeleton(folder: ModelFolder, arguments: dict[str, Any]) -> PreTrainedModel:
    auto_class = getattr(transformers, folder.auto_class)
    try:
        with torch.device("meta"):
            return auto_class.from_config(folder.config, trust_remote_code=folder.trust_remote_code, **arguments)
    except Exception as error:
        raise ModelError(
            f"{folder.source}: {folder.architecture} cannot be built from its config ({_first_line(error)}); "
            "mend config.json"
        ) from error


def _load_module(opened: _Opened, dtype: torch.dtype) -> PreTrainedModel:
    folder = opened.folder
    auto_class = getattr(transformers, folder.auto_class)
    try:
        module, report = auto_class.from_pretrained(
            folder.path,
            config=folder.config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=folder.trust_remote_code,
            output_loading_info=True,
            **opened.arguments,
        )
    except Exception as error:
        raise ModelError(
            f"{folder.source}: transformers cannot load {folder.architecture}: {_first_line(error)}; do config.json "
            "and the weights belong together?"
        ) from error
    _check_report(report, folder)
    return module


def _check_report(report: dict[str, Any], folder: ModelFolder) -> None:
    def listed(names: Any) -> str:
        texts = sorted(str(name) for name in names)
        return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")

    if report["missing_keys"]:
        raise ModelError(
            f"{folder.source}: the weight files lack {listed(report['missing_keys'])}, which {folder.architecture} "
            "needs; complete the download, or mend architectures in config.json"
        )
    if report["mismatched_keys"]:
        shapes = [
            f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
        ]
        raise ModelError(
            f"{folder.source}: shapes in the weight files contradict config.json: {listed(shapes)}; do they belong "
            "together?"
        )
    unused = [name for name in report["unexpected_keys"] if not _KNOWN_UNUSED.search(str(name))]
    if unused:
        raise ModelError(
            f"{folder.source}: the weight files hold {listed(unused)}, which {folder.architecture} does not use; "
            "mend architectures in config.json, or save the model again with its own class"
        )


def _dequantized(module: PreTrainedModel, opened: _Opened) -> PreTrainedModel:
    """The dequantized weights in a model of plain layers: compressed-tensors leaves hooks on its own."""
    from compressed_tensors.compressors import decompress_module  # heavy, and needed here only
    from compressed_tensors.quantization.utils import is_module_quantized

    for part in list(module.modules()):
        if is_module_quantized(part):
            decompress_module(part)
    config: Any = copy.deepcopy(opened.folder.config)
    del config.quantization_config
    plain = _skeleton(replace(opened.folder, config=config), opened.arguments)
    found = module.state_dict()
    plain.load_state_dict({name: found[name] for name in plain.state_dict()}, assign=True)
    for name, buffer in module.named_buffers():
        parent, _, leaf = name.rpartition(".")
        if leaf in (target := plain.get_submodule(parent))._buffers:
            target._buffers[leaf] = buffer  # not in a state dict, hence still without memory
    plain.tie_weights()
    return plain


def _finish(opened: _Opened, module: PreTrainedModel) -> LoadedModel:
    layout = opened.layout
    module.eval()
    module.requires_grad_(False)
    if layout.shared_head is not None:
        embedding, head = (module.get_submodule(name).weight for name in layout.shared_head)
        if embedding is not head:
            raise ModelError(
                f"{layout.source}: config.json ties the embedding to the head, but the weight files hold a different "
                f'{layout.shared_head[1]}.weight; set "tie_word_embeddings": false in config.json'
            )
    return LoadedModel(module, _load_tokenizer(opened.folder), layout, opened.blocks_path, opened.folder.path)


def _load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase | None:
    if not any((folder.path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=folder.trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"{folder.source}: the tokenizer cannot be loaded ({_first_line(error)}); copy the original's tokenizer "
            "files again"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
