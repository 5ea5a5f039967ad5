"""What a run folder already says about own text, before a model is loaded. Loads no framework."""

from pathlib import Path

from cptquant.core.settings import OWN_TEXT, RunSettings

BEGUN_BEFORE = "this run was begun before GPTQ read own text by default; --own-text 256 adds it, for other weights"


def carry_own_text(folder: Path, settings: RunSettings) -> RunSettings:
    """Settings for a run folder, with what its run settled on (`RunSettings.own_text_default`, `quantizer_default`).

    A run that quantized with GPTQ before that was written down read no own text, and keeps its bits. So does one that
    was begun when GPTQ was the default quantizer, or with another that is not named again.

    Raises:
        ArtifactError: settings.json is damaged.
    """
    if not (folder / "settings.json").exists():
        return settings
    before = RunSettings.load(folder / "settings.json")
    asked = before.own_text is not None or before.quantizer != "gptq"
    if "gptq" in OWN_TEXT and not asked and "gptq" not in before.own_text_default and _quantized(folder):
        before = before.settled("gptq", 0, BEGUN_BEFORE)
    begun = before.quantizer if _quantized(folder) else None
    carried = {"own_text_default": before.own_text_default, "quantizer_default": begun or before.quantizer_default}
    return settings.model_copy(update=carried)


def _quantized(folder: Path) -> bool:
    """Whether pieces or a record of quantized weights stand there."""
    records = any(next(folder.glob(name), None) for name in ("manifest*.json", "frontier/manifest-*.json"))
    return records or any(path.is_dir() for path in (folder / "work").glob("*"))
