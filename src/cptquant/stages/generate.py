"""Continue a prompt with a run's files in one of the engines."""

from pathlib import Path

from cptquant.core.errors import ModelError, UserError
from cptquant.core.layout import ModelLayout
from cptquant.core.settings import RunSettings
from cptquant.engines.process import run_engine
from cptquant.models.source import find_model
from cptquant.stages.written import check_run, checkpoint_folder, engine_record

_ENGINE_TARGETS = {"onnx": "onnx", "llamacpp": "gguf", "torch": "torch"}


def generate_text(folder: Path, prompt: str, engine: str, *, tokens: int, threads: int) -> str:
    """The prompt's most likely continuation.

    Args:
        engine: transformers (checkpoint/), onnx, llamacpp or torch (their exported files). tokens: at most.

    Raises:
        UserError: an unknown engine, an empty prompt. ArtifactError: the engine's files were not written, are of other
        weights than the run's, or damaged.
        EngineError: the engine is missing, or prompt and continuation do not fit the context.
        ModelError: an encoder, which continues nothing.
    """
    from transformers import AutoTokenizer

    check_run(folder)
    settings = RunSettings.load(folder / "settings.json")
    layout = ModelLayout.load(folder / "layout.json")
    if layout.task != "causal_lm":
        raise ModelError(f"{layout.source} is for {layout.task}; only causal language models continue a prompt")
    file, context = _file(folder, engine)
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
        engine, file, "generate", threads=threads, context=len(ids) + tokens, ids=ids, tokens=tokens,
        stop=stop,
    )  # fmt: skip
    return str(tokenizer.decode(answer["ids"]))


def _file(folder: Path, engine: str) -> tuple[Path, int | None]:
    """What the engine is given, and the longest context it was written for (None: the model's)."""
    if engine == "transformers":
        return checkpoint_folder(folder), None
    if engine not in _ENGINE_TARGETS:
        raise UserError(f"--engine {engine!r} is unknown; choose one of: transformers, {', '.join(_ENGINE_TARGETS)}")
    record = engine_record(folder, _ENGINE_TARGETS[engine], engine)
    return folder / record.entry, record.context
