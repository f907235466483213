"""Recipes: what to do to which model, read strictly, checked before anything is downloaded."""

from efficli.recipe.model import (
    Bench,
    Calibration,
    Certificate,
    Export,
    Gates,
    Pass,
    Recipe,
    load,
    parse_recipe,
)

__all__ = ["Bench", "Calibration", "Certificate", "Export", "Gates", "Pass", "Recipe", "load", "parse_recipe"]
