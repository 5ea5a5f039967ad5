"""bench.json: every engine in a process of its own, all of them once a round, round after round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cptquant.core.bench import BASELINE, BenchRecord, BenchVariant, spread
from cptquant.core.engine_memory import find_context, held_bytes_per_token
from cptquant.core.errors import EngineError, UserError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.progress import Progress
from cptquant.engines.process import run_engine
from cptquant.stages.written import engine_record

ENGINES = ("transformers", "onnx", "llamacpp")
ENGINE_TARGETS = {"onnx": "onnx", "llamacpp": "gguf"}
_DECODE_TOKENS, _PREFILL = 32, [128, 512]
_LOWER_IS_BETTER = ("encode_128_ms", "encode_512_ms")


@dataclass(frozen=True)
class BenchMethod:
    """How speeds are measured: threads of every engine, rounds, and seconds given to each speed in a round."""

    threads: int = 1
    rounds: int = 5
    seconds: float = 1.0


@dataclass(frozen=True)
class Contender:
    """One engine with one file.

    Attributes:
        bytes_per_token: of weights; None for encoders. context: longest that the file holds; None where the model says.
    """

    name: str
    engine: str
    file: Path
    file_bytes: int
    bytes_per_token: int | None
    context: int | None = None


def run_contenders(folder: Path, layout: ModelLayout, original: Path, engines: Sequence[str]) -> list[Contender]:
    """What there is to compare in a run folder: the baselines, and each engine's file.

    Raises:
        UserError: no engine, or an unknown one. ArtifactError: an engine's files were not written yet, are of other
        weights than the run's, or damaged; with the command.
    """
    check_engines(engines)
    contenders: list[Contender] = []
    for engine in engines:
        if engine == "transformers":
            contenders += baselines(layout, original)
            continue
        record = engine_record(folder, ENGINE_TARGETS[engine], engine)
        formats = {site.site: QuantFormat.parse(site.format) for site in record.round_trip}
        made = engine_contender(engine, layout, folder / record.entry, formats, record.file_bytes)
        contenders.append(replace(made, context=record.context))
    return contenders


def check_engines(engines: Sequence[str]) -> None:
    """Refuse names that are no engine, before anything is written or measured.

    Raises:
        UserError: none at all, or an unknown one.
    """
    if not engines:
        raise UserError(f"--engines names no engine; choose of: {', '.join(ENGINES)}")
    for engine in engines:
        if engine not in ENGINES:
            raise UserError(f"--engines {engine!r} is unknown; choose of: {', '.join(ENGINES)}")


def baselines(layout: ModelLayout, original: Path) -> list[Contender]:
    """The original in transformers, in float32 and in bfloat16."""
    size = sum(path.stat().st_size for path in original.glob("*.safetensors"))
    formats: dict[str, QuantFormat] = {}
    return [
        Contender(name, engine, original, size, held_bytes_per_token(layout, formats, float_bytes=width))
        for name, engine, width in (
            ("transformers fp32", "transformers", 4),
            (BASELINE, "transformers-bf16", 2),
        )
    ]


def engine_contender(
    engine: str, layout: ModelLayout, file: Path, formats: Mapping[str, QuantFormat], file_bytes: int
) -> Contender:
    """One engine with our file."""
    per_token = held_bytes_per_token(layout, formats, float_bytes=2 if engine == "llamacpp" else 4)
    return Contender(engine, engine, file, file_bytes, per_token)


def bench_stage(
    name: str, layout: ModelLayout, contenders: Sequence[Contender], how: BenchMethod, progress: Progress
) -> BenchRecord:
    """Measure all contenders, interleaved: a change in what else the machine does touches all of them alike.

    An engine that is missing keeps its line in the table, with the reason.

    Raises:
        EngineError: not one engine could be measured.
    """
    answers: list[list[dict[str, Any]]] = [[] for _ in contenders]
    problems = ["" for _ in contenders]
    bandwidths: list[float] = []
    for turn in range(how.rounds):
        probe = run_engine("none", Path(), "bandwidth", threads=how.threads)
        bandwidths.append(float(probe["bytes_per_second"]))
        for index, contender in enumerate(contenders):
            if not problems[index]:
                try:
                    answers[index].append(_measure(contender, layout, how))
                except EngineError as error:
                    problems[index] = str(error)
            progress("bench", turn * len(contenders) + index + 1, how.rounds * len(contenders))
    if not any(answers):
        reasons = "; ".join(f"{found.name}: {problem}" for found, problem in zip(contenders, problems, strict=True))
        raise EngineError(f"no engine could be measured, and no bench.json was written; {reasons}")
    base = next((i for i, contender in enumerate(contenders) if contender.name == BASELINE), None)
    reference = [] if base is None else answers[base]
    variants = [
        _variant(contender, found, problem, reference, bandwidths)
        for contender, found, problem in zip(contenders, answers, problems, strict=True)
    ]
    return BenchRecord(
        model=name, parameters=layout.parameters, threads=how.threads, rounds=how.rounds,
        bandwidth_bytes_per_second=spread(bandwidths), variants=tuple(variants),
    )  # fmt: skip


def _measure(contender: Contender, layout: ModelLayout, how: BenchMethod) -> dict[str, Any]:
    longest = contender.context or find_context(layout, None)
    arguments = {
        "prefill": [length for length in _PREFILL if length <= longest],
        "decode_tokens": _DECODE_TOKENS,
        "vocabulary": layout.vocabulary_size,
        "seconds": how.seconds,
    }
    context = min(longest, _PREFILL[-1] + _DECODE_TOKENS)
    return run_engine(
        contender.engine, contender.file, "speed", threads=how.threads, context=context, arguments=arguments
    )


def _variant(
    contender: Contender,
    answers: list[dict[str, Any]],
    problem: str,
    reference: list[dict[str, Any]],
    bandwidths: list[float],
) -> BenchVariant:
    if problem or not answers:
        return BenchVariant(name=contender.name, file_bytes=contender.file_bytes, problem=problem or "not run")
    names = [key for key in answers[0] if key.endswith(("_per_second", "_ms", "load_seconds", "peak_bytes"))]
    speeds = [key for key in names if key.endswith(("_per_second", "_ms"))]
    shares = None
    if contender.bytes_per_token is not None and "decode_tokens_per_second" in answers[0]:
        per_token = contender.bytes_per_token
        rates = [per_token * float(answer["decode_tokens_per_second"]) for answer in answers]
        shares = spread([rate / limit for rate, limit in zip(rates, bandwidths, strict=False)])
    return BenchVariant(
        name=contender.name,
        engine=answers[0]["version"],
        file_bytes=contender.file_bytes,
        bytes_per_token=contender.bytes_per_token,
        figures={key: spread([float(answer[key]) for answer in answers]) for key in names},
        ratios={key: spread(_ratios(key, answers, reference)) for key in speeds if reference},
        bandwidth_share=shares,
    )


def _ratios(key: str, answers: list[dict[str, Any]], reference: list[dict[str, Any]]) -> list[float]:
    pairs = [(float(answer[key]), float(base[key])) for answer, base in zip(answers, reference, strict=False)]
    return [base / own if key in _LOWER_IS_BETTER else own / base for own, base in pairs]
