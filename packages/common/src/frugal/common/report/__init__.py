"""Pages about runs (``python -m frugal.common.report``) and models side by side (``compare``).

They are self-contained: no network, no script, light or dark as the reader's system is.
"""

from frugal.common.report.page import write_report as write_report
