"""Losses and gradients of preference training beside TRL's own trainers, on the same batch, in float32."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import nybble
from nybble.data.judged_batches import JudgedCollator
from nybble.data.rows.formats import TARGETS
from nybble.objective.choice import choose_objective
from nybble.recipe import PreferenceOptions
from nybble.weights.on_cpu import stay_unpacked
from tests.conftest import WORDS

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed"),
]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
ROWS = 5
SETTINGS = {
    "per_device_train_batch_size": ROWS, "report_to": "none", "use_cpu": True, "bf16": False, "max_length": 128,
    "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip


def examples(labelled):
    draw = random.Random(7)
    text = lambda most: " ".join(draw.choices(WORDS, k=draw.randint(1, most)))  # noqa: E731
    rows = [{"prompt": text(8), "chosen": " " + text(6), "rejected": " " + text(9)} for _ in range(ROWS)]
    if not labelled:
        return Dataset.from_list(rows)
    return Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 != 1} for n, row in enumerate(rows)]
    )


def trained_further(model):
    """The adapter as it might be after some steps: not what it began as, which is what the reference is."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


@pytest.fixture(scope="module")
def theirs(tiny_llama, tiny_tokenizer, tmp_path_factory):
    """Loss, gradients and rows of TRL's trainer for an objective."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = theirs_of(name, tiny_llama, tiny_tokenizer, tmp_path_factory.mktemp(name))
        return found[name]

    return of


def theirs_of(name, folder, tokenizer, out):
    tokenizer.pad_token = "<unk>"
    classes = {
        "dpo": (DPOTrainer, DPOConfig, {"beta": 0.3}),
        "kto": (KTOTrainer, KTOConfig, {
            "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7, "train_sampling_strategy": "sequential"
        }),
        "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.3}),
        "simpo": (CPOTrainer, CPOConfig, {"beta": 2.0, "simpo_gamma": 0.8, "loss_type": "simpo", "cpo_alpha": 0.0}),
    }  # fmt: skip
    trainer_class, config_class, more = classes[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    trainer = trainer_class(
        model=model, args=config_class(output_dir=str(out), **SETTINGS, **more), train_dataset=examples(name == "kto"),
        processing_class=tokenizer, peft_config=LORA,
    )  # fmt: skip
    trained_further(trainer.model)
    rows = [trainer.train_dataset[n] for n in range(ROWS)]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    gradients = {each: p.grad for each, p in trainer.model.named_parameters() if p.requires_grad}
    weights = {each: p.detach().clone() for each, p in trainer.model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, weights, [as_row(row, name) for row in rows]


def as_row(row, name):
    """A row of TRL's data set as nybble's collator takes it."""
    if "completion_ids" in row:
        prompt, answer, rejected = row["prompt_ids"], row["completion_ids"], []
    elif "chosen_ids" in row:
        prompt, answer, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
    else:
        size = sum(label == -100 for label in row["chosen_labels"])
        prompt, answer = row["chosen_input_ids"][:size], row["chosen_input_ids"][size:]
        rejected = row["rejected_input_ids"][size:]
        assert row["rejected_input_ids"][:size] == prompt
    assert len(prompt) > 0
    assert len(answer) > 0
    return {
        "input_ids": [*prompt, *answer], "trained": [name == "orpo"] * len(prompt) + [True] * len(answer),
        "prompt": len(prompt), "rejected": list(rejected), "is_good": row.get("label", True),
    }  # fmt: skip


OPTIONS = {
    "dpo": PreferenceOptions(beta=0.3),
    "kto": PreferenceOptions(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7),
    "orpo": PreferenceOptions(beta=0.3),
    "simpo": PreferenceOptions(beta=2.0, gamma=0.8),
}


@pytest.mark.parametrize("layout", ["padded", "flat", "fused"])
@pytest.mark.parametrize("name", ["dpo", "orpo", "kto", "simpo"])
def test_loss_and_gradients_are_those_of_trl(name, layout, theirs, tiny_llama):
    """TRL's ORPO imitates prompts too: so does nybble's with data.train_on=all."""
    expected, gradients, weights, rows = theirs(name)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).requires_grad_(False), LORA
    )
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[each])
    if layout == "fused":
        stay_unpacked(model)
        nybble.fuse(model)
    objective = choose_objective(name, OPTIONS[name])
    collate = JudgedCollator(0, flatten=layout != "padded", mismatched=TARGETS[name] == "labels")
    batch = collate(rows)
    loss = objective.loss(model, batch, torch.tensor(objective.count(batch), dtype=torch.float32)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    own = {each: p.grad for each, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert largest > 1e-3, "gradients that are all zero would agree with anything"
    worst = max((own[each] - gradients[each]).abs().max() for each in own)
    assert worst < 1e-4, f"{worst} of {largest}"
    if layout == "fused":
        assert nybble.fusion(model).fallen_back == 0
