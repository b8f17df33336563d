"""One run of bench/quality.py: its rows, its model, its training, and the measurements afterwards."""

from __future__ import annotations

import datetime
import gc
import hashlib
import math
import pathlib
import re
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import bitsandbytes
import numpy
import peft
import torch
import transformers
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from bench.quality_setup import ALL_METHODS, TASKS, Run, Setup, tokens_of
from nybble.data.batches import Collator, Sample, next_labels
from nybble.engine.fuse import fuse, fusion
from nybble.engine.loss import last_hidden
from nybble.model.adapter.lora import attach_adapter
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.model.device import choose_device, choose_dtype
from nybble.model.tokenizer.load import load_tokenizer
from nybble.objective.supervised import Supervised
from nybble.plan.schedule import Schedule, plan_warmup
from nybble.recipe import Recipe, load_recipe
from nybble.training.arguments import training_arguments
from nybble.training.optimizer import make_optimizer
from nybble.training.trainer import QLoraTrainer

MEASURED_TOGETHER = 16  # rows, with 2 GB of float32 logits and their logarithms for SmolLM2's vocabulary
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def recipe_of(run: Run, setup: Setup, model: pathlib.Path) -> Recipe:
    """The recipe of a run; all methods use one optimiser, AdamW with 32-bit states."""
    method = ALL_METHODS[run.method]
    adapter = [f"lora.targets={method.targets}"] if method.targets else []
    return load_recipe(None, [
        f"model.path={model}", f"model.quantization={method.quantization}", "model.dtype=auto",
        f"lora.r={setup.r}", f"lora.alpha={setup.alpha}", "lora.dropout=0", *adapter,
        f"train.micro_batch={setup.rows}", "train.accumulation=1", f"train.max_steps={setup.steps}",
        f"train.learning_rate={run.rate or 1}", "train.scheduler=cosine", "train.warmup=0.03", "train.optimizer=adamw",
        f"train.seed={run.seed}",
    ])  # fmt: skip


def compute_type(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a processor without bfloat16, for trials, where it is many times as fast."""
    return choose_dtype("auto", device)[0]


def computing(device: torch.device) -> torch.autocast:
    """Compute layers in the compute type, whatever the type of their parameters."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_type(device) == torch.bfloat16)


def load(
    recipe: Recipe, device: torch.device, whole: bool, cache: pathlib.Path, fp8: Mapping[str, Any] | None = None
) -> Any:
    """The model to train: fused with an adapter, or whole with float32 master weights."""
    checkpoint = find_checkpoint(recipe.model.path)
    dtype = torch.float32 if whole else compute_type(device)
    model = load_base(checkpoint, recipe.model, dtype, device, cache).model
    set_seed(recipe.train.seed)
    if whole:
        return model.requires_grad_(True)
    adapted = attach_adapter(model, recipe.lora)
    begin_alike(adapted, recipe.train.seed)
    if fp8 is None:
        fuse(adapted)
    else:
        fuse(adapted, compute="fp8", **fp8)
    engine = fusion(adapted)
    assert engine is not None
    assert not engine.fallen_back, "all layers are fused"
    engine.budget.chunked_loss = True
    return adapted


@torch.no_grad()
def begin_alike(model: PeftModel, seed: int) -> None:
    """Draw each A again as PEFT does, but from seed and name alone, whichever other modules have adapters."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            fresh = torch.empty(parameter.shape)
            parameter.copy_(torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator))


def adapter_digest(model: torch.nn.Module, names: Sequence[str]) -> str:
    """Digest of the adapter parameters of all modules whose names contain one of `names`."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and any(part in name for part in names):
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Witness:
    """A collator that takes a digest of the rows it is given and of their order."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate
        self.digest = hashlib.sha256()

    def __call__(self, rows: Sequence[Sample]) -> dict[str, Any]:
        for row in rows:
            self.digest.update(numpy.array(row["input_ids"], dtype=numpy.int32).tobytes())
        return self.collate(rows)


def train(model: Any, recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase, flat: bool) -> dict[str, Any]:
    """Train all steps. Returns the digest of the rows, the loss curve, peak memory and seconds."""
    device = model.device
    witness = Witness(Collator(tokenizer.pad_token_id, flatten=flat))
    steps = recipe.train.max_steps
    assert steps is not None
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            recipe, pathlib.Path(folder), Schedule(steps, 10**6, 10**6, *plan_warmup(recipe.train.warmup, steps)), device,
            compute_type(device), has_validation=False, checkpointing=False,
        )  # fmt: skip
        arguments.save_strategy, arguments.logging_steps = "no", max(1, steps // 12)
        optimizer = make_optimizer(
            model, recipe.train.optimizer, compute_type(device), recipe.train.learning_rate, recipe.train.weight_decay
        )
        trainer = QLoraTrainer(
            objective=Supervised(),
            optimizer=optimizer,
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=witness,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.current_step.losses = trainer.current_step.batches = trainer.current_step.metrics = _Forgetful()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        trainer.train()
    engine = fusion(model)
    assert engine is None or not engine.fallen_back, "a batch was not computed by the fused engine"
    curve = [[line["step"], round(line["loss"], 4)] for line in trainer.state.log_history if "loss" in line]
    return {
        "order": witness.digest.hexdigest()[:16],
        "curve": curve,
        "peak_GB": round(torch.cuda.max_memory_reserved() / 1e9, 3) if device.type == "cuda" else None,
        "train_seconds": round(time.perf_counter() - began, 1),
    }


class _Forgetful(list[Any]):
    """A list that keeps no batches. These runs have no guards; a loss that is not finite counts as infinite."""

    def append(self, _: Any) -> None:
        """Drop the item."""


@torch.no_grad()
def row_losses(model: Any, rows: Dataset, pad_id: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Nats of each row, summed over its trained tokens, and their number; bfloat16 layers, float32 logits."""
    bare, device, collate = _bare(model), model.device, Collator(pad_id)
    head = bare.get_output_embeddings().weight.float()
    samples = rows.to_list()
    order = sorted(range(len(samples)), key=lambda n: -len(samples[n]["input_ids"]))
    nats, counts = torch.zeros(len(samples), dtype=torch.float64), torch.zeros(len(samples), dtype=torch.int64)
    for start in range(0, len(order), MEASURED_TOGETHER):
        picked = order[start : start + MEASURED_TOGETHER]
        batch = {name: value.to(device) for name, value in collate([samples[n] for n in picked]).items()}  # type: ignore[union-attr]
        labels, positions = batch.pop("labels"), batch.pop("predicting")
        with computing(device):
            hidden = last_hidden(model, bare.get_decoder(), batch)
        logits = hidden.flatten(0, 1)[positions].float() @ head.t()
        losses = torch.nn.functional.cross_entropy(logits, next_labels(labels).flatten()[positions], reduction="none")
        owners = positions // labels.shape[1]
        zeros = torch.zeros(len(picked), dtype=torch.float64, device=device)
        nats[picked] = zeros.index_add(0, owners, losses.double()).cpu()
        counts[picked] = torch.bincount(owners, minlength=len(picked)).cpu()
    return nats.numpy(), counts.numpy()


def _bare(model: Any) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def right_answers(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, end_id: int, new_tokens: int
) -> list[int]:
    """1 for each greedy answer whose last number is the expected one, else 0. All rows are one batch, padded on the left."""
    samples = rows.to_list()
    starts = [sample["trained"].index(True) for sample in samples]
    longest = max(starts)
    pad = tokenizer.pad_token_id
    prompts = [sample["input_ids"][:start] for sample, start in zip(samples, starts, strict=True)]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - start) + [1] * start for start in starts], device=model.device)
    with computing(model.device):
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True,
            eos_token_id=list({end_id, tokenizer.eos_token_id}), pad_token_id=pad,
        )  # fmt: skip
    answers = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    expected = [
        tokenizer.decode(sample["input_ids"][start:], skip_special_tokens=True)
        for sample, start in zip(samples, starts, strict=True)
    ]
    return [int(last_number(mine) == last_number(right)) for mine, right in zip(answers, expected, strict=True)]


def last_number(text: str) -> float:
    """The last number of a text, in which commas may separate thousands; NaN, which equals nothing, if there is none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else math.nan


def one_run(run: Run, setup: Setup, model_folder: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Train and measure. Returns a line of the results."""
    gc.collect()  # frees what the previous run left in this process
    began = time.perf_counter()
    # 1. Rows.
    task, method = TASKS[run.data], ALL_METHODS[run.method]
    whole = not method.targets
    tokenizer = load_tokenizer(model_folder)
    rows = tokens_of(run.data, "train", setup, tokenizer, folder)
    split = "development" if run.stage == "tune" else "test"
    held_out = tokens_of(run.data, split, setup, tokenizer, folder).train
    # 2. Model.
    device = choose_device("auto")
    recipe = recipe_of(run, setup, model_folder)
    model = load(recipe, device, whole, folder / "cache", method.fp8)
    result = {"init": adapter_digest(model, [""]), "init_qv": adapter_digest(model, ["q_proj", "v_proj"])}
    # 3. Train. A fully fine-tuned model is measured as it would be used, in bfloat16.
    if run.stage != "before":
        result |= train(model, recipe, rows.train, tokenizer, flat=not whole)
    if whole:
        model.to(compute_type(device))
    model.eval()
    # 4. Held-out loss, answers.
    nats, counts = row_losses(model, held_out.select(range(min(setup.held_out, len(held_out)))), tokenizer.pad_token_id)
    loss = float(nats.sum() / counts.sum())
    result["loss"] = round(loss, 6) if math.isfinite(loss) else None
    if split == "test":
        result |= {"nats": numpy.round(nats, 3).tolist(), "tokens": counts.tolist()}
    if split == "test" and task.asks and setup.questions:
        asked = held_out.select(range(min(setup.questions, len(held_out))))
        result["right"] = right_answers(model, asked, tokenizer, rows.template.end_id, setup.new_tokens)
    return {**asdict(run), **result, **about(device), "seconds": round(time.perf_counter() - began, 1)}


def about(device: torch.device) -> dict[str, Any]:
    """Date, device and versions of a run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": str(compute_type(device)).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)},
    }
