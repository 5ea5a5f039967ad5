"""Continue a prompt with a run's files in one of the engines."""

from pathlib import Path

from cptquant.core.engine_export import ExportRecord
from cptquant.core.errors import ArtifactError, ModelError, UserError
from cptquant.core.layout import ModelLayout
from cptquant.core.settings import RunSettings
from cptquant.engines.process import run_engine
from cptquant.models.source import find_model

_ENGINE_TARGETS = {"onnx": "onnx", "llamacpp": "gguf"}


def generate_text(
    folder: Path, prompt: str, engine: str, *, tokens: int, threads: int, context: int | None = None
) -> str:
    """The prompt's most likely continuation.

    Args:
        engine: transformers (checkpoint/), onnx or llamacpp (their exported files). tokens: at most.

    Raises:
        UserError: an unknown engine, an empty prompt. ArtifactError: the engine's files were not written.
        EngineError: the engine is missing, or prompt and continuation do not fit the context.
        ModelError: an encoder, which continues nothing.
    """
    from transformers import AutoTokenizer

    settings = RunSettings.load(folder / "settings.json")
    layout = ModelLayout.load(folder / "layout.json")
    if layout.task != "causal_lm":
        raise ModelError(f"{layout.source} is for {layout.task}; only causal language models continue a prompt")
    original = find_model(settings.model, trust_remote_code=settings.trust_remote_code).path
    tokenizer = AutoTokenizer.from_pretrained(
        original, local_files_only=True, trust_remote_code=settings.trust_remote_code
    )
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not ids:
        raise UserError("--prompt is empty; give some text")
    longest = context or layout.max_positions
    if longest is not None and len(ids) + tokens > longest:
        raise UserError(
            f"--prompt of {len(ids)} tokens and --tokens {tokens} do not fit the context of {longest}; lower --tokens "
            "or shorten the prompt"
        )
    stop = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    answer = run_engine(
        engine, _file(folder, engine), "generate", threads=threads, context=len(ids) + tokens, ids=ids, tokens=tokens,
        stop=stop,
    )  # fmt: skip
    return str(tokenizer.decode(answer["ids"]))


def _file(folder: Path, engine: str) -> Path:
    if engine == "transformers":
        if not (folder / "checkpoint" / "model.safetensors").is_file():
            raise ArtifactError(
                f"{folder}/checkpoint holds no checkpoint of transformers; write one with: cptquant export {folder} "
                "--target transformers"
            )
        return folder / "checkpoint"
    if engine not in _ENGINE_TARGETS:
        raise UserError(f"--engine {engine!r} is unknown; choose one of: transformers, {', '.join(_ENGINE_TARGETS)}")
    target = _ENGINE_TARGETS[engine]
    record = folder / "export" / target / "export.json"
    if not record.is_file():
        raise ArtifactError(
            f"{folder} holds no files for {engine}; write them with: cptquant export {folder} --target {target}"
        )
    return folder / ExportRecord.load(record).entry
