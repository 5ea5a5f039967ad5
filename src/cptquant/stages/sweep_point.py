"""One more run beside those of a finished sweep: the same training up to one anneal, at a share and tokens chosen."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from cptquant.adaptation.ladder import is_whole
from cptquant.adaptation.mixture import Mixture
from cptquant.adaptation.token_files import TokenSource, is_source_of, open_source, save_source
from cptquant.core.artifact import digest_json
from cptquant.core.errors import ArtifactError
from cptquant.core.sweep import GENERAL
from cptquant.core.sweep_record import PointRecord, SweepRecord
from cptquant.stages.sweep_setup import fixed_points
from cptquant.stages.sweep_task import SweepTask, TrainingSpec, carry_out, is_done, point_path

ADAPTED = "adapted"
_SHARE_ROUNDING = 1e-9


@dataclass(frozen=True)
class SweepFolder:
    """A sweep on disk.

    Attributes:
        notes: what a person should know of it; grows as it is looked at.
    """

    folder: Path
    record: SweepRecord
    notes: list[str] = field(default_factory=list[str])

    def base(self, size: str) -> Path:
        """Base model of a size, of the first seed."""
        found = Path(self.record.bases[f"{size}-s{self.record.plan.seeds[0]}"])
        return found if found.is_absolute() else self.folder / found

    def runs_csv(self, domain: str) -> Path:
        """Rows of one domain."""
        return self.folder / ("runs.csv" if len(self.record.plan.domains) == 1 else f"runs-{domain}.csv")

    def held(self, corpus: str) -> Path:
        """Held-out windows of a corpus, as the sweep's tasks read them (the latest, where the plan was changed)."""
        return self._text(f"{corpus}-held-*.npz", f"held-out windows of {corpus}")

    def source(self, corpus: str) -> TokenSource:
        """A corpus in tokens, as the sweep's tasks read it."""
        found = [path for path in self._texts(f"{corpus}-*") if is_source_of(corpus, path)]
        if not found:
            raise self._lacks(f"tokens of {corpus}")
        return open_source(corpus, found[-1])

    def _text(self, pattern: str, what: str) -> Path:
        found = self._texts(pattern)
        if not found:
            raise self._lacks(what)
        return found[-1]

    def _texts(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "work/text").glob(pattern), key=lambda path: path.stat().st_mtime)

    def _lacks(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.folder / 'work/text'} holds no {what}; run the sweep again")


@dataclass(frozen=True)
class RunChoice:
    """Which run.

    Attributes:
        tokens: D, rounded to whole steps. sources: texts of the run, None for the sweep's own.
        keep: whether the annealed model is written too, to `ADAPTED` in the run's folder.
    """

    size: str
    domain: str
    ratio: float
    tokens: float
    seed: int = 0
    keep: bool = False
    sources: tuple[TokenSource, ...] | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Corpus -> share of the tokens, those without any left out."""
        shares = {GENERAL: 1 - self.ratio, self.domain: self.ratio}
        return {name: share for name, share in shares.items() if share > _SHARE_ROUNDING}


def choice_mixture(sweep: SweepFolder, choice: RunChoice) -> Mixture:
    """The windows a run reads, without a limit on epochs (see `Mixture.counts`)."""
    given = {source.name: source for source in choice.sources or ()}
    plan = sweep.record.plan
    points = fixed_points(plan, round(choice.tokens))
    return Mixture(
        [given.get(name) or sweep.source(name) for name in choice.shares], list(choice.shares.values()),
        window_tokens=plan.window, total_tokens=points[-1].tokens, seed=choice.seed, max_epochs=1e9,
    )  # fmt: skip


def train_point(sweep: SweepFolder, choice: RunChoice, parent: Path, label: str) -> tuple[PointRecord, Path]:
    """Train and judge a run as the sweep does its own; a killed one goes on, a finished one is not made again.

    Returns:
        What was found, and the run's folder in `parent`, named after the label and everything the run depends on.
    """
    plan, mixture = sweep.record.plan, choice_mixture(sweep, choice)
    points = fixed_points(plan, round(choice.tokens))
    training = TrainingSpec(
        sources={}, shares=choice.shares, window=plan.window, batch=plan.batch, tokens=points[-1].tokens,
        max_epochs=1e9, points=points, peak_rate=plan.learning_rate, warm_up=plan.warm_up,
        weight_decay=plan.weight_decay, seed=choice.seed,
    )  # fmt: skip
    held = {name: sweep.held(name) for name in (GENERAL, choice.domain)}
    parts = [mixture.digest, sweep.base(choice.size).name, training.model_dump(mode="json")]
    folder = parent / f"{label}-{digest_json([*parts, *(path.name for path in held.values())])[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {source.name: source.folder or folder / source.name for source in mixture.sources}
    task = SweepTask(
        kind="run", id=label, folder=str(folder), model=str(sweep.base(choice.size)), model_key="",
        judged={name: str(path) for name, path in held.items()},
        training=training.model_copy(update={"sources": {name: str(path) for name, path in files.items()}}),
        keep=str(folder / ADAPTED) if choice.keep else "", threads=plan.threads, gpus=plan.gpus,
    )  # fmt: skip
    if not is_done(task) or (choice.keep and not is_whole(folder / ADAPTED)):
        point_path(folder, 0).unlink(missing_ok=True)
        own = [source for source in mixture.sources if source.folder is None]
        for source in own:
            save_source(source, files[source.name])
        carry_out(task)
        for source in own:
            shutil.rmtree(files[source.name])
    return PointRecord.load(point_path(folder, 0)), folder
