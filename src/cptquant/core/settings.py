"""What a person asked for, kept in the run folder so that later stages start from the same choices."""

from typing import ClassVar

from cptquant.core.artifact import Artifact, Frozen
from cptquant.core.budget import Budget
from cptquant.core.engine_memory import memory_budget
from cptquant.core.errors import FormatError, UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.targets import find_target

BASELINES = ("uniform", "random", "preset")
_SMALL_MODEL_PARAMETERS = 50_000_000
LEARNING = ("signround", "block-ap", "kl-rounding")
"""Quantizers that learn after GPTQ, many times as long as GPTQ takes."""
OWN_TEXT = {"gptq": 256, "block-ap": 256, "kl-rounding": 768}
"""Sequences the model writes for its calibration where nothing was asked for (decision 0009): learning then sees each
about once; of `gptq` and `block-ap` as many as the PTQ law and the frontier's prior were fitted with."""


class OwnTextDefault(Frozen):
    """What own text came to in a run that was not asked for any: sequences, and why none where that needs saying."""

    sequences: int
    note: str = ""


class RunSettings(Artifact):
    """Options of a run (settings.json); every field is a flag of `cptquant quantize`.

    Attributes:
        model: local folder, hub id or `embedded:NAME`. budget: as written; None until `allocate`.
        memory, context: a limit on run-time memory instead of a budget, and the tokens its cache must hold.
        formats: candidate formats beside 16 bits; None means the target's own (`Target.default_formats`).
        calibration, eval_text: the person's own text; None means the embedded text.
        calibration_sequences, eval_sequences, sequence_length: how much of it is used, in windows of tokens.
    quantizer: None decides by size (`quantizer_for`). quantizer_default: what None came to in this run, so that it
        keeps its bits; no flag.
    own_text: sequences that a causal language model writes itself, added to the calibration text when quantizing; None
        decides by quantizer and size (`own_text_for`).
    own_text_default: quantizer -> what None came to in this run, so that it keeps its bits; no flag, settled by
        `stages/own_text.py`.
    baselines: "uniform", "random" and, of llama.cpp, "preset" at no more bytes; None decides (`baselines_for`).
    refine_swaps: rounds of swaps between sites after allocation, judged on the model's own loss; 0 leaves them out.
    predict: whether a causal language model's losses are predicted before it is quantized (forecast.json); None
        decides by size (`forecasts`).
    """

    SCHEMA: ClassVar[str] = "cptquant.settings"
    MADE_BY: ClassVar[str] = "cptquant inspect MODEL --output RUN"

    model: str
    budget: str | None = None
    memory: str | None = None
    context: int | None = None
    sensitivity: str = "tdmpq"
    allocator: str = "knapsack"
    quantizer: str | None = None
    quantizer_default: str | None = None
    target: str = "transformers"
    formats: tuple[str, ...] | None = None
    calibration: str | None = None
    eval_text: str | None = None
    calibration_sequences: int = 128
    eval_sequences: int = 64
    sequence_length: int = 256
    own_text: int | None = None
    own_text_default: dict[str, OwnTextDefault] = {}
    baselines: tuple[str, ...] | None = None
    refine_swaps: int = 0
    seed: int = 0
    trust_remote_code: bool = False
    predict: bool | None = None

    def formats_for(self, layout: ModelLayout) -> tuple[QuantFormat, ...]:
        """Parsed `formats`, or the target's default ones for this model.

        Raises:
            FormatError: a format is unreadable, the list is empty, or the target is unknown.
        """
        self.check_formats()
        names = find_target(self.target).formats_for(layout) if self.formats is None else self.formats
        return tuple(QuantFormat.parse(name) for name in names)

    def check_formats(self) -> None:
        """Refuse `formats` that cannot be read, before a model is looked at.

        Raises:
            FormatError: with the format, or that there is none.
        """
        if self.formats is not None and not self.formats:
            raise FormatError("--formats names no format; give a comma-separated list such as int3-g64,int4-g64")
        for name in self.formats or ():
            QuantFormat.parse(name)

    @property
    def parsed_budget(self) -> Budget:
        """Parsed `budget`.

        Raises:
            BudgetError: unreadable. UserError: none was given yet.
        """
        if self.budget is None:
            raise UserError("no budget was given; add --budget, e.g. --budget 4bpw")
        return Budget.parse(self.budget)

    def budget_for(self, layout: ModelLayout) -> Budget:
        """The limit on the weights of this model: `budget`, or what `memory` leaves for them.

        Raises:
            BudgetError: unreadable or unreachable. UserError: both were given, or neither.
        """
        if self.memory is None:
            return self.parsed_budget
        if self.budget is not None:
            raise UserError("--budget and --memory were both given; --memory already decides the bytes of the weights")
        return memory_budget(layout, self.memory, self.context, self.target)

    def quantizer_for(self, layout: ModelLayout) -> str:
        """The quantizer: what was asked for, else block-wise training for causal language models below 50M parameters,
        which write text for it. Above, training takes many times as long as GPTQ on a CPU; other kinds of models were
        not measured (decision 0012)."""
        named = self.quantizer or self.quantizer_default
        if named is not None:
            return named
        small = layout.parameters < _SMALL_MODEL_PARAMETERS
        return "block-ap" if small and layout.task == "causal_lm" else "gptq"

    def own_text_for(self, layout: ModelLayout) -> int:
        """How many sequences the model writes for its own calibration.

        By default what `OWN_TEXT` says of the quantizer, but for `kl-rounding` only below 50M parameters: above,
        writing costs more time on a CPU than all else. What a run settled on once holds for it.

        Raises:
            UserError: asked for of another kind of model, or of a quantizer that reads no text.
        """
        quantizer = self.quantizer_for(layout)
        if self.own_text and quantizer == "rtn":
            raise UserError(f"--own-text {self.own_text}: --quantizer rtn reads no text; leave the flag out")
        if layout.task != "causal_lm":
            if self.own_text:
                raise UserError(
                    f"--own-text {self.own_text}: {layout.source} is for {layout.task}, and only causal language "
                    "models write text; leave the flag out"
                )
            return 0
        if self.own_text is not None:
            return self.own_text
        if quantizer in self.own_text_default:
            return self.own_text_default[quantizer].sequences
        small = layout.parameters < _SMALL_MODEL_PARAMETERS or quantizer == "kl-rounding"
        return OWN_TEXT.get(quantizer, 0) if small else 0

    def own_text_note(self, layout: ModelLayout) -> str:
        """Why the default's own text is left out in this run; empty where it is not."""
        settled = self.own_text_default.get(self.quantizer_for(layout))
        return "" if self.own_text is not None or settled is None else settled.note

    def settled(self, quantizer: str, sequences: int, note: str = "") -> "RunSettings":
        """A copy in which a quantizer's default of own text is fixed."""
        found = OwnTextDefault(sequences=sequences, note=note)
        return self.model_copy(update={"own_text_default": {**self.own_text_default, quantizer: found}})

    def carried_out_with(self, layout: ModelLayout, quantizer: str | None = None) -> str:
        """The quantizer (None: the run's own) as records name it: losses with and without own text do not compare."""
        return (quantizer or self.quantizer_for(layout)) + (" + own text" if self.own_text_for(layout) else "")

    def forecasts(self, layout: ModelLayout) -> bool:
        """Whether losses are predicted: for causal language models, which the law knows; by default below 50M
        parameters, since features cost about as much time as measuring sensitivity."""
        if layout.task != "causal_lm":
            return False
        return layout.parameters < _SMALL_MODEL_PARAMETERS if self.predict is None else self.predict

    def baselines_for(self, layout: ModelLayout) -> tuple[str, ...]:
        """Which baselines are quantized and evaluated beside the plan.

        Each costs a quantization of its own, so above 50M parameters, and where learning makes that costly, only those
        that the guard needs are the default: uniform bits, and under --target gguf llama.cpp's own choice of types.
        """
        if self.baselines is not None:
            return self.baselines
        guard = ("uniform", "preset") if self.target == "gguf" else ("uniform",)
        cheap = layout.parameters < _SMALL_MODEL_PARAMETERS and self.quantizer_for(layout) not in LEARNING
        return (*guard, "random") if cheap else guard
