"""The spellings of `--quantizer`."""

from cptquant.core.errors import UserError
from cptquant.models.text import TokenSet
from cptquant.quantizers.gptq import Gptq
from cptquant.quantizers.held_out import given_text
from cptquant.quantizers.kl_rounding import KlRounding
from cptquant.quantizers.learned_blocks import LearnedBlocks
from cptquant.quantizers.rtn import Rtn
from cptquant.quantizers.signround import SignRound

Quantizer = Gptq | Rtn | SignRound | LearnedBlocks | KlRounding

QUANTIZERS: dict[str, Quantizer] = {
    "gptq": Gptq(),
    "rtn": Rtn(),
    "signround": SignRound(),
    "block-ap": LearnedBlocks(),
    "kl-rounding": KlRounding(),
}


def find_quantizer(name: str) -> Quantizer:
    """A quantizer with its default hyper-parameters.

    Raises:
        UserError: no such quantizer.
    """
    if name not in QUANTIZERS:
        raise UserError(f"--quantizer {name!r} is unknown; choose one of: {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]


def start_of(quantizer: LearnedBlocks | KlRounding) -> Quantizer:
    """The quantizer whose result learning goes on from."""
    start = quantizer.start
    assert isinstance(start, Quantizer)
    return start


def start_text(quantizer: LearnedBlocks | KlRounding, tokens: TokenSet) -> TokenSet:
    """What that quantizer reads of the calibration text."""
    return given_text(tokens) if isinstance(quantizer, LearnedBlocks) else tokens


def first_pass(quantizer: Quantizer, tokens: TokenSet) -> tuple[Quantizer, TokenSet]:
    """What all learning begins with, and what that reads; the quantizer itself where it learns nothing afterwards."""
    while isinstance(quantizer, LearnedBlocks | KlRounding):
        quantizer, tokens = start_of(quantizer), start_text(quantizer, tokens)
    return quantizer, tokens


def spelling_of(quantizer: Quantizer) -> str:
    """How `--quantizer` spells a method, whatever its hyper-parameters."""
    return next(name for name, known in QUANTIZERS.items() if type(known) is type(quantizer))
