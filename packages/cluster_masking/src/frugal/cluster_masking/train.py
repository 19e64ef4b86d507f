"""Train with Cluster Masking: ``python -m frugal.cluster_masking.train RECIPE [--field value]``."""

from frugal.cluster_masking.recipes import RECIPES
from frugal.common.train import main

if __name__ == "__main__":
    main(RECIPES, method="cluster_masking")
