"""The memory plan of a run on a GPU: made before the base is loaded, kept to while it trains, and compared with what was used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.data.sets.prepare import Prepared
from nybble.distributed.group import all_gather, ranks_that_share
from nybble.errors import RecipeError, TrainingError
from nybble.plan.free_memory import Memory, device_memory
from nybble.plan.placing import changed
from nybble.plan.schedule import Schedule
from nybble.plan.step import BACKWARD, FORWARD, KEPT, LOADING, LOSS, unplanned
from nybble.preflight.plan.card import Card, limit_bytes
from nybble.preflight.plan.make import RowFacts, RunPlan, as_stored, make_plan
from nybble.preflight.plan.report import command, one_line
from nybble.preflight.plan.rows import row_facts
from nybble.preflight.plan.sizes import Sizes
from nybble.recipe import Recipe
from nybble.run.summary import MemorySummary
from nybble.terminal import bytes_text

WRONG = 0.05  # share by which a plan may be exceeded before it is called wrong


@dataclass(frozen=True)
class MemoryPlan:
    """What a run is expected to reserve on its GPU."""

    plan: RunPlan
    total: int
    """Bytes of the GPU."""

    def fitted(self, recipe: Recipe) -> Recipe:
        """The recipe that was planned, with what the plan changes to make it fit."""
        return changed(recipe, self.plan.option.changes)

    @property
    def line(self) -> str:
        """The plan in a line."""
        return one_line(self.plan)

    def enforce(self, device: torch.device) -> None:
        """Keep torch to the recipe's limit, if it names one."""
        limit = self.plan.limit
        if self.plan.recipe.train.vram is not None and limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / self.total), device)

    def compare(self, measured: int) -> MemorySummary:
        """The plan beside what was reserved.

        Args:
            measured: bytes, torch.cuda.max_memory_reserved since the base was loaded.
        """
        prediction = self.plan.option.prediction
        peak = max((each for each in prediction.moments if each.name != LOADING), key=lambda moment: moment.total)
        # What follows from the tokens of a batch; the rest hardly varies.
        inexact = {name: peak.items[name] for name in (KEPT, BACKWARD, LOSS, FORWARD) if name in peak.items}
        item = max(inexact, key=lambda name: inexact[name], default="") if measured > (1 + WRONG) * peak.total else ""
        return MemorySummary(
            predicted_gb=round(peak.total / 1e9, 3),
            measured_gb=round(measured / 1e9, 3),
            moment=peak.name,
            exceeded_by=item,
        )


def check_limit(recipe: Recipe, device: torch.device) -> None:
    """Refuse a limit that cannot be kept to, before anything is read.

    Raises:
        RecipeError: the recipe limits a GPU's memory, but there is none, or what it asks for has no plan.
    """
    what = _unplanned_on(recipe, device)
    if what is not None and recipe.train.vram is not None:
        raise RecipeError(
            f"train.vram={recipe.train.vram} limits the memory of a GPU that nybble plans, but this run has {what}",
            fix="leave train.vram out",
        )


def plan_memory(
    recipe: Recipe, sizes: Sizes, data: Prepared, schedule: Schedule, device: torch.device, *, is_new: bool,
    others: int,
) -> MemoryPlan | None:  # fmt: skip
    """The plan of a run; None on a CPU, and for what has no plan.

    Args:
        recipe: the recipe.
        sizes: of the base.
        data: the rows.
        schedule: the steps.
        device: where it trains.
        is_new: whether the recipe may still change: a run that is resumed keeps to its own.
        others: bytes that this process has on the device beside the run and its base, such as another model.

    Raises:
        RecipeError: the limit is more than the GPU has, or the checkpoint's quantisation has no plan to keep to a limit by.
        TrainingError: nothing fits into the limit; it names what would.
    """
    if _unplanned_on(as_stored(recipe, sizes.stored), device) is not None:
        check_limit(as_stored(recipe, sizes.stored), device)
        return None
    memory = device_memory(device)
    # Of a base that is there already, as in a sweep, and of torch's cache: they are part of the plan.
    memory = Memory(memory.free + torch.cuda.memory_reserved(device) - others, memory.total)
    # Of several processes each must come to the same plan.
    memory = Memory(min(all_gather([memory.free])), min(all_gather([memory.total])))
    facts = row_facts(recipe, data, schedule)
    sharing = min(map(len, ranks_that_share()))  # what is spread over processes is spread over so many
    recipe = changed(recipe, {"train.processes": str(sharing)})
    return plan_within(recipe, sizes, facts, memory, torch.cuda.get_device_name(device), is_new=is_new)


def _unplanned_on(recipe: Recipe, device: torch.device) -> str | None:
    return "model.device=cpu" if device.type != "cuda" else unplanned(recipe)


def plan_within(
    recipe: Recipe, sizes: Sizes, facts: RowFacts, memory: Memory, name: str, *, is_new: bool = True
) -> MemoryPlan:
    """The plan of a run on a GPU.

    Args:
        recipe: the recipe; without train.vram it stays as it is.
        sizes: of the base.
        facts: the rows.
        memory: of the GPU.
        name: of the GPU.
        is_new: whether the recipe may still change.

    Raises:
        TrainingError: nothing fits into the limit; it names what would.
    """
    card = Card(name, memory.total, memory.free)
    vram = recipe.train.vram
    limit = limit_bytes(vram, card)
    assert limit is not None, "there is a card"
    plan = make_plan(recipe, sizes, limit=limit, card=card, facts=facts, adapt=vram is not None and is_new)
    if vram is not None and plan.verdict not in ("fits", "over"):
        shorter = plan.verdict == "shorter"
        raise TrainingError(
            f"train.vram={vram}: as written the run does not fit into {bytes_text(limit)}",
            fix=command(plan) if shorter else "a smaller model: this one does not fit, however lean",
        )
    return MemoryPlan(plan, memory.total)
