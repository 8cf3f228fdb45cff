"""From folders of runs, or of a comparison, to one page that can be sent around.

It reads folders only: no PyTorch, no session, so that a report can be made where nothing can be trained.
"""

from spfde.app.report.folders import RecordedRun, read_run

__all__ = ["RecordedRun", "read_run"]
