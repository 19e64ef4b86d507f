"""Fixtures of the checkpoint tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `import small_stages`
