"""Training that wins back what rounding lost, on the grid of the plan."""
