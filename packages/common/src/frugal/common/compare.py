"""``python -m frugal.common.compare runs/a runs/b --out compared``: several models on one page."""

from frugal.common.report.compare import main

if __name__ == "__main__":
    main()
