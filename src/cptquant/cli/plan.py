"""`cptquant plan`: which size, share, tokens and bits, from a finished sweep."""

import re
from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_Sweep = Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder that cptquant sweep made.", show_default=False)]
_MaxSize = Annotated[
    str, typer.Option("--max-size", help="Largest file of the result, e.g. 12MB, 1.2GiB.", show_default=False)
]
_Compute = Annotated[
    str,
    typer.Option(
        "--compute",
        help="Training at most: 2h, 30min, 90s at the speed of the sweep's machine, or FLOPs (6 N D), e.g. 1e16.",
        show_default=False,
    ),
]
_Increase = Annotated[
    str | None,
    typer.Option(
        "--max-general-increase",
        help="How far the general loss may rise above the base model's, quantizing included, e.g. 3%.  [default: any]",
        show_default=False,
    ),
]
_Domain = Annotated[
    list[str] | None,
    typer.Option("--domain", help="Domain text of the planned run; may be repeated.  [default: the sweep's]",
                 show_default=False),
]  # fmt: skip
_General = Annotated[
    list[str] | None,
    typer.Option("--general", help="General text of the planned run; may be repeated.  [default: the sweep's]",
                 show_default=False),
]  # fmt: skip
_LawDomain = Annotated[
    str | None,
    typer.Option("--law-domain", help="Which domain of the sweep, where it has several.", show_default=False),
]
_Law = Annotated[
    Path | None,
    typer.Option("--law", help="A law fitted before (cptquant law fit).  [default: --form fitted to the sweep]",
                 show_default=False),
]  # fmt: skip
_Bits = Annotated[
    str | None,
    typer.Option("--bits", help="Widths to choose among, comma-separated; 16 bits are always one.  [default: those the "
                 "sweep quantized to, else 2,3,4,8]", show_default=False),
]  # fmt: skip
_MaxEpochs = Annotated[
    float | None,
    typer.Option("--max-epochs", min=0.01, help="Passes over a text at most.  [default: the sweep's]",
                 show_default=False),
]  # fmt: skip
_Run = Annotated[bool, typer.Option("--run", help="Carry the recommended point out: train, quantize, measure.")]
_Neighbours = Annotated[
    int, typer.Option("--neighbours", min=0, max=7, help="With --run: as many of its neighbours too.")
]


def plan(
    sweep: _Sweep,
    max_size: _MaxSize,
    compute: _Compute,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the plan; made if missing.")],
    max_general_increase: _Increase = None,
    domain: _Domain = None,
    general: _General = None,
    law_domain: _LawDomain = None,
    law: _Law = None,
    form: Annotated[str, typer.Option("--form", help="Law fitted to the sweep's runs; see law fit.")] = "dcpt",
    bits: _Bits = None,
    target: Annotated[str, typer.Option("--target", help="Engine whose arithmetic counts the bytes.")] = "transformers",
    max_epochs: _MaxEpochs = None,
    run: _Run = False,
    neighbours: _Neighbours = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Choose size, domain share, tokens and bits together, under a file size and training compute.

    Predicts the domain and general loss of every choice by the law of the sweep's runs plus what bits cost, with
    intervals; --run carries the choice out and puts what was measured beside it.
    """
    from cptquant.cli.law_flags import parse_increase
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.core.errors import UserError
    from cptquant.pipeline import run_plan
    from cptquant.reports.joint import joint_table
    from cptquant.stages.joint_plan import PAGE, PlanRequest, plan_stage

    if neighbours and not run:
        raise UserError(f"--neighbours {neighbours} goes with --run; add --run, or leave it out")
    seconds, flops = parse_compute(compute)
    request = PlanRequest(
        sweep=sweep,
        output=output,
        size_bytes=parse_size(max_size),
        seconds=seconds,
        flops=flops,
        general_increase=None if max_general_increase is None else parse_increase(max_general_increase),
        domain=law_domain,
        bits=None if bits is None else parse_bits(bits),
        law=law,
        form=form,
        target=target,
        domain_text=tuple(domain or ()),
        general_text=tuple(general or ()),
        max_epochs=max_epochs,
        seed=seed,
    )
    with watch(quiet=as_json) as progress:
        made = plan_stage(request, progress)
        if run:
            if not as_json:
                print_text(joint_table(made))
            made = run_plan(request, made, neighbours, progress)
    if as_json:
        print_json(made)
    else:
        print_text(joint_table(made))
        print(f"report     {output / PAGE}")


def parse_compute(text: str) -> tuple[float | None, float | None]:
    """`2h` -> seconds, or `1e16` -> FLOPs; the other is None.

    Raises:
        UserError: neither.
    """
    from cptquant.core.errors import UserError

    allowed = "give a duration such as 90s, 30min, 2h, or training FLOPs such as 1e16"
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|m|h)\s*", text)
    if found is not None:
        seconds = float(found[1]) * {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600}[found[2]]
        if not 1 <= seconds <= 3.2e8:
            raise UserError(f"--compute {text!r} is no duration from a second to ten years; {allowed}")
        return seconds, None
    try:
        flops = float(text.lower().removesuffix("flops").removesuffix("flop").strip())
    except ValueError:
        flops = 0.0
    if not 1e9 <= flops <= 1e30:
        raise UserError(f"--compute {text!r} is not readable; {allowed}")
    return None, flops


def parse_size(text: str) -> float:
    """`12MB` -> bytes.

    Raises:
        BudgetError: no size in bytes.
    """
    from cptquant.core.budget import Budget
    from cptquant.core.errors import BudgetError

    try:
        budget = Budget.parse(text)
    except BudgetError:
        budget = None
    if budget is None or budget.unit != "bytes":
        raise BudgetError(f"--max-size {text!r} is no size in bytes; write it as 12MB, 120MiB or 1.2GB")
    return budget.value


def parse_bits(text: str) -> tuple[int, ...]:
    """`2,3,4` -> widths.

    Raises:
        UserError: none, or one outside 2 to 8 that is not 16.
    """
    from cptquant.core.errors import UserError

    found: list[int] = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not (2 <= int(part) <= 8 or int(part) == 16):
            raise UserError(f"--bits {text!r}: {part.strip()!r} is no width; give 2 to 8, or 16 for not quantized")
        found.append(int(part))
    return tuple(dict.fromkeys(found))
