"""What a tool wrote, as float32 weights by the original's parameter names, and the bits its quantized matrices take.

Three forms are read: compressed-tensors and GPTQ folders and ours for torch (decoded by `ruler.py`), and
`dense.safetensors` from tools without a folder of either kind: float32 weights with, in the file's metadata, the bits
that each matrix takes in the tool's own storage.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from ruler import decode_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

DENSE = "dense.safetensors"


@dataclass(frozen=True)
class Written:
    """A quantized model.

    Attributes:
        weights: quantized matrices, and all other floats that the tool wrote (AWQ changes norms).
        bits: codes, scales and zero points of the quantized matrices; of symmetric groups no zero points.
        quantized_weights: how many weights those matrices have.
    """

    weights: dict[str, Tensor]
    bits: int
    quantized_weights: int

    @property
    def bits_per_weight(self) -> float:
        """Scales counted."""
        return self.bits / self.quantized_weights


def read_written(output: Path, parameters: set[str]) -> Written:
    """Read a tool's output folder, or the one folder inside it that holds a checkpoint.

    Args:
        parameters: names of the original's parameters; anything else in the files is left out.

    Raises:
        FileNotFoundError: no weights. ValueError, KeyError: weights in another form.
    """
    if (output / DENSE).exists():
        return _read_dense(output / DENSE)
    folder = find_checkpoint(output)
    quantized = decode_checkpoint(folder)
    others: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        others |= {name: tensor.float() for name, tensor in load_file(path).items() if name in parameters}
    weights = sum(weight.numel() for weight in quantized.values())
    return Written(others | quantized, count_bits(folder), weights)


def find_checkpoint(output: Path) -> Path:
    """The folder with weights: a run of cptquant keeps it as `checkpoint`, AutoRound under a name of its own.

    Raises:
        FileNotFoundError: none, or several.
    """
    if (output / "checkpoint").is_dir():
        return output / "checkpoint"
    folders = sorted({path.parent for path in output.rglob("*.safetensors")})
    if len(folders) != 1:
        raise FileNotFoundError(f"{output} holds {len(folders)} folders with weights instead of one")
    return folders[0]


def _read_dense(path: Path) -> Written:
    with safe_open(path, "pt") as file:
        bits: dict[str, int] = json.loads(file.metadata()["bits"])
    weights = load_file(path)
    return Written(weights, sum(bits.values()), sum(weights[name].numel() for name in bits))


def count_bits(folder: Path) -> int:
    """Bits of packed codes, scales, and zero points where groups have them.

    GPTQ's format stores zero points of symmetric groups too; they say nothing and are not counted. An order of columns
    counts as it is stored, unless it only says that groups follow each other.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    endings = [".qweight", ".weight_packed", ".scales", ".weight_scale", ".weight_zero_point"]
    endings += [".weight_low_rank_left", ".weight_low_rank_right", ".weight_low_rank_scale"]
    if not config.get("sym", True):
        endings.append(".qzeros")
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                ordered = name.endswith((".g_idx", ".weight_g_idx"))
                if not ordered and not name.endswith(tuple(endings)):
                    continue
                tensor = file.get_tensor(name)
                if not ordered or _reorders(tensor):
                    total += 8 * tensor.numel() * tensor.element_size()
    return total


def _reorders(groups: Tensor) -> bool:
    return bool((torch.diff(groups.long()) < 0).any())
