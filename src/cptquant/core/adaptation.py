"""What was asked of `cptquant adapt`, and what came of it (adaptation.json in the run folder)."""

from typing import ClassVar, Literal

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.evaluation import Measurement
from cptquant.core.mixture import CHAT_SHARE, SourceCount

SCHEDULES = ("cosine", "constant")


class AdaptationRequest(Frozen):
    """Flags of `cptquant adapt`.

    Attributes:
        model, teacher: as `MODEL` is spelled; the teacher is the model itself if None.
        domain, general, instructions, preferences: files and folders. eval_domain, eval_general: held-out text; None
            takes the tail of the source, which is then not trained on.
        method: as `--method` spells it (`adaptation/methods.py`). distil_weight: lam; None leaves it to the method.
        ratio: share of domain tokens. chat_share: of instructions and preferences together.
        tokens: to train on. window: tokens a window. batch: windows a step, all processes together. micro_batch: at
            once in one process; None all of its part.
        teacher_bits: 8 or 16. teacher_cache: k of a cache of top-k probabilities; 0 for a live teacher.
        learning_rate, schedule, warm_up, anneal, weight_decay: see `adaptation/mix_cpt.py`.
        max_epochs: how often a source may be read. overlap: see `adaptation/overlap.py`.
        align_instructions, align_preferences: samples of stage 2; 0 for none. chat_template: a file. align_rate:
            learning rate of SFT; DPO takes a tenth. align_epochs: over the chosen samples.
        tasks: files of questions; task_limit: how many of each.
        eval_sequences: windows of each held-out text. looks: how often they are read during training.
    """

    model: str
    domain: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    preferences: tuple[str, ...] = ()
    eval_domain: str | None = None
    eval_general: str | None = None
    method: str = "mix-cpt"
    ratio: float | None = None
    chat_share: float = CHAT_SHARE
    tokens: int = 0
    distil_weight: float | None = None
    temperature: float = 1.0
    teacher: str | None = None
    teacher_bits: int = 16
    teacher_cache: int = 0
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warm_up: float = 0.05
    anneal: float = 0.2
    weight_decay: float = 0.1
    window: int = 256
    batch: int = 8
    micro_batch: int | None = None
    max_epochs: float = 4.0
    keep_documents_apart: bool = False
    overlap: float = 0.2
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    align_instructions: int = 0
    align_preferences: int = 0
    chat_template: str | None = None
    align_rate: float = 2e-5
    align_epochs: float = 1.0
    tasks: tuple[str, ...] = ()
    task_limit: int = 500
    eval_sequences: int = 64
    looks: int = 5
    seed: int = 0
    trust_remote_code: bool = False


class HeldOutLoss(Frozen):
    """Loss on held-out text. Attributes: n: scored tokens. stderr: clustered by document; None for one cluster."""

    nll_nats_per_token: float
    n: int
    stderr: float | None


class AdaptationLook(Frozen):
    """Held-out texts looked at after some steps.

    Attributes:
        tokens: trained on so far. training_nats_per_token: the whole loss, mean since the look before; None at the
            start. divergence_nats_per_token: its KL to the teacher's target; None without a teacher.
        held_out: name of the text -> loss.
    """

    step: int
    tokens: int
    training_nats_per_token: float | None
    divergence_nats_per_token: float | None = None
    held_out: dict[str, HeldOutLoss] = {}


class SourceRecord(Frozen):
    """One source of the mixture.

    Attributes:
        files: what was given. documents: read, pieces of plain text counted each. dropped: left out because they
            overlap with evaluation text. held_out: left out to be evaluation text.
        count: what was taken.
    """

    name: str
    files: tuple[str, ...]
    documents: int
    dropped: int
    held_out: int
    count: SourceCount


class TeacherRecord(Frozen):
    """What the teacher cost.

    Attributes:
        kind: in words, e.g. "live", "cache of the top 64". seconds: of its passes on the clock. share: of the seconds
            of stage 1, the cache included. discarded_mass: mean probability outside the top k; None without a cache.
        cache_bytes: on disk.
    """

    kind: str
    seconds: float
    share: float
    discarded_mass: float | None = None
    cache_bytes: int = 0


class AlignmentRecord(Frozen):
    """What stage 2 did with one kind of sample.

    Attributes:
        kind: "instructions" (SFT) or "preferences" (DPO). candidates: samples there were. dropped: too hard without a
            template. chosen: trained on; their line numbers stand in `indices_file`.
        score_before, score_after: mean format score of the chosen, and of as many held-out samples.
        held_out_before, held_out_after: the latter; None where none were left.
    """

    kind: Literal["instructions", "preferences"]
    candidates: int
    dropped: int
    chosen: int
    steps: int
    seconds: float
    indices_file: str
    score_before: float
    score_after: float
    held_out_before: float | None = None
    held_out_after: float | None = None
    held_out_count: int = 0
    training_loss: float | None = None


class AdaptationReport(Artifact):
    """What an adaptation did.

    Attributes:
        request: what was asked. options: every choice that was made, in words.
        sources: of the mixture. looks: of stage 1. steps, tokens: of stage 1.
        measurements: before ("original") and after ("adapted"; "aligned" after stage 2), `note` names the text.
        teacher: None where there was none. alignment: of stage 2.
        notes: what a person should know: defaults that stepped in, text that was left out.
        training_seconds: of stage 1 on the clock, the teacher's cache included.
        files: sha256 of every file of model/, as they were written.
    """

    SCHEMA: ClassVar[str] = "cptquant.adaptation"
    MADE_BY: ClassVar[str] = "cptquant adapt MODEL --domain TEXT --tokens N --output RUN"

    request: AdaptationRequest
    options: dict[str, str] = {}
    sources: tuple[SourceRecord, ...] = ()
    steps: int = 0
    tokens: int = 0
    looks: tuple[AdaptationLook, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    teacher: TeacherRecord | None = None
    alignment: tuple[AlignmentRecord, ...] = ()
    notes: tuple[str, ...] = ()
    training_seconds: float = 0.0
    files: dict[str, str] = {}
