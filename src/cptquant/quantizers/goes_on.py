"""What every quantizer that goes on from a finished solution shares."""

from cptquant.quantizers.gptq import Gptq


class GoesOn:
    """A quantizer with a `start`, whose products and scales it keeps to; the start may go on from another."""

    start: "Gptq | GoesOn"

    @property
    def first(self) -> Gptq:
        """The GPTQ that all learning begins with."""
        return self.start if isinstance(self.start, Gptq) else self.start.first

    @property
    def coarse_products(self) -> bool:
        """As of the start."""
        return self.start.coarse_products

    @property
    def clip_search(self) -> bool:
        """As of the start."""
        return self.start.clip_search
