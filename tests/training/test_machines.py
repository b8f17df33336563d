"""Runs of two machines that share no folder: processes with working, home and cache folders of their own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.run.folder import Run, open_run
from nybble.run.log import read_metrics
from nybble.run.marks import read_mark
from tests.forked import Forks
from tests.training.test_processes import COMMON, SPLIT

OUT = "runs/run"  # below each machine's own working folder
WORDS = [*COMMON, *SPLIT[2], "train.max_steps=6", "train.evaluate_every=2", "lora.dropout=0.1", f"out={OUT}"]
SHORT = ["train.warmup=0", "train.max_steps=4", "train.seed=2"]


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


def machines_in(root):
    folders = [root / "a", root / "b"]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def command(forks, root, words, moment=None, status=0, apart=True):
    """What a command says; its processes are on two machines, or both on the first."""
    folders = [root / "a", root / "b" if apart else root / "a"]
    (root / "said.txt").unlink(missing_ok=True)
    if apart:
        ended = forks.run(root, ["--cache", "cache", "train", *words], moment, 2, folders)
    else:
        ended = forks.run(root, ["--cache", root / "a" / "cache", "train", *words], moment, 2)
    said = (root / "said.txt").read_text()
    print(said)
    assert ended["status"] == status
    return said


def numbers(run):
    """Losses of steps and evaluations."""
    return [line.model_dump(exclude={"seconds"}) for line in read_metrics(run)]


def held_against(run, other) -> None:
    assert len(numbers(run)) == len(numbers(other)) == 10
    for line, wanted in zip(numbers(run), numbers(other), strict=True):
        for key, value in line.items():
            assert value is None or value == pytest.approx(wanted[key], abs=1e-5), (line, wanted)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, other.adapter)]
    assert all(torch.allclose(tensor, adapters[1][name], atol=1e-5) for name, tensor in adapters[0].items())


@pytest.fixture(scope="module")
def together(forks, tiny_llama, rows, tmp_path_factory):
    """The same run by two processes of one machine."""
    root = tmp_path_factory.mktemp("together")
    machines_in(root)
    words = [word if word != f"out={OUT}" else f"out={root / 'a' / OUT}" for word in WORDS]
    command(forks, root, [tiny_llama, rows, *words], apart=False)
    return open_run(root / "a" / OUT)


def test_two_machines_train_what_one_trains_and_only_the_first_writes_the_run(
    forks, together, tiny_llama, rows, tmp_path
):
    first, second = machines_in(tmp_path)
    command(forks, tmp_path, [tiny_llama, rows, *WORDS])
    run = open_run(first / OUT)
    held_against(run, together)
    written = read_mark(run.latest_checkpoint())["files"]
    assert {name for name in written if name.startswith("rng_state")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert not (second / "runs").exists()
    for machine in (first, second):
        assert {"base", "tokens"} <= {path.name for path in (machine / "cache").iterdir()}, "cached on each machine"


def interrupted(root, run):
    """A copy of the first machine's run, as it was when its last steps were not done; the second machine is new."""
    machines_in(root)
    shutil.copytree(run.folder, root / "a" / OUT)
    shutil.rmtree(root / "a" / OUT / "adapter")
    shutil.rmtree(root / "a" / OUT / "checkpoints" / "checkpoint-6")
    return Run(root / "a" / OUT, run.recipe)


@pytest.mark.parametrize("there", ["nothing", "an older copy"])
def test_a_run_is_resumed_with_a_machine_that_does_not_have_it(there, forks, together, tmp_path):
    run = interrupted(tmp_path, together)
    if there == "an older copy":
        shutil.copytree(run.folder, tmp_path / "b" / OUT)
        shutil.rmtree(tmp_path / "b" / OUT / "checkpoints" / "checkpoint-4")
    before = sorted(path for path in (tmp_path / "b").rglob("*"))
    said = command(forks, tmp_path, ["--resume", OUT])
    assert "resuming from checkpoint-4" in said
    held_against(run, together)
    written = [path for path in (tmp_path / "b").rglob("*") if path not in before and "cache" not in path.parts]
    assert written == []
    assert not list(run.folder.glob(".*")), "nothing is left of the probe"


def test_a_run_that_cannot_be_resumed_is_refused_by_all_with_the_reason(forks, together, tmp_path):
    run = interrupted(tmp_path, together)
    for folder in run.checkpoints.iterdir():
        (folder / "optimizer.pt").unlink()
    said = command(forks, tmp_path, ["--resume", OUT], status=1)
    assert "error: no checkpoint can be resumed from" in said
    assert "there is no optimizer.pt" in said


def test_each_machine_must_have_the_same_data(forks, tiny_llama, rows, tmp_path):
    for folder, count in zip(machines_in(tmp_path), (80, 79), strict=True):
        (folder / "rows.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:count]))
    said = command(forks, tmp_path, [tiny_llama, "rows.jsonl", *WORDS], status=1)
    assert "the processes of this run would not train the same" in said
    assert re.search(r"- process 1 on \S+: data: '.+' -> '.+'", said)
    assert "fix:   the same command, data, base and versions on each machine" in said
    assert not list(tmp_path.glob("*/runs"))


def test_the_first_writes_the_batches_of_a_loss_that_is_not_finite(forks, tiny_llama, rows, tmp_path):
    machines_in(tmp_path)
    base = tmp_path / "poisoned"
    shutil.copytree(tiny_llama, base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][7] = 1e38  # finite, as a base must be, and its products are not
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    said = command(forks, tmp_path, [base, rows, *WORDS], status=1)
    assert "is not finite" in said
    saved = {file.name: torch.load(file, weights_only=True) for file in (tmp_path / "a" / OUT).glob("nonfinite-*")}
    assert set(saved) == {"nonfinite-step-1.pt", "nonfinite-step-1-process-1.pt"}
    batches = [content["batches"][0]["input_ids"] for content in saved.values()]
    assert batches[0].shape != batches[1].shape or not torch.equal(*batches), "each process's own"
    assert not (tmp_path / "b" / "runs").exists()


def test_the_best_checkpoint_is_the_first_ones(forks, tiny_llama, rows, tmp_path):
    """The second machine has no checkpoint to load at the end, and must agree on which one was kept."""
    machines_in(tmp_path)
    said = command(
        forks, tmp_path, [tiny_llama, rows, *WORDS, "train.learning_rate=5e-2", "train.scheduler=constant", *SHORT]
    )
    run = open_run(tmp_path / "a" / OUT)
    assert run.summary().kept_step == 2, said
    kept = load_file(run.checkpoints / "checkpoint-2" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, kept[name]) for name, tensor in load_file(run.adapter / "adapter_model.safetensors").items()
    )


def test_an_error_of_one_machine_ends_the_other_too(forks, tiny_llama, rows, tmp_path):
    """Each machine has its own copy of the base, and one is damaged."""
    for machine in machines_in(tmp_path):
        shutil.copytree(tiny_llama, machine / "base")
    weights = tmp_path / "b" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = command(forks, tmp_path, ["base", rows, *WORDS], status=1)
    assert "process 1: error: the file is cut off" in said
    assert "\nerror: another process of this run has ended, or cannot be reached: " in said
    assert "unexpected error" not in said
    assert not list(tmp_path.glob("*/runs"))


def agents(root, words):
    """What two agents of torchrun say, each with a working and a home folder of its own; the first one's process is rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", port]
    command = ["-m", "nybble", "--cache", "cache", "train", *map(str, words)]
    processes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(rank), *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "HOME": str(folder)}, text=True,
        )
        for rank, folder in enumerate((root / "a", root / "b"))
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    print(*said, sep="\n---\n")
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_two_agents_of_torchrun_train_and_resume(together, tiny_llama, rows, tmp_path):
    """As two machines do: fresh, then resumed after the second machine was replaced by a new one."""
    trained, resumed = tmp_path / "trained", tmp_path / "resumed"
    machines_in(trained)
    for root, words in ((trained, [tiny_llama, rows, *WORDS]), (resumed, ["--resume", OUT])):
        if root == resumed:
            interrupted(root, open_run(trained / "a" / OUT))
        statuses, _ = agents(root, words)
        assert statuses == [0, 0]
        held_against(open_run(root / "a" / OUT), together)
        assert not (root / "b" / "runs").exists()


@pytest.mark.slow
def test_an_error_on_one_machine_ends_both_agents(tiny_llama, rows, tmp_path):
    for machine in machines_in(tmp_path):
        shutil.copytree(tiny_llama, machine / "base")
    (tmp_path / "b" / "base" / "model.safetensors").write_bytes(b"damaged")
    statuses, said = agents(tmp_path, ["base", rows, *WORDS])
    assert statuses == [1, 1]
    assert "process 1: error: " in said[1]
    assert "error: another process of this run has ended" in said[0]
