"""The errors of this package, under their public name."""

from spfde.core.errors import (
    DataError,
    InvalidArgument,
    Problem,
    RunFolderError,
    SpfdeError,
    StateMismatch,
    TrainingDiverged,
    UsageError,
    WeightsFileError,
)

__all__ = [
    "DataError",
    "InvalidArgument",
    "Problem",
    "RunFolderError",
    "SpfdeError",
    "StateMismatch",
    "TrainingDiverged",
    "UsageError",
    "WeightsFileError",
]
