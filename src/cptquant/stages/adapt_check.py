"""What can be known to be wrong with a request to adapt before anything is read."""

import math
from pathlib import Path

from cptquant.adaptation.format_alignment import check_alignment_package
from cptquant.adaptation.methods import AdaptationMethod, find_method
from cptquant.core.adaptation import SCHEDULES, AdaptationRequest
from cptquant.core.errors import DataError, UserError
from cptquant.core.mixture import check_share
from cptquant.models.processes import process_count
from cptquant.stages.check import check_seed


def check_adaptation(request: AdaptationRequest) -> AdaptationMethod:
    """The method, if the flags say something sensible.

    Raises:
        UserError: the first thing that is wrong.
    """
    method = find_method(request.method)
    _check_shares(request, method)
    _check_numbers(request)
    _check_teacher(request, method)
    _check_sources(request, method)
    if request.align_instructions or request.align_preferences:
        check_alignment_package()
    elif request.chat_template is not None:
        raise UserError("--chat-template has no use without --align-instructions or --align-preferences; leave it out")
    check_seed(request.seed)
    return method


def _check_shares(request: AdaptationRequest, method: AdaptationMethod) -> None:
    check_share("--chat-share", request.chat_share)
    check_share("--overlap", request.overlap)
    check_share("--warm-up", request.warm_up)
    check_share("--anneal", request.anneal)
    if request.ratio is None:
        return
    check_share("--ratio", request.ratio)
    if not method.general and request.ratio != 1:
        raise UserError(
            f"--ratio {request.ratio:g} leaves tokens to other text, and --method {request.method} trains on the "
            "domain alone; leave it out, or take --method replay or mix-cpt"
        )


def _check_numbers(request: AdaptationRequest) -> None:
    if request.schedule not in SCHEDULES:
        raise UserError(f"--schedule {request.schedule!r} is unknown; choose one of: {', '.join(SCHEDULES)}")
    for name in ("learning_rate", "weight_decay", "temperature", "max_epochs", "align_rate", "align_epochs"):
        value = getattr(request, name)
        if not 0 <= value < math.inf or (value == 0 and name != "weight_decay"):
            raise UserError(f"--{name.replace('_', '-')} {value:g} is out of range; give a number above 0")
    step = request.batch * request.window
    if request.tokens < step:
        raise DataError(
            f"--tokens {request.tokens:,} do not fill one step of --batch {request.batch} windows of --window "
            f"{request.window} tokens ({step:,}); give more --tokens, or a smaller --batch or --window"
        )
    processes = process_count()
    if request.batch % processes:
        raise UserError(f"--batch {request.batch} cannot be shared by {processes} processes; give a multiple of them")
    mine = request.batch // processes
    if request.micro_batch is not None and mine % request.micro_batch:
        raise UserError(
            f"--micro-batch {request.micro_batch} does not divide the {mine} windows of --batch {request.batch} that a "
            f"process has; give a divisor of {mine}"
        )


def _check_teacher(request: AdaptationRequest, method: AdaptationMethod) -> None:
    if request.distil_weight is not None:
        check_share("--distil-weight", request.distil_weight)
        if request.distil_weight > 0 and method.distil_weight is None:
            raise UserError(
                f"--distil-weight {request.distil_weight:g} needs a teacher, and --method {request.method} has none; "
                "take --method mix-cpt or kl"
            )
    if request.teacher_bits not in (8, 16):
        raise UserError(
            f"--teacher-bits {request.teacher_bits} is not offered; give 8, or 16 for the weights as they are"
        )
    if not needs_teacher(request, method):
        for flag, given in (
            ("--teacher", request.teacher), ("--teacher-bits", request.teacher_bits == 8),
            ("--teacher-cache", request.teacher_cache),
        ):  # fmt: skip
            if given:
                why = "--distil-weight is 0" if method.distil_weight is not None else f"--method {request.method}"
                raise UserError(f"{flag} has no use without a teacher ({why}); leave it out")


def needs_teacher(request: AdaptationRequest, method: AdaptationMethod) -> bool:
    """Whether a teacher is asked at all."""
    return method.shape(request.distil_weight, request.temperature).weight > 0


def _check_sources(request: AdaptationRequest, method: AdaptationMethod) -> None:
    if not request.domain and request.ratio != 0:
        raise DataError("no domain text; give it with --domain: .txt, .jsonl, .parquet files, or folders of them")
    for name in ("domain", "general", "instructions", "preferences", "tasks"):
        for spec in getattr(request, name):
            if not Path(spec).expanduser().exists():
                raise DataError(f"--{name} {spec} does not exist; give files or folders that do")
    for name in ("eval_domain", "eval_general", "chat_template"):
        spec = getattr(request, name)
        if spec is not None and not Path(spec).expanduser().exists():
            raise DataError(f"--{name.replace('_', '-')} {spec} does not exist; give a file or folder that does")
    for name, align in (("instructions", request.align_instructions), ("preferences", request.align_preferences)):
        given = bool(getattr(request, name))
        if align and not given:
            raise DataError(f"--align-{name} {align} needs samples; give them with --{name}")
        if given and not method.chat and not align:
            raise UserError(
                f"--{name} has no use: --method {request.method} mixes no chat data, and --align-{name} is 0; leave it "
                "out, or take --method mix-cpt"
            )
