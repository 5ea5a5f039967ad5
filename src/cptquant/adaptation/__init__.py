"""Domain adaptation: mixtures of text, Mix-CPT, format alignment, sweeps."""
