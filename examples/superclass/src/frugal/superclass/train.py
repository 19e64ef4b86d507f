"""Train it: ``python -m frugal.superclass.train RECIPE [--field value ...]``."""

from frugal.common.train import main
from frugal.superclass.recipes import RECIPES

if __name__ == "__main__":
    main(RECIPES, method="superclass")
