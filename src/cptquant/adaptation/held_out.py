"""What a causal language model makes of text that it is not trained on."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cptquant.core.adaptation import HeldOutLoss
from cptquant.models.estimates import cluster_by_document, estimate_ratio
from cptquant.models.losses import IGNORED, scored_targets, sequence_nll
from cptquant.models.text import TokenSet


def held_out_loss(model: PreTrainedModel, tokens: TokenSet, batch_windows: int = 8) -> HeldOutLoss:
    """Mean loss of the next token, each window by itself, with an error clustered by document."""
    training = model.training
    model.eval()
    targets = scored_targets(tokens, "causal_lm")
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, tokens.sequence_count, batch_windows):
            rows = slice(start, start + batch_windows)
            logits = model(input_ids=tokens.input_ids[rows].to(device), use_cache=False).logits
            sums.append(sequence_nll(logits.cpu(), targets[rows]).sums)
    model.train(training)
    found = estimate_ratio(torch.cat(sums), (targets != IGNORED).sum(dim=1), cluster_by_document(tokens.documents))
    return HeldOutLoss(nll_nats_per_token=found.value, n=found.n, stderr=found.stderr)


@torch.no_grad()
def reads_documents_apart(model: PreTrainedModel) -> bool:
    """Whether positions that start anew keep a model from attending to the document before: it is tried."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None] + 1
    positions = torch.arange(8, device=ids.device)[None] % 4
    other = torch.where(torch.arange(8, device=ids.device) < 4, ids + 1, ids)
    first, second = (
        model(input_ids=each, position_ids=positions, use_cache=False).logits[0, 4:].float() for each in (ids, other)
    )
    return bool(torch.allclose(first, second, atol=1e-3 * float(first.abs().max())))
