"""The two ways into `bench`: a run folder, or a shape with random weights."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cptquant.core.artifact import output_error, write_whole
from cptquant.core.bench import BenchRecord
from cptquant.core.layout import ModelLayout
from cptquant.core.progress import Progress
from cptquant.core.provenance import Stopwatch
from cptquant.core.settings import RunSettings
from cptquant.models.source import find_model
from cptquant.reports.bench_table import bench_page
from cptquant.stages.bench import (
    ENGINE_TARGETS,
    BenchMethod,
    Contender,
    baselines,
    bench_stage,
    check_engines,
    engine_contender,
    run_contenders,
)
from cptquant.stages.synthetic import load_synthetic, make_model, write_for_target
from cptquant.stages.written import check_run


@dataclass(frozen=True)
class SyntheticPlan:
    """Budget and candidate formats of a random mixed plan; no formats means each target's own."""

    budget: str = "4.2bpw"
    formats: tuple[str, ...] = ()


def bench_folder(folder: Path, engines: Sequence[str], *, how: BenchMethod, progress: Progress) -> BenchRecord:
    """Measure a run's files in the engines named, beside the original in transformers.

    Raises:
        ArtifactError: no run, or files of an engine that were not written. UserError: an unknown engine.
    """
    watch = Stopwatch()
    check_engines(engines)
    check_run(folder)
    settings = RunSettings.load(folder / "settings.json")
    layout = ModelLayout.load(folder / "layout.json")
    original = find_model(settings.model, trust_remote_code=settings.trust_remote_code).path
    contenders = run_contenders(folder, layout, original, engines)
    record = bench_stage(layout.source, layout, contenders, how, progress)
    return _save(record, folder, watch, how.threads)


def bench_synthetic(
    shape: str,
    output: Path,
    engines: Sequence[str],
    *,
    how: BenchMethod,
    progress: Progress,
    plan: SyntheticPlan = SyntheticPlan(),
) -> BenchRecord:
    """Measure engines on a shape with random weights, rounded to a random mixed plan of the budget.

    Args:
        plan: budget and formats of the rounding.

    Raises:
        UserError: an unknown shape or engine, or a budget that cannot be met.
    """
    check_engines(engines)
    watch = Stopwatch()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(output, error) from None
    with tempfile.TemporaryDirectory() as work:
        original = make_model(shape, Path(work) / "original")
        model = load_synthetic(original)
        contenders: list[Contender] = []
        for engine in engines:
            if engine == "transformers":
                contenders += baselines(model.layout, original)
                continue
            target = ENGINE_TARGETS[engine]
            file, written = write_for_target(model, target, plan.budget, Path(work) / engine, plan.formats)
            size = sum(path.stat().st_size for path in file.parent.glob("model*"))
            contenders.append(engine_contender(engine, model.layout, file, written.quant_formats, size))
            progress(f"write {engine}", 1, 1)
        layout = model.layout
        del model
        name = f"{shape} (random weights, {plan.budget})"
        record = bench_stage(name, layout, contenders, how, progress)
    return _save(record, output, watch, how.threads)


def _save(record: BenchRecord, folder: Path, watch: Stopwatch, threads: int) -> BenchRecord:
    record = record.model_copy(update={"provenance": watch.provenance(threads=threads)})
    record.save(folder / "bench.json")
    write_whole(folder / "bench.html", bench_page(record).encode())
    return record
