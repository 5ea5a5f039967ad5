"""Write quantized weights for a target's engine: one function per target, found by `--target`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cptquant.core.errors import UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.plan import Plan
from cptquant.models.load import LoadedModel
from cptquant.models.stream import QuantizedSource


@dataclass(frozen=True)
class WrittenFiles:
    """What an exporter wrote.

    Attributes:
        folder: holds everything. entry: the file (or the folder) an engine is given.
        tensor_bytes: of all tensors. file_bytes: of the files that hold them.
        context: longest sequence the files are for; None where they set no limit.
        checks: how the engine computes ("float activations", ...) -> entry to check with; temporary ones included.
        read_back: (site, dequantized float32 matrix) of every quantized site, from the files.
    """

    folder: Path
    entry: Path
    tensor_bytes: int
    file_bytes: int
    context: int | None
    checks: Mapping[str, Path]
    read_back: Callable[[], Iterator[tuple[str, Tensor]]]
    temporary: tuple[Path, ...] = field(default=())


@dataclass(frozen=True)
class ExportRequest:
    """What there is to write: the original, the plan, the quantized weights, where to, and how long sequences get."""

    model: LoadedModel
    plan: Plan
    source: QuantizedSource
    folder: Path
    context: int | None = None

    @property
    def formats(self) -> dict[str, QuantFormat]:
        """Site -> format."""
        return self.plan.quant_formats


FLOAT, INT8 = "float activations", "int8 activations"


def _write_onnx(request: ExportRequest) -> WrittenFiles:
    from cptquant.exporters.onnx.export import export_onnx, write_float_twin
    from cptquant.exporters.onnx.read_back import read_sites

    written = export_onnx(
        request.model, request.formats, request.source, request.folder, context=request.context
    )
    twin = write_float_twin(written.model_file)
    return WrittenFiles(
        folder=request.folder,
        entry=written.model_file,
        tensor_bytes=written.tensor_bytes,
        file_bytes=written.file_bytes,
        context=written.context,
        checks={FLOAT: twin, INT8: written.model_file},
        read_back=lambda: read_sites(written.model_file, request.model.layout, request.formats),
        temporary=(twin,),
    )


EXPORTERS: dict[str, Callable[[ExportRequest], WrittenFiles]] = {"onnx": _write_onnx}
"""Target -> what writes its files. Targets not named here are compressed-tensors checkpoints (`stages.quantize`)."""


def find_exporter(target: str) -> Callable[[ExportRequest], WrittenFiles]:
    """The exporter of a target.

    Raises:
        UserError: the target's files are the checkpoint itself, or an extra package is missing.
    """
    if target not in EXPORTERS:
        raise UserError(f"--target {target} has no exporter; exporters exist for: {', '.join(EXPORTERS)}")
    require_packages(target)
    return EXPORTERS[target]


_PACKAGES: dict[str, tuple[str, ...]] = {"onnx": ("onnx",), "gguf": ("gguf",)}


def require_packages(target: str) -> None:
    """Refuse, before anything is computed, a target whose files cannot be written here.

    Raises:
        UserError: naming the extra to install.
    """
    from importlib.util import find_spec

    missing = [name for name in _PACKAGES.get(target, ()) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--target {target} needs the package {missing[0]}, which is not installed: pip install cptquant[{target}]"
        )

