import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gguf_toys import Quantized, quantize_toy, save_toy

from cptquant.models.load import quiet_transformers


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantized]:
    """A small model of a family in mixed block formats, made once per session."""
    made: dict[str, Quantized] = {}

    def make(name: str) -> Quantized:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with quiet_transformers():
                made[name] = quantize_toy(save_toy(name, folder / "model"), folder / "work")
        return made[name]

    return make
