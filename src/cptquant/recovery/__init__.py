"""Recovery: training that wins back what rounding lost."""
