"""`python -m cptquant`, which `torchrun` and `accelerate launch` start."""

from cptquant.cli.main import main

if __name__ == "__main__":
    main()
