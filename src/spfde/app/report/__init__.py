"""From run folders to one page that can be sent around: tables, plots, and which figure is measured or modelled.

It reads run folders only: no PyTorch, no session, so that a report can be made where nothing can be trained.
"""

from spfde.app.report.folders import RecordedRun, read_run
from spfde.app.report.page import write_report

__all__ = ["RecordedRun", "read_run", "write_report"]
