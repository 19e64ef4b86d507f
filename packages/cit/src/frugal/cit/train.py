"""Train CiT: ``python -m frugal.cit.train RECIPE [--field value ...]``."""

from frugal.cit.recipes import RECIPES
from frugal.common.train import main

if __name__ == "__main__":
    main(RECIPES, method="cit")
