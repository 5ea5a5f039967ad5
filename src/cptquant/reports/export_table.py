"""An export for people: what was written, and how it compared in its engine."""

from cptquant.core.engine_export import EngineComparison, ExportRecord, MemoryUse
from cptquant.reports.quantities import spell_bytes


def export_table(record: ExportRecord) -> str:
    """A few lines for the terminal."""
    lines = [
        f"target     {record.target}",
        f"size       {spell_bytes(record.tensor_bytes)} of tensors in {spell_bytes(record.file_bytes)} of files",
        f"round trip {spell_round_trip(record)}",
        f"engine     {record.engine}",
    ]
    lines += [f"           {spell_comparison(found)}" for found in record.comparisons]
    if record.tokens_equal is not None:
        lines.append(f"token ids  {spell_tokens(record)}")
    if record.memory is not None:
        lines.append(f"memory     {spell_memory(record.memory)}")
    return "\n".join(lines) + "\n"


def spell_round_trip(record: ExportRecord) -> str:
    """How many quantized matrices the files give back exactly."""
    exact = sum(site.largest_error == 0 for site in record.round_trip)
    return f"{exact} of {len(record.round_trip)} quantized matrices exact"


def spell_tokens(record: ExportRecord) -> str:
    """Whether the engine's tokenizer is Hugging Face's."""
    if record.tokens_equal is None:
        return "not compared: the engine has no tokenizer of its own, or was not run"
    note = f"; but in Korean and Indic scripts {record.tokens_note}" if record.tokens_note else ""
    return f"{'equal to' if record.tokens_equal else 'NOT'} Hugging Face's on mixed text{note}"


def spell_comparison(found: EngineComparison) -> str:
    """One line: distance to our own model, with n, error and bound."""
    error = "" if found.stderr is None else f" ± {found.stderr:.1e}"
    way, is_ours = spell_way(found), found.weights == "quantized"
    if found.kl_nats is None:
        cosine, lowest = ("–" if value is None else f"{value:.6f}" for value in (found.cosine, found.cosine_lowest))
        bound = "" if found.bound is None else f", 1 - cosine allowed {found.bound:g}"
        other = "our model" if is_ours else "it"
        return f"{way}: cosine to {other} {cosine}{error}, lowest {lowest}, n = {found.n:,}{bound}"
    share = "–" if found.top1_agreement is None else f"{found.top1_agreement:.2%}"
    bound = "" if found.bound is None else f", allowed {found.bound:g}"
    divergence = f"KL({'ours' if is_ours else 'original'} ‖ engine) {found.kl_nats:.2e}{error} nats"
    return f"{way}: {divergence}, same top answer {share}, n = {found.n:,}{bound}"


def spell_way(found: EngineComparison) -> str:
    """How the engine computed, and with which weights where they are not the exported ones."""
    return found.arithmetic if found.weights == "quantized" else f"the original, {found.arithmetic}"


def spell_memory(memory: MemoryUse) -> str:
    """One line: predicted beside measured peak."""
    parts = (
        f"predicted {spell_bytes(memory.predicted_bytes)} for {memory.context:,} tokens of context (weights "
        f"{spell_bytes(memory.weight_bytes)}, cache {spell_bytes(memory.cache_bytes)}, engine "
        f"{spell_bytes(memory.base_bytes + memory.overhead_bytes)})"
    )
    if memory.measured_bytes is None:
        return parts
    off = memory.predicted_bytes / memory.measured_bytes - 1
    return f"{parts}; measured {spell_bytes(memory.measured_bytes)} ({off:+.0%})"
