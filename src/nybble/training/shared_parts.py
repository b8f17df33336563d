"""The base and the data that trainings in one process share, one after the other: a sweep loads and prepares them once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nybble.data.sets.prepare import Prepared
from nybble.engine.fuse import unfuse
from nybble.model.base.load import Base
from nybble.recipe import Recipe
from nybble.training.preparation import TrainingSetup

PreparedData = tuple[PreTrainedTokenizerBase, Prepared]


class SharedParts:
    """At most one base and one data set, each with what decides it in a recipe.

    A base is used again only if the training before it ended well and was removed from it. An error may leave a model with
    gradients, hooks, wrapped methods and half-written buffers: it is then loaded again.
    """

    def __init__(self) -> None:
        self.loads = 0
        """How often a base was loaded."""
        self._base: Base | None = None
        self._base_key: object = None
        self._others = 0
        self._is_bare = False
        self._data: PreparedData | None = None
        self._data_key: object = None

    def base(self, recipe: Recipe, dtype: torch.dtype, place: torch.device, load: Callable[[], Base]) -> Base:
        """The base of a recipe, without an adapter.

        Args:
            recipe: its section model is used.
            dtype: the compute type.
            place: the device on which it is loaded.
            load: loads it.
        """
        key = (recipe.model.model_dump(), dtype, place)
        if self._base is None or not self._is_bare or key != self._base_key:
            self._base = None
            free_memory()
            self._others = self.others_bytes(place)
            self._base, self._base_key = load(), key
            self.loads += 1
        self._is_bare = False
        return self._base

    def others_bytes(self, device: torch.device) -> int:
        """Bytes that this process has on a device beside a base that is kept, such as another model of the caller's."""
        if device.type != "cuda":
            return 0
        return torch.cuda.memory_allocated(device) if self._base is None else self._others

    def data(self, recipe: Recipe, prepare: Callable[[], PreparedData]) -> PreparedData:
        """Tokenizer and rows of a recipe.

        Args:
            recipe: its sections model and data are used, the seed of the split, the objective, and whether the layers are fused,
                for which batches have another form.
            prepare: prepares them.
        """
        model = recipe.model
        key = (
            *(recipe.data.model_dump(), model.path, model.revision, model.rope_scaling),
            *(recipe.train.seed, recipe.train.objective, recipe.engine.fused),
        )
        if self._data is None or key != self._data_key:
            self._data, self._data_key = prepare(), key
        return self._data

    def release(self, setup: TrainingSetup) -> None:
        """Remove a trained adapter from the base, which can then be used again.

        Where its weights are not all on the device, or a stored adapter may have brought embeddings of its own, the base is
        dropped instead.
        """
        recipe, fusion = setup.recipe, setup.fusion
        if recipe.engine.weights != "device" or recipe.adapter is not None:
            self._base = None
        else:
            unfuse(setup.model)
            bare: Any = setup.model.unload()
            if recipe.train.gradient_checkpointing and (fusion is None or fusion.fallen_back):
                bare.gradient_checkpointing_disable()
                bare.disable_input_require_grads()  # the hook that checkpointing needs on the embedding
            bare.requires_grad_(False)
            bare.eval()
            self._is_bare = True
        free_memory()


def free_memory() -> None:
    """Free what a training left: trainer, model and error refer to each other in cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
