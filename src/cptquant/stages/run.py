"""The run folder: what was asked for, the files of finished stages, and the model, loaded when first needed."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cptquant.core.artifact import Artifact, output_error
from cptquant.core.errors import OutputError
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.provenance import Stopwatch
from cptquant.core.settings import RunSettings

if TYPE_CHECKING:
    from cptquant.models.corpus import Split
    from cptquant.models.load import LoadedModel
    from cptquant.models.text import TokenSet

A = TypeVar("A", bound=Artifact)


@dataclass
class Run:
    """A run folder, what was asked for, and the model, loaded when first needed."""

    folder: Path
    settings: RunSettings
    progress: Progress = field(default=ignore_progress)

    @classmethod
    def start(cls, folder: Path, settings: RunSettings, progress: Progress = ignore_progress) -> "Run":
        """Open a folder for a model: a new or empty one, or one that already holds a run of the same model.

        Raises:
            OutputError: not empty and no run, a run of another model, or not writable.
        """
        path = folder / "settings.json"
        if path.exists():
            before = RunSettings.load(path)
            if before.model != settings.model:
                raise OutputError(
                    f"--output {folder} holds a run of {before.model!r}, not of {settings.model!r}; "
                    "choose another folder or remove it"
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"--output {folder} is not empty and holds no cptquant run; choose an empty folder")
        elif folder.exists() and not folder.is_dir():
            raise OutputError(f"--output {folder} is a file; choose a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(folder, error) from None
        if not os.access(folder, os.W_OK):
            raise OutputError(f"--output {folder} is not writable; choose another folder")
        settings.save(path)
        return cls(folder, settings, progress)

    @classmethod
    def resume(cls, folder: Path, progress: Progress = ignore_progress, **changes: object) -> "Run":
        """Open a run folder for a later stage, with flags that override its settings.

        Raises:
            ArtifactError: the folder holds no run.
        """
        settings = RunSettings.load(folder / "settings.json")
        if changes:
            settings = settings.model_copy(update=changes)
            settings.save(folder / "settings.json")
        return cls(folder, settings, progress)

    @cached_property
    def model(self) -> "LoadedModel":
        """The original, in its own dtype."""
        from cptquant.models.load import load_model  # here, so that `cptquant allocate` loads no framework

        return load_model(self.settings.model, trust_remote_code=self.settings.trust_remote_code)

    @cached_property
    def calibration(self) -> "TokenSet":
        """Text for measuring and quantizing."""
        return self._tokens("calibration", self.settings.calibration, self.settings.calibration_sequences)

    @cached_property
    def validation(self) -> "TokenSet":
        """Held-out text on which the guard chooses, half as much; never the text that is reported on."""
        return self._tokens("validation", self.settings.eval_text, max(2, self.settings.eval_sequences // 2))

    @cached_property
    def test(self) -> "TokenSet":
        """Held-out text that is reported on. A person's own file is dealt to validation and test without overlap."""
        return self._tokens("test", self.settings.eval_text, self.settings.eval_sequences)

    def read_all_text(self) -> None:
        """Read every text the run will need, so that one that is too short is refused before compute is spent.

        Raises:
            DataError: unusable text. ModelError: the model or its tokenizer cannot be loaded.
        """
        _ = self.calibration, self.validation, self.test

    def _tokens(self, split: "Split", source: str | None, sequences: int) -> "TokenSet":
        from cptquant.models.text import load_tokens

        return load_tokens(
            self.model, source, split, sequences=sequences, length=self.settings.sequence_length,
            seed=self.settings.seed,
        )  # fmt: skip

    def stage(self, name: str, kind: type[A], inputs: dict[str, str], make: Callable[[], A]) -> A:
        """The artifact of that name: as found if made from the same inputs, else made and saved."""
        path = self.folder / name
        if path.exists():
            found = kind.load(path)
            if found.inputs == inputs:
                return found
        watch = Stopwatch()
        made = make()
        provenance = watch.provenance(seed=self.settings.seed, threads=_threads())
        made = made.model_copy(update={"inputs": inputs, "provenance": provenance})
        made.save(path)
        return made

    def load(self, name: str, kind: type[A]) -> A:
        """An artifact of an earlier stage.

        Raises:
            ArtifactError: missing or damaged; names the command that makes it.
        """
        return kind.load(self.folder / name)


def _threads() -> int | None:
    torch = sys.modules.get("torch")  # stages that never touch a framework must not load it for this
    return None if torch is None else torch.get_num_threads()
