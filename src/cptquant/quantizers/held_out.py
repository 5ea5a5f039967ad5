"""Calibration text kept out of learning, to choose and to judge by."""

import torch

from cptquant.models.own_text import NO_DOCUMENT
from cptquant.models.text import TokenSet


def given_text(tokens: TokenSet) -> TokenSet:
    """What the person gave, without what the model wrote itself; all where it wrote everything."""
    given = (tokens.documents != NO_DOCUMENT).nonzero().flatten()
    return tokens if len(given) in (0, tokens.sequence_count) else tokens.subset(given)


def split_held_out(tokens: TokenSet, share: float, seed: int) -> tuple[TokenSet, TokenSet]:
    """(held out, learned on); the held-out sequences are spread evenly over what the model did not write itself.

    Args:
        tokens: two sequences or more. share: of the person's sequences that is held out, at least one sequence.
        seed: of the order of what is learned on.
    """
    given = int((tokens.documents != NO_DOCUMENT).sum())  # these come first
    held = min(max(1, round(share * given)), max(1, given // 2))
    chosen = torch.linspace(0, given - 1, held + 2)[1:-1].round().long() if held < given - 1 else torch.tensor([0])
    rest = torch.ones(tokens.sequence_count, dtype=torch.bool)
    rest[chosen] = False
    left = rest.nonzero().flatten()
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))
    return tokens.subset(chosen), tokens.subset(left[order])  # batches of both kinds of text
