"""What will happen, epoch by epoch, and its price."""

from spfde.planning.bill import Blueprint, Plan, check_epochs, check_recipe, draw, plan, scoring_flops

__all__ = ["Blueprint", "Plan", "check_epochs", "check_recipe", "draw", "plan", "scoring_flops"]
