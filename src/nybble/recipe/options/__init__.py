"""Every option of a training run: defined once, typed, with its documentation below it; one file per section."""

from nybble.recipe.options.data import DataOptions
from nybble.recipe.options.engine import EngineOptions
from nybble.recipe.options.export import ExportOptions
from nybble.recipe.options.lora import LoraOptions
from nybble.recipe.options.model import ModelOptions
from nybble.recipe.options.preference import PreferenceOptions
from nybble.recipe.options.recipe import Recipe, option_names
from nybble.recipe.options.section import Options
from nybble.recipe.options.tracker import TrackerOptions
from nybble.recipe.options.train import TrainOptions

__all__ = [
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
    "option_names",
]
