import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import MODELS, save_tokenizer

from cptquant.models.load import LoadedModel, load_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `oracles`, whatever way pytest is started


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """A small random model by name, in float16 unless told otherwise; made once per session."""
    made: dict[tuple[str, torch.dtype], LoadedModel] = {}

    def make(name: str, dtype: torch.dtype = torch.float16) -> LoadedModel:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            MODELS[name]().to(dtype).save_pretrained(folder)
            save_tokenizer(folder)
            made[name, dtype] = load_model(str(folder))
        return made[name, dtype]

    return make
