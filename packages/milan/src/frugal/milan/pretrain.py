"""Pretrain an encoder: ``python -m frugal.milan.pretrain RECIPE [--field value ...]``."""

from frugal.common.train import main
from frugal.milan.recipes import RECIPES

if __name__ == "__main__":
    main(RECIPES, method="milan", script="pretrain")
