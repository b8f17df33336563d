"""The loss curve and the model card of a finished run."""

from __future__ import annotations

import json
import pathlib
import shlex

from matplotlib.figure import Figure

from nybble.files.atomic import replacing
from nybble.files.writing import write_text
from nybble.markdown import code, escaped, fence, front_matter, storable
from nybble.run.folder import Run
from nybble.run.log import read_metrics
from nybble.run.summary import Summary

SMOOTHING = 0.9  # of the drawn loss: the weight of the earlier values in each point


def draw_loss(run: Run, file: pathlib.Path) -> None:
    """Training loss (each step and smoothed) and validation loss over steps, as PNG."""
    lines = read_metrics(run)
    steps = [(line.step, line.loss) for line in lines if isinstance(line.loss, float)]
    validation = [(line.step, line.eval_loss) for line in lines if line.eval_loss is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if steps:  # the metrics.jsonl of a resumed run may have been lost
        axes.plot(*zip(*steps, strict=True), color="#9db4c0", linewidth=0.8, label="training, each step")
        axes.plot(*zip(*_smooth(steps), strict=True), color="#1d5b79", linewidth=1.8, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d1603d", marker="o", linewidth=1.8, label="validation")
        step, loss = min(validation, key=lambda point: point[1])
        axes.annotate(f"best {loss:.3f}", (step, loss), xytext=(0, 10), textcoords="offset points", ha="right")
    axes.set(xlabel="step", ylabel=f"loss ({run.recipe.train.loss_unit})")
    axes.set_title(storable(run.folder.name), parse_math=False)  # a $ in it does not start a formula
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    if steps or validation:
        axes.legend(frameon=False)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")


def write_card(run: Run, summary: Summary) -> None:
    """Write the model card: what the adapter is, what it was trained on, its results, and how to load it."""
    recipe = run.recipe
    lora = recipe.lora
    validation = summary.validation_loss
    result = "no validation rows were held out"
    if validation:
        result = f"{validation.before:.4f} before training, {validation.kept:.4f} at step {summary.kept_step} (kept)"
    quantization = recipe.model.quantization
    found = " (found: learning_rate.png)" if summary.learning_rate_reason else ""
    name = summary.base.name
    front = {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["qlora", "lora", "nybble"],
    }
    loading = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, dtype={json.dumps(summary.dtype)})
model, tokenizer = PeftModel.from_pretrained(base, "adapter"), AutoTokenizer.from_pretrained("tokenizer")"""
    body = f"""{front_matter(front)}
# {escaped(run.folder.name)}

A LoRA adapter for {code(name)}, trained by nybble {summary.versions["nybble"]} on a frozen
{quantization} base. It is a derivative of that base model: the base's licence applies to it.

| | |
| --- | --- |
| base | {code(name)} ({summary.base.fingerprint}) |
| data | {code(json.dumps(recipe.data.path))}, {summary.data.rows} rows ({summary.data.fingerprint[:16]}) |
| template | {escaped(summary.data.template)} |
| adapter | r {lora.r}, alpha {lora.alpha:g}, targets {escaped(", ".join(summary.adapter.targets))} |
| trained parameters | {summary.adapter.trainable_parameters:,} |
| objective | {recipe.train.objective} |
| steps | {summary.steps}, peak learning rate {recipe.train.peak_rate:g}{found} |
| validation loss ({recipe.train.loss_unit}) | {result} |
| peak memory | {summary.peak_memory_gb:.2f} GB on {escaped(summary.device)} |
| speed in training | {summary.tokens_per_second:,.0f} tokens/s |

![loss](loss.png)

## Use

{fence(f"nybble chat {shlex.quote(str(run.folder))}", "sh")}

or, from this folder, without nybble:

{fence(loading, "python")}
"""
    write_text(run.folder / "README.md", storable(body))


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential mean, divided by the sum of its weights so far, so that it does not lag at the start."""
    smoothed, level, weight = [], 0.0, 0.0
    for step, loss in points:
        level = SMOOTHING * level + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append((step, level / weight))
    return smoothed
