"""Train CLIPA: ``python -m frugal.clipa.train RECIPE [--field value ...]``."""

from frugal.clipa.recipes import RECIPES
from frugal.common.train import main

if __name__ == "__main__":
    main(RECIPES, method="clipa")
