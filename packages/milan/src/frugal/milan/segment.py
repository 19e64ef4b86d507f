"""Train UperNet on an encoder, pixel by pixel: ``python -m frugal.milan.segment RECIPE ...``."""

from frugal.common.train import main
from frugal.milan.segmentation_recipes import SEGMENTATION

if __name__ == "__main__":
    main(SEGMENTATION, method="milan", script="segment")
