"""What the tests of transfer learning share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `import segment_cases`
