"""Targets: one file per engine, the rules they share in `base`, their spellings in `registry`."""

from cptquant.core.targets.base import Target, candidate_formats, list_refusals, low_rank_names
from cptquant.core.targets.registry import TARGETS, find_target

__all__ = ["TARGETS", "Target", "candidate_formats", "find_target", "list_refusals", "low_rank_names"]
