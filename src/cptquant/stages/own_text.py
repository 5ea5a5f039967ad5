"""Calibration text for quantizing: the person's, and what the model writes itself where it can."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cptquant.core.artifact import digest_json, output_error
from cptquant.core.settings import RunSettings

if TYPE_CHECKING:
    from cptquant.models.text import TokenSet
    from cptquant.stages.run import Run


def settle_own_text(run: "Run") -> None:
    """Write the model's own text before anything is predicted or quantized, or find that the run goes without it.

    What the defaults of own text and of the quantizer came to is written into settings.json and holds for the run.
    Where own text is the default only, a model that cannot write is no error: settings.json, progress, manifest and
    report say why the given text is all that is read, and every label and forecast of the run follows from that.

    Raises:
        OwnTextError: the model cannot write, and own text was asked for. DataError: unusable calibration text.
    """
    from cptquant.models.own_text import OwnTextError

    if run.own_text_settled:
        return
    run.own_text_settled = True
    settings, layout = run.settings, run.model.layout
    count, note = settings.own_text_for(layout), settings.own_text_note(layout)
    try:
        _ = run.quantizer_text
    except OwnTextError as error:
        if settings.own_text is not None:
            raise
        count, note = 0, error.reason
    if note:
        run.progress(f"calibrated on the given text alone: {note}", 1, 1)
    quantizer = settings.quantizer_for(layout)
    if settings.own_text is None and quantizer != "rtn":
        run.settings = settings.settled(quantizer, count, note)
    if settings.quantizer is None:
        run.settings = run.settings.model_copy(update={"quantizer_default": quantizer})
    kept = RunSettings.load(run.folder / "settings.json")
    if (run.settings.own_text_default, run.settings.quantizer_default) != (
        kept.own_text_default,
        kept.quantizer_default,
    ):
        run.keep_settings()


def enlarge_calibration(run: "Run") -> "TokenSet":
    """The calibration text, with `--own-text` sequences written by the model after it.

    These are kept in work/own-text-DIGEST.safetensors, so that every plan of the run and every later stage reads the
    same ones; a file that was cut short or changed is written again.

    Raises:
        OwnTextError: the model cannot write. OutputError: the disk is full.
    """
    return with_own_text(run, run.calibration, run.settings.own_text_for(run.model.layout), run.settings.seed)


def with_own_text(run: "Run", text: "TokenSet", count: int, seed: int) -> "TokenSet":
    """A text, and so many sequences of the same length that the model writes from beginnings in it; kept in work/.

    Raises:
        ModelError: own text was asked for of a model that writes none. OutputError: the disk is full.
    """
    from cptquant.models.own_text import join_texts, write_own_text

    if count == 0:
        return text
    wanted = {
        "layout": run.model.layout.digest(),
        "tokens": text.digest,
        "sequences": str(count),
        "seed": str(seed),
    }
    path = run.folder / "work" / f"own-text-{digest_json(wanted)[:16]}.safetensors"
    written = _read(run, path, count) if path.exists() else None
    if written is None:
        written = write_own_text(
            run.model, text, count, seed=seed,
            progress=lambda done, total: run.progress("write calibration text", done, total),
        )  # fmt: skip
        _save(written, path)
    return join_texts(text, written)


def _read(run: "Run", path: Path, count: int) -> "TokenSet | None":
    """None where the file is not what was written."""
    import torch

    from cptquant.models.own_text import NO_DOCUMENT
    from cptquant.models.text import TokenSet

    ids, metadata = None, dict[str, str]()
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        ids, metadata = file.get_tensor("input_ids"), file.metadata() or {}
    if ids is not None and ids.dtype is torch.int64 and len(ids) == count:
        documents = torch.full((count,), NO_DOCUMENT, dtype=torch.int64)
        found = TokenSet.build(ids, torch.ones_like(ids), None, documents, metadata.get("description", ""))
        if found.digest == metadata.get("digest"):
            return found
    run.progress(f"made anew: {path} was cut short or changed after it was written", 1, 1)
    return None


def _save(written: "TokenSet", path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"digest": written.digest, "description": written.description}
        save_file({"input_ids": written.input_ids}, partial, metadata=metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise output_error(path, error) from None
