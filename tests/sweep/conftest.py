"""A tiny sweep on the project's own text: two sizes, three shares, one domain, and its texts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cptquant.core.sweep_file import read_plan
from cptquant.stages.sweep import open_sweep, sweep_stage
from cptquant.stages.task_pool import Workers, import_ray

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """general: the documentation; domain: Python of the package."""
    folder = tmp_path_factory.mktemp("texts")
    pages = sorted((REPOSITORY / "docs").glob("*.md"))
    code = sorted((REPOSITORY / "src/cptquant/laws").glob("*.py"))
    for name, files in (("general", pages), ("code", code)):
        half = len(files) // 2
        (folder / f"{name}.txt").write_text("\n\n".join(file.read_text() for file in files[:half]))
        (folder / f"{name}-valid.txt").write_text("\n\n".join(file.read_text() for file in files[half:]))
    return folder


@pytest.fixture(scope="session")
def write_plan(texts: Path) -> Callable[..., Path]:
    """A plan in a folder, with some keys changed."""

    def write(folder: Path, **changes: Any) -> Path:
        plan = {
            "family": "embedded:opt-mini",
            "sizes": [{"hidden": 32, "layers": 1}, {"hidden": 64, "layers": 1}],
            "pretrain": {"tokens": "12k"},
            "general": {"train": str(texts / "general.txt"), "valid": str(texts / "general-valid.txt")},
            "domains": {"code": {"train": str(texts / "code.txt"), "valid": str(texts / "code-valid.txt")}},
            "ratios": [0, 0.5, 1],
            "tokens": "12k",
            "window": 32,
            "batch": 16,
            "warm_up": 2,
            "evaluations": {"count": 2, "first": "10k", "windows": 12},
            **changes,
        }
        path = folder / "plan.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in plan.items() if value is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def finished(write_plan: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, carried out in this process; nobody changes it."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = read_plan(write_plan(folder, quantize=[3, 4]))
    output = folder / "out"
    sweep_stage(open_sweep(plan, output), output, Workers())
    return output


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Any]:
    """One local Ray with one worker for all tests that need it."""
    workers = Workers(count=1)
    ray = import_ray(workers)
    from cptquant.stages.task_pool import start_ray

    start_ray(ray, workers)
    yield ray
    ray.shutdown()
