"""What will happen, epoch by epoch, and its price."""

from spfde.planning.bill import Plan, plan

__all__ = [
    "Plan",
    "plan",
]
