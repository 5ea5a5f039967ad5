"""An export for people: what was written, and how it compared in its engine."""

from cptquant.core.engine_export import EngineComparison, ExportRecord, MemoryUse
from cptquant.reports.quantities import spell_bytes


def export_table(record: ExportRecord) -> str:
    """A few lines for the terminal."""
    lossy = [site for site in record.round_trip if site.largest_error != 0]
    lines = [
        f"target     {record.target}",
        f"size       {spell_bytes(record.tensor_bytes)} of tensors in {spell_bytes(record.file_bytes)} of files",
        f"round trip {len(record.round_trip) - len(lossy)} of {len(record.round_trip)} quantized matrices exact",
        f"engine     {record.engine}",
    ]
    lines += [f"           {spell_comparison(found)}" for found in record.comparisons]
    if record.tokens_equal is not None:
        lines.append(
            f"tokenizer  {'gives' if record.tokens_equal else 'DOES NOT give'} Hugging Face's ids on mixed text"
        )
    if record.memory is not None:
        lines.append(f"memory     {spell_memory(record.memory)}")
    return "\n".join(lines) + "\n"


def spell_comparison(found: EngineComparison) -> str:
    """One line: distance to our own model, with n, error and bound."""
    error = "" if found.stderr is None else f" ± {found.stderr:.1e}"
    bound = "" if found.bound is None else f", allowed {found.bound:g}"
    if found.kl_nats is None:
        return (
            f"{found.arithmetic}: cosine to our model {found.cosine:.6f}{error}, lowest {found.cosine_lowest:.6f}, "
            f"n = {found.n:,}"
        )
    return (
        f"{found.arithmetic}: KL(ours ‖ engine) {found.kl_nats:.2e}{error} nats, same top answer "
        f"{found.top1_agreement:.2%}, n = {found.n:,}{bound}"
    )


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
