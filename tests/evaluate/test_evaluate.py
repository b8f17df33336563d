"""nybble eval on a tiny run: benchmarks from files, held-out loss, answers, what is kept, what is missing."""

from __future__ import annotations

import gzip
import json
import math
import pathlib
import shutil
import subprocess
import sys

import lm_eval.tasks
import pytest
import torch
import wandb
from rich.console import Console
from transformers import AutoModelForCausalLM

from nybble.cli.extras import make_harness
from nybble.errors import EvaluationError, RecipeError
from nybble.evaluate.evaluation import Measures, evaluate
from nybble.evaluate.harness import Harness, _spread
from nybble.evaluate.perplexity import row_losses, text_windows
from nybble.evaluate.texts import read_texts
from nybble.recipe import TrackerOptions, load_recipe
from nybble.run.folder import Run, open_run
from nybble.run.log import read_metrics
from nybble.training.trackers import log_evaluation
from nybble.training.train import train
from tests.cli.test_cli import nybble

ARC = [
    {"id": str(n), "question": f"Which is {n}?", "choices": {"text": [f"{n}", "cat", "red dog"], "label": ["A", "B", "C"]},
     "answerKey": "ABC"[n % 3]}
    for n in range(12)
]  # fmt: skip
MMLU = [
    {"question": f"What is {n}?", "subject": subject, "choices": ["one", "two", "red", "cat"], "answer": n % 4}
    for subject in ("anatomy", "virology")
    for n in range(7)
]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", autouse=True)
def few_tasks():
    """Three of lm-eval's benchmarks: to read all of its 14,000 files, as test_processes.py does, takes 7 seconds."""
    tasks = pathlib.Path(lm_eval.tasks.__file__).parent
    folders = [tasks / "arc", tasks / "mmlu" / "default", tasks / "piqa"]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.evaluate.harness._manager", lambda: manager)
        yield


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_rows(folder / "arc_easy.validation.jsonl", ARC)
    write_rows(folder / "mmlu.test.jsonl", MMLU)
    write_rows(folder / "mmlu.dev.jsonl", MMLU)
    return folder


@pytest.fixture(scope="module")
def run(tuned_run) -> Run:
    return tuned_run


KEYS = [
    *(
        "version",
        "run",
        "date",
        "versions",
        "base",
        "adapter",
        "dtype",
        "device",
        "limit",
        "seconds",
        "tasks",
        "missing",
    ),
    *("texts", "held_out", "samples", "generation", "lengths", "max_length", "training", "recipe", "skill"),
]
"""Of evaluation.json; all but the first as 0.5.1 wrote them."""


@pytest.fixture(scope="module")
def results(run, benches, cache):
    harness = Harness(benches, 8)
    text = run.folder.parent / "text.txt"
    text.write_text("one two three red cat " * 200)
    measures = Measures(["arc_easy", "mmlu", "piqa"], [text], 6)
    return evaluate(run, measures, harness, Console(quiet=True), cache)


def test_everything_is_measured_and_written(run, results):
    assert run.evaluation() == results
    results = json.loads((run.folder / "evaluation.json").read_text())
    assert list(results) == KEYS
    assert (run.folder / "report.html").exists()
    arc, mmlu = results["tasks"]
    assert (arc["name"], arc["metric"], arc["rows"], arc["of"]) == ("arc_easy", "acc_norm", 8, 12)
    assert arc["data"] == "arc_easy.validation.jsonl"
    assert (mmlu["name"], mmlu["rows"], mmlu["of"], mmlu["fewshot"]) == ("mmlu", 8, 14, 5)
    assert mmlu["over_subjects"]["subjects"] == 2
    assert arc["over_subjects"] is None
    assert results["missing"] == [{"task": "piqa", "why": results["missing"][0]["why"]}]
    assert "no file for it" in results["missing"][0]["why"]
    assert arc["contamination"]["flagged"] == 0
    held_out = results["held_out"]
    assert held_out["rows"] == 12
    assert held_out["verdict"] == "better"
    assert held_out["difference"]["mean"] == pytest.approx(held_out["tuned"]["loss"] - held_out["base"]["loss"])
    then = json.loads((run.folder / "summary.json").read_text())["validation_loss"]
    assert held_out["base"]["loss"] == pytest.approx(then["before"], abs=1e-4)
    assert held_out["tuned"]["loss"] == pytest.approx(then["kept"], abs=1e-4)
    (text,) = results["texts"]
    assert text["tuned"]["perplexity"] == pytest.approx(math.exp(text["tuned"]["loss"]))
    assert [metric["name"] for metric in results["generation"]["metrics"]] == [
        *("exact match", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ends by itself", "distinct answers")
    ]
    assert len(results["samples"]) == 4 + 3
    assert sum(results["lengths"].values()) == 80 - 12, "the training rows, not those held out"


@pytest.mark.parametrize("fused", ["true", "false"])
def test_losses_in_bfloat16_are_those_of_the_run_s_own_validation(fused, tiny_llama, rows, cache, tmp_path, quiet):
    """Computed by the other path, the base's loss is 8e-5 apart here, and SmolLM2's after one step 0.33."""
    words = [f"model.path={tiny_llama}", f"data.path={rows}", f"out={tmp_path / 'run'}", "model.dtype=bfloat16"]
    words += [
        "data.max_length=128",
        "data.validation=8",
        "train.max_steps=2",
        "train.learning_rate=3e-3",
        "train.samples=0",
    ]
    words += [f"engine.fused={fused}", "train.warmup=0"]
    trained = train(load_recipe(None, words), console=quiet, cache=cache)
    held_out = evaluate(trained, Measures([], [], 0), None, quiet, cache).held_out
    then = trained.summary().validation_loss
    print(then, held_out)
    assert held_out.tuned.loss == pytest.approx(then.kept, abs=1e-5)
    assert held_out.base.loss == pytest.approx(then.before, abs=1e-5)


def test_scores_are_cached_and_an_evaluation_is_resumed(run, benches, cache, results, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("nybble.evaluate.evaluation.write_report", lambda *given: None)  # which takes a second
    harness = Harness(benches, 8)
    score = harness.score
    monkeypatch.setattr(
        harness, "score", lambda benchmark, *rest: asked.append(benchmark.name) or score(benchmark, *rest)
    )
    again = evaluate(run, Measures(["arc_easy", "mmlu"], (), 0), harness, Console(quiet=True), cache)
    assert asked == []
    assert again.tasks == results.tasks
    harness.limit = 9
    evaluate(run, Measures(["arc_easy"], (), 0), harness, Console(quiet=True), cache)
    assert asked == ["arc_easy", "arc_easy"], "base and tuned on other rows"
    own = tmp_path / "bench"
    own.mkdir()
    write_rows(own / "arc_easy.validation.jsonl", [{**row, "question": row["question"] + "?"} for row in ARC])
    harness.limit, harness.data = 8, own
    evaluate(run, Measures(["arc_easy"], (), 0), harness, Console(quiet=True), cache)
    assert asked == ["arc_easy"] * 4, "other items under the same name"
    other = tmp_path / "run"
    shutil.copytree(run.folder, other)
    (other / "adapter" / "COMPLETE").unlink(missing_ok=True)
    config = other / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 3}))
    evaluate(open_run(other), Measures(["arc_easy"], (), 0), harness, Console(quiet=True), cache)
    assert asked == ["arc_easy"] * 5, "the same tensors under another alpha: tuned only"


@pytest.mark.slow
def test_scores_are_those_of_lm_eval_s_own_command(tiny_llama, tiny_tokenizer, benches, tmp_path):
    harness = Harness(benches, 10)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with harness.benchmark("arc_easy") as benchmark:
        ours = harness.score(benchmark, model, tiny_tokenizer)
        entry = harness.manager.task_index["arc_easy"]
        own = tmp_path / "arc_easy.yaml"
        own.write_text(
            f"include: {entry.yaml_path}\ntask: arc_easy\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{validation: {benches / 'arc_easy.validation.jsonl'}}}}}\n"
            "training_split: null\ntest_split: null\n"
        )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", str(own), "--limit", "10"]
    command += ["--model_args", f"pretrained={tiny_llama},dtype=float32", "--batch_size", "8", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    theirs = [json.loads(line) for line in file.read_text().splitlines()]
    assert ours.values == [entry["acc_norm"] for entry in sorted(theirs, key=lambda entry: entry["doc_id"])]
    (summary,) = (tmp_path / "out").rglob("results_*.json")
    assert sum(ours.values) / 10 == json.loads(summary.read_text())["results"]["arc_easy"]["acc_norm,none"]


def test_benchmarks_during_training_become_curves_and_change_nothing(tiny_llama, rows, benches, cache, tmp_path, quiet):
    runs = []
    for tasks in ("[]", "[arc_easy]"):
        words = [f"model.path={tiny_llama}", f"data.path={rows}", f"out={tmp_path / tasks}", "model.device=cpu"]
        words += ["model.dtype=float32", "data.max_length=128", "data.validation=8", "lora.dropout=0.1"]
        words += ["train.max_steps=4", "train.evaluate_every=2", f"train.eval_tasks={tasks}", "train.samples=0"]
        harness = Harness(benches, 6, 2) if tasks != "[]" else None
        runs.append(train(load_recipe(None, words), console=quiet, cache=cache, benchmarks=harness))
    without, with_tasks = (read_metrics(run) for run in runs)
    scores = [line.scores["arc_easy"] for line in with_tasks if line.eval_loss is not None]
    assert len(scores) == 3
    assert all(0 <= score <= 1 for score in scores)
    assert [line.loss for line in without] == [line.loss for line in with_tasks], "the dropout changed"
    with pytest.raises(RecipeError) as caught:
        train(load_recipe(None, [*words, f"out={tmp_path / 'other'}"]), console=quiet, cache=cache)
    print(caught.value)
    assert "there is no benchmark harness to run them" in str(caught.value)


def test_the_numbers_go_to_wandb_too(run, results, monkeypatch):
    logged = []
    monkeypatch.setattr("nybble.training.trackers.wandb_key_present", lambda: False)
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", lambda self, numbers, **_: logged.append(numbers))
    notice = log_evaluation(TrackerOptions(to="wandb"), run.folder, results)
    assert "wandb sync" in notice
    assert logged[0]["arc_easy/tuned"] == results.tasks[0].tuned.mean
    assert logged[0]["held-out loss/base"] == results.held_out.base.loss
    assert log_evaluation(TrackerOptions(), run.folder, results) is None


def test_the_command_line_shows_the_table_and_names_what_is_wrong(run, benches, tmp_path, results, here):
    done = nybble("eval", run.folder, "--tasks", "none", "--answers", 2, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "better" in done.stdout
    done = here("eval", run.folder, "--tasks", "arc_esy", "--data-dir", benches)
    print(done.stderr)
    assert done.returncode == 1
    assert "did you mean arc_easy" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_folder_of_rows_is_named(tmp_path):
    with pytest.raises(EvaluationError, match="there is no folder"):
        make_harness(["arc_easy"], tmp_path / "nowhere", 1)


BAD_ROWS = {
    "arc_easy.validation.jsonl": (json.dumps(ARC[0]).encode("utf-16"), "the file is UTF-16, not UTF-8", ":1"),
    "arc_easy.test.jsonl.gz": (gzip.compress(b'{"question": "caf\xe9"}\n'), "not UTF-8: byte 0xe9", ":1"),
    "mmlu.test.jsonl": (b"\n" + json.dumps(MMLU[0]).encode() + b"\n{\n", "not valid JSON", ":3"),
    "mmlu.dev.jsonl": (
        b'{"question": "' + b"x" * 16_000_000 + b'"}\n',
        "a line of 16.0 MB, over the limit of 16 MB",
        ":1",
    ),
    "ARC-Easy.validation.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n",
        "git-lfs pointer",
        "",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_of_a_benchmark_that_cannot_be_read_are_named_before_a_model_is_loaded(tmp_path, name):
    content, what, line = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError) as caught:
        make_harness(["mmlu" if name.startswith("mmlu") else "arc_easy"], tmp_path, 1)
    print(caught.value)
    assert what in caught.value.what
    assert caught.value.where == f"{tmp_path / name}{line}"
    assert "data.max_row_mb" not in str(caught.value), "it is for rows that are trained on"


def test_files_of_rows_may_have_a_bom_blank_lines_and_copies_beside_them(tmp_path):
    rows = "".join(f"{json.dumps(row)}\n\n" for row in MMLU)
    for name in ("mmlu.test.jsonl", "mmlu.dev.jsonl"):
        (tmp_path / name).write_text(f"\ufeff{rows}", encoding="utf-8")
    (tmp_path / "mmlu.test.jsonl.bak").write_bytes(b"\xff")
    with make_harness(["mmlu"], tmp_path, 4).benchmark("mmlu") as benchmark:
        assert benchmark.of == len(MMLU)


TEXTS = {
    # name: bytes (None: no such file), what is said, what fixes it
    "nothing.txt": (None, "there is no file", "ls "),
    "empty.txt": (b"", "is empty", "with text in it"),
    "blank.txt": (b" \n\n", "is empty", "with text in it"),
    "wide.txt": ("one caf\u00e9".encode("utf-16"), "the file is UTF-16, not UTF-8", "iconv -f UTF-16"),
    "wide-unmarked.txt": ("one two".encode("utf-16-le"), "the file is UTF-16LE, not UTF-8", "iconv -f UTF-16LE"),
    "latin.txt": ("one\ncaf\u00e9".encode("latin-1"), "not UTF-8: byte 0xe9 at position 4", "iconv -f WINDOWS-1252"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8: byte 0x89", ""),
    "paper.txt": (b"%PDF-1.7\n", "a PDF", "write its text"),
    "cut.txt.gz": (gzip.compress(b"one two" * 99)[:-9], "the gzip file is truncated", "again"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n", "git-lfs pointer", "lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_cannot_be_read_is_named(tmp_path, name):
    content, what, fix = TEXTS[name]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(EvaluationError) as caught:
        read_texts([file])
    print(caught.value)
    assert what in caught.value.what
    assert fix in (caught.value.fix or "")
    assert str(file) in str(caught.value)


def test_texts_are_read_whatever_ends_their_lines_and_folders_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (tmp_path / "B.TXT.GZ").write_bytes(gzip.compress(b"<html>"))
    assert [text.text for text in read_texts([tmp_path / "a.txt", tmp_path / "B.TXT.GZ"])] == ["one\ntwo\n", "<html>"]
    with pytest.raises(EvaluationError, match="is a folder, not a text"):
        read_texts([tmp_path])


def test_a_bad_text_is_named_before_anything_is_loaded(run, tmp_path, cache, quiet, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_bytes("one".encode("utf-16"))
    script = f"""
import pathlib, sys
from nybble.errors import EvaluationError
sys.argv = ["nybble", "eval", {str(run.folder)!r}, "--tasks", "none", "--text", {str(file)!r}]
from nybble.cli import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.split() == ["False"], done.stderr
    assert "the file is UTF-16, not UTF-8" in done.stderr
    assert f"{file}:1" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(EvaluationError, match="has fewer than two tokens"):
        evaluate(run, Measures((), [tmp_path / "short.txt"], 0), None, quiet, cache)
    monkeypatch.setattr("nybble.evaluate.evaluation.load_answerer", None)
    with pytest.raises(EvaluationError, match="UTF-16"):
        evaluate(run, Measures((), [file], 0), None, quiet, cache)


def test_the_loss_of_a_row_does_not_depend_on_its_batch(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    samples = [{"input_ids": list(range(3, 3 + n)), "trained": [False, *[True] * (n - 1)]} for n in (5, 60, 9, 33)]
    together = row_losses(model, samples, 0)
    for place, sample in enumerate(samples):
        ids = torch.tensor([sample["input_ids"]])
        alone = model(input_ids=ids, labels=ids).loss.item()
        assert together.sums[place] / together.tokens[place] == pytest.approx(alone, abs=1e-5)
    assert together.tokens.tolist() == [4, 59, 8, 32]


def test_a_text_is_read_in_windows_without_a_token_lost(tiny_tokenizer):
    text = "one two three " * 50
    windows = text_windows(text, tiny_tokenizer, 32)
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for window in windows for token in window["input_ids"]] == ids
    assert max(len(window["input_ids"]) for window in windows) == 32


def test_each_window_begins_with_bos_where_the_tokenizer_puts_one(llama2_tokenizer):
    windows = text_windows("Hello world. " * 40, llama2_tokenizer, 16)
    assert len(windows) > 5
    assert all(window["input_ids"][0] == 1 and 1 not in window["input_ids"][1:] for window in windows)


def test_rows_of_a_group_are_spread_over_its_parts():
    assert {part: len(rows) for part, rows in _spread({"a": 10, "b": 2, "c": 10}, 9).items()} == {
        "a": 4,
        "b": 2,
        "c": 3,
    }
    assert {part: len(rows) for part, rows in _spread({"a": 3, "b": 2}, None).items()} == {"a": 3, "b": 2}


def test_an_unknown_task_is_named_with_its_likely_neighbours(benches):
    with pytest.raises(EvaluationError) as caught:
        Harness(benches, 1).parts("arc_esy")
    print(caught.value)
    assert "did you mean arc_easy" in str(caught.value)
