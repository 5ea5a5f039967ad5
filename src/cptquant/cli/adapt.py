"""`cptquant adapt`: continue the training of a model on a domain without losing the rest."""

import re
from pathlib import Path
from typing import Annotated

import typer

from cptquant.cli import options

_TEXT = ".txt, .jsonl, .parquet, a folder of them, or a saved `datasets` folder; may be given several times."


def _files(flag: str, text: str) -> object:
    return typer.Option(flag, help=text, show_default=False)


_Domain = Annotated[list[str] | None, _files("--domain", f"Text of the domain: {_TEXT}")]
_General = Annotated[list[str] | None, _files("--general", "Text like what the model was trained on, so that it is not "
                     "forgotten.  [default: the embedded text, where the method mixes any]")]  # fmt: skip
_Instructions = Annotated[list[str] | None, _files("--instructions", 'Records {"instruction", "response"}.')]
_Preferences = Annotated[list[str] | None, _files("--preferences", 'Records {"prompt", "chosen", "rejected"}.')]
_EvalDomain = Annotated[str | None, _files("--eval-domain", "Held-out text of the domain.  [default: the tail of "
                        "--domain, not trained on]")]  # fmt: skip
_EvalGeneral = Annotated[str | None, _files("--eval-general", "Held-out general text.  [default: the tail of "
                         "--general, not trained on]")]  # fmt: skip
_Method = Annotated[
    str,
    typer.Option("--method", help="mix-cpt (mixture, swapped teacher), kl (without the swap), replay (mixture, no "
                 "teacher) or cpt (domain alone)."),
]  # fmt: skip
_Ratio = Annotated[
    float | None,
    typer.Option("--ratio", help="Share of domain tokens; cptquant law finds it.  [default: 0.5; cpt 1]",
                 show_default=False),
]  # fmt: skip
_ChatShare = Annotated[
    float,
    typer.Option("--chat-share", help="Instructions and preferences together, as a share of all tokens; general text "
                 "takes the rest."),
]  # fmt: skip
_Tokens = Annotated[str, typer.Option("--tokens", help="Tokens to train on, e.g. 20M.", show_default=False)]
_Weight = Annotated[
    float | None,
    typer.Option("--distil-weight", help="λ, share of the divergence from the teacher in the loss.  [default: 0.5]",
                 show_default=False),
]  # fmt: skip
_Teacher = Annotated[
    str | None,
    typer.Option("--teacher", help="Another teacher with the same tokenizer.  [default: the model]",
                 show_default=False),
]  # fmt: skip
_TeacherBits = Annotated[int, typer.Option("--teacher-bits", help="8: the teacher's layers rounded to 8 bits.")]
_TeacherCache = Annotated[
    int,
    typer.Option("--teacher-cache", min=0, help="Ask the teacher once and keep its K most likely tokens a position; 0 "
                 "asks it at every step."),
]  # fmt: skip
_Rate = Annotated[float, typer.Option("--learning-rate", help="AdamW's highest rate.")]
_Schedule = Annotated[str, typer.Option("--schedule", help="cosine, or constant with an anneal at the end.")]
_Anneal = Annotated[float, typer.Option("--anneal", help="Of --schedule constant: last share of the steps.")]
_MicroBatch = Annotated[
    int | None,
    typer.Option("--micro-batch", min=1, help="Windows at once in a process; the rest is accumulated.  [default: all]",
                 show_default=False),
]  # fmt: skip
_Apart = Annotated[
    bool,
    typer.Option("--keep-documents-apart", help="No attention across documents, and no first token predicted from "
                 "another document."),
]  # fmt: skip
_Overlap = Annotated[
    float,
    typer.Option("--overlap", help="Leave out documents with this share of their 13-word sequences in evaluation "
                 "text."),
]  # fmt: skip
_AlignInstructions = Annotated[
    int,
    typer.Option("--align-instructions", min=0, help="Afterwards teach the chat format with so many instructions, "
                 "chosen by their format score (needs trl)."),
]  # fmt: skip
_AlignPreferences = Annotated[
    int, typer.Option("--align-preferences", min=0, help="The same with preferences, by DPO.")
]
_Template = Annotated[str | None, _files("--chat-template", "Jinja file of the format.  [default: the tokenizer's, "
                      "else a heading for each role]")]  # fmt: skip
_Tasks = Annotated[
    list[str] | None,
    _files("--tasks", "Questions with given answers (.jsonl: query, choices, gold; or context, continuation), asked "
           "before and after; may be given several times."),
]  # fmt: skip
_Bf16 = Annotated[
    bool | None,
    typer.Option("--bf16/--no-bf16", help="Mixed precision.  [default: where a GPU can]", show_default=False),
]
_Checkpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Run blocks again on the way back instead of keeping their "
                 "activations: less memory, more time."),
]  # fmt: skip


def adapt(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder; made if missing.")],
    tokens: _Tokens,
    domain: _Domain = None,
    general: _General = None,
    instructions: _Instructions = None,
    preferences: _Preferences = None,
    eval_domain: _EvalDomain = None,
    eval_general: _EvalGeneral = None,
    method: _Method = "mix-cpt",
    ratio: _Ratio = None,
    chat_share: _ChatShare = 0.2,
    distil_weight: _Weight = None,
    temperature: Annotated[float, typer.Option("--temperature", help="T of the divergence.")] = 1.0,
    teacher: _Teacher = None,
    teacher_bits: _TeacherBits = 16,
    teacher_cache: _TeacherCache = 0,
    learning_rate: _Rate = 1e-4,
    schedule: _Schedule = "cosine",
    anneal: _Anneal = 0.2,
    warm_up: Annotated[float, typer.Option("--warm-up", help="Share of the steps over which the rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's.")] = 0.1,
    window: Annotated[int, typer.Option("--window", min=8, help="Tokens a window.")] = 256,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows a step, all processes together.")] = 8,
    micro_batch: _MicroBatch = None,
    max_epochs: Annotated[float, typer.Option("--max-epochs", help="How often a source may be read.")] = 4.0,
    keep_documents_apart: _Apart = False,
    overlap: _Overlap = 0.2,
    align_instructions: _AlignInstructions = 0,
    align_preferences: _AlignPreferences = 0,
    align_rate: Annotated[float, typer.Option("--align-rate", help="Rate of SFT; DPO takes a tenth.")] = 2e-5,
    align_epochs: Annotated[float, typer.Option("--align-epochs", help="Passes over the chosen samples.")] = 1.0,
    chat_template: _Template = None,
    tasks: _Tasks = None,
    task_limit: Annotated[int, typer.Option("--task-limit", min=1, help="Questions of each --tasks file.")] = 500,
    eval_sequences: Annotated[int, typer.Option("--eval-sequences", min=8, help="Held-out windows a text.")] = 64,
    looks: Annotated[int, typer.Option("--looks", min=1, help="How often they are read during training.")] = 5,
    bf16: _Bf16 = None,
    gradient_checkpointing: _Checkpointing = False,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue the training of MODEL on a domain, held by general text and by a frozen teacher.

    Writes a model folder that every other subcommand and stock transformers take, and a report with losses before and
    after. Killed, the same command goes on. Start it with torchrun (-m cptquant adapt ...) to train on several
    processes.
    """
    from cptquant.cli.terminal import print_json, print_text, watch
    from cptquant.core.adaptation import AdaptationRequest
    from cptquant.reports.adaptation import adaptation_table
    from cptquant.stages.adapt import adapt_stage

    request = AdaptationRequest(
        model=model, domain=tuple(domain or ()), general=tuple(general or ()), instructions=tuple(instructions or ()),
        preferences=tuple(preferences or ()), eval_domain=eval_domain, eval_general=eval_general, method=method,
        ratio=ratio, chat_share=chat_share, tokens=parse_tokens(tokens), distil_weight=distil_weight,
        temperature=temperature, teacher=teacher, teacher_bits=teacher_bits, teacher_cache=teacher_cache,
        learning_rate=learning_rate, schedule=schedule, warm_up=warm_up, anneal=anneal, weight_decay=weight_decay,
        window=window, batch=batch, micro_batch=micro_batch, max_epochs=max_epochs,
        keep_documents_apart=keep_documents_apart, overlap=overlap, bf16=bf16,
        gradient_checkpointing=gradient_checkpointing, eval_sequences=eval_sequences, looks=looks, seed=seed or 0,
        align_instructions=align_instructions,
        align_preferences=align_preferences, align_rate=align_rate, align_epochs=align_epochs,
        chat_template=chat_template, tasks=tuple(tasks or ()), task_limit=task_limit,
        trust_remote_code=bool(trust_remote_code),
    )  # fmt: skip
    with watch(quiet=as_json) as progress:
        report = adapt_stage(request, output, progress)
    if report is None:
        return  # another process than the first
    if as_json:
        print_json(report)
    else:
        print_text(adaptation_table(report))
        print(f"model  {output / 'model'}\nreport {output / 'report.html'}")


def parse_tokens(text: str) -> int:
    """A number of tokens such as 20M, 1.5B, 300k or 50000.

    Raises:
        UserError: anything else.
    """
    from cptquant.core.errors import UserError

    found = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([kKmMbBtT]?)\s*", text)
    if found is None:
        raise UserError(f"--tokens {text!r} is no number of tokens; give e.g. 300k, 20M, 1.5B")
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[found[2].lower()]
    return round(float(found[1].replace("_", "").replace(",", "")) * scale)
