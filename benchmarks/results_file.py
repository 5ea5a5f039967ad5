"""Where benchmarks leave their figures: benchmarks/results/<name>.json, written whole."""

import json
from pathlib import Path
from typing import Any

from cptquant.core.artifact import write_whole

FOLDER = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
"""Reference models and texts, beside the repository."""


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Write one benchmark's figures."""
    path = FOLDER / f"{name}.json"
    FOLDER.mkdir(exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def model_folder(name: str) -> Path:
    """Folder of `embedded:NAME`, of a model in shared/models, or the folder itself."""
    from cptquant.models.embedded import PREFIX, embedded_model_path

    if name.startswith(PREFIX):
        return embedded_model_path(name)
    return SHARED / "models" / name if (SHARED / "models" / name).is_dir() else Path(name)
