"""Train FLIP: ``python -m frugal.flip.train RECIPE [--field value ...]``."""

from frugal.common.train import main
from frugal.flip.recipes import RECIPES

if __name__ == "__main__":
    main(RECIPES, method="flip")
