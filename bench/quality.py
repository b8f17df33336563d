"""Is QLoRA as good as 16-bit LoRA and full fine-tuning? SmolLM2-135M-Instruct, two data sets, tuned rates, five seeds.

    nybble demo --weights MODEL
    python -m bench.quality run MODEL DATA_DIR RESULTS.jsonl [--minutes 9] [--side-by-side 6] [--cache DIR]
    python -m bench.quality report RESULTS.jsonl [--picture FILE.png]

`run` finishes as many runs as it can in its minutes and says what is left; called again, it continues. RESULTS.jsonl has
one line per finished run; a run that was cut off is done again. `report` prints the tables and the verdict in Markdown.

Methods: LoRA (r 16, alpha 32) on a bfloat16 base, all linear layers; QLoRA NF4 (double quantisation), all linear layers;
QLoRA NF4, q_proj and v_proj; full fine-tuning in bf16 mixed precision, like Trainer's bf16=True: float32 master weights and
bfloat16 autocast, measured with the weights rounded to bfloat16. All use one optimiser, torch's AdamW with float32 states
and no weight decay, with a cosine schedule, 3% warm-up, and 300 steps of 16 rows. Rows have up to 512 tokens and are not
packed; there is no gradient checkpointing. LoRA and QLoRA run through the fused engine, full fine-tuning through
Transformers' own forward.

Pairs: with the same seed, all methods see the same rows in the same order, and the adapter of a module starts with the same
numbers in every method that has it. Each result carries digests of both, and `report` refuses results whose digests differ.

Rates: candidates are 1 and 3 times powers of ten, tried with seed 0 by the loss on the development split; four rates at
first, then the neighbours of the best one until both were tried. Seeds 1 to 5 then train at that rate and are measured on
the test split, which no choice has seen. For GSM8K these are its test file, and 500 of its training rows for development;
for instruct_mix, 600 and 300 of its rows. No prompt occurs in two splits.

The claim, fixed before any result: the held-out loss of QLoRA (NF4, all linear) is equivalent to 16-bit LoRA's within
MARGIN = 0.01 nats per token, on both data sets (without correction: both must hold). The test: the loss of a method is the
sum of its nats over all trained tokens of the test split and over all seeds, divided by the number of these tokens; D is
QLoRA's minus LoRA's. With S seeds and N rows, d[s,i] is the paired difference in nats of row i under seed s, t[i] its
tokens, and T their sum:

    D[s] = sum_i d[s,i] / T         D = mean_s D[s]         e[i] = (mean_s d[s,i] - D t[i]) N / T
    v_seeds = variance_s(D[s]) / S          v_rows = variance_i(e[i]) / N         se = sqrt(v_seeds + v_rows)
    df = (v_seeds + v_rows)^2 / (v_seeds^2 / (S - 1) + v_rows^2 / (N - 1))         (Satterthwaite)

Seeds and rows are both random, so the claim is about other seeds and other rows of the same kind (v_seeds + v_rows counts
their interaction twice, which errs on the careful side). There are two one-sided t-tests at 5% each, H0: D <= -MARGIN and
H0: D >= MARGIN. The verdict is "equivalent" if both are rejected, that is, if the 90% interval D +- t(0.95, df) se lies
inside (-MARGIN, MARGIN). It is "different" if the interval lies entirely outside, and "open" otherwise. Every verdict is
about 135M parameters, not about 7B.

The weights come from a GGUF file in Q4_1, so the 16-bit base was already rounded to 4 bits once (in blocks of 32, with
evenly spaced levels); NF4 rounds it again. That may make NF4's error smaller or larger than on weights that were never
rounded.

Time: 2 data sets x 4 methods x (4 to 6 rates + 5 seeds) = 72 to 88 runs, and 4 untrained ones. A step is 16 rows, 3,500
tokens of GSM8K: 2.8 TFLOP, about 20 ms of an H200's kernels at this width, but over 3,000 launches, for which the host
needs 60 to 100 ms (docs/benchmarks.md: 3,128 launches for 32 layers; the plain path with checkpointing and 4-bit weights
took 161 s for 150 such steps and everything around them). So a run of 300 steps is 20 to 30 s, and with loading, held-out
loss and 500 answers (256 tokens at 40 ms) up to 45 s alone. Since the host is the bottleneck, several runs share the card:
six side by side take 120 ms of kernels for a step of each, and finish 88 runs of 45 s in 17 minutes if sharing gains a
factor of 4, in 25 if it gains 2.7. Peak memory is that of each process. Seconds are printed, but are no basis for a
comparison, since runs share card and host.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers
from datasets.utils.logging import disable_progress_bar

from bench.quality_report import draw, report
from bench.quality_run import one_run
from bench.quality_setup import METHODS, TASKS, Run, Setup, tokens_of, write_splits
from nybble.errors import NybbleError
from nybble.files.paths import default_cache
from nybble.model.device import grow_segments
from nybble.model.tokenizer.load import load_tokenizer

Plan = Callable[[list[dict[str, Any]], Setup], tuple[list[Run], int]]
"""From the finished runs: those that can start now, and the least number of runs that will follow."""
FIRST = {"full": range(-10, -6), "lora": range(-7, -3), "qlora": range(-7, -3), "qlora-qv": range(-7, -3)}
"""Steps of the ladder of rates that are tried first: 1e-5 to 3e-4, and 3e-4 to 1e-2."""
TUNED_ON = 0  # the seed for tuning; the others are reported
GUESS = 90.0  # seconds of a run before the first one was measured
# A run is expected to take at most LONGER times the longest of the RECENT last ones of its kind: the first ones compile kernels.
LONGER, RECENT = 1.3, 8


def rate_of(step: int) -> float:
    """The rate at a step of the ladder: 0 is 1, -1 is 0.3, -2 is 0.1 and so on."""
    return float(f"{(1, 3)[step % 2]}e{step // 2}")


def next_rates(losses: dict[int, float], first: Sequence[int]) -> list[int]:
    """Steps of the ladder still to be tried: the first ones, then the neighbours of the best one; none once both were tried."""
    missing = [step for step in first if step not in losses]
    if missing:
        return missing
    best = best_rate(losses)
    return [step for step in (best - 1, best + 1) if step not in losses]


def best_rate(losses: dict[int, float]) -> int:
    """The step with the lowest loss; of equal ones the lower step."""
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
    """Runs that can start now, and the least number of runs that will follow: tuning decides which."""
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
        """Give the worker its next run."""
        self.run, self.started = run, time.monotonic()
        self.pipe.send(run)


def start_worker(setup: Setup, model: pathlib.Path, folder: pathlib.Path) -> Worker:
    """Start a worker in a new interpreter, since CUDA's state does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, setup, model, folder), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def serve(pipe: Connection, setup: Setup, model: pathlib.Path, folder: pathlib.Path) -> None:
    """A worker's loop: receive a run, send its result, until the pipe closes."""
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
            return  # closes the pipe, which tells the parent that the run failed


def quiet() -> None:
    """Switch off progress bars, since several processes share the terminal."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bar()


class Session:
    """One call of `run`: its workers, results and deadline."""

    def __init__(
        self,
        setup: Setup,
        model: pathlib.Path,
        folder: pathlib.Path,
        file: pathlib.Path,
        minutes: float,
        side_by_side: int,
        plan: Plan,
    ) -> None:
        self.plan = plan
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        self.setup, self.file, self.side_by_side = setup, file, side_by_side
        self.results = read_results(file, setup)
        self.failed: set[Run] = set()
        self.workers: list[Worker] = []
        self.start = lambda: start_worker(setup, model, folder)

    def work(self) -> None:
        """Run until nothing is left or the time is over."""
        try:
            while self.assign() and (left := self.deadline - time.monotonic()) > 0:
                for pipe in wait([worker.pipe for worker in self.workers if worker.run], timeout=left):
                    self.take(next(worker for worker in self.workers if worker.pipe is pipe))
        finally:
            for worker in self.workers:
                worker.process.kill()

    def assign(self) -> bool:
        """Give runs to idle workers. Returns whether any worker is busy."""
        busy = {worker.run for worker in self.workers if worker.run}
        runs, _ = self.plan(self.results, self.setup)
        fitting = [run for run in runs if run not in busy | self.failed and self.fits(run)]
        while len(self.workers) < min(self.side_by_side, len(busy) + len(fitting)):
            self.workers.append(self.start())
        idle = [worker for worker in self.workers if worker.run is None]
        for worker, run in zip(idle, fitting, strict=False):
            worker.give(run)
        return any(worker.run for worker in self.workers)

    def fits(self, run: Run) -> bool:
        """Whether a run is expected to end before the deadline."""
        alike = [row["seconds"] for row in self.results if (row["data"], row["stage"]) == (run.data, run.stage)]
        return time.monotonic() + LONGER * max(alike[-RECENT:], default=GUESS) < self.deadline

    def take(self, worker: Worker) -> None:
        """Receive a result and write it at once. If the worker has died, its run has failed."""
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
        say(f"{time.monotonic() - self.began:5.0f} s  {described(line)}; {self.left()}")

    def left(self) -> str:
        """How many runs and minutes are left."""
        runs, later = self.plan(self.results, self.setup)
        count = len(runs) + later
        seconds = [row["seconds"] for row in self.results] or [GUESS]
        minutes = count * sum(seconds) / len(seconds) / self.side_by_side / 60
        return f"{'at least ' if later else ''}{count} runs left, about {minutes:.0f} minutes"


def described(row: dict[str, Any]) -> str:
    """A result in one line."""
    right = f", {sum(row['right'])} of {len(row['right'])} right" if "right" in row else ""
    loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
    memory = f", {row['peak_GB']:.2f} GB" if row.get("peak_GB") else ""
    where = f"{row['stage']:6} {row['data']:12} {row['method']:8} seed {row['seed']} rate {row['rate']:g}"
    return f"{where}: {loss}{right}{memory}, {row['seconds']:.0f} s"


def say(text: str) -> None:
    """Print at once, also when the output goes into a file."""
    print(text, flush=True)


def read_results(file: pathlib.Path, setup: Setup | None) -> list[dict[str, Any]]:
    """Finished runs. An incomplete last line, from a call that was killed while writing, is removed from the file."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    results = [json.loads(line) for line in whole.splitlines()]
    others = [row for row in results if setup is not None and row["setup"] != asdict(setup)]
    if others:
        sys.exit(f"{file} contains runs of another setup: {others[0]['setup']}, not {asdict(setup)}")  # type: ignore[arg-type]
    return results


def prepare_all(setup: Setup, model: pathlib.Path, data: pathlib.Path, folder: pathlib.Path) -> Iterator[str]:
    """Write the splits and tokenise them once, before the workers need them. Yields a description of each."""
    write_splits(data, folder)
    tokenizer = load_tokenizer(model)
    for name in TASKS:
        for split in ("train", "development", "test"):
            rows = tokens_of(name, split, setup, tokenizer, folder)
            lengths = rows.train["length"]
            yield f"{name} {split}: {len(lengths)} rows, {sum(lengths) / len(lengths):.0f} tokens each on average"


def setup_of(changes: list[str]) -> Setup:
    """The setup with changes, each as name=number, for trials."""
    return Setup(**{name: int(value) for name, value in (change.split("=", 1) for change in changes)})


def parsed(description: str | None) -> argparse.Namespace:
    """The arguments of `run` and of `report`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser.parse_args()


def run(given: argparse.Namespace, changes: list[str], plan: Plan) -> None:
    """Do the runs that a plan asks for."""
    quiet()
    setup = setup_of([*changes, *given.set])
    session = Session(setup, given.model, given.cache, given.results, given.minutes, given.side_by_side, plan)
    try:
        for line in prepare_all(setup, given.model, given.data, given.cache):
            say(line)
    except NybbleError as error:
        sys.exit(str(error))
    session.work()
    say(f"{len(session.results)} runs done, {len(session.failed)} failed; {session.left()}")


def main() -> None:
    """Parse and run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = parsed(__doc__)
    if given.command == "run":
        run(given, [], pending)
        return
    results = read_results(given.results, None)
    say(report(results))
    if given.picture is not None:
        draw(results, given.picture)


if __name__ == "__main__":
    main()
