"""Every option of a training run, and how a recipe is read and written."""

from nybble.recipe.dumping import dump_recipe
from nybble.recipe.loading import load_recipe
from nybble.recipe.options import (
    DataOptions,
    EngineOptions,
    ExportOptions,
    LoraOptions,
    ModelOptions,
    Options,
    PreferenceOptions,
    Recipe,
    TrackerOptions,
    TrainOptions,
    option_names,
)
from nybble.recipe.paths import PATH_OPTIONS, absolute_path, absolute_paths, absolute_tree

__all__ = [
    "PATH_OPTIONS",
    "DataOptions",
    "EngineOptions",
    "ExportOptions",
    "LoraOptions",
    "ModelOptions",
    "Options",
    "PreferenceOptions",
    "Recipe",
    "TrackerOptions",
    "TrainOptions",
    "absolute_path",
    "absolute_paths",
    "absolute_tree",
    "dump_recipe",
    "load_recipe",
    "option_names",
]
