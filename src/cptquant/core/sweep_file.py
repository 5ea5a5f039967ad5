"""plan.yaml -> SweepPlan. Whatever is wrong is told by its place in the file: `ratios[2] is 1.4, expected 0 to 1`."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cptquant.core.errors import UserError
from cptquant.core.sweep import (
    EMBEDDED,
    GENERAL,
    LEAST_TOKENS,
    CorpusSpec,
    EvaluationSpec,
    PretrainSpec,
    SizeSpec,
    SweepPlan,
    evaluation_points,
    parse_tokens,
)
from cptquant.core.yaml_node import NAME, YamlNode

_KEYS = tuple(SweepPlan.model_fields)
_REQUIRED = ("family", "sizes", "general", "domains", "ratios", "tokens")
_LARGEST = 10**9


def read_plan(path: Path) -> SweepPlan:
    """Read and check a plan; paths in it are taken from the folder it lies in.

    Raises:
        UserError: PyYAML is not installed, the file is missing or no YAML, or a key or value is wrong: with its place.
    """
    try:
        import yaml
    except ImportError:
        raise UserError(
            f'{path} needs PyYAML to be read; install it with: pip install "cptquant[sweep]" (or pyyaml alone)'
        ) from None
    try:
        raw: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a plan as docs/sweep.md describes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a plan in UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    return parse_plan(raw, path)


def parse_plan(raw: object, path: Path) -> SweepPlan:
    """The same from what a YAML reader gave.

    Raises:
        UserError: see `read_plan`.
    """
    top = YamlNode(raw, "", path)
    found = top.mapping(_KEYS, required=_REQUIRED)
    sizes = _sizes(found["sizes"])
    pretrain = _pretrain(found["pretrain"]) if "pretrain" in found else None
    if pretrain is None and any(size.path is None for size in sizes):
        raise top.wrong(
            "has no key pretrain",
            "sizes that are no folders are trained from scratch first: add e.g. pretrain: {tokens: 2M}",
        )
    plan = SweepPlan(
        family=found["family"].model(),
        sizes=sizes,
        pretrain=pretrain,
        general=_corpus(found["general"]),
        domains=_domains(found["domains"]),
        ratios=_distinct(found["ratios"], YamlNode.share),
        tokens=_tokens(found["tokens"]),
        **_rest(found),
    )
    _check(plan, top)
    return plan


def _rest(found: Mapping[str, YamlNode]) -> dict[str, Any]:
    """Keys that may be left out."""
    readers: dict[str, Callable[[YamlNode], object]] = {
        "evaluations": _evaluations,
        "seeds": lambda node: _distinct(node, lambda each: each.whole(0, 2**31 - 1)),
        "window": lambda node: node.whole(8, 1 << 17),
        "batch": lambda node: node.whole(1, 1 << 16),
        "learning_rate": lambda node: node.number(0.0, 1.0, above=True),
        "warm_up": lambda node: node.whole(0, _LARGEST),
        "anneal": lambda node: node.number(0.0, 0.9, above=True),
        "weight_decay": lambda node: node.number(0.0, 10.0),
        "max_epochs": lambda node: node.number(0.0, 1e6, above=True),
        "quantize": lambda node: _distinct(node, lambda each: each.whole(2, 8), empty=True),
        "group": lambda node: node.whole(8, 1 << 14),
        "threads": lambda node: node.whole(1, 1024),
        "gpus": lambda node: node.whole(0, 1024),
        "attempts": lambda node: node.whole(1, 100),
    }
    return {key: read(found[key]) for key, read in readers.items() if key in found}


def _check(plan: SweepPlan, top: YamlNode) -> None:
    """What single values do not show."""
    first, last = plan.evaluations.first, plan.tokens
    if plan.evaluations.count > 1 and first >= last:
        raise top.wrong(f"has evaluations.first = {first:,}", f"it must lie below tokens = {last:,}")
    if all(ratio == 0 for ratio in plan.ratios):
        raise top.wrong("has ratios = [0]", "a sweep needs a share of domain text; add ratios up to 1")
    if plan.gpus > 1 and plan.batch % plan.gpus:
        raise top.wrong(f"has batch = {plan.batch}", f"it must be a multiple of gpus = {plan.gpus}, which share it")
    names = [size.name for size in plan.sizes]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise top.wrong(f"has two sizes called {doubled!r}", "give each a name of its own: {name: ..., ...}")
    try:
        points = evaluation_points(plan)
    except UserError as error:
        raise UserError(f"{top.path}: {error}") from None
    if points[0].tokens < LEAST_TOKENS:
        raise top.wrong(
            f"has its first evaluation at {points[0].tokens:,} tokens",
            f"laws are fitted from {LEAST_TOKENS:,} tokens on: raise evaluations.first",
        )


def _sizes(node: YamlNode) -> tuple[SizeSpec, ...]:
    found = tuple(_size(each) for each in node.items())
    if not found:
        raise node.wrong("is empty", "give at least one size, three for a law of sizes: [0.6M, 1.5M, 4M]")
    return found


def _size(node: YamlNode) -> SizeSpec:
    if isinstance(node.value, str) and parse_tokens(node.value) is None:
        return _existing(node, None)
    if node.raw_mapping is None:
        return _by_parameters(node, None)
    found = node.mapping(("name", "hidden", "layers", "parameters", "path"))
    shape, name = {"hidden", "layers"} & set(found), found.get("name")
    if sum((bool(shape), "parameters" in found, "path" in found)) != 1 or len(shape) == 1:
        raise node.wrong(
            f"has {', '.join(sorted(found)) or 'nothing'}",
            "say what it is by hidden and layers, by parameters (of the blocks), or by path (of a model)",
        )
    if "path" in found:
        return _existing(found["path"], name)
    if "parameters" in found:
        return _by_parameters(found["parameters"], name)
    hidden, layers = found["hidden"].whole(8, 1 << 17), found["layers"].whole(1, 1 << 12)
    return SizeSpec(name=f"{hidden}x{layers}" if name is None else name.name(), hidden=hidden, layers=layers)


def _by_parameters(node: YamlNode, name: YamlNode | None) -> SizeSpec:
    count = parse_tokens(node.value) if isinstance(node.value, str | int | float) else None
    if count is None or not 1e4 <= count <= 1e13:
        raise node.wrong(
            f"is {node.value!r}",
            "expected parameters of the blocks from 10k to 10T (0.6M), {hidden: 128, layers: 3}, or a model's folder",
        )
    text = node.value.strip() if isinstance(node.value, str) else str(count)
    return SizeSpec(name=text if name is None else name.name(), parameters=count)


def _existing(node: YamlNode, name: YamlNode | None) -> SizeSpec:
    path = node.local(node.text())
    if not path.is_dir():
        raise node.wrong(
            f"is {node.value!r}",
            "which is no folder; expected a model's folder, parameters of the blocks (0.6M) or "
            "{hidden: 128, layers: 3}",
        )
    given = re.sub(r"[^A-Za-z0-9_.]", "_", path.resolve().name) if name is None else name.name()
    return SizeSpec(name=given, path=str(path))


def _pretrain(node: YamlNode) -> PretrainSpec:
    found = node.mapping(("tokens", "learning_rate"), required=("tokens",))
    rates = {"learning_rate": found["learning_rate"].number(0.0, 1.0, above=True)} if "learning_rate" in found else {}
    return PretrainSpec(tokens=_tokens(found["tokens"]), **rates)


def _evaluations(node: YamlNode) -> EvaluationSpec:
    found = node.mapping(("count", "first", "decay", "windows"))
    readers: dict[str, Callable[[YamlNode], object]] = {
        "count": lambda each: each.whole(1, 1000),
        "first": _tokens,
        "decay": lambda each: each.number(0.0, 20.0),
        "windows": lambda each: each.whole(8, 1 << 20),
    }
    values: dict[str, Any] = {key: read(found[key]) for key, read in readers.items() if key in found}
    return EvaluationSpec(**values)


def _domains(node: YamlNode) -> dict[str, CorpusSpec]:
    raw = node.raw_mapping
    if not raw:
        raise node.wrong(f"is {node.value!r}", "expected domains by name: {law: {train: FILE, valid: FILE}}")
    found: dict[str, CorpusSpec] = {}
    for key, value in raw.items():
        each = YamlNode(value, f"{node.place}.{key}", node.path)
        if not isinstance(key, str) or not NAME.fullmatch(key) or key == GENERAL:
            raise each.wrong(
                f"has the name {key!r}", f"a domain is called by letters, digits, _ and ., and not {GENERAL!r}"
            )
        found[key] = _corpus(each)
    return found


def _corpus(node: YamlNode) -> CorpusSpec:
    if node.value == EMBEDDED:
        return CorpusSpec(train=(EMBEDDED,), valid=EMBEDDED)
    found = node.mapping(("train", "valid"), required=("train", "valid"))
    train = found["train"]
    files = train.items() if train.raw_list is not None else [train]
    if not files:
        raise train.wrong("is empty", "give at least one file")
    return CorpusSpec(train=tuple(each.file() for each in files), valid=found["valid"].file())


def _distinct(node: YamlNode, read: Callable[[YamlNode], Any], *, empty: bool = False) -> tuple[Any, ...]:
    values: list[object] = []
    for each in node.items():
        value = read(each)
        if value in values:
            raise each.wrong(f"is {each.value!r}", "which stands there already; keep one")
        values.append(value)
    if not values and not empty:
        raise node.wrong("is empty", "give at least one value")
    return tuple(values)


def _tokens(node: YamlNode) -> int:
    count = parse_tokens(node.value) if isinstance(node.value, str | int | float) else None
    if count is None or count < LEAST_TOKENS:
        raise node.wrong(f"is {node.value!r}", f"expected tokens from {LEAST_TOKENS:,} up, e.g. 500k, 2M, 1.5e6")
    return count
