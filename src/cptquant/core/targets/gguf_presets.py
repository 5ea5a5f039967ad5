"""Which type llama.cpp's presets give each tensor: the hand rules that a plan has to beat at no more bytes.

Rules as in llama.cpp's quantizer (`llama_tensor_get_type`): value and down projections of the first eighth, the last
eighth and every third block between get more bits, an attention's fused q, k, v counts as a value projection, the
output tensor (the token embedding where it is the head too) has 6 bits. Rows that a K type does not divide get
llama.cpp's own replacements. Mixtures of experts are not among our models. The tests compare with the engine's own
files (tests/exporters/test_llamacpp_presets.py; not the extra bits of 80 blocks).
"""

from collections.abc import Mapping

from cptquant.core.formats import QuantFormat, block_format
from cptquant.core.gguf_types import BLOCK_LAYOUTS, GgufType
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.targets.gguf_names import find_place

PRESETS: dict[str, GgufType] = {"Q2_K": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
"""Preset -> the type of a tensor that no rule singles out, from few bytes to many."""

_OTHER_ROWS: Mapping[GgufType, GgufType] = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
"""What llama.cpp replaces a type by where 256 does not divide the row (before 2026 Q4_0 was IQ4_NL, of equal bytes)."""
_ATTENTION_OUTPUT: Mapping[str, GgufType] = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}
_70B_BLOCKS = 80


def preset_formats(layout: ModelLayout, preset: str) -> dict[str, QuantFormat]:
    """Site name -> format of the preset, for every site of the layout; 16 bits where the file has no such tensor.

    Raises:
        KeyError: no such preset.
    """
    rules = _Rules(layout, preset)
    return {site.name: rules.format_of(site) for site in layout.sites}


class _Rules:
    def __init__(self, layout: ModelLayout, preset: str) -> None:
        self._layout, self._preset = layout, preset
        self._base: GgufType = PRESETS[preset]
        roles = {site.role: site for site in layout.block_sites}
        queries, keys = roles.get("q"), roles.get("k")
        self._shares_values = bool(queries and keys and queries.out_features >= 4 * keys.out_features)

    def format_of(self, site: Site) -> QuantFormat:
        place = find_place(self._layout.model_type, site.parameter_name)
        if place is None or not _is_quantized(place.tensor):
            return self._layout.keep_format
        chosen = self._choose(site, place.tensor)
        if site.in_features % BLOCK_LAYOUTS[chosen].block_columns == 0:
            return block_format(chosen)
        other = _OTHER_ROWS.get(chosen)
        fits = other is not None and site.in_features % BLOCK_LAYOUTS[other].block_columns == 0
        return block_format(other) if other is not None and fits else self._layout.keep_format

    def _choose(self, site: Site, tensor: str) -> GgufType:
        if site.block_index is None:
            is_output = tensor.startswith("output.") or (tensor.startswith("token_embd.") and self._embedding_is_head)
            if not is_output:
                return self._base
            return "Q8_0" if site.in_features % BLOCK_LAYOUTS[self._base].block_columns else "Q6_K"
        kind = tensor.split(".")[2]
        if kind in ("attn_v", "attn_qkv"):
            return self._value(site.block_index)
        if kind == "ffn_down":
            return self._down(site.block_index)
        if kind == "attn_output":
            return _ATTENTION_OUTPUT.get(self._preset, self._base)
        return self._base

    @property
    def _embedding_is_head(self) -> bool:
        """llama.cpp takes the embedding for the output where the file has none: encoders, and shared heads."""
        return self._layout.shared_head is not None or not any(site.role == "head" for site in self._layout.sites)

    def _value(self, block_index: int) -> GgufType:
        chosen: GgufType = self._base
        if self._preset == "Q2_K":
            chosen = "Q4_K" if self._shares_values else "Q3_K"
        elif self._preset == "Q3_K_M":
            chosen = "Q5_K" if block_index < 2 else "Q4_K"
        elif self._has_more_bits(block_index):
            chosen = "Q6_K"
        is_70b = self._layout.block_count == _70B_BLOCKS and self._layout.model_type in ("llama", "mistral", "qwen2")
        return "Q5_K" if is_70b and chosen in ("Q3_K", "Q4_K") else chosen

    def _down(self, block_index: int) -> GgufType:
        if self._preset == "Q2_K":
            return "Q3_K"
        if self._preset == "Q3_K_M":
            return "Q5_K" if block_index < self._layout.block_count // 16 else "Q4_K"
        return "Q6_K" if self._has_more_bits(block_index) else self._base

    def _has_more_bits(self, block_index: int) -> bool:
        count = self._layout.block_count
        eighth = count // 8
        return block_index < eighth or block_index >= 7 * count // 8 or (block_index - eighth) % 3 == 2


def _is_quantized(tensor: str) -> bool:
    return tensor.endswith(".weight") and not tensor.startswith(("position_embd", "token_types"))
