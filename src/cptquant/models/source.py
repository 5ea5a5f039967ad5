"""From what a person types after MODEL to a folder on disk with a config that can be trusted."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from cptquant.core.artifact import read_json
from cptquant.core.errors import ArtifactError, ModelError
from cptquant.core.layout import Task
from cptquant.models.embedded import PREFIX, embedded_model_path

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]

TASK_HEADS: dict[Task, tuple[str, Mapping[Any, Any]]] = {
    "causal_lm": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked_lm": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "sequence_classification": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "encoder": ("AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
}
"""Task -> the transformers class that loads it, and the architectures that class knows, by model type."""


@dataclass(frozen=True)
class ModelFolder:
    """A model's files, found and read as far as the config.

    Attributes:
        source: as the person named it. path: the folder.
        architecture: `config.architectures[0]`. task: what its head does.
        auto_class: name of the transformers class that loads it.
        trust_remote_code: the person allowed the folder's own Python code to run.
    """

    source: str
    path: Path
    config: PretrainedConfig
    architecture: str
    task: Task
    auto_class: str
    trust_remote_code: bool = False

    @property
    def quantization_method(self) -> str | None:
        """`quant_method` of an already quantized checkpoint, else None."""
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None:
            return None
        if isinstance(quantization, dict):
            return str(cast(dict[str, Any], quantization).get("quant_method", "unknown"))
        return str(getattr(quantization, "quant_method", "unknown"))


def find_model(source: str | Path, *, trust_remote_code: bool = False) -> ModelFolder:
    """Resolve a local folder, a hub id or `embedded:NAME`, and read its config.

    Raises:
        ModelError: nothing there, no or damaged config.json, or an architecture that cannot be handled.
    """
    path = _resolve(str(source), trust_remote_code=trust_remote_code)
    raw = _read_config(path, source=str(source))
    architecture = _architecture(raw, path)
    config = _parse_config(path, architecture=architecture, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source}: {architecture} is an encoder-decoder; cptquant handles models with one stack of blocks "
            "(decoders such as OPT or Llama, encoders such as BERT)"
        )
    task, auto_class = _task(architecture, raw, trust_remote_code=trust_remote_code, source=str(source))
    return ModelFolder(str(source), path, config, architecture, task, auto_class, trust_remote_code)


def _resolve(source: str, *, trust_remote_code: bool) -> Path:
    if source.startswith(PREFIX):
        return embedded_model_path(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{source} is a file; MODEL is a folder with config.json and *.safetensors, or a hub id")
    if not _HUB_ID.match(source):
        raise ModelError(
            f"{source} does not exist; MODEL is a local folder with config.json and *.safetensors, a hub id such as "
            "facebook/opt-125m, embedded:opt-mini or embedded:bert-mini"
        )
    return _download(source, trust_remote_code=trust_remote_code)


def _download(source: str, *, trust_remote_code: bool) -> Path:
    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{source} is no local folder, and the Hugging Face hub could not give it ({reason}); check the spelling "
            "and the network, or download the model elsewhere and give its folder"
        ) from None


def _read_config(path: Path, *, source: str) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        what = "is empty" if not any(path.iterdir()) else "holds no config.json"
        raise ModelError(f"{source} {what}; a Hugging Face model folder holds config.json and *.safetensors")
    try:
        return read_json(path / "config.json", made_by="save_pretrained of the original model")
    except ArtifactError as error:
        raise ModelError(str(error)) from None


def _architecture(raw: dict[str, Any], path: Path) -> str:
    if not isinstance(raw.get("model_type"), str):
        raise ModelError(
            f'{path / "config.json"}: model_type is {raw.get("model_type")!r}, expected a name such as "opt"'
        )
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError(
            f"{path / 'config.json'}: architectures is {json.dumps(names)}, expected a list with the class the weights "
            'belong to, such as ["OPTForCausalLM"]; add it'
        )
    return names[0]


def _parse_config(path: Path, *, architecture: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds for a wrong field
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) if lines else type(error).__name__
        raise ModelError(
            f"{path / 'config.json'} ({architecture}) is not accepted by transformers: {reason[:300]}; mend the field, "
            "or, for a model that brings its own code, pass --trust-remote-code if you trust it"
        ) from None


def _task(architecture: str, raw: dict[str, Any], *, trust_remote_code: bool, source: str) -> tuple[Task, str]:
    for task, (auto_class, names) in TASK_HEADS.items():
        known = {name for entry in names.values() for name in ((entry,) if isinstance(entry, str) else entry)}
        if architecture in known:
            return task, auto_class
    own_code = raw.get("auto_map")
    if isinstance(own_code, dict):
        if trust_remote_code:
            for task, (auto_class, _) in TASK_HEADS.items():
                if auto_class in own_code:
                    return task, auto_class
        else:
            raise ModelError(
                f"{source}: {architecture} comes with its own Python code; pass --trust-remote-code if you trust it"
            )
    raise ModelError(
        f"{source}: architecture {architecture} is unknown here; cptquant handles causal language models, masked "
        "language models, sequence classifiers and bare encoders of transformers (…ForCausalLM, …ForMaskedLM, "
        "…ForSequenceClassification, …Model)"
    )
