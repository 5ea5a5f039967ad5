"""How numbers are spelled for people: significant digits, errors, bytes, times. Nothing here computes a metric."""

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_FIXED_RANGE = (1e-3, 1e6)  # outside, powers of ten are easier to read than zeros
_DECIMAL = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_BINARY = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def spell_number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, powers of ten outside 0.001 to a million; whole numbers below a million in full."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < _FIXED_RANGE[1]:
        return _minus(f"{value:,.0f}")
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not _FIXED_RANGE[0] <= abs(value) < _FIXED_RANGE[1]:
        return f"{_minus(f'{value / 10**exponent:.{digits - 1}f}')}×{_power(exponent)}"
    return _minus(f"{value:,.{max(0, digits - 1 - exponent)}f}")


def spell_tick(value: float) -> str:
    """An axis label: two significant digits without trailing zeros, e.g. `0.01`, `0.3`, `3×10⁻⁴`, `10⁻⁵`."""
    text = spell_number(value, 2)
    digits, power = text.split("×", 1) if "×" in text else (text, "")
    if "." in digits:
        digits = digits.rstrip("0").removesuffix(".")
    if power:
        return power if digits == "1" else f"{digits}×{power}"
    return digits


def spell_measured(value: float, stderr: float | None) -> str:
    """`value ± stderr`, the error with two significant digits and the value with as many decimals.

    Without an error: three significant digits. Small or large values share one power of ten.
    """
    if stderr is None or not math.isfinite(stderr) or not math.isfinite(value):
        return spell_number(value)
    if stderr == 0:
        return f"{spell_number(value, 4)} ± 0"
    larger = max(abs(value), stderr)
    exponent = math.floor(math.log10(larger))
    if _FIXED_RANGE[0] <= larger < _FIXED_RANGE[1]:
        decimals = _decimals(stderr)
        return f"{_minus(f'{value:,.{decimals}f}')} ± {stderr:,.{decimals}f}"
    scale = 10.0**exponent
    decimals = _decimals(stderr / scale)
    return f"({_minus(f'{value / scale:.{decimals}f}')} ± {stderr / scale:.{decimals}f})×{_power(exponent)}"


def _decimals(stderr: float) -> int:
    exponent = math.floor(math.log10(float(f"{stderr:.1e}")))
    return min(max(0, 1 - exponent), 9)


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _minus(text: str) -> str:
    return text.replace("-", "−")


def spell_bytes(size_bytes: float) -> str:
    """Decimal and binary units together, e.g. `3.12 MB (2.98 MiB)`; plain bytes below 1,000."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} bytes"
    return f"{spell_decimal_bytes(size_bytes)} ({_scaled(size_bytes, _BINARY)})"


def spell_decimal_bytes(size_bytes: float) -> str:
    """Decimal units alone, e.g. `3.12 MB`: for axes and narrow columns."""
    return f"{size_bytes:.0f} bytes" if size_bytes < 1000 else _scaled(size_bytes, _DECIMAL)


def _scaled(size_bytes: float, units: tuple[tuple[str, int], ...]) -> str:
    for name, factor in units:
        # 999.6 MB must not be spelled "1,000 MB" in three digits: go up a unit where rounding would
        if size_bytes >= 0.9995 * factor:
            return f"{_three_digits(size_bytes / factor)} {name}"
    name, factor = units[-1]
    return f"{_three_digits(size_bytes / factor)} {name}"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"


def spell_exact_bytes(size_bytes: float) -> str:
    """Every digit, e.g. `3,120,456 bytes`."""
    return f"{size_bytes:,.0f} bytes"


def spell_count(count: int) -> str:
    """A number of weights: `124 M`, `2.65 M`, `1.20 B`; in full below 10,000."""
    for name, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= max(0.9995 * factor, 10_000):
            return f"{_three_digits(count / factor)} {name}"
    return f"{count:,}"


def spell_seconds(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 05 s`, `1 h 02 min`."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def spell_share(part: float, whole: float) -> str:
    """A share in percent; a dash if there is no whole."""
    if whole <= 0:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.1f} %" if percent < 99.95 else "100 %"


_UNIT_SPELLINGS = {
    "one_minus_cosine": "1 − cosine",
    "loss_nats_per_token": "nats/token",
    "loss_nats_per_example": "nats/example",
    "relative": "relative units",
    "kl_nats_per_token": "nats/token",
    "kl_nats_per_example": "nats/example",
    "nll_nats_per_token": "nats/token",
    "nll_nats_per_example": "nats/example",
    "nll_increase_nats_per_token": "nats/token",
    "nll_increase_nats_per_example": "nats/example",
}

_NAME_SPELLINGS = {
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "accuracy_mcnemar_p": "Accuracy, paired test (p)",
    "bits_per_byte": "Bits per byte",
    "bits_per_weight": "Bits per weight",
    "compression_vs_float16": "Compression vs FP16",
    "compression_vs_float32": "Compression vs FP32",
    "embedding_cosine": "Embedding cosine",
    "embedding_cosine_distance": "1 − embedding cosine",
    "embedding_cosine_min": "Embedding cosine, lowest",
    "embedding_cosine_percentile1": "Embedding cosine, 1st percentile",
    "kl_nats_per_token": "KL to original",
    "kl_nats_per_example": "KL to original",
    "nll_nats_per_token": "NLL",
    "nll_nats_per_example": "NLL",
    "nll_increase_nats_per_token": "NLL increase",
    "nll_increase_nats_per_example": "NLL increase",
    "parameters": "Parameters",
    "top1_agreement": "Top-1 agreement",
    "weight_bytes": "Weights on disk",
}

METHOD_NAMES = {
    "cmpq": "CMPQ",
    "pmpq": "PMPQ",
    "tdmpq": "TDMPQ",
    "path": "Path integral",
    "sketch": "KL sketch",
    "ablation": "Ablation (oracle)",
}
"""Sensitivity methods for people; the first three as the paper writes them."""

TASK_NAMES = {
    "causal_lm": "causal language model",
    "masked_lm": "masked language model",
    "sequence_classification": "sequence classifier",
    "encoder": "bare encoder",
}
"""Tasks of a layout for people."""


def spell_name(name: str) -> str:
    """A measurement's name for people; unknown names with their underscores as spaces."""
    return _NAME_SPELLINGS.get(name, name.replace("_", " "))


def spell_unit(unit: str) -> str:
    """A unit for people: `kl_nats_per_token` is in nats/token; products are spelled factor by factor."""
    if "_times_" in unit:
        return " × ".join(spell_unit(factor) for factor in unit.split("_times_"))
    return _UNIT_SPELLINGS.get(unit, unit.replace("_", " "))


def spell_measurement(name: str, value: float, stderr: float | None, *, brief: bool = False) -> str:
    """The value of a measurement of that name: sizes in humanised bytes, counts in full, the rest with its error.

    `brief` leaves out binary units: in a terminal columns are narrow.
    """
    if name == "weight_bytes":
        return spell_decimal_bytes(value) if brief else spell_bytes(value)
    if name == "bits_per_weight":
        return f"{value:.3f}"
    if name == "parameters":
        return f"{value:,.0f}"
    if name.startswith("compression_"):
        return f"{spell_number(value)}×"
    return spell_measured(value, stderr)
