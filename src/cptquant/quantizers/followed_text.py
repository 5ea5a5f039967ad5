"""The original, run beside a changed model on the same text, batch by batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cptquant.models.load import LoadedModel
from cptquant.models.stream import ModelStream, QuantizedSource
from cptquant.models.text import TokenSet
from cptquant.quantizers.output_divergence import OutputDivergence, mask_for_task

_SPREAD_SEQUENCES = 16
"""From which the spread of each block's hidden states is taken."""
_TINY = 1e-30


class FollowedText:
    """Tokens with a stream of the changed model, one of the original, and the judge between their outputs.

    Args:
        model: the original. weights: the changed model's. batch_size: sequences a batch.

    Attributes:
        original, stream: of the original and of the changed model, both before the first block.
        judge: of a batch's outputs, once `follow` was called for this batch.
    """

    def __init__(self, model: LoadedModel, weights: QuantizedSource, tokens: TokenSet, batch_size: int) -> None:
        seen, judged = mask_for_task(model, tokens)
        self.original = ModelStream(model, seen, batch_size=batch_size)
        self.stream = ModelStream(model, seen, weights=weights, batch_size=batch_size)
        self._last: dict[int, Tensor] = {}
        self.judge = OutputDivergence(self.original, self.stream, self._last, judged)

    @torch.no_grad()
    def follow(self, batch: int, originals: Sequence[nn.Module]) -> list[Tensor]:
        """The original's hidden state after every block; the judge keeps the last one, of this batch alone."""
        states: list[Tensor] = []
        hidden = self.original.hidden[batch]
        for index, block in enumerate(originals):
            hidden = self.original.run_block_at(block, index, batch, hidden)
            states.append(hidden)
        self._last.clear()
        self._last[batch] = hidden
        return states


class StateDistance:
    """Mean over blocks of the mean squared distance of hidden states from the original's, in units of their spread."""

    def __init__(self, text: FollowedText, originals: Sequence[nn.Module]) -> None:
        stream = text.original
        batches = range(min(len(stream.batches), max(1, _SPREAD_SEQUENCES // len(stream.hidden[0]))))
        states = [text.follow(batch, originals) for batch in batches]
        masks = torch.cat([stream.batches[batch].attention_mask for batch in batches]).bool().flatten()
        self._spreads = [
            _spread(torch.cat([found[index] for found in states]).flatten(0, 1)[masks])
            for index in range(len(originals))
        ]

    def gradient(
        self,
        index: int,
        mask: Tensor,  # (b, T)
        hidden: Tensor,  # (b, T, width): output of block `index`
        original: Tensor,  # (b, T, width)
    ) -> Tensor:
        """With respect to `hidden`."""
        scale = 2 / (self._spreads[index] * max(1, int(mask.sum())) * len(self._spreads))
        return ((hidden - original) * mask.unsqueeze(-1)).mul_(scale)


def _spread(
    states: Tensor,  # (tokens, width)
) -> float:
    """Mean squared distance from the mean."""
    return max(float((states - states.mean(dim=0)).square().sum(dim=1).mean()), _TINY)
