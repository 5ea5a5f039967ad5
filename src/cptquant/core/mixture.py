"""Which source each window of a training mixture comes from: exact shares after every prefix, not only on average."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cptquant.core.artifact import Frozen
from cptquant.core.errors import DataError

CHAT_SHARE = 0.2
"""Default of --chat-share: instructions and preferences together, as a share of all tokens. The paper gives none
(arXiv 2407.10804, said by a reviewer); a fifth is in the range that replay needs (arXiv 2403.08763)."""

CHAT_SOURCES = ("instructions", "preferences")
_ROUNDING = 1e-9
"""Shares whose sum is this near to 1 are taken as adding up."""


class SourceCount(Frozen):
    """What a mixture took from one source.

    Attributes:
        share: of all tokens, as asked for. windows, tokens: taken so far.
        held_tokens: that the source has, in whole windows. epochs: taken over held.
    """

    name: str
    share: float
    windows: int
    tokens: int
    held_tokens: int

    @property
    def epochs(self) -> float:
        """Passes over the source; above 1 its windows were repeated."""
        return self.tokens / self.held_tokens


def check_share(flag: str, share: float) -> None:
    """Refuse a share that is none.

    Raises:
        DataError: outside [0, 1], or no number.
    """
    if not 0 <= share <= 1:
        raise DataError(f"{flag} {share:g} is no share of the tokens; give a number from 0 to 1")


def divide_tokens(ratio: float, chat_share: float, available: Sequence[str]) -> dict[str, float]:
    """Shares of domain, general, instructions and preferences.

    The domain takes `ratio`. Of the rest, `chat_share` of all tokens (less where the rest is smaller) goes to the chat
    sources there are, in equal parts, and what then remains to general text.

    Args:
        available: sources that were given, of "domain", "general" and `CHAT_SOURCES`.

    Raises:
        DataError: a share outside [0, 1]; a share for a source that was not given.
    """
    check_share("--ratio", ratio)
    check_share("--chat-share", chat_share)
    chat = [name for name in CHAT_SOURCES if name in available]
    chat_total = min(chat_share, 1 - ratio) if chat else 0.0
    general = 1 - ratio - chat_total
    shares = {"domain": ratio, "general": 0.0 if general < _ROUNDING else general}
    shares |= {name: chat_total / len(chat) for name in chat}
    shares = {name: share for name, share in shares.items() if share > 0}
    missing = [name for name in shares if name not in available]
    if missing:
        rest = " or put it all on the domain with --ratio 1" if missing == ["general"] else ""
        raise DataError(
            f"--ratio {ratio:g} leaves {shares[missing[0]]:.3g} of the tokens to {missing[0]} text, and none was "
            f"given; give it with --{missing[0]}{rest}"
        )
    return shares


def apportion_windows(shares: Sequence[float], windows: int) -> NDArray[np.int16]:
    """The source of every window.

    After any k windows the count of source i is within 1 - 1/(2n - 2) of shares[i] * k (Tijdeman, The chairman
    assignment problem, Discrete Mathematics 32, 1980): of the sources far enough behind, the one whose turn would be
    overdue first comes next.

    Args:
        shares: of n sources, at least 0, adding up to 1.

    Returns:
        (windows,) index of the source.

    Raises:
        DataError: a negative share, or shares that do not add up to 1.
    """
    if any(not share >= 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=_ROUNDING):
        raise DataError(
            f"the shares {', '.join(f'{share:g}' for share in shares)} are not parts of 1 that add up to it"
        )
    positive = [index for index, share in enumerate(shares) if share > 0]
    if len(positive) == 1:
        return np.full(windows, positive[0], dtype=np.int16)
    slack = 1 / (2 * len(positive) - 2)
    order = np.empty(windows, dtype=np.int16)
    counts = dict.fromkeys(positive, 0)
    for place in range(windows):
        behind = {index: shares[index] * (place + 1) - counts[index] for index in positive}
        eligible = [index for index in positive if behind[index] >= slack - _ROUNDING]
        chosen = min(eligible, key=lambda index: (1 - slack - behind[index]) / shares[index])
        counts[chosen] += 1
        order[place] = chosen
    return order


def check_epochs(counts: Sequence[SourceCount], max_epochs: float, flags: Mapping[str, str] = {}) -> None:
    """Refuse a mixture that would repeat a source too often.

    Args:
        flags: source -> the flag that gives more of it; `--NAME` where it is missing.

    Raises:
        DataError: the tokens the source holds, the tokens asked of it, and what to do.
    """
    for count in counts:
        if count.epochs > max_epochs * (1 + _ROUNDING):
            raise DataError(
                f"{count.name} text holds {count.held_tokens:,} tokens and its share {count.share:.3g} asks for "
                f"{count.tokens:,}: {count.epochs:.1f} epochs, above --max-epochs {max_epochs:g}; give more text with "
                f"{flags.get(count.name, '--' + count.name)}, fewer --tokens, a smaller share, or a larger --max-epochs"
            )
