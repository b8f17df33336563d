"""Teach a small model a skill, then what is preferred: orders to JSON by SFT, then the shorter of two right answers by DPO.

    python examples/preference.py [--seed 0] [--folder runs/preference]

Everything is generated from the seed. In the answers that SFT sees, chance decides after each colon and comma whether a space
follows. A pair is two such answers to one order, both right, and the shorter one was chosen. DPO starts from SFT's adapter, which
is also its reference. Both are tested on orders whose sentences, names and goods neither has seen.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re
import time
from collections.abc import Sequence

from rich.console import Console

from nybble.chat.answerer import Answerer, Sampling
from nybble.chat.loading import load_answerer
from nybble.data.sets.prepare import prepare
from nybble.demo.embedded import embedded_model
from nybble.demo.orders import Order, exact_match, prompt_for, test_orders, train_orders
from nybble.evaluate.preferences import pair_likelihoods, preference_entry
from nybble.files.paths import default_cache
from nybble.recipe import load_recipe
from nybble.run.folder import Run
from nybble.training.train import train

SFT_STEPS, DPO_STEPS, BATCH, TESTS, HELD_OUT = 60, 60, 2, 100, 8
SFT_RATE, DPO_RATE, BETA = 1.5e-3, 6e-5, 0.5
"""Chosen with seed 7. At rates of 1e-4 and more the model may drop brackets as well as spaces (docs/experiments.md)."""
SPACED = 0.45
"""Probability of a space. With 0.5 the tuned model preferred the shorter answer in 23 of 100 pairs, with 0.4 in 72 (seed 7)."""


def main() -> None:
    """Train both runs and print what they prefer and how often they are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/preference"))
    given = parser.parse_args()
    console, cache, began = Console(), default_cache(), time.perf_counter()
    draw = random.Random(f"spaces {given.seed}")
    given.folder.mkdir(parents=True)
    base = embedded_model(cache)
    count = HELD_OUT + SFT_STEPS * BATCH
    orders = train_orders(count + HELD_OUT + DPO_STEPS * BATCH, given.seed)
    tests = test_orders(TESTS, given.seed)
    sft_rows = [{"messages": [*asked(each), said(spaced(each, draw))]} for each in orders[:count]]
    files = {name: given.folder / f"{name}.jsonl" for name in ("sft", "pairs", "tests")}
    write(files["sft"], sft_rows)
    write(files["pairs"], [pair(each, draw) for each in orders[count:]])
    write(files["tests"], [pair(each, draw) for each in tests])
    console.rule("1  supervised: orders to JSON, spaces at random")
    common = [f"model.path={base}", f"train.seed={given.seed}", f"train.micro_batch={BATCH}", "train.accumulation=1"]
    common += ["train.scheduler=linear", "train.warmup=5", "train.samples=0", "data.max_length=512"]
    common += [f"data.validation={HELD_OUT}"]
    first = run([*common, f"data.path={files['sft']}", f"out={given.folder / 'sft'}", f"train.max_steps={SFT_STEPS}",
                 f"train.learning_rate={SFT_RATE}", f"train.evaluate_every={SFT_STEPS}"], console)  # fmt: skip
    console.rule("2  dpo: the shorter of two right answers")
    second = run([*common, f"data.path={files['pairs']}", f"out={given.folder / 'dpo'}", f"train.max_steps={DPO_STEPS}",
                  f"train.learning_rate={DPO_RATE}", "train.objective=dpo", f"preference.beta={BETA}", f"adapter={first.adapter}",
                  f"train.evaluate_every={DPO_STEPS}"], console)  # fmt: skip
    console.rule(f"3  {TESTS} orders whose sentences, names and goods neither has seen")
    for name, each in (("sft", first), ("dpo", second)):
        console.print(f"{name}  {tested(each, files['tests'], tests, cache)}")
    console.print(f"{time.perf_counter() - began:.0f} s in all")


def asked(order: Order) -> list[dict[str, str]]:
    """The prompt as messages."""
    return [{"role": message.role, "content": message.content} for message in prompt_for(order.text)]


def said(answer: str) -> dict[str, str]:
    """An answer as a message."""
    return {"role": "assistant", "content": answer}


def spaced(order: Order, draw: random.Random) -> str:
    """The right answer, with spaces after colons and commas by chance (names have neither)."""
    return re.sub("[:,]", lambda mark: mark[0] + " " * (draw.random() < SPACED), order.answer)


def pair(order: Order, draw: random.Random) -> dict[str, list[dict[str, str]]]:
    """A preference: both answers are right, and the shorter one was chosen."""
    answers: set[str] = set()
    while len({len(answer) for answer in answers}) < 2:
        answers = {spaced(order, draw), spaced(order, draw)}
    chosen, rejected = sorted(answers, key=len)
    return {"prompt": asked(order), "chosen": [said(chosen)], "rejected": [said(rejected)]}


def compact(answer: str) -> str:
    """A JSON answer without spaces between its parts."""
    return json.dumps(json.loads(answer), separators=(",", ":"), ensure_ascii=False)


def write(file: pathlib.Path, rows: Sequence[object]) -> None:
    """Rows as JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(options: Sequence[str], console: Console) -> Run:
    """A run with these options."""
    return train(load_recipe(None, options), console=console)


def tested(run: Run, pairs: pathlib.Path, tests: Sequence[Order], cache: pathlib.Path) -> str:
    """Preference accuracy on unseen pairs, and how many unseen orders are answered rightly, and how."""
    answerer = load_answerer(run, cache, dequantise=True)
    data = run.recipe.data.model_copy(update={"path": str(pairs), "validation": 0.0, "max_length": 1024})
    rows = list(prepare(data, answerer.tokenizer, 0, cache, template=answerer.template, target="pairs").train)
    likelihoods = pair_likelihoods(answerer.model, rows, answerer.tokenizer.pad_token_id)
    accuracy = preference_entry(likelihoods, likelihoods, "dpo").metrics[0].tuned
    assert accuracy.interval is not None
    low, high = accuracy.interval
    answers = answers_of(answerer, tests)
    right = [exact_match(answer, order.answer) for answer, order in zip(answers, tests, strict=True)]
    spaces = sum(
        len(answer.strip()) - len(compact(answer)) for answer, is_right in zip(answers, right, strict=True) if is_right
    )
    return (
        f"prefers the shorter of two right answers in {accuracy.mean:.0%} of {len(rows)} pairs (95%: {low:.0%} to {high:.0%}); "
        f"{sum(right)} of {len(tests)} answers exactly right, with {spaces / max(1, sum(right)):.1f} spaces on average"
    )


def answers_of(answerer: Answerer, tests: Sequence[Order]) -> list[str]:
    """Greedy answers, at most a little longer than the longest one with all spaces."""
    longest = max(len(answerer.tokenizer(json.dumps(json.loads(each.answer)))["input_ids"]) for each in tests)
    return answerer.answer([prompt_for(each.text) for each in tests], Sampling(max_new_tokens=longest + 5))


if __name__ == "__main__":
    main()
