"""What will happen, epoch by epoch, and its price."""

from spfde.planning.bill import Plan, plan, price, scoring_flops
from spfde.planning.blueprint import Blueprint, MaskedLayer, check_epochs, check_recipe, draw
from spfde.planning.timeline import Counts, Row, Timeline

__all__ = [
    "Blueprint",
    "Counts",
    "MaskedLayer",
    "Plan",
    "Row",
    "Timeline",
    "check_epochs",
    "check_recipe",
    "draw",
    "plan",
    "price",
    "scoring_flops",
]
