"""Recipes: what to do to which model, read strictly, checked before anything is downloaded."""

from efficli.recipe.loading import LoadedRecipe, Places, load, load_with, no_place
from efficli.recipe.model import Bench, Calibration, Certificate, Export, Gates, Pass, Recipe, parse_recipe

__all__ = [
    "Bench", "Calibration", "Certificate", "Export", "Gates", "LoadedRecipe", "Pass", "Places", "Recipe", "load",
    "load_with", "no_place", "parse_recipe",
]  # fmt: skip
