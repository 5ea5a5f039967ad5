"""Ways to hold a weight matrix beyond plain integer formats, in memory only: what each leaves of it, and its bits.

Each is a value with `bits(rows, columns)`, stored bits of the whole matrix with everything it needs, and
`quantize(weight, hessian, gptq, dtype)`, what is left of the weight when it is read back, (out, in) float32. All end in
the package's GPTQ with its descent; what is kept beside the codes is fitted by least squares under the same damped
Hessian. Bits are counted in each option's favour (no padding of rows, positions of single weights at their entropy), so
that one which loses here loses as a storage format as well.

    LowRank    W ~ Q + A B: SLiM (2410.09615) with the whole Hessian as the metric, not its diagonal
    Columns    some input columns in 16 or 8 bits (PB-LLM's split, 2310.00034, by columns)
    Entries    single weights in 16 or 8 bits (AdpQ's threshold, 2405.13358, is "magnitude"; PB-LLM's is "salience")
    Rotated    W R quantized under R' H R, R orthogonal (QuaRot, 2404.00456); no bytes where R folds into a neighbour
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from scipy.linalg import hadamard
from torch import Tensor

from cptquant.core.formats import QuantFormat
from cptquant.quantizers.gptq import Gptq

Kept = Literal[8, 16]
"""Bits of what is kept beside the codes."""


class Option(Protocol):
    """One way to hold a matrix."""

    @property
    def name(self) -> str:
        """Unique among options."""
        ...

    @property
    def base(self) -> QuantFormat:
        """Format of the codes."""
        ...

    def bits(self, rows: int, columns: int) -> float:
        """Stored bits of the whole matrix."""
        ...

    def quantize(self, weight: Tensor, hessian: Tensor, gptq: Gptq, dtype: torch.dtype) -> Tensor:
        """(out, in) float32 as read back."""
        ...


def damped(hessian: Tensor, gptq: Gptq) -> Tensor:
    """The Hessian as GPTQ sees it."""
    diagonal = hessian.diagonal()
    mean = float(diagonal[diagonal > 0].mean())
    result = hessian.clone()
    result.diagonal().add_(gptq.damping * mean)
    result.diagonal()[diagonal <= 0] = mean
    return result


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E')."""
    return float(torch.sum((error @ hessian) * error, dtype=torch.float64))


def round_kept(
    values: Tensor,  # any shape; with 8 bits one scale for each entry of the leading dimension
    kept: Kept,
    dtype: torch.dtype,
) -> Tensor:
    """What is kept, as stored."""
    if kept == 16:
        return values.to(dtype).float()
    flat = values.reshape(values.shape[0], -1)
    scale = (flat.abs().amax(dim=1, keepdim=True) / 127).clamp_(min=1e-12).to(dtype).float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((flat / scale).round_().clamp_(-127, 127) * scale).view_as(values)


def _codes(weight: Tensor, hessian: Tensor, base: QuantFormat, gptq: Gptq, dtype: torch.dtype) -> Tensor:
    return gptq(weight, hessian, base, dtype).weight.dequantize()


@dataclass(frozen=True)
class Plain:
    """A format of the package."""

    base: QuantFormat

    @property
    def name(self) -> str:
        return self.base.name

    def bits(self, rows: int, columns: int) -> float:
        return 8.0 * self.base.stored_bytes(rows, columns)

    def quantize(self, weight: Tensor, hessian: Tensor, gptq: Gptq, dtype: torch.dtype) -> Tensor:
        return _codes(weight, hessian, self.base, gptq, dtype)


@dataclass(frozen=True)
class LowRank:
    """Codes plus a product of two thin factors; 8 bits: one 16-bit scale for each of their 2 x rank vectors.

    The best of four, by calibration error: factors of GPTQ's error, or of the weight itself first; each with GPTQ run
    again on what the factors leave and the factors fitted again to that.
    """

    base: QuantFormat
    rank: int
    kept: Kept

    @property
    def name(self) -> str:
        return f"{self.base.name} + rank {self.rank} in {self.kept} bits"

    def bits(self, rows: int, columns: int) -> float:
        scales = 2 * self.rank * 16 if self.kept == 8 else 0
        return 8.0 * self.base.stored_bytes(rows, columns) + self.kept * self.rank * (rows + columns) + scales

    def quantize(self, weight: Tensor, hessian: Tensor, gptq: Gptq, dtype: torch.dtype) -> Tensor:
        metric = damped(hessian, gptq)
        root = torch.linalg.cholesky(metric)
        best, least = weight, math.inf
        for start in (_codes(weight, hessian, self.base, gptq, dtype), torch.zeros_like(weight)):
            factors = self.fit(weight - start, root, dtype)
            codes = _codes(weight - factors, hessian, self.base, gptq, dtype)
            again = self.fit(weight - codes, root, dtype)
            candidates = [codes + factors, codes + again]
            if bool(start.any()):
                candidates.append(start + factors)
            for candidate in candidates:
                error = output_error(candidate - weight, metric)
                if error < least:
                    best, least = candidate, error
        return best

    def fit(self, error: Tensor, root: Tensor, dtype: torch.dtype) -> Tensor:
        """A B that leaves least of tr((E - A B) H (E - A B)'), H = root root', before its factors are rounded."""
        left, values, right = torch.linalg.svd(error @ root, full_matrices=False)
        half = values[: self.rank].sqrt()
        outer = left[:, : self.rank] * half
        inner = torch.linalg.solve_triangular(root, half[:, None] * right[: self.rank], upper=False, left=False)
        return round_kept(outer.t(), self.kept, dtype).t() @ round_kept(inner, self.kept, dtype)


@dataclass(frozen=True)
class Columns:
    """The most salient input columns apart, the others in groups of their own.

    The kept ones make up for the others' errors: given those, their best values are W_K + (W_R - Q_R) H_RK / H_KK, so
    the others are quantized under the Schur complement H_RR - H_RK H_KK^-1 H_KR, which is exact but for the rounding
    of what is kept. Salience: sum over rows of w^2 / [H^-1]_jj.
    """

    base: QuantFormat
    share: float
    kept: Kept

    @property
    def name(self) -> str:
        return f"{self.base.name} + {100 * self.share:g} % of columns in {self.kept} bits"

    def count(self, columns: int) -> int:
        """Columns kept, at least one."""
        return max(1, round(self.share * columns))

    def bits(self, rows: int, columns: int) -> float:
        count = self.count(columns)
        rest = columns - count
        codes = rows * rest * self.base.code_bits + 16 * self.base.scale_count(rows, rest)
        scales = 16 * count if self.kept == 8 else 0
        return float(codes + rows * count * self.kept + scales + 16 * count + 128)

    def quantize(self, weight: Tensor, hessian: Tensor, gptq: Gptq, dtype: torch.dtype) -> Tensor:
        metric = damped(hessian, gptq)
        salience = weight.square().sum(dim=0) / torch.linalg.inv(metric).diagonal()
        order = torch.argsort(salience, descending=True, stable=True)
        count = self.count(weight.shape[1])
        apart, others = order[:count].sort().values, order[count:].sort().values
        # (H_RK H_KK^-1)', (kept, others)
        carried = torch.linalg.solve(metric[apart][:, apart], metric[apart][:, others])
        schur = metric[others][:, others] - metric[others][:, apart] @ carried
        result = torch.empty_like(weight)
        undamped = replace(gptq, damping=0.0)  # damped above already
        result[:, others] = _codes(weight[:, others], (schur + schur.t()) / 2, self.base, undamped, dtype)
        values = weight[:, apart] + (weight[:, others] - result[:, others]) @ carried.t()
        result[:, apart] = round_kept(values.t(), self.kept, dtype).t()
        return result


@dataclass(frozen=True)
class Entries:
    """Single weights apart, added to the codes; positions at the entropy of a random choice.

    Codes are fitted to the weight without them, the entries by least squares to what the codes leave, twice; the best
    by calibration error. `by`: largest |w| (AdpQ); "group", largest |w| relative to the root mean square of its group,
    which is what stretches the group's scale; "salience", largest w^2 / [H^-1]_jj^2 (PB-LLM); "correction", the entries
    whose change alone lowers the error of plain GPTQ most.
    """

    base: QuantFormat
    share: float
    kept: Kept
    by: Literal["magnitude", "group", "salience", "correction"]

    @property
    def name(self) -> str:
        return f"{self.base.name} + {100 * self.share:g} % of weights in {self.kept} bits by {self.by}"

    def bits(self, rows: int, columns: int) -> float:
        p = round(self.share * rows * columns) / (rows * columns)
        entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
        scale = 16 if self.kept == 8 else 0
        return 8.0 * self.base.stored_bytes(rows, columns) + rows * columns * (entropy + p * self.kept) + scale

    def quantize(self, weight: Tensor, hessian: Tensor, gptq: Gptq, dtype: torch.dtype) -> Tensor:
        metric = damped(hessian, gptq)
        mask = self.choose(weight, hessian, metric, gptq, dtype)
        entries = weight * mask
        best, least = weight, math.inf
        for _ in range(2):
            codes = _codes(weight - entries, hessian, self.base, gptq, dtype)
            fitted = fit_entries(weight - codes, mask, metric)
            entries = round_kept(fitted[None], self.kept, dtype)[0]  # one scale for all
            error = output_error(codes + entries - weight, metric)
            if error < least:
                best, least = codes + entries, error
        return best

    def choose(self, weight: Tensor, hessian: Tensor, metric: Tensor, gptq: Gptq, dtype: torch.dtype) -> Tensor:
        """Which weights, bool (out, in)."""
        if self.by == "magnitude":
            score = weight.abs()
        elif self.by == "group":
            score = weight.abs() / group_rms(weight, self.base)
        elif self.by == "salience":
            score = weight.abs() / torch.linalg.inv(metric).diagonal()
        else:
            left = weight - _codes(weight, hessian, self.base, gptq, dtype)
            score = (left @ metric).square() / metric.diagonal()
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        chosen[score.flatten().topk(round(self.share * weight.numel())).indices] = True
        return chosen.view_as(weight)


def group_rms(weight: Tensor, base: QuantFormat) -> Tensor:
    """Root mean square of each weight's group, shape of the weight."""
    width = base.granularity if isinstance(base.granularity, int) else weight.shape[1]
    parts = [part.square().mean(dim=1, keepdim=True).sqrt().expand_as(part) for part in weight.split(width, dim=1)]
    return torch.cat(parts, dim=1).clamp(min=1e-12)


def fit_entries(
    error: Tensor,  # (out, in): what is to be made up for
    mask: Tensor,  # bool (out, in)
    metric: Tensor,  # (in, in), positive definite
) -> Tensor:
    """Entries on the mask that leave least of tr((E - O) H (E - O)'), row by row: H_SS o = (E H)_S."""
    result = torch.zeros_like(error)
    target = error @ metric
    most = int(mask.sum(dim=1).max())
    places = torch.argsort(mask.int(), dim=1, descending=True, stable=True)[:, :most]  # first the row's own
    real = torch.gather(mask, 1, places)
    system = metric[places[:, :, None], places[:, None, :]] * (real[:, :, None] & real[:, None, :])
    system.diagonal(dim1=1, dim2=2).add_((~real).float())
    right = torch.gather(target, 1, places) * real
    return result.scatter_(1, places, torch.linalg.solve(system, right[:, :, None])[:, :, 0] * real)


def rotation(size: int, block: int, seed: int) -> Tensor:
    """Block-diagonal Hadamard matrix with random signs: orthogonal, (size, size) float32; x' = R' x.

    Raises:
        ValueError: the block is no power of two or does not divide the size.
    """
    if size % block or block & (block - 1):
        raise ValueError(f"a block of {block} must be a power of two that divides {size}")
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
    square = torch.from_numpy(hadamard(block)).float() / math.sqrt(block)
    return signs[:, None] * torch.block_diag(*[square] * (size // block))


def largest_block(size: int) -> int:
    """Largest power of two that divides a size."""
    return size & -size


@dataclass(frozen=True)
class Rotated:
    """Quantized after a rotation of the inputs (`columns`), of the outputs (`rows`), or of both; then turned back.

    Block 0 is the largest power of two that divides the width. `same`: signs repeat from block to block, as a rotation
    of the heads of v folded into o needs where heads share a key and value head.
    """

    base: QuantFormat
    side: Literal["columns", "rows", "both"]
    block: int = 0
    seed: int = 0
    same: bool = False

    @property
    def name(self) -> str:
        return f"{self.base.name}, {self.side} rotated by {self.block or 'the whole'}"

    def bits(self, rows: int, columns: int) -> float:
        return 8.0 * self.base.stored_bytes(rows, columns)

    def matrix(self, size: int) -> Tensor:
        """The rotation of one side, (size, size)."""
        block = self.block or largest_block(size)
        if self.same:
            return torch.block_diag(*[rotation(block, block, self.seed)] * (size // block))
        return rotation(size, block, self.seed)

    def quantize(self, weight: Tensor, hessian: Tensor, gptq: Gptq, dtype: torch.dtype) -> Tensor:
        turned = weight
        if self.side != "columns":
            outputs = self.matrix(weight.shape[0])
            turned = outputs.t() @ turned
        if self.side != "rows":
            inputs = self.matrix(weight.shape[1])
            turned, hessian = turned @ inputs, inputs.t() @ hessian @ inputs
            hessian = (hessian + hessian.t()) / 2
        result = _codes(turned, hessian, self.base, gptq, dtype)
        if self.side != "rows":
            result = result @ inputs.t()
        return outputs @ result if self.side != "columns" else result
