"""What llama.cpp's own quantization starts from: a model as GGUF in 16 bits, and its importance matrix."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from cptquant.allocation.allocate import allocate
from cptquant.allocation.methods import find_allocator
from cptquant.core.budget import Budget
from cptquant.core.formats import QuantFormat
from cptquant.core.targets import find_target
from cptquant.exporters.gguf.read_back import GgufWeights
from cptquant.exporters.gguf.tensors import list_tensors
from cptquant.exporters.gguf.write import write_file
from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, site_modules
from cptquant.models.text import TokenSet
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.hessian import collect_block_hessians

GGUF = find_target("gguf")
FORMATS = tuple(QuantFormat.parse(name) for name in GGUF.default_formats)


def write_source(model: LoadedModel, path: Path) -> None:
    """The original in 16 bits as GGUF."""
    layout = model.layout
    kept = {site.name: layout.keep_format.name for site in layout.sites}
    size_bytes = GGUF.plan_bytes(layout, {})
    made = allocate(layout, None, Budget(size_bytes, "bytes"), GGUF, find_allocator("uniform"), formats=FORMATS)
    plan = made.model_copy(update={"formats": kept, "size_bytes": size_bytes})
    write_file(path, model, list_tensors(model, plan, ShardFolder(path.with_name("none"), {}, {})))


def write_importance(model: LoadedModel, tokens: TokenSet, source: Path, path: Path) -> None:
    """Mean squared inputs of every matrix in the blocks, by the file's tensor names, as `llama-imatrix` collects them.

    Into an .npz file. None for the token embedding, as there.
    """
    found: dict[str, np.ndarray] = {}
    names = GgufWeights(source, model)
    stream = ModelStream(model, tokens)
    for index in range(model.layout.block_count):
        block = stream.load_block()
        hessians = collect_block_hessians(stream, block, site_modules(block, model.layout, index))
        for site in model.layout.block_sites:
            if site.block_index == index:
                tensor = names.tensor_of(site)
                assert tensor is not None
                found[tensor] = hessians.hessian(site.name).diagonal().numpy()
        stream.advance(block)
    np.savez(path, **found)  # pyright: ignore[reportArgumentType]


def quantize_preset(python: Path | str, preset: str, source: Path, importance: Path, output: Path) -> None:
    """llama.cpp's own file.

    Raises:
        subprocess.CalledProcessError: llama.cpp failed.
    """
    request: dict[str, Any] = {
        "source": str(source), "output": str(output), "preset": preset, "importance": str(importance),
    }  # fmt: skip
    script = Path(__file__).with_name("llamacpp_quantize.py")
    subprocess.run(
        [str(python), str(script)], input=json.dumps(request), text=True, check=True, stderr=subprocess.DEVNULL
    )
