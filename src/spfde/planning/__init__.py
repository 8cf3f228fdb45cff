"""What will happen, epoch by epoch, and its price."""

from spfde.planning.bill import Plan, plan
from spfde.planning.blueprint import traced_once

__all__ = [
    "Plan",
    "plan",
    "traced_once",
]
