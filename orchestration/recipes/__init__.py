"""Recipes: named experiments. A name is a method on a setting (`ctrw_digits`), with a variant of the method behind it where there is one.

`library` finds and reads the files in `settings/` and `methods/`, `names` splits names, `composition` stacks what they say, `loading` adds
flags and validates. Importing this brings neither PyTorch nor schemas: what is called names is answered from names of files.
"""

from orchestration.recipes.composition import compose
from orchestration.recipes.loading import LoadedRecipe, load_recipe, parse_experiment, parse_overrides, recipe_tree
from orchestration.recipes.names import RecipeName, is_recipe, list_recipes, listed_recipes, possible_names, split_name
from orchestration.recipes.trees import set_dotted

__all__ = [
    "LoadedRecipe",
    "RecipeName",
    "compose",
    "is_recipe",
    "list_recipes",
    "listed_recipes",
    "load_recipe",
    "parse_experiment",
    "parse_overrides",
    "possible_names",
    "recipe_tree",
    "set_dotted",
    "split_name",
]
