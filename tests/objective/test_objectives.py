"""Objectives behind their protocol: the one for supervised fine-tuning, and one of preference that the loop has never seen."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nybble.data.batches import Collator
from nybble.objective.likelihood import summed_loss, token_losses
from nybble.objective.objective import Mean, MetricMeans, MicroBatch, Objective, StepLoss
from nybble.objective.supervised import Supervised
from nybble.plan.schedule import Schedule
from nybble.recipe import load_recipe
from nybble.run.folder import Run
from nybble.training.arguments import training_arguments
from nybble.training.guards import Guards
from nybble.training.optimizer import make_optimizer
from nybble.training.progress import RunProgress
from nybble.training.recorder import Recorder
from nybble.training.resource_use import ResourceUse
from nybble.training.trainer import QLoraTrainer

BETA = 0.2


class Preference:
    """Direct preference optimisation (Rafailov et al. 2023) by whole logits; a batch's first half was chosen, its other rejected.

    The reference is the model with its adapter off. A mean over pairs, not over tokens.
    """

    metrics: Sequence[str] = ("margin", "accuracy")

    def count(self, batch: MicroBatch) -> int:
        return len(batch["input_ids"]) // 2

    def loss(self, model: torch.nn.Module, batch: MicroBatch, count: torch.Tensor) -> StepLoss:
        margins = self._margins(model, batch)
        loss = -torch.nn.functional.logsigmoid(margins).sum() / count
        return StepLoss(loss, {name: mean for name, mean in self._measured(margins.detach()).items() if name != "loss"})

    def measure(self, model: torch.nn.Module, batch: MicroBatch) -> MetricMeans:
        return self._measured(self._margins(model, batch))

    def _measured(self, margins: torch.Tensor) -> dict[str, Mean]:
        terms = {"loss": -torch.nn.functional.logsigmoid(margins), "margin": margins, "accuracy": (margins > 0).float()}
        return {name: Mean(term.sum(), len(margins)) for name, term in terms.items()}

    def _margins(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        tuned = self._log_probabilities(model, batch)
        with torch.no_grad(), model.disable_adapter():
            reference = self._log_probabilities(model, batch)
        chosen, rejected = (tuned - reference).chunk(2)
        return BETA * (chosen - rejected)

    def _log_probabilities(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        found = torch.gather(logits.log_softmax(-1), 2, labels.clamp(min=0)[..., None])[..., 0]
        return (found * (labels >= 0)).sum(-1)


def pairs(count: int) -> Dataset:
    """The same prompt twice; chosen answers are of tokens 50 to 69, rejected ones of 90 to 109."""
    rows = []
    for n in range(count):
        prompt = [1, 10 + n % 7, 11 + n % 5]
        rows.append({
            "chosen": [*prompt, 50 + n % 20, 50 + (3 * n) % 20, 2],
            "rejected": [*prompt, 90 + n % 20, 2],
            "length": 2 * (len(prompt) + 3),
        })  # fmt: skip
    return Dataset.from_list(rows)


def collate(rows):
    ids = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    return Collator(0)([{"input_ids": own, "trained": [n >= 3 for n in range(len(own))]} for own in ids])


def adapted(folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def test_the_unchanged_loop_trains_a_preference_objective(tiny_llama, tmp_path, quiet):
    """Counted in pairs, measured beside its loss, with a reference pass: nothing of the trainer knows about it."""
    recipe = load_recipe(None, [
        f"model.path={tiny_llama}", "data.path=d", "train.micro_batch=4", "train.accumulation=2", "train.learning_rate=1e-2",
        "train.scheduler=constant", "train.keep_best=false",
    ])  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    schedule, device = Schedule(24, 12, 100, 0), torch.device("cpu")
    arguments = training_arguments(recipe, tmp_path, schedule, device, torch.float32, True, checkpointing=False)
    arguments.save_strategy = "no"
    objective: Objective = Preference()
    model = adapted(tiny_llama)
    trainer = QLoraTrainer(
        objective=objective, optimizer=make_optimizer(model, "adamw", torch.float32, 1e-2, 0.0), model=model,
        args=arguments, train_dataset=pairs(64), eval_dataset=pairs(13), data_collator=collate,
    )  # fmt: skip
    run, progress = Run(tmp_path, recipe), RunProgress(quiet, schedule, frozenset())
    trainer.add_callback(Recorder(run, trainer.current_step, objective.metrics, quiet, progress, None, "none"))
    trainer.add_callback(Guards(run, trainer.current_step, ResourceUse(0.0, {})))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([line for line in lines if key in line] for key in ("loss", "eval_loss"))
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the adapter changes nothing yet: log 2 a pair"
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["margin"] > 0.2
    assert steps[-1]["accuracy"] > 0.5
    assert all((8 * line["accuracy"]).is_integer() for line in steps), "of the 8 pairs of a step, each counted once"
    assert [line["step"] for line in evaluations] == [0, 12, 24]
    assert evaluations[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert evaluations[-1]["eval_loss"] < 0.6
    assert evaluations[-1]["eval_accuracy"] > 0.8
    assert evaluations[-1]["eval_margin"] > 0.2


@pytest.mark.parametrize("objective", [Supervised(), Preference()], ids=["supervised", "preference"])
def test_a_step_s_loss_does_not_depend_on_how_it_is_split(objective, tiny_llama):
    """Loss and gradients of a batch are those of its micro batches together, and the measured mean is the loss."""
    model = adapted(tiny_llama)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    rows = list(pairs(6))
    whole, parts = collate(rows), [collate(rows[:1]), collate(rows[1:4]), collate(rows[4:])]

    def backward(batches):
        count = torch.tensor(sum(objective.count(batch) for batch in batches))
        found = [objective.loss(model, batch, count) for batch in batches]
        sum(one.loss for one in found).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad()
        return sum(one.loss.item() for one in found), gradients

    together, apart = backward([whole]), backward(parts)
    assert apart[0] == pytest.approx(together[0], rel=1e-5)
    for one, other in zip(apart[1], together[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        measured = objective.measure(model, whole)
    assert measured.keys() == {"loss", *objective.metrics}
    assert float(measured["loss"].total / measured["loss"].count) == pytest.approx(together[0], rel=1e-5)


def test_losses_of_single_tokens_add_up_to_the_batch_s(tiny_llama):
    model, batch = adapted(tiny_llama).eval(), collate(list(pairs(5)))
    found = token_losses(model, batch)
    assert found.shape == (len(batch["predicting"]),)
    labels = copy.deepcopy(batch["labels"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found, plain[labels[:, 1:].flatten() >= 0].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(summed_loss(model, batch).detach(), found.sum(), atol=1e-4, rtol=1e-5)
