"""Training on several GPUs: data-parallel, with the base on each of them or spread over them, beside torch's FSDP2.

    python -m bench.scale run TOKENIZER DATA --processes 1 2 [4 8] [--rows TEXT ...] [--json FILE] [--timeout 300]
    python -m bench.scale show FILE [--plot FILE.png]

Each row is trained by so many processes, one per GPU; several numbers of processes follow one another. Weights are random. Tokens
per second are those of all ranks together after the warm-up; the share is that of the rate of the smallest number of processes,
times the ratio. Memory is the largest max_memory_reserved of a rank, in 1e9 bytes. Losses of rows that take the same steps are
compared with those of the first of them. FSDP2 (torch.distributed.fsdp.fully_shard over bitsandbytes' layers) computes with
Transformers' and PEFT's own forward and checkpointing. DPO's reference is live, and a pair's prompt counts twice. The processes
of all rows load libraries at once, about 1 GB each; then one row at a time is measured. The rows of SmolLM2 also run on a CPU:
--rows SmolLM2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from bench.processes import kill_all

DEFAULTS = {
    "model": "llama-2-7b", "weights": "device", "batch": 4, "length": 2048, "limit": 0.0, "policy": "auto", "resident": 0,
    "compute": "bf16", "steps": 9, "warm_up": 3, "in_step": 0, "optimizer": "paged_adamw_8bit", "objective": "supervised",
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "7B, on each": {},
    "7B in fp8, on each": {"compute": "fp8"},
    "7B, sharded": {"weights": "sharded"},
    "7B, sharded over hosts": {"weights": "sharded-host"},
    "7B, on each one's host": {"weights": "host"},
    "7B, FSDP2": {"weights": "fsdp2", "optimizer": "adamw"},
    "7B, 1 x 2048, sharded": {"weights": "sharded", "batch": 1},
    "7B, the same steps, on each": {"batch": 1, "in_step": 8, "length": 1024, "optimizer": "adamw"},
    "7B, the same steps, sharded": {"batch": 1, "in_step": 8, "length": 1024, "optimizer": "adamw", "weights": "sharded"},
    "7B, 200 steps, sharded": {"weights": "sharded", "length": 512, "steps": 200},
    "7B DPO, 8 pairs of 2 x 512, on each": {"batch": 8, "length": 512, "objective": "dpo"},
    "8B, on each": {"model": "llama-3-8b"},
    "8B in fp8, on each": {"model": "llama-3-8b", "compute": "fp8"},
    "13B, on each": {"model": "llama-2-13b"},
    "13B in fp8, on each": {"model": "llama-2-13b", "compute": "fp8"},
    "13B, sharded": {"model": "llama-2-13b", "weights": "sharded"},
    "70B, 1 x 2048, sharded": {"model": "llama-2-70b", "weights": "sharded", "batch": 1, "steps": 6},
    "70B, 1 x 4096, sharded": {"model": "llama-2-70b", "weights": "sharded", "batch": 1, "length": 4096, "steps": 6},
    "70B, 1 x 2048, sharded, in 24 GB": {
        "model": "llama-2-70b", "weights": "sharded", "batch": 1, "steps": 6, "limit": 24.0,
    },
    "70B, 1 x 2048, on each one's host, in 24 GB": {
        "model": "llama-2-70b", "weights": "host", "batch": 1, "steps": 5, "limit": 24.0,
    },
    **{
        f"SmolLM2, {name}": {"model": "smollm2-135m", "weights": weights, "batch": 1, "length": 64, "in_step": 2, "steps": 4,
                             "warm_up": 1, "optimizer": "adamw"}
        for name, weights in (("on each", "device"), ("sharded", "sharded"), ("FSDP2", "fsdp2"))
    },
    "SmolLM2 DPO": {
        "model": "smollm2-135m", "batch": 2, "length": 32, "objective": "dpo", "steps": 4, "warm_up": 1, "optimizer": "adamw",
    },
}  # fmt: skip
NEED_SEVERAL = ("sharded", "sharded-host", "fsdp2")


class Row:
    """One row on so many processes, which import and wait to be measured."""

    def __init__(self, name: str, processes: int, given: argparse.Namespace) -> None:
        self.name, self.processes, self.timeout = name, processes, given.timeout
        self.folder, self.errors = tempfile.TemporaryDirectory(), tempfile.TemporaryFile("w+")  # noqa: SIM115 (see end)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m",
            "bench.scale_rank", str(given.tokenizer), str(given.data), json.dumps(DEFAULTS | ROWS[name]), self.folder.name,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.errors, text=True, start_new_session=True
        )

    def wait_until_ready(self) -> None:
        """Wait until all processes have imported, or the launcher has ended."""
        gate = pathlib.Path(self.folder.name)
        while len(list(gate.glob("ready-*"))) < self.processes and self.process.poll() is None:
            time.sleep(0.1)

    def measure(self) -> dict[str, Any]:
        """Let them begin, and wait for the result."""
        (pathlib.Path(self.folder.name) / "begin").touch()
        failed = f"no result after {self.timeout} s"
        try:
            said, _ = self.process.communicate(timeout=self.timeout)
            lines = [line for line in said.splitlines() if line.startswith("RESULT ")]
            failed = f"exit status {self.process.returncode}"
        except subprocess.TimeoutExpired:
            lines = []
        if lines:
            return {"row": self.name, **json.loads(lines[0].removeprefix("RESULT "))}
        self.errors.seek(0)
        reasons = [line.strip() for line in self.errors if "Error: " in line]
        return {"row": self.name, "ranks": self.processes, "failed": reasons[0] if reasons else failed}

    def end(self) -> None:
        """End what is left of it: its processes would keep their GPUs."""
        kill_all(self.process)
        self.errors.close()
        self.folder.cleanup()


def run(given: argparse.Namespace) -> None:
    """Measure rows, and write each as soon as it is there."""
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        rows = []
        for name, processes in wanted(given):
            rows.append(Row(name, processes, given))
            stack.callback(rows[-1].end)
        for row in rows:
            row.wait_until_ready()
        for row in rows:
            results.append(row.measure())
            kill_all(row.process)
            print(json.dumps(results[-1]), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(results, indent=1) + "\n")


def wanted(given: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Names and numbers of processes of the rows that were asked for: by their whole names, or by a part of several."""
    for name in ROWS:
        for processes in given.processes:
            is_wanted = not given.rows or any(text == name if text in ROWS else text in name for text in given.rows)
            if is_wanted and (processes > 1 or ROWS[name].get("weights") not in NEED_SEVERAL):
                yield name, processes


def shares(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results with what a table adds: the share of the smallest number's rate, and the largest difference of losses."""
    found = []
    for one in (one for one in results if "failed" not in one):
        least = min(
            (other for other in results if other["row"] == one["row"] and "failed" not in other),
            key=lambda row: row["ranks"],
        )
        rate = one["tok_s"] / least["tok_s"] * least["ranks"] / one["ranks"]
        found.append(one | {"share": rate, "apart": losses_apart(one, results)})
    return found


def losses_apart(one: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """The largest difference from the losses of the first row that took the same steps; None where none did."""
    same = ("model", "batch", "length", "in_step", "steps")
    if not one["in_step"] or one["weights"] == "fsdp2":
        return None
    first = next(row for row in results if "failed" not in row and all(row[name] == one[name] for name in same))
    return max(abs(a - b) for a, b in zip(one["losses"], first["losses"], strict=True))


def show(given: argparse.Namespace) -> None:
    """Print the table, and draw it."""
    results = json.loads(given.file.read_text())
    names = [row["row"] for row in results]
    print("| work | GPUs | tokens/s | share | GB on each | losses apart |\n| --- | --- | --- | --- | --- | --- |")
    for row in (table := sorted(shares(results), key=lambda row: (names.index(row["row"]), row["ranks"]))):
        apart = "" if row["apart"] is None else f"{row['apart']:.4f}"
        print(
            f"| {row['row']} | {row['ranks']} | {row['tok_s']:,} | {row['share']:.1%} | {max(row['reserved_gb']):.2f} | {apart} |"
        )
    for row in results:
        if "failed" in row:
            print(f"{row['row']} on {row['ranks']}: {row['failed']}")
    if given.plot is not None:
        draw(table, given.plot)


def draw(table: list[dict[str, Any]], file: pathlib.Path) -> None:
    """Tokens per second over the number of GPUs, a line for each row with several numbers of them, and the largest's share.

    Both axes are logarithmic: 70B's rates are a tenth of 7B's. Rows that take the same steps are there for their losses.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["row"] for row in table if not row["in_step"]):
        points = sorted((row["ranks"], row["tok_s"], row["share"]) for row in table if row["row"] == name)
        if len(points) > 1:
            ranks, rates = [point[0] for point in points], [point[1] for point in points]
            axes.plot(ranks, [rates[0] * each / ranks[0] for each in ranks], ":", color="0.7")
            axes.plot(ranks, rates, marker="o", label=f"{name}: {points[-1][2]:.1%} on {ranks[-1]}")
    counts = sorted({row["ranks"] for row in table})
    axes.set(
        xlabel="GPUs",
        ylabel="tokens per second, all together",
        title="Several GPUs (dotted: proportional to the smallest number)",
    )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="0.9")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Parse and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("run")
    measuring.add_argument("tokenizer", type=pathlib.Path)
    measuring.add_argument("data", type=pathlib.Path)
    measuring.add_argument("--processes", type=int, nargs="+", required=True)
    measuring.add_argument("--rows", nargs="+", default=[])
    measuring.add_argument("--json", type=pathlib.Path)
    measuring.add_argument("--timeout", type=float, default=300)
    measuring.set_defaults(do=run)
    showing = commands.add_parser("show")
    showing.add_argument("file", type=pathlib.Path)
    showing.add_argument("--plot", type=pathlib.Path)
    showing.set_defaults(do=show)
    given = parser.parse_args()
    given.do(given)


if __name__ == "__main__":
    main()
