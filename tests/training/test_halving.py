"""A micro batch that does not fit in memory: the run goes on with half of it, once, and ends as one that began with that."""

from __future__ import annotations

import functools
import io
import json
import weakref

import pytest
import torch
from rich.console import Console
from transformers.models.llama.modeling_llama import LlamaModel

import nybble.training.guards as guards
import nybble.training.halving as halving
import nybble.training.rehearsal as rehearsal
from nybble.errors import RunError, TrainingError
from nybble.objective.supervised import Supervised
from nybble.plan.out_of_memory import memory_table
from nybble.plan.schedule import smaller_micro_batch
from nybble.run.folder import open_run
from nybble.training.train import resume, train
from tests.training.test_train import UNASKED, adapter_of, interrupted, losses, read_metrics_but_time, recipe_for

WORDS = ["train.max_steps=6", "train.evaluate_every=2", "train.learning_rate=5e-3", "train.micro_batch=4",
         "train.accumulation=2", UNASKED]  # fmt: skip
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB.\nSee documentation."


class SmallDevice:
    """Passes of a Llama with more than so many rows do not fit, once so many of them have."""

    def __init__(self, monkeypatch, rows: int, when: str = "forward", after: int = 0) -> None:
        self.rows = rows
        self.when = when
        self.left = after
        self.failures = 0
        forward = LlamaModel.forward

        @functools.wraps(forward)  # the engine checks its signature
        def watched(model, *given, **more):
            output = forward(model, *given, **more)
            bounds = more.get("cu_seq_lens_q")  # of rows without padding
            count = len(bounds) - 1 if bounds is not None else len(more["input_ids"])
            if count > self.rows and model.training == (self.when != "evaluation"):
                self.left -= 1
                if self.left < 0 and self.when == "backward":
                    output.last_hidden_state.register_hook(self.fail)
                elif self.left < 0:
                    self.fail()
            return output

        monkeypatch.setattr(LlamaModel, "forward", watched)

    def fail(self, *_: object) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError(FULL)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300)


@pytest.fixture(scope="module")
def small(tiny_llama, rows, cache, tmp_path_factory):
    """A run that was started with half of the micro batch."""
    out = tmp_path_factory.mktemp("small") / "run"
    words = [*WORDS, "train.micro_batch=2", "train.accumulation=4"]
    return train(recipe_for(tiny_llama, rows, out, *words), console=Console(quiet=True), cache=cache)


def summary_of(run) -> dict:
    return json.loads((run.folder / "summary.json").read_text())


@pytest.mark.parametrize(("when", "after"), [("forward", 0), ("forward", 1), ("backward", 1), ("forward", 3)])
def test_a_step_that_does_not_fit_before_a_checkpoint_starts_over_with_half(
    when, after, small, tiny_llama, rows, cache, tmp_path, monkeypatch, console
):
    """To the last bit: in the first micro batch, within a step, and after a step has changed the adapter."""
    device = SmallDevice(monkeypatch, 2, when, after)
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=console, cache=cache)
    print(console.file.getvalue())
    assert device.failures == 1
    notice = "memory    micro batch 4 did not fit: continuing with 2, accumulation 2 -> 4 (the same step)\n"
    assert console.file.getvalue().count(notice) == 1
    assert "stopped" not in console.file.getvalue()
    assert read_metrics_but_time(run) == read_metrics_but_time(small)
    assert all(torch.equal(tensor, adapter_of(small)[name]) for name, tensor in adapter_of(run).items())
    assert (summary_of(run)["micro_batch"], summary_of(run)["halved_from"]) == (2, 4)
    assert (summary_of(small)["micro_batch"], summary_of(small)["halved_from"]) == (2, None)
    recorded = open_run(run.folder).recipe
    assert recorded == run.recipe
    assert (recorded.train.micro_batch, recorded.train.accumulation) == (2, 4)
    assert sorted(path.name for path in run.folder.iterdir()) == sorted(path.name for path in small.folder.iterdir())


def test_a_step_that_does_not_fit_after_a_checkpoint_goes_on_from_there(
    small, tiny_llama, rows, cache, tmp_path, monkeypatch, console
):
    """The steps before were split otherwise, so the sums are equal up to rounding."""
    device = SmallDevice(monkeypatch, 2, "backward", after=7)  # two steps, a checkpoint, one and a half steps
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=console, cache=cache)
    print(console.file.getvalue())
    assert device.failures == 1
    assert "resuming from checkpoint-2" in console.file.getvalue()
    assert losses(run) == pytest.approx(losses(small), rel=1e-5)
    for name, tensor in adapter_of(run).items():
        torch.testing.assert_close(tensor, adapter_of(small)[name], atol=1e-5, rtol=0)
    assert summary_of(run)["halved_from"] == 4


def test_an_evaluation_that_does_not_fit_beside_the_optimiser_is_found_after_the_first_step(
    tiny_llama, rows, cache, tmp_path, monkeypatch, console, quiet
):
    monkeypatch.setattr("nybble.training.loop.MEASURED_TOKENS", 1)  # a batch has as many rows as a micro batch
    words = [*WORDS, "train.evaluate_every=3"]
    half = recipe_for(tiny_llama, rows, tmp_path / "half", *words, "train.micro_batch=2", "train.accumulation=4")
    expected = train(half, console=quiet, cache=cache)
    device = SmallDevice(monkeypatch, 2, "evaluation", after=2)  # those of the evaluation before the first step
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=console, cache=cache)
    print(console.file.getvalue())
    assert device.failures == 1
    assert "step     3" not in console.file.getvalue().partition("memory ")[0]
    assert all(torch.equal(tensor, adapter_of(expected)[name]) for name, tensor in adapter_of(run).items())


def fails_once(monkeypatch, module, name):
    """The first call of a function runs out of memory."""
    original, fail = getattr(module, name), [True]

    def full(*given):
        if fail:
            fail.clear()
            raise torch.OutOfMemoryError(FULL)
        original(*given)

    monkeypatch.setattr(module, name, full)


def test_a_save_that_does_not_fit_is_halved_too(small, tiny_llama, rows, cache, tmp_path, monkeypatch, console):
    fails_once(monkeypatch, guards, "mark_complete")
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=console, cache=cache)
    print(console.file.getvalue())
    assert "micro batch 4 did not fit" in console.file.getvalue()
    assert all(torch.equal(tensor, adapter_of(small)[name]) for name, tensor in adapter_of(run).items())


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_nothing_of_the_failed_attempt_is_left_in_memory(when, tiny_llama, rows, cache, tmp_path, monkeypatch, quiet):
    """Before the base is loaded again: neither the model nor a tensor of the step that failed."""
    seen: list[weakref.ref] = []
    left: list[int] = []
    loss, free = Supervised.loss, halving.free_memory

    def watched(self, model, batch, count):
        seen.extend(weakref.ref(each) for each in (model, batch["input_ids"], *model.parameters()))
        result = loss(self, model, batch, count)
        seen.append(weakref.ref(result.loss))
        return result

    def freed():
        free()
        left.append(sum(each() is not None for each in seen))

    monkeypatch.setattr(Supervised, "loss", watched)
    monkeypatch.setattr(halving, "free_memory", freed)
    SmallDevice(monkeypatch, 2, when, after=3)
    train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=quiet, cache=cache)
    assert len(seen) > 50
    assert left == [0]


def test_the_second_time_ends_with_what_takes_the_memory(tiny_llama, rows, cache, tmp_path, monkeypatch, console):
    device = SmallDevice(monkeypatch, 1)
    with pytest.raises(TrainingError) as caught:
        train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=console, cache=cache)
    print(console.file.getvalue(), caught.value, sep="\n")
    assert device.failures == 2
    said = str(caught.value)
    assert said.startswith("the GPU does not have enough memory: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "See documentation" not in said
    assert "\n  planned, in total " in said
    assert "where: micro batch 2, rows of up to 256 tokens" in said
    assert caught.value.fix == "the same command with train.micro_batch=1 train.accumulation=8 (the same step)"
    assert not (tmp_path / "run").exists(), "as after any failure before the first checkpoint"
    assert "nothing of this run was kept" in console.file.getvalue()


def test_a_micro_batch_of_one_ends_at_once(tiny_llama, rows, cache, tmp_path, monkeypatch, console):
    device = SmallDevice(monkeypatch, 0)
    words = [*WORDS, "train.micro_batch=1"]
    with pytest.raises(TrainingError) as caught:
        train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=console, cache=cache)
    print(caught.value)
    assert device.failures == 1
    assert "did not fit" not in console.file.getvalue()
    assert caught.value.fix == "the same command with engine.policy=host (the same step, slower)"
    assert not (tmp_path / "run").exists()


def test_a_halved_run_is_resumed_but_not_halved_again(
    small, tiny_llama, rows, cache, tmp_path, monkeypatch, console, quiet
):
    """Killed after it was halved, it goes on with what its recipe.yaml says; another failure says how to go on."""
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS)
    with monkeypatch.context() as patch:
        SmallDevice(patch, 2)
        interrupted(patch, 3, recipe, quiet, cache)
    with monkeypatch.context() as patch:
        device = SmallDevice(patch, 1)
        with pytest.raises(TrainingError) as caught:
            resume(tmp_path / "run", console=console, cache=cache)
    print(console.file.getvalue(), caught.value, sep="\n")
    assert device.failures == 1
    run = open_run(tmp_path / "run")
    assert caught.value.fix == (
        f"in {run.folder}/recipe.yaml set train.micro_batch=1 train.accumulation=8 (the same step), "
        f"then: nybble train --resume {run.folder}"
    )
    resume(run.folder, console=quiet, cache=cache)
    assert read_metrics_but_time(run) == read_metrics_but_time(small)
    assert all(torch.equal(tensor, adapter_of(small)[name]) for name, tensor in adapter_of(run).items())
    assert summary_of(run)["halved_from"] == 4


def test_a_resumed_run_may_be_split_otherwise_but_not_given_other_steps(
    small, tiny_llama, rows, cache, tmp_path, monkeypatch, quiet
):
    interrupted(monkeypatch, 3, recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), quiet, cache)
    file = tmp_path / "run" / "recipe.yaml"
    good = file.read_text()
    file.write_text(good.replace("micro_batch: 4", "micro_batch: 2"))
    with pytest.raises(RunError) as caught:
        resume(tmp_path / "run", console=quiet, cache=cache)
    print(caught.value)
    assert "train.micro_batch: 4 -> 2" in str(caught.value)
    file.write_text(good.replace("micro_batch: 4", "micro_batch: 2").replace("accumulation: 2", "accumulation: 4"))
    run = resume(tmp_path / "run", console=quiet, cache=cache)
    for name, tensor in adapter_of(run).items():
        torch.testing.assert_close(tensor, adapter_of(small)[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("split", "expected"),
    [((8, 2), (4, 4)), ((4, 1), (2, 2)), ((3, 1), (1, 3)), ((7, 2), (2, 7)), ((6, 5), (3, 10)), ((1, 16), None)],
)
def test_a_smaller_micro_batch_keeps_the_step(split, expected):
    assert smaller_micro_batch(*split) == expected


def test_the_table_has_the_measured_peak_where_there_is_one():
    predicted = {"base (nf4)": 3_870_000_000, "adapter": 160_000_000}
    print(memory_table(predicted, 9_900_000_000))
    assert memory_table(predicted, 9_900_000_000).splitlines() == [
        "  base (nf4)           3.87 GB",
        "  adapter              0.16 GB",
        "  planned, in total    4.03 GB",
        "  reserved at most     9.90 GB",
    ]
    assert "reserved" not in memory_table(predicted, None)


def test_several_processes_are_not_halved(tiny_llama, rows, cache, tmp_path, monkeypatch, console):
    """Those that did not run out of memory wait in an exchange: they cannot be told."""
    monkeypatch.setattr("nybble.training.halving.group_size", lambda: 2)
    device = SmallDevice(monkeypatch, 2)
    with pytest.raises(TrainingError) as caught:
        train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=console, cache=cache)
    print(caught.value)
    assert device.failures == 1
    assert "did not fit" not in console.file.getvalue()


def test_a_trial_save_that_does_not_fit_is_halved(small, tiny_llama, rows, cache, tmp_path, monkeypatch, console):
    fails_once(monkeypatch, rehearsal, "try_save")
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=console, cache=cache)
    print(console.file.getvalue())
    assert console.file.getvalue().count("micro batch 4 did not fit") == 1
    assert all(torch.equal(tensor, adapter_of(small)[name]) for name, tensor in adapter_of(run).items())
