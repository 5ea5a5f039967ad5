"""The two models and the text that come with the package, so that everything runs without a network."""

from pathlib import Path

from cptquant.core.errors import ModelError

PREFIX = "embedded:"
EMBEDDED_MODELS = ("opt-mini", "bert-mini")
_DATA = Path(__file__).parent / "embedded_data"


def embedded_model_path(source: str) -> Path:
    """Folder of `embedded:opt-mini` or `embedded:bert-mini`.

    Raises:
        ModelError: no such embedded model, or the installation lacks its files.
    """
    name = source.removeprefix(PREFIX)
    if name not in EMBEDDED_MODELS:
        allowed = ", ".join(PREFIX + known for known in EMBEDDED_MODELS)
        raise ModelError(f"{source!r} is no embedded model; choose one of: {allowed}")
    path = _DATA / name
    if not (path / "config.json").is_file():
        raise ModelError(f"{source!r} is missing from this installation ({path}); install cptquant again")
    return path


def embedded_text_path(split: str, *, labelled: bool) -> Path:
    """The embedded text of a split: gzipped JSON lines with `text`, `module` and, if labelled, `label`."""
    return _DATA / "text" / f"{'classification_' if labelled else ''}{split}.jsonl.gz"
