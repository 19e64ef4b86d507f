"""Fine-tune an encoder on images with classes: ``python -m frugal.milan.finetune RECIPE ...``."""

from frugal.common.train import main
from frugal.milan.transfer_recipes import FINE_TUNING

if __name__ == "__main__":
    main(FINE_TUNING, method="milan", script="finetune")
