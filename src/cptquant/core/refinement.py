"""What swaps between sites did to a plan, round by round."""

from typing import ClassVar

from cptquant.core.artifact import Artifact, Frozen


class SwapRound(Frozen):
    """One round of the search.

    Attributes:
        steps, moves: single steps measured; swaps judged. passes: plans times sequences judged in all.
        before, after: site -> format, of the sites of the best swap; empty where there was none to judge.
        expected: what its steps alone added up to, in `unit`.
        difference, stderr: of the loss with it from the loss without it, paired over `sequences` fresh sequences.
        taken: whether that was significant.
    """

    steps: int
    moves: int
    passes: int
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    expected: float = 0.0
    difference: float = 0.0
    stderr: float = 0.0
    sequences: int = 0
    taken: bool = False


class Refinement(Artifact):
    """Result of `--refine-swaps` (refinement.json).

    Attributes:
        search: its hyper-parameters. text: what swaps were judged on. unit: of the differences.
        formats: of the plan that came out: site name -> format name.
    """

    SCHEMA: ClassVar[str] = "cptquant.refinement"
    MADE_BY: ClassVar[str] = "cptquant allocate RUN --budget BUDGET --refine-swaps ROUNDS"

    search: str
    text: str
    unit: str
    rounds: tuple[SwapRound, ...]
    formats: dict[str, str]

    @property
    def sentence(self) -> str:
        """For the plan's notes."""
        taken = [found for found in self.rounds if found.taken]
        if not taken:
            return f"no swap between sites was better by its own loss on {self.text}; the plan stayed as it was"
        gain = -sum(found.difference for found in taken)
        sites = len({name for found in taken for name in found.after})
        swaps = "1 swap" if len(taken) == 1 else f"{len(taken)} swaps"
        return f"{swaps} changed {sites} sites and took {gain:.2g} {self.unit} off the loss on {self.text}"
