"""Is what was written our model? Files read back, held-out text through their engine, and the engine's tokenizer.

A target's engine may round activations to 8 bits for its integer products. So the same weights go through it twice
where they can: with float activations, which must agree with our model within the bound or graph, metadata or row
orders are wrong; and as the file is run, where all that differs is the engine's own rounding, which is stated.
llama.cpp also runs the original in 16 bits, to which it rounds activations then: its rounding apart from any plan.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cptquant.core.artifact import output_error
from cptquant.core.engine_export import EngineComparison, SiteRoundTrip
from cptquant.core.errors import EngineError, MissingEngineError
from cptquant.core.plan import Plan
from cptquant.engines.process import run_engine
from cptquant.engines.registry import TARGET_ENGINES
from cptquant.evaluation.engine import EngineOutputs, compare_engine, comparison_sequences
from cptquant.evaluation.scored_text import prepare_text
from cptquant.exporters.export import find_exporter, round_trip_error
from cptquant.exporters.gguf.tokenizer import read_vocabulary
from cptquant.models.load import LoadedModel
from cptquant.models.stream import read_weight
from cptquant.models.text import TokenSet
from cptquant.packing.shards import ShardFolder

FLOAT, INT8, SIXTEEN = "float activations", "int8 activations", "16-bit activations"
_INDIC, _KOREAN = "नमस्ते दुनिया. ", "안녕하세요 세계. "
MIXED_TEXT = (
    "The quick brown fox, 1234567 jumps; it's O'Neill's — “quoted”!\n\n\tdef f(x):\n        return x ** 2  # π≈3.14\n"
    f"Zażółć gęślą jaźń. Ünïcödé naïve café. Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. {_INDIC}\n"
    f"你好，世界。こんにちは世界。{_KOREAN}🙂 ½ ²  trailing   spaces   \r\n"
    "<html>&amp;</html> don't WE'LL 00 3.0e-7"
)
_DECOMPOSED = (_INDIC, _KOREAN)
"""llama.cpp's WordPiece keeps only the first part of a character that falls apart under NFD, whatever the file says:
vowels of Hangul and of Indic scripts are lost. Accents, which BERT drops too, fall away as they should."""


@dataclass(frozen=True)
class Written:
    """An export to be checked: whose it is, the plan under its target, our pieces, and the file or folder to open.

    `context`: longest text the file takes, where it was written for one.
    """

    model: LoadedModel
    plan: Plan
    shards: ShardFolder
    entry: Path
    context: int | None = None


@dataclass(frozen=True)
class Checked:
    """What the files were found to be; `comparisons` empty where the engine is not installed, as `engine` says."""

    round_trip: list[SiteRoundTrip]
    comparisons: list[EngineComparison]
    engine: str
    tokens_equal: bool | None = None
    tokens_note: str = ""


def check_files(written: Written, tokens: TokenSet) -> Checked:
    """Read everything back, then run the engine on held-out text and on mixed text to tokenize.

    Raises:
        EngineError: tensors, outputs or token ids are not ours, with what differs; or the engine refuses the file.
    """
    round_trip = read_back(written)
    difference, note, equal = "", "", None
    try:
        comparisons, engine = compare_files(written, tokens)
        if written.plan.target == "gguf":
            difference, note = compare_token_ids(written.model, written.entry)
            equal = True
    except MissingEngineError as error:
        comparisons, engine = [], f"not run: {error}"
    refuse_differences(written.entry, comparisons, round_trip, difference)
    return Checked(round_trip, comparisons, engine, equal, note)


def read_back(written: Written) -> list[SiteRoundTrip]:
    """Every quantized matrix as the files hold it against ours, and of those kept in 16 bits the ones that differ."""
    records: list[SiteRoundTrip] = []
    model, plan, entry = written.model, written.plan, written.entry
    folder = entry if entry.is_dir() else entry.parent
    for name, found in find_exporter(plan.target).read_back(folder, model, plan):
        fmt = plan.quant_formats[name]
        ours = written.shards.weight(name)
        if ours is None:
            site = model.layout.site_by_name[name]
            dtype = torch.float16 if fmt.storage == "float16" else torch.bfloat16
            ours = read_weight(model.module.get_submodule(name), site).detach().to(dtype).float()
        error = round_trip_error(found, ours)
        if not fmt.is_float or error != 0:
            records.append(SiteRoundTrip(site=name, format=fmt.name, largest_error=error))
    return records


@dataclass(frozen=True)
class _Way:
    """One way to run the engine: how it computes, whether the bound holds, and what makes its file in a folder.

    `original`: with the unquantized weights, beside the original itself.
    """

    arithmetic: str
    bounded: bool
    make_file: Callable[[Path], Path]
    float_cache: bool = False
    original: bool = False


def compare_files(written: Written, tokens: TokenSet) -> tuple[list[EngineComparison], str]:
    """The engine's outputs beside ours on a few sequences, and the engine's version.

    Raises:
        MissingEngineError: not installed. EngineError: it refuses the file or fails. OutputError: no room for outputs.
    """
    model, entry = written.model, written.entry
    text = prepare_text(model, _few(written, tokens))
    ids, mask = text.tokens.input_ids, text.tokens.attention_mask
    with _room_beside(entry) as work:
        np.save(work / "ids.npy", ids.numpy())
        np.save(work / "mask.npy", mask.numpy())
        of_ours: list[EngineOutputs] = []
        of_original: list[EngineOutputs] = []
        version = ""
        for way in _ways(written):
            at = work / way.arithmetic.replace(" ", "-")
            at.mkdir()
            file = way.make_file(work)
            try:
                answer = run_engine(
                    TARGET_ENGINES[written.plan.target], file, "outputs", threads=torch.get_num_threads(),
                    context=ids.shape[1], ids=f"{work}/ids.npy", mask=f"{work}/mask.npy", outputs=str(at),
                    float_cache=way.float_cache,
                )  # fmt: skip
            finally:
                if file != entry:
                    file.unlink()
            version = str(answer["version"])
            outputs = EngineOutputs(way.arithmetic, way.bounded, lambda index, at=at: _read(at, index))
            (of_original if way.original else of_ours).append(outputs)
        compared = compare_engine(model, written.shards, text, of_ours)
        return compared + (compare_engine(model, None, text, of_original) if of_original else []), version


@contextmanager
def _room_beside(entry: Path) -> Iterator[Path]:
    """A folder beside the files for what the engine is given and gives, several times their size; gone afterwards.

    Not the system's temporary folder, which may be small: a full disk is then the disk that `--output` is on.
    """
    files = entry if entry.is_dir() else entry.parent
    work = files.with_name(f"{files.name}.engine-check")
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    try:
        work.mkdir()
        yield work
    except OSError as error:
        raise output_error(work, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _few(written: Written, tokens: TokenSet) -> TokenSet:
    """As many sequences as are compared, no longer than the file allows."""
    model = written.model
    length = min(tokens.input_ids.shape[1], written.context or tokens.input_ids.shape[1])
    if written.plan.target == "gguf":
        from cptquant.exporters.gguf.metadata import context_length

        length = min(length, context_length(model))
    some = tokens.subset(slice(0, comparison_sequences(model.layout, tokens.sequence_count, length)))
    if length == tokens.input_ids.shape[1]:
        return some
    return TokenSet.build(
        some.input_ids[:, :length], some.attention_mask[:, :length], some.labels, some.documents, some.description
    )


def _ways(written: Written) -> list[_Way]:
    entry = written.entry
    as_run = _Way(INT8, False, lambda _: entry)
    if written.plan.target == "onnx":
        from cptquant.exporters.onnx.export import write_float_twin

        return [_Way(FLOAT, True, lambda _: write_float_twin(entry)), as_run]
    if written.plan.target == "gguf":
        exact = _Way(FLOAT, True, lambda work: _write_gguf(written, work, original=False), float_cache=True)
        alone = _Way(SIXTEEN, False, lambda work: _write_gguf(written, work, original=True), original=True)
        return [exact, as_run, alone]
    return [_Way(FLOAT, True, lambda _: entry)]


def _write_gguf(written: Written, work: Path, *, original: bool) -> Path:
    """Our dequantized weights in float32, with which llama.cpp rounds no activation; or the original in 16 bits."""
    from cptquant.exporters.gguf.tensors import list_tensors
    from cptquant.exporters.gguf.write import write_file

    plan, shards, path = written.plan, written.shards, work / ("original.gguf" if original else "float32.gguf")
    if original:
        keep = written.model.layout.keep_format.name
        plan = Plan.model_validate({**plan.model_dump(), "formats": dict.fromkeys(plan.formats, keep)})
    write_file(path, written.model, list_tensors(written.model, plan, shards, in_float32=not original))
    return path


def _read(folder: Path, index: int) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{index}.npy"))


def compare_token_ids(model: LoadedModel, entry: Path) -> tuple[str, str]:
    """How the file's tokenizer cuts mixed text, whole and line by line, unlike Hugging Face's.

    Returns:
        (a difference that no export may have, one that llama.cpp's WordPiece has whatever the file says); "" for none.

    Raises:
        MissingEngineError: llama.cpp is not installed. EngineError: it refuses the file.
    """
    mixed, apart = MIXED_TEXT, list[str]()
    if read_vocabulary(model).model == "bert":
        apart = [text.strip() for text in _DECOMPOSED]
        for text in _DECOMPOSED:
            mixed = mixed.replace(text, "")
    texts = [mixed, *[line for line in mixed.splitlines() if line.strip()]]
    tokenizer = model.require_tokenizer()
    found: list[list[int]] = run_engine("llamacpp", entry, "tokenize", texts=texts + apart)["ids"]
    differences: dict[str, str] = {}
    for text, theirs in zip(texts + apart, found, strict=True):
        ours = cast(list[int], tokenizer.encode(text, add_special_tokens=True))
        if theirs != ours:
            differences[text] = _spell_token_difference(text, ours, theirs)
    # of those that fail, the shortest text that shows it
    failing = [differences[text] for text in texts if text in differences]
    stated = [differences[text] for text in apart if text in differences]
    return failing[-1] if failing else "", stated[0] if stated else ""


def _spell_token_difference(text: str, ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(ours), len(theirs)) if at is None else at
    engine, own = (ids[at : at + 8] if at < len(ids) else "the end" for ids in (theirs, ours))
    shown = text if len(text) <= 80 else text[:77] + "..."
    return (
        f"the engine's tokenizer cuts {shown!r} unlike Hugging Face's: first at position {at}, where it gives {engine} "
        f"and Hugging Face {own}"
    )


def refuse_differences(
    entry: Path, compared: list[EngineComparison], round_trip: list[SiteRoundTrip], tokens: str
) -> None:
    """Fail an export that is not our model; what is not a number is refused with a bound and without.

    The engine's rounding of the original's activations is stated only: it is no property of what was written.

    Raises:
        EngineError: with everything that differs.
    """
    differing = [record for record in round_trip if record.largest_error != 0]
    ours = [way for way in compared if way.weights == "quantized"]
    over = [way for way in ours if not way.distance <= (sys.float_info.max if way.bound is None else way.bound)]
    reasons = [_spell_over(way) for way in over]
    if differing and not over:
        reasons.append("read back from the file")
    if differing:
        named = ", ".join(f"{record.site} (by up to {record.largest_error:.3g})" for record in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        cause = f"; tensors that differ from ours: {named}{more}"
    else:
        cause = "; every quantized tensor reads back exactly, so the engine computes something else" if over else ""
    if tokens:
        cause += f"; {tokens}"
    if reasons or tokens:
        stated = f" ({'; '.join(reasons)})" if reasons else ""
        raise EngineError(
            f"{entry} is not our model in the engine{stated}{cause}; the files are kept for a look, do not use them"
        )


def _spell_over(way: EngineComparison) -> str:
    allowed = "a finite value is expected" if way.bound is None else f"allowed {way.bound:g}"
    unit = " of 1 - cosine" if way.kl_nats is None else " nats"
    return f"{way.arithmetic}: {way.distance:.3g}{unit}, {allowed}"
