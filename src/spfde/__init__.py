"""Sparse training, progressive layer freezing and circular data sieving for PyTorch, under one schedule.

The names below are loaded when they are first used, so that the command line starts without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "spfde.recipe",
    "StaticSparse": "spfde.sparsity",
    "SET": "spfde.sparsity",
    "RigL": "spfde.sparsity",
    "MEST": "spfde.sparsity",
    "SETITOP": "spfde.sparsity",
    "RigLITOP": "spfde.sparsity",
    "SNIP": "spfde.sparsity",
    "GraSP": "spfde.sparsity",
    "SynFlow": "spfde.sparsity",
    "DeepR": "spfde.sparsity",
    "DSR": "spfde.sparsity",
    "SNFS": "spfde.sparsity",
    "TopKAST": "spfde.sparsity",
    "GMP": "spfde.sparsity",
    "STR": "spfde.sparsity",
    "Unstructured": "spfde.sparsity",
    "Block": "spfde.sparsity",
    "NM": "spfde.sparsity",
    "Kernels": "spfde.sparsity",
    "Patterns": "spfde.sparsity",
    "Channels": "spfde.sparsity",
    "ProgressiveFreezing": "spfde.freezing",
    "BlockwiseCosine": "spfde.freezing",
    "DataSieving": "spfde.sieving",
    "OneTimeRemoval": "spfde.sieving",
    "PrefixCache": "spfde.engines.prefix_cache",
    "attach": "spfde.session.attach",
    "Session": "spfde.session.session",
    "register": "spfde.core.registry",
    "plan": "spfde.planning",
    "Plan": "spfde.planning",
    "SpfdeError": "spfde.core.errors",
    "InvalidArgument": "spfde.core.errors",
    "StateMismatch": "spfde.core.errors",
    "UsageError": "spfde.core.errors",
    "TrainingDiverged": "spfde.core.errors",
    "DataError": "spfde.core.errors",
    "RunFolderError": "spfde.core.errors",
    "WeightsFileError": "spfde.core.errors",
    "cite": "spfde.recipe.citation",
}
_ROOMS = ("presets", "errors", "sparsity", "freezing", "sieving", "cost", "export", "analysis")

__all__ = [*_HOMES, *_ROOMS, "__version__"]

if TYPE_CHECKING:
    from spfde import analysis as analysis
    from spfde import cost as cost
    from spfde import errors as errors
    from spfde import export as export
    from spfde import freezing as freezing
    from spfde import presets as presets
    from spfde import sieving as sieving
    from spfde import sparsity as sparsity
    from spfde.core.errors import DataError as DataError
    from spfde.core.errors import InvalidArgument as InvalidArgument
    from spfde.core.errors import RunFolderError as RunFolderError
    from spfde.core.errors import SpfdeError as SpfdeError
    from spfde.core.errors import StateMismatch as StateMismatch
    from spfde.core.errors import TrainingDiverged as TrainingDiverged
    from spfde.core.errors import UsageError as UsageError
    from spfde.core.errors import WeightsFileError as WeightsFileError
    from spfde.core.registry import register as register
    from spfde.engines.prefix_cache import PrefixCache as PrefixCache
    from spfde.freezing import BlockwiseCosine as BlockwiseCosine
    from spfde.freezing import ProgressiveFreezing as ProgressiveFreezing
    from spfde.planning.bill import Plan as Plan
    from spfde.planning.bill import plan as plan
    from spfde.recipe.citation import cite as cite
    from spfde.recipe.recipe import Recipe as Recipe
    from spfde.session.attach import attach as attach
    from spfde.session.session import Session as Session
    from spfde.sieving import DataSieving as DataSieving
    from spfde.sieving import OneTimeRemoval as OneTimeRemoval
    from spfde.sparsity import DSR as DSR
    from spfde.sparsity import GMP as GMP
    from spfde.sparsity import MEST as MEST
    from spfde.sparsity import NM as NM
    from spfde.sparsity import SET as SET
    from spfde.sparsity import SETITOP as SETITOP
    from spfde.sparsity import SNFS as SNFS
    from spfde.sparsity import SNIP as SNIP
    from spfde.sparsity import STR as STR
    from spfde.sparsity import Block as Block
    from spfde.sparsity import Channels as Channels
    from spfde.sparsity import DeepR as DeepR
    from spfde.sparsity import GraSP as GraSP
    from spfde.sparsity import Kernels as Kernels
    from spfde.sparsity import Patterns as Patterns
    from spfde.sparsity import RigL as RigL
    from spfde.sparsity import RigLITOP as RigLITOP
    from spfde.sparsity import StaticSparse as StaticSparse
    from spfde.sparsity import SynFlow as SynFlow
    from spfde.sparsity import TopKAST as TopKAST
    from spfde.sparsity import Unstructured as Unstructured


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = import_module(f"spfde.{name}")
    else:
        raise AttributeError(f"module 'spfde' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
