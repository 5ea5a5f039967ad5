"""How a long stage tells whoever watches how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called as work proceeds; must be cheap."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of the named stage are finished."""
        ...


def ignore_progress(stage: str, done: int, total: int) -> None:
    """For callers that do not watch."""
