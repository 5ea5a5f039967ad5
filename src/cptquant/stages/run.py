"""The run folder: what was asked for, the files of finished stages, and the model, loaded when first needed."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cptquant.core.artifact import Artifact, output_error
from cptquant.core.engine_memory import find_context
from cptquant.core.errors import ArtifactError, OutputError
from cptquant.core.layout import ModelLayout
from cptquant.core.progress import Progress, ignore_progress
from cptquant.core.provenance import Stopwatch
from cptquant.core.settings import RunSettings
from cptquant.stages.check import check_choices
from cptquant.stages.own_text_choice import carry_own_text

if TYPE_CHECKING:
    from cptquant.models.corpus import Split
    from cptquant.models.load import LoadedModel
    from cptquant.models.text import TokenSet

A = TypeVar("A", bound=Artifact)


@dataclass
class Run:
    """A run folder, what was asked for, and the model, loaded when first needed.

    Attributes:
        own_text_settled: whether `settle_own_text` was called, which says what it found once.
    """

    folder: Path
    settings: RunSettings
    progress: Progress = field(default=ignore_progress)
    own_text_settled: bool = field(default=False, init=False)

    @classmethod
    def start(
        cls, folder: Path, settings: RunSettings, progress: Progress = ignore_progress, *, keep: bool = True
    ) -> "Run":
        """Open a folder for a model: a new or empty one, or one that already holds a run of the same model.

        Args:
            keep: write the settings over those of the run that is there; otherwise `keep_settings` does, once they
                have been looked at further.

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
        run = cls(folder, carry_own_text(folder, settings), progress)
        begun = RunSettings.load(path).quantizer if path.exists() else None
        if settings.quantizer is None and begun is not None and begun == run.settings.quantizer_default:
            progress(f"this run was begun with --quantizer {begun} and goes on with it", 1, 1)
        if keep or not path.exists():
            run.keep_settings()
        return run

    @classmethod
    def resume(cls, folder: Path, progress: Progress = ignore_progress, **changes: object) -> "Run":
        """Open a run folder for a later stage, with flags that override its settings and are kept.

        Raises:
            ArtifactError: the folder holds no run. UserError: a flag's value; the settings then stay as they were.
        """
        run = cls.look(folder, progress, **changes)
        if changes:
            run.keep_settings()
        return run

    @classmethod
    def look(cls, folder: Path, progress: Progress = ignore_progress, **changes: object) -> "Run":
        """As `resume`, without keeping the flags: `keep_settings` does, once they have been looked at further."""
        settings = carry_own_text(folder, RunSettings.load(folder / "settings.json"))
        if changes:
            settings = settings.model_copy(update={**_replaced(changes), **changes})
            check_choices(settings, texts=tuple(changes))
            if (folder / "layout.json").is_file():
                find_context(ModelLayout.load(folder / "layout.json"), settings.context)
        return cls(folder, settings, progress)

    def keep_settings(self) -> None:
        """Write settings.json, from which later stages start."""
        self.settings.save(self.folder / "settings.json")

    @cached_property
    def model(self) -> "LoadedModel":
        """The original, in its own dtype."""
        from cptquant.models.load import load_model  # here, so that `cptquant allocate` loads no framework

        return load_model(self.settings.model, trust_remote_code=self.settings.trust_remote_code)

    @cached_property
    def calibration(self) -> "TokenSet":
        """Text for measuring, and what quantizing starts from."""
        return self._tokens("calibration", self.settings.calibration, self.settings.calibration_sequences)

    @cached_property
    def quantizer_text(self) -> "TokenSet":
        """Text for quantizing: the calibration text, and what the model writes itself."""
        from cptquant.stages.own_text import enlarge_calibration

        return enlarge_calibration(self)

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
            DataError: unusable text. ModelError: the model or its tokenizer cannot be loaded. UserError: own
            text was asked for of a model that writes none.
        """
        self.settings.own_text_for(self.model.layout)
        _ = self.calibration, self.validation, self.test

    def _tokens(self, split: "Split", source: str | None, sequences: int) -> "TokenSet":
        from cptquant.models.text import load_tokens

        return load_tokens(
            self.model, source, split, sequences=sequences, length=self.settings.sequence_length,
            seed=self.settings.seed,
        )  # fmt: skip

    def stage(
        self,
        name: str,
        kind: type[A],
        inputs: dict[str, str],
        make: Callable[[], A],
        *,
        damage: Callable[[A], list[str]] | None = None,
        edited: bool = False,
    ) -> A:
        """The artifact of that name: as found if made from the same inputs, else made and saved.

        Args:
            damage: what is wrong with the content or with the files that the artifact describes; if anything, it is
                made anew, as it is where it cannot be read, and the progress says why.
            edited: a person may have written in it, so one that cannot be read is refused instead.
        """
        path = self.folder / name
        found = self._found(path, kind, keeps=edited) if path.exists() else None
        if found is not None:
            if found.inputs == inputs:
                wrong = [] if damage is None else damage(found)
                if not wrong:
                    return found
                for sentence in wrong:
                    self.progress(f"made anew: {sentence}", 1, 1)
        watch = Stopwatch()
        made = make()
        provenance = watch.provenance(seed=self.settings.seed, threads=_threads())
        made = made.model_copy(update={"inputs": inputs, "provenance": provenance})
        made.save(path)
        return made

    def _found(self, path: Path, kind: type[A], *, keeps: bool) -> A | None:
        """What stands there; of a damaged record None, but an error where a person may have edited it (`keeps`)."""
        try:
            return kind.load(path)
        except ArtifactError as error:
            if keeps:
                raise ArtifactError(f"{error}, after removing this one, which may hold what you wrote") from None
            self.progress(f"made anew: {error}", 1, 1)
            return None

    def load(self, name: str, kind: type[A]) -> A:
        """An artifact of an earlier stage.

        Raises:
            ArtifactError: missing or damaged; names the command that makes it.
        """
        return kind.load(self.folder / name)


def _replaced(changes: dict[str, object]) -> dict[str, object]:
    """A new limit takes the place of the other kind of limit that stood before."""
    return {old: None for new, old in (("budget", "memory"), ("memory", "budget")) if changes.get(new) is not None}


def _threads() -> int | None:
    torch = sys.modules.get("torch")  # stages that never touch a framework must not load it for this
    return None if torch is None else torch.get_num_threads()
