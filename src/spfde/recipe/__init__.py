"""Plain data: a recipe, named recipes, and what to cite for one."""

from spfde.recipe.recipe import Recipe

__all__ = ["Recipe"]
