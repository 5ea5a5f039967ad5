"""Negative log-likelihood, perplexity and bits per byte, each model by itself and paired with the original."""

import math
from collections.abc import Mapping

import torch
from tokenizers import decoders
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cptquant.core.evaluation import Measurement
from cptquant.models.estimates import Clusters, Estimate, estimate_ratio


def perplexity_measurements(
    nll_nats: Mapping[str, Tensor],  # subject -> (n,) float64: summed over the scored positions of each sequence
    counts: Tensor,  # (n,) int64: scored positions
    clusters: Clusters,
    *,
    note: str,
    scored_bytes: Tensor | None = None,  # (n,) int64: bytes of text behind the scored positions
) -> list[Measurement]:
    """`nll_nats_per_token` and `perplexity` of each subject, `bits_per_byte` if the bytes are known.

    With "original" among the subjects, every other also gets `nll_increase_nats_per_token`: subject minus original on
    the same tokens. Its error is that of the paired difference, far below the error of either value, because what
    makes one document harder than another cancels.
    """
    measurements: list[Measurement] = []
    original = nll_nats.get("original")
    for subject, sums in nll_nats.items():
        nll = estimate_ratio(sums, counts, clusters)
        measurements.append(nll.measurement("nll_nats_per_token", subject, "nats/token", f"{note}; {clusters.note}"))
        measurements.append(
            exponential(nll).measurement(
                "perplexity", subject, "perplexity", "exp of nll_nats_per_token, error by the delta method"
            )
        )
        if scored_bytes is not None:
            bits = estimate_ratio(sums / math.log(2), scored_bytes, clusters)
            measurements.append(
                bits.measurement("bits_per_byte", subject, "bits/byte", "over the bytes of the scored tokens")
            )
        if original is not None and subject != "original":
            increase = estimate_ratio(sums - original, counts, clusters)
            measurements.append(
                increase.measurement(
                    "nll_increase_nats_per_token", subject, "nats/token", "minus the original, on the same tokens"
                )
            )
    return measurements


def exponential(nll: Estimate) -> Estimate:
    """exp of an estimate; standard error by the delta method, exp(value) * stderr."""
    value = math.exp(nll.value)
    return Estimate(value, None if nll.stderr is None else value * nll.stderr, nll.n)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Bytes of text each token stands for, (vocabulary,) int64; special tokens 0.

    Known exactly for byte-level BPE only (OPT, GPT-2, Llama 3, Qwen): there a token is spelled with one character per
    byte. None for other tokenizers.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return None
    special, added = set(tokenizer.all_special_tokens), tokenizer.get_added_vocab()
    vocabulary = tokenizer.get_vocab()
    lengths = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, index in vocabulary.items():
        if token not in special:
            lengths[index] = len(token.encode()) if token in added else len(token)  # added tokens are plain text
    return lengths
