"""Is QLoRA as good as 16-bit LoRA and full fine-tuning? SmolLM2-135M-Instruct, two data sets, tuned rates, five seeds.

    nybble demo --weights MODEL
    python -m bench.quality run MODEL DATA_DIR RESULTS.jsonl [--minutes 9] [--side-by-side 6] [--cache DIR]
    python -m bench.quality report RESULTS.jsonl [--picture FILE.png]

`run` does as much as fits into its minutes and says what is left; called again, it goes on. RESULTS.jsonl has a line for each
finished run; a run that was cut off is done anew. `report` prints the tables and the verdict in Markdown.

Methods: LoRA (r 16, alpha 32) on a bfloat16 base, all linear layers; QLoRA NF4 (double quantisation), all linear layers;
QLoRA NF4, q_proj and v_proj; full fine-tuning in bf16 mixed precision, as Trainer's bf16=True has it: float32 master
weights, bfloat16 autocast, measured with the weights rounded to bfloat16. One optimiser for all, torch's AdamW with
float32 states, no weight decay; cosine schedule, 3% warm-up, 300 steps of 16 rows, rows up to 512 tokens, not packed
and no gradient checkpointing. LoRA and QLoRA run through the fused engine, full fine-tuning through Transformers' own forward.

Pairs: for a seed all methods see the same rows in the same order, and an adapter of a module begins with the same numbers
in every method that has it. Each result carries digests of both, and `report` refuses results whose digests differ.

Rates: on a ladder of 1 and 3 times powers of ten, on seed 0, by the loss on the development split; four rates at first,
then the best one's neighbours until both were tried. Seeds 1 to 5 then train at that rate and are measured on the
test split, which no choice has seen. GSM8K: its test file, and 500 of its training rows for development. instruct_mix: 600
and 300 of its rows. No prompt stands in two splits.

The claim, fixed before any result: the held-out loss of QLoRA (NF4, all linear) is equivalent to 16-bit LoRA's within
MARGIN = 0.01 nats a token, on both data sets (no correction: both must hold). The test: the loss of a method is the sum of
its nats over all trained tokens of the test split, and over all seeds, divided by their number; D is QLoRA's minus LoRA's.
With S seeds and N rows, d[s,i] the paired difference in nats of row i under seed s and t[i] its tokens, T their sum:

    D[s] = sum_i d[s,i] / T         D = mean_s D[s]         e[i] = (mean_s d[s,i] - D t[i]) N / T
    v_seeds = variance_s(D[s]) / S          v_rows = variance_i(e[i]) / N         se = sqrt(v_seeds + v_rows)
    df = (v_seeds + v_rows)^2 / (v_seeds^2 / (S - 1) + v_rows^2 / (N - 1))         (Satterthwaite)

Seeds and rows are both random, so the claim is for other seeds and other rows of the kind (v_seeds + v_rows counts their
interaction twice, which errs on the careful side). Two one-sided t-tests at 5% each, H0: D <= -MARGIN and H0: D >= MARGIN;
equivalent where both are rejected, that is where the 90% interval D +- t(0.95, df) se lies inside (-MARGIN, MARGIN).
Shown to differ where it lies outside altogether, else open. Whatever comes out is shown at 135M parameters, not at 7B.

The weights come from a GGUF file in Q4_1, so the 16-bit base is one that was rounded to 4 bits once already (in blocks of 32,
levels evenly spaced); NF4 rounds it again. That may make NF4's error smaller or larger than on weights never rounded.

How long it takes: 2 data sets x 4 methods x (4 to 6 rates + 5 seeds) = 72 to 88 runs, and 4 untrained ones. A step is 16 rows,
3,500 tokens of GSM8K: 2.8 TFLOP, about 20 ms of an H200's kernels at this width, but over 3,000 launches, for which the
host needs 60 to 100 ms (docs/benchmarks.md: 3,127 launches for 32 layers; the plain path with checkpointing and 4-bit
weights took 161 s for 150 such steps and all around them). So a run of 300 steps is 20 to 30 s, and with loading, held-out
loss and 500 answers (256 tokens at 40 ms) up to 45 s alone. As the host is what is waited for, several runs share the card:
six side by side take 120 ms of kernels for a step of each, and finish 88 runs of 45 s in 17 minutes if sharing gains
a factor of 4, in 25 if it gains 2.7. Peak memory is a process's own. Seconds are told, but compare nothing: runs share
card and host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers
from datasets.utils.logging import disable_progress_bar

from bench.quality_report import draw, report
from bench.quality_run import METHODS, TASKS, Run, Setup, one_run, tokens_of, write_splits
from nybble.errors import NybbleError
from nybble.files.paths import default_cache
from nybble.model.device import grow_segments
from nybble.model.tokenizer.load import load_tokenizer

FIRST = {"full": range(-10, -6), "lora": range(-7, -3), "qlora": range(-7, -3), "qlora-qv": range(-7, -3)}
"""Steps of the ladder that are tried first: 1e-5 to 3e-4, and 3e-4 to 1e-2."""
TUNED_ON = 0  # the seed; the others are reported
GUESS = 90.0  # seconds of a run before one was seen
LONGER, RECENT = (
    1.3,
    8,
)  # a run may take so many times the longest of the last ones of its kind: the first compile kernels


def rate_of(step: int) -> float:
    """The ladder: 0 is 1, -1 is 0.3, -2 is 0.1 and so on, written as their decimals."""
    return float(f"{(1, 3)[step % 2]}e{step // 2}")


def next_rates(losses: dict[int, float], first: Sequence[int]) -> list[int]:
    """Steps of the ladder still to be tried: the first ones, then the best one's neighbours; none when both were."""
    missing = [step for step in first if step not in losses]
    if missing:
        return missing
    best = best_rate(losses)
    return [step for step in (best - 1, best + 1) if step not in losses]


def best_rate(losses: dict[int, float]) -> int:
    """The step with the least loss; of equal ones the lower."""
    return min(sorted(losses), key=lambda step: losses[step])


def tuning_losses(results: list[dict[str, Any]], data: str, method: str) -> dict[int, float]:
    """Development losses by step of the ladder; a run that diverged has an infinite one."""
    steps = {rate_of(step): step for step in range(-20, 5)}
    return {
        steps[row["rate"]]: math.inf if row["loss"] is None else row["loss"]
        for row in results
        if (row["stage"], row["data"], row["method"]) == ("tune", data, method)
    }


def pending(results: list[dict[str, Any]], setup: Setup) -> tuple[list[Run], int]:
    """Runs that can be started now, and how many more will follow them at least: what is tuned decides what comes next."""
    done = {Run(*(row[field.name] for field in dataclasses.fields(Run))) for row in results}
    tuning, testing, later = [], [], 0
    for data in TASKS:
        for method in METHODS:
            losses = tuning_losses(results, data, method)
            steps = next_rates(losses, FIRST[method])
            tuning += [Run("tune", data, method, TUNED_ON, rate_of(step)) for step in steps]
            if steps:
                later += setup.seeds
                continue
            rate = rate_of(best_rate(losses))
            testing += [Run("test", data, method, seed, rate) for seed in range(1, setup.seeds + 1)]
        testing += [Run("before", data, method, TUNED_ON, 0.0) for method in ("lora", "qlora")]
    return [run for run in [*tuning, *testing] if run not in done], later


@dataclass
class Worker:
    """A process that does one run after another."""

    process: Any
    pipe: Connection
    run: Run | None = None
    started: float = field(default_factory=time.monotonic)

    def give(self, run: Run) -> None:
        """Its next run."""
        self.run, self.started = run, time.monotonic()
        self.pipe.send(run)


def start_worker(setup: Setup, model: pathlib.Path, folder: pathlib.Path) -> Worker:
    """In a fresh interpreter: a card's state does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, setup, model, folder), daemon=True)
    process.start()
    there.close()
    return Worker(process, here)


def serve(pipe: Connection, setup: Setup, model: pathlib.Path, folder: pathlib.Path) -> None:
    """A worker's life: a run comes, its result goes, until the pipe closes."""
    quiet()
    if torch.cuda.is_available():
        grow_segments()
    while True:
        try:
            run = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(one_run(run, setup, model, folder))
        except (NybbleError, RuntimeError, AssertionError, OSError):
            traceback.print_exc()
            return  # and with it the pipe: the run has failed


def quiet() -> None:
    """No progress bars of six processes at once."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bar()


class Sitting:
    """One call of `run`: workers, what is done, and the time there is."""

    def __init__(
        self,
        setup: Setup,
        model: pathlib.Path,
        folder: pathlib.Path,
        file: pathlib.Path,
        minutes: float,
        side_by_side: int,
    ) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        self.setup, self.file, self.side_by_side = setup, file, side_by_side
        self.results = read_results(file, setup)
        self.failed: set[Run] = set()
        self.workers: list[Worker] = []
        self.start = lambda: start_worker(setup, model, folder)

    def work(self) -> None:
        """Until nothing is left or the time is over."""
        try:
            while self.hand_out() and (left := self.deadline - time.monotonic()) > 0:
                for pipe in wait([worker.pipe for worker in self.workers if worker.run], timeout=left):
                    self.take(next(worker for worker in self.workers if worker.pipe is pipe))
        finally:
            for worker in self.workers:
                worker.process.kill()

    def hand_out(self) -> bool:
        """Give runs to whoever is idle; whether anybody is at work."""
        busy = {worker.run for worker in self.workers if worker.run}
        runs, _ = pending(self.results, self.setup)
        fitting = [run for run in runs if run not in busy | self.failed and self.fits(run)]
        while len(self.workers) < min(self.side_by_side, len(busy) + len(fitting)):
            self.workers.append(self.start())
        idle = [worker for worker in self.workers if worker.run is None]
        for worker, run in zip(idle, fitting, strict=False):
            worker.give(run)
        return any(worker.run for worker in self.workers)

    def fits(self, run: Run) -> bool:
        """Whether a run would end in time, as far as one can see."""
        alike = [row["seconds"] for row in self.results if (row["data"], row["stage"]) == (run.data, run.stage)]
        return time.monotonic() + LONGER * max(alike[-RECENT:], default=GUESS) < self.deadline

    def take(self, worker: Worker) -> None:
        """A result, written at once; or a worker that is gone, and its run with it."""
        run = worker.run
        assert run is not None
        try:
            result = worker.pipe.recv()
        except EOFError:
            self.failed.add(run)
            self.workers.remove(worker)
            say(f"FAILED {run}")
            return
        worker.run = None
        line = {**result, "side_by_side": self.side_by_side, "setup": asdict(self.setup)}
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        self.results.append(line)
        say(f"{time.monotonic() - self.began:5.0f} s  {told(line)}; {self.left()}")

    def left(self) -> str:
        """Runs and minutes."""
        runs, later = pending(self.results, self.setup)
        count = len(runs) + later
        seconds = [row["seconds"] for row in self.results] or [GUESS]
        minutes = count * sum(seconds) / len(seconds) / self.side_by_side / 60
        return f"{count} runs left{' at least' if later else ''}, about {minutes:.0f} minutes"


def told(row: dict[str, Any]) -> str:
    """A result in a line."""
    right = f", {sum(row['right'])} of {len(row['right'])} right" if "right" in row else ""
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
    memory = f", {row['peak_GB']:.2f} GB" if row.get("peak_GB") else ""
    where = f"{row['stage']:6} {row['data']:12} {row['method']:8} seed {row['seed']} rate {row['rate']:g}"
    return f"{where}: {loss}{right}{memory}, {row['seconds']:.0f} s"


def say(text: str) -> None:
    """At once, also into a file."""
    print(text, flush=True)


def read_results(file: pathlib.Path, setup: Setup | None) -> list[dict[str, Any]]:
    """Finished runs; half a line at the end, from a call that was killed while writing, is cut away."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    results = [json.loads(line) for line in whole.splitlines()]
    others = [row for row in results if setup is not None and row["setup"] != asdict(setup)]
    if others:
        sys.exit(f"{file} holds runs of another setup: {others[0]['setup']}, not {asdict(setup)}")  # type: ignore[arg-type]
    return results


def prepare_all(setup: Setup, model: pathlib.Path, data: pathlib.Path, folder: pathlib.Path) -> Iterator[str]:
    """Write the splits and tokenise them once, before the workers ask for them; what each holds."""
    write_splits(data, folder)
    tokenizer = load_tokenizer(model)
    for name in TASKS:
        for split in ("train", "development", "test"):
            rows = tokens_of(name, split, setup, tokenizer, folder)
            lengths = rows.train["length"]
            yield f"{name} {split}: {len(lengths)} rows, {sum(lengths) / len(lengths):.0f} tokens each"


def setup_of(words: list[str]) -> Setup:
    """The setup with changes, name=number each: for trials."""
    return Setup(**{name: int(value) for name, value in (word.split("=", 1) for word in words)})


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    for name in ("model", "data", "results"):
        running.add_argument(name, type=pathlib.Path)
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--side-by-side", type=int, default=6, help="runs that share the card")
    running.add_argument(
        "--cache", type=pathlib.Path, default=default_cache() / "quality", help="splits, tokens, the NF4 base"
    )
    running.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="another setup, for a trial")
    reporting = commands.add_parser("report")
    reporting.add_argument("results", type=pathlib.Path)
    reporting.add_argument("--picture", type=pathlib.Path)
    given = parser.parse_args()
    if given.command == "report":
        results = read_results(given.results, None)
        say(report(results))
        if given.picture is not None:
            draw(results, given.picture)
        return
    quiet()
    setup = setup_of(given.set)
    sitting = Sitting(setup, given.model, given.cache, given.results, given.minutes, given.side_by_side)
    try:
        for line in prepare_all(setup, given.model, given.data, given.cache):
            say(line)
    except NybbleError as error:
        sys.exit(str(error))
    sitting.work()
    say(f"{len(sitting.results)} runs done, {len(sitting.failed)} failed; {sitting.left()}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
