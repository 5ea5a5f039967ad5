"""What every quantizer that goes on from a finished GPTQ solution shares."""

from cptquant.quantizers.gptq import Gptq


class GoesOn:
    """A quantizer with a `start`, whose products and scales it keeps to."""

    start: Gptq

    @property
    def coarse_products(self) -> bool:
        """As of the start."""
        return self.start.coarse_products

    @property
    def clip_search(self) -> bool:
        """As of the start."""
        return self.start.clip_search
