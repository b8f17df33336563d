"""The memory plan of a run; what needs a GPU is in tests/training/test_gpu.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nybble.errors import RecipeError, TrainingError
from nybble.plan.free_memory import Memory
from nybble.plan.known_models import KNOWN
from nybble.plan.placing import Rows
from nybble.plan.step import Prediction
from nybble.preflight.plan.make import RowFacts
from nybble.preflight.plan.sizes import Sizes
from nybble.recipe import load_recipe
from nybble.training.memory import check_limit, plan_memory, plan_within
from nybble.training.messages import memory_text

SIZES = Sizes(KNOWN["llama-2-7b"].shape, "built in")
FACTS = RowFacts(Rows(2048, lambda rows: 2048 * rows), 1000, 62, 2_000_000, 2048)
CARD = Memory(free=23_000_000_000, total=25_000_000_000)
WORDS = ("model.path=meta-llama/Llama-2-7b-hf", "data.path=my.jsonl", "data.max_length=2048")


def planned(*words: str, memory: Memory = CARD):
    return plan_within(load_recipe(None, [*WORDS, *words]), SIZES, FACTS, memory, "NVIDIA Test")


def test_without_a_limit_the_recipe_stays_as_it_is():
    memory = planned("train.micro_batch=8")
    recipe = load_recipe(None, [*WORDS, "train.micro_batch=8"])
    assert memory.fitted(recipe) == memory.plan.recipe == recipe
    print(memory.line)
    assert "of 23.00 GB on the GPU, most of it kept activations (" in memory.line


def test_a_recipe_that_may_not_fit_is_told_what_finds_a_way():
    memory = planned("train.micro_batch=16", "engine.policy=keep-all")
    print(memory.line)
    assert memory.plan.recipe.train.micro_batch == 16
    assert "it may not fit; train.vram=auto finds a way that does" in memory.line


def test_with_a_limit_the_recipe_is_made_to_fit():
    memory = planned("train.micro_batch=16", "train.vram=8GB")
    print(memory.line)
    train = memory.plan.recipe.train
    assert train.micro_batch * train.accumulation == 16 * 4
    assert train.micro_batch < 16
    assert memory.plan.option.prediction.peak.total <= 8e9
    assert f"with train.micro_batch={train.micro_batch} train.accumulation={train.accumulation}" in memory.line
    auto = planned("train.micro_batch=16", "train.vram=auto", memory=Memory(9_000_000_000, 25_000_000_000))
    assert auto.plan.limit == 9_000_000_000


def test_what_does_not_fit_ends_before_anything_is_loaded():
    with pytest.raises(TrainingError) as error:
        planned("train.vram=4.6GB", "train.eval_tasks=arc_easy")  # with which weights cannot be streamed
    print(error.value)
    assert "as written the run does not fit into 4.60 GB" in str(error.value)
    assert "nybble train meta-llama/Llama-2-7b-hf my.jsonl data.max_length=" in str(error.value)
    assert "train.vram=4.6GB" in str(error.value)
    with pytest.raises(TrainingError, match="a smaller model"):
        planned("train.vram=0.9GB")
    with pytest.raises(RecipeError, match=r"this machine has 25\.00 GB"):
        planned("train.vram=40GB")


def test_weights_move_to_the_host_where_nothing_else_fits():
    assert planned("train.vram=5GB").plan.recipe.engine.weights == "device"
    memory = planned("train.vram=4.5GB")
    assert memory.plan.recipe.engine.weights == "host"
    assert "engine.weights=host" in memory.line


def test_a_limit_is_refused_where_there_is_nothing_to_limit():
    recipe = load_recipe(None, [*WORDS, "train.vram=8GB"])
    with pytest.raises(RecipeError, match=r"this run has model\.device=cpu"):
        check_limit(recipe, torch.device("cpu"))
    plain = load_recipe(None, [*WORDS, "train.vram=8GB", "lora.dora=true"])
    with pytest.raises(RecipeError, match="Transformers computes the layers"):
        check_limit(plain, torch.device("cuda"))
    free = load_recipe(None, [*WORDS, "lora.dora=true"])
    assert plan_memory(free, SIZES, None, None, torch.device("cuda"), is_new=True, others=0) is None
    eight = dataclasses.replace(SIZES, stored="int8")
    # A checkpoint that came in 8 bits: Transformers computes its layers.
    assert (
        plan_memory(load_recipe(None, list(WORDS)), eight, None, None, torch.device("cuda"), is_new=True, others=0)
        is None
    )
    with pytest.raises(RecipeError, match=r"model\.quantization=int8"):
        plan_memory(recipe, eight, None, None, torch.device("cuda"), is_new=True, others=0)
    assert (
        plan_memory(load_recipe(None, list(WORDS)), SIZES, None, None, torch.device("cpu"), is_new=True, others=0)
        is None
    )


def test_layers_that_transformers_computes_have_a_plan_too():
    memory = planned("train.vram=7GB", "engine.fused=false", "train.micro_batch=8")
    print(memory.line)
    assert memory.plan.option.changes == {"train.micro_batch": "2", "train.accumulation": "16"}
    assert "computed by Transformers" in planned("engine.fused=false").line
    with pytest.raises(RecipeError, match=r"train\.gradient_checkpointing=false"):
        check_limit(
            load_recipe(None, [*WORDS, "train.vram=8GB", "engine.fused=false", "train.gradient_checkpointing=false"]),
            torch.device("cuda"),
        )


def test_the_plan_is_compared_with_what_was_reserved():
    memory = planned("engine.policy=host")
    peak = memory.plan.option.prediction.peak.total
    right, wrong, less = (memory.compare(int(peak * share)) for share in (1.013, 1.08, 0.5))
    print(memory_text(right), memory_text(wrong), sep="\n")
    assert memory_text(right).endswith(" GB planned (+1.3%)")
    assert "(+8.0%); more than planned, most likely in one layer's backward: please report this line" in memory_text(
        wrong
    )
    assert (right.exceeded_by, wrong.exceeded_by, less.exceeded_by) == ("", "one layer's backward", "")
    assert wrong.moment == "step"


def test_a_run_that_is_resumed_keeps_to_its_own_recipe():
    recipe = load_recipe(None, [*WORDS, "train.micro_batch=16", "engine.policy=keep-all", "train.vram=8GB"])
    memory = plan_within(recipe, SIZES, FACTS, CARD, "NVIDIA Test", is_new=False)
    assert memory.fitted(recipe) == recipe
    assert memory.plan.limit == 8e9


def test_a_step_is_compared_though_loading_took_more():
    memory = planned("engine.policy=host", "engine.embedding=host", "train.micro_batch=1", "data.max_length=256")
    prediction = memory.plan.option.prediction
    longer = dataclasses.replace(prediction.moments[0], items={**prediction.moments[0].items, "weights": 10**10})
    option = dataclasses.replace(memory.plan.option, prediction=Prediction([longer, *prediction.moments[1:]]))
    memory = dataclasses.replace(memory, plan=dataclasses.replace(memory.plan, option=option))
    assert memory.plan.option.prediction.peak.name == "loading"
    assert memory.compare(10**9).moment == "step"


@pytest.mark.parametrize("value", ["lots", "12TB", "50MB", "-3GB", ""])
def test_a_limit_that_is_no_size(value):
    with pytest.raises(RecipeError, match=r"train\.vram"):
        load_recipe(None, [*WORDS, f"train.vram={value}"])
