"""cptquant: measure which layers break, spend the bits where they matter, hand over a checkpoint that runs."""
