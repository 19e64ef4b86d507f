"""Train a linear layer on a frozen encoder: ``python -m frugal.milan.linear_probe RECIPE ...``."""

from frugal.common.train import main
from frugal.milan.transfer_recipes import LINEAR_PROBING

if __name__ == "__main__":
    main(LINEAR_PROBING, method="milan", script="linear_probe")
