"""fuse in TRL's trainers: losses, metrics and every adapter's gradient, step by step, are those of the same run without it."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import nybble
from nybble.engine.fuse import attach
from nybble.engine.layer import SavedActivations
from nybble.engine.layer_function import run
from nybble.errors import EngineError
from nybble.weights.on_cpu import stay_unpacked
from nybble.weights.streamed import Streaming
from tests.conftest import WORDS, small_tokenizer, write_llama
from tests.engine.streaming import SynchronousCopier

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig), "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig), "orpo": (ORPOTrainer, ORPOConfig),
    "cpo": (CPOTrainer, CPOConfig), "online": (OnlineDPOTrainer, OnlineDPOConfig),
}  # fmt: skip
ONLINE = {
    "grpo": {"num_generations": 2, "max_completion_length": 8, "beta": 0.1},
    "rloo": {"num_generations": 2, "max_completion_length": 8, "beta": 0.1},
    "online": {"max_new_tokens": 8},
}
STEPS = 3
COMMON = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False,
    "use_cpu": not torch.cuda.is_available(),
}  # fmt: skip


def text(number, start):
    """Words whose number differs from row to row, so that every batch is padded."""
    return " ".join(WORDS[(number * k + start) % len(WORDS)] for k in range(1, 3 + (number + start) % 7))


PAIRS = [{"prompt": text(n, 0), "chosen": " " + text(n, 3), "rejected": " " + text(n, 8)} for n in range(24)]
ROWS = {
    "kto": [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 != 0} for n, row in enumerate(PAIRS)],
    **{kind: [{"prompt": row["prompt"]} for row in PAIRS] for kind in ONLINE},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Weights so large that rewards differ from row to row."""
    folder = write_llama(tmp_path_factory.mktemp("trl") / "llama", initializer_range=0.15)
    small_tokenizer().save_pretrained(folder)
    return folder


class Gradients(TrainerCallback):
    """The gradients of each step, before the optimiser uses them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        found = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
        self.steps.append({name: gradient.float().clone() for name, gradient in found.items()})


def base(kind, folder, quantised):
    storage = None
    if quantised:
        storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    auto, words = AutoModelForCausalLM, {}
    if kind == "reward":
        auto, words = AutoModelForSequenceClassification, {"num_labels": 1}
    torch.manual_seed(0)  # the head of rewards is random
    model = auto.from_pretrained(folder, dtype=torch.float32, quantization_config=storage, **words)
    stay_unpacked(model)
    return model


def build(
    kind,
    folder,
    tmp_path,
    *,
    quantised=False,
    own_adapter=False,
    own_reference=False,
    adapter=True,
    early=False,
    **settings,
):
    """A trainer as its users write it.

    Args:
        kind: of TRAINERS.
        folder: the base.
        tmp_path: where it writes.
        quantised: the base is in 4 bits.
        own_adapter: it is given a PEFT model, and keeps a copy of the adapter as its reference.
        own_reference: it is given a second model as its reference.
        adapter: whether there is one.
        early: the model is fused before the trainer is built.
        settings: of the trainer.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<unk>"
    model = base(kind, folder, quantised)
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task)
    words = {"train_dataset": Dataset.from_list(ROWS.get(kind, PAIRS)), "processing_class": tokenizer}
    if own_adapter:
        model = get_peft_model(model, lora)
    elif adapter:
        words["peft_config"] = lora
    if early:
        nybble.fuse(model)
    if own_reference:
        words["ref_model"] = base(kind, folder, quantised)
    if kind in ONLINE:
        words["reward_funcs"] = lambda completions, **_: [float(len(set(answer))) for answer in completions]
    if settings.get("eval_strategy"):
        words["eval_dataset"] = Dataset.from_list(ROWS.get(kind, PAIRS)[:6])
    trainer, config = TRAINERS[kind]
    made = trainer(
        model=model, args=config(output_dir=str(tmp_path), **{**COMMON, **ONLINE.get(kind, {}), **settings}), **words
    )
    for part in made.model.parameters():  # TRL makes the adapters of a quantised base bfloat16
        if part.requires_grad:
            part.data = part.data.float()
    return made


def trained(trainer):
    """Gradients and logged numbers of all steps."""
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
    unequal = ("epoch", "runtime", "time", "per_second")
    return seen.steps, [{k: v for k, v in line.items() if not k.endswith(unequal)} for line in logged]


def compare(kind, folder, tmp_path, monkeypatch, **settings):
    """Train without and with fuse; returns the fused trainer, and how many layers were fused with and without gradients."""
    gradients, lines = trained(build(kind, folder, tmp_path, **settings))
    trainer = build(kind, folder, tmp_path, **settings)
    nybble.fuse(trainer.model)
    counts = Counter()

    def counting(call, x, y, policy):
        saved = run(call, x, y, policy)
        counts["reference" if policy is None else "trained"] += 1
        assert policy is not None or saved == SavedActivations(), "a pass without gradients keeps nothing"
        return saved

    monkeypatch.setattr("nybble.engine.layer_function.run", counting)
    ours, our_lines = trained(trainer)
    assert len(ours) == len(gradients) == STEPS
    for mine, theirs in zip(ours, gradients, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name
    for mine, theirs in zip(our_lines, lines, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=2e-5)
    assert any(gradient.norm() > 1e-3 for gradient in ours[-1].values())
    assert nybble.fusion(trainer.model).fallen_back == 0, nybble.fusion(trainer.model).describe()
    assert counts["trained"] == 2 * STEPS * COMMON["gradient_accumulation_steps"]
    return trainer, counts["reference"]


PER_MICRO_BATCH = {"dpo": 1, "kto": 3, "reward": 0, "grpo": 1, "rloo": 2, "orpo": 0, "cpo": 0}
"""Passes without gradients: references, and KTO's estimate of the KL divergence."""


@pytest.mark.parametrize("kind", PER_MICRO_BATCH)
def test_every_pass_of_a_trainer_is_fused_and_its_numbers_stay(kind, llama, tmp_path, monkeypatch):
    _, references = compare(kind, llama, tmp_path, monkeypatch, quantised=kind in ("dpo", "grpo"))
    assert references == 2 * STEPS * COMMON["gradient_accumulation_steps"] * PER_MICRO_BATCH[kind]


WAYS = {
    "a copy of the adapter as reference": ("dpo", {"own_adapter": True}),
    "an adapter and a reference of 4 bits": ("kto", {"own_adapter": True, "quantised": True}),
    "a reference model": ("dpo", {"own_reference": True}),
    "no checkpointing": ("dpo", {"gradient_checkpointing": False, "quantised": True}),
    "reentrant checkpointing": ("dpo", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "padding to a multiple": ("dpo", {"pad_to_multiple_of": 16}),
    "validation": ("dpo", {"eval_strategy": "steps", "eval_steps": 1, "quantised": True}),
    "validation of rewards": ("reward", {"eval_strategy": "steps", "eval_steps": 1}),
    "several steps for a generation": ("grpo", {"steps_per_generation": 4, "num_iterations": 2}),
    "paged generation": ("grpo", {"use_transformers_continuous_batching": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_settings_of_trainers(way, llama, tmp_path, monkeypatch):
    kind, settings = WAYS[way]
    compare(kind, llama, tmp_path, monkeypatch, **settings)


@pytest.mark.slow
def test_online_dpo_generates_with_the_fused_layers_while_it_checkpoints(llama, tmp_path, monkeypatch):
    """TRL then generates without a cache."""
    _, references = compare("online", llama, tmp_path, monkeypatch)
    assert references > 2 * STEPS * COMMON["gradient_accumulation_steps"]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_reference_log_probabilities_are_computed_when_the_trainer_is_built(kind, llama, tmp_path, monkeypatch):
    """So the model is fused before. TRL caches them by the base and the rows, so each run has a cache of its own."""
    found, passes = [], []
    monkeypatch.setattr(
        "nybble.engine.layer_function.run",
        lambda call, x, y, policy: passes.append(policy is None) or run(call, x, y, policy),
    )
    for number, early in enumerate((False, True)):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / str(number))
        trainer = build(kind, llama, tmp_path / str(number), precompute_ref_log_probs=True, early=early)
        assert len(passes) == (2 * 12 if kind == "dpo" else 2 * 2 * 12) * early, "two layers, 12 batches"
        _, lines = trained(trainer)
        columns = [name for name in trainer.train_dataset.column_names if name.startswith("ref_")]
        found.append((lines, {name: trainer.train_dataset[name][:] for name in columns}))
    assert found[1][1].keys() == found[0][1].keys() != set()
    for name, expected in found[0][1].items():
        assert found[1][1][name] == pytest.approx(expected, rel=1e-4)
    for mine, theirs in zip(found[1][0], found[0][0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=2e-5)


def live_bytes():
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}.values())


@pytest.mark.parametrize("context", ["disabled", "another adapter"])
def test_a_reference_pass_leaves_nothing_behind(context, llama):
    model = get_peft_model(base("dpo", llama, True), LoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("ref", model.peft_config["default"])
    nybble.fuse(model.train())
    ids = torch.arange(64).view(2, 32)

    def reference():
        if context == "disabled":
            with torch.no_grad(), model.disable_adapter():
                return model(input_ids=ids, use_cache=False).logits
        model.set_adapter("ref")
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        model.set_adapter("default")
        return logits

    reference()  # the workspace and what is read of the layers
    before = live_bytes()
    policy = model(input_ids=ids, use_cache=False).logits
    kept = live_bytes() - before - policy.nbytes
    del policy
    before = live_bytes()
    logits = reference()
    assert not logits.requires_grad
    assert live_bytes() - before == logits.nbytes
    assert kept > 2 * ids.numel() * 64 * 4, "a pass with gradients keeps at least the layers' inputs"


def test_a_base_that_is_trained_as_a_whole_falls_back_and_says_so(llama, tmp_path, caplog):
    trainer = build("dpo", llama, tmp_path, adapter=False)
    nybble.fuse(trainer.model)
    assert "keep their original forward: its norms are trained (there is no adapter yet" in caplog.text
    trainer.train()
    assert nybble.fusion(trainer.model).fallen_back == 2
    assert "decoder layers fall back to the original forward: its norms are trained" in caplog.text


def test_generation_with_weights_on_the_host_is_refused_by_name(llama, tmp_path, monkeypatch):
    """A key-value cache is built by the original forward, which needs the weights; without a cache the fused layers generate."""
    trainer = build("grpo", llama, tmp_path)
    attach(trainer.model, "auto", "device", Streaming(SynchronousCopier()))
    with pytest.raises(EngineError, match="a key-value cache is built") as refused:
        trainer.train()
    print(refused.value, refused.value.fix)
    assert "generation_kwargs" in refused.value.fix

    gradients, _ = trained(build("grpo", llama, tmp_path))
    trainer = build("grpo", llama, tmp_path, generation_kwargs={"use_cache": False})
    attach(trainer.model, "auto", "device", Streaming(SynchronousCopier()))
    ours, _ = trained(trainer)
    for mine, theirs in zip(ours, gradients, strict=True):
        for name, gradient in theirs.items():
            assert (mine[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name
