"""What a run folder already says about own text, before a model is loaded. Loads no framework."""

from pathlib import Path

from cptquant.core.settings import OWN_TEXT, RunSettings

BEGUN_BEFORE = (
    f"this run was begun before GPTQ read own text by default; --own-text {OWN_TEXT['gptq']} adds it, for other weights"
)


def carry_own_text(folder: Path, settings: RunSettings) -> RunSettings:
    """Settings for a run folder, with what its run was found to go without (`RunSettings.own_text_left_out`).

    A run that quantized with GPTQ before own text was its default keeps its bits: settings.json then lacks that field.

    Raises:
        ArtifactError: settings.json is damaged.
    """
    if not (folder / "settings.json").exists():
        return settings
    before = RunSettings.load(folder / "settings.json")
    left_out = dict(before.own_text_left_out)
    if not knows_own_text(before) and before.own_text is None and before.quantizer == "gptq" and _quantized(folder):
        left_out["gptq"] = BEGUN_BEFORE
    return settings.model_copy(update={"own_text_left_out": left_out})


def knows_own_text(loaded: RunSettings) -> bool:
    """Whether settings that were read from a file were written since own text can be a default that is left out."""
    return "own_text_left_out" in loaded.model_fields_set


def _quantized(folder: Path) -> bool:
    """Whether pieces or a record of quantized weights stand there."""
    records = any(next(folder.glob(name), None) for name in ("manifest*.json", "frontier/manifest-*.json"))
    return records or any(path.is_dir() for path in (folder / "work").glob("*"))
