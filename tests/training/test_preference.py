"""Runs that learn preferences, from data to adapter: kept and live reference, resuming, processes, notices, evaluation."""

from __future__ import annotations

import io
import json
import shutil

import numpy
import pytest
from rich.console import Console

from nybble.cli.app import app
from nybble.engine import compute
from nybble.engine.fusion import Fusion
from nybble.errors import RecipeError
from nybble.evaluate.evaluation import Measures, evaluate
from nybble.evaluate.gate import judge, parse_requirements
from nybble.recipe import load_recipe
from nybble.run.log import read_metrics
from nybble.training.preference_watch import APART, FALL, WINDOW, PreferenceWatch
from nybble.training.train import resume, train
from tests.conftest import WORDS
from tests.forked import Forks
from tests.training.test_train import adapter_of, losses

FAST = [
    "model.device=cpu", "model.dtype=float32", "data.max_length=128", "data.validation=8", "train.micro_batch=4",
    "train.accumulation=2", "train.samples=0", "train.scheduler=constant", "train.learning_rate=3e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


def write(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Answers of the first words were chosen, those of the last ones rejected."""
    rows = [
        {
            "prompt": " ".join(WORDS[(n * k) % 20] for k in range(1, 3 + n % 5)),
            "chosen": " ".join(WORDS[(n + k) % 9] for k in range(1 + n % 3)) + f" {n}",
            "rejected": " ".join(WORDS[11 + (n * k) % 9] for k in range(1 + (n + 1) % 4)) + f" {n}",
        }
        for n in range(56)
    ]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def labels(tmp_path_factory, pairs):
    rows = []
    for n, line in enumerate(pairs.read_text().splitlines()):
        pair = json.loads(line)
        rows.append(
            {"prompt": pair["prompt"], "completion": pair["rejected" if n % 2 else "chosen"], "label": n % 2 == 0}
        )
    return write(tmp_path_factory.mktemp("labels") / "labels.jsonl", rows)


def recipe_of(model, data, out, objective, *words):
    words = [f"train.objective={objective}", *FAST, *words]
    return load_recipe(None, [f"model.path={model}", f"data.path={data}", f"out={out}", *words])


def said_by(recipe, cache, work=train):
    console = Console(file=io.StringIO(), width=200)
    run = work(recipe, console=console, cache=cache)
    return run, console.file.getvalue()


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "kto"])
def test_each_objective_learns_what_is_preferred(objective, tiny_llama, pairs, labels, cache, tmp_path):
    data = labels if objective == "kto" else pairs
    run, _ = said_by(
        recipe_of(tiny_llama, data, tmp_path / "run", objective, "train.max_steps=24", "train.evaluate_every=12"), cache
    )
    evaluations = [line.model_dump() for line in read_metrics(run) if line.eval_loss is not None]
    first, last = evaluations[0], evaluations[-1]
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_accuracy"] > 0.8
    assert last["eval_reward_chosen"] > last["eval_reward_rejected"]
    if objective == "dpo":
        assert first["eval_loss"] == pytest.approx(numpy.log(2), abs=1e-4), "the reference is the model as it begins"
        assert first["eval_kl"] == pytest.approx(0, abs=1e-3)
        assert last["eval_margin"] == pytest.approx(last["eval_reward_chosen"] - last["eval_reward_rejected"], abs=1e-4)
    if objective == "kto":
        assert first["eval_loss"] == pytest.approx(0.5, abs=1e-4)


def test_a_live_reference_gives_the_losses_of_a_kept_one(tiny_llama, pairs, cache, tmp_path):
    found = {}
    for reference in ("kept", "live"):
        recipe = recipe_of(
            tiny_llama, pairs, tmp_path / reference, "dpo", "train.max_steps=5", f"preference.reference={reference}"
        )
        run, told = said_by(recipe, cache)
        assert ("\nreference " in told) == (reference == "kept")
        found[reference] = losses(run)
    assert found["live"] == pytest.approx(found["kept"], abs=1e-5)
    assert len(set(found["kept"])) == 4, "the first step warms up"


@pytest.mark.parametrize("reference", ["kept", "live"])
def test_in_fp8_the_reference_answers_as_the_model_that_is_trained_from_it(
    reference, tiny_llama, pairs, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(compute, "missing", lambda device: "")  # on a CPU its reference computes it
    words = ["model.device=auto", "model.dtype=auto", "engine.compute=fp8", "lora.dropout=0.1", "train.max_steps=3"]
    recipe = recipe_of(tiny_llama, pairs, tmp_path / "run", "dpo", *words, f"preference.reference={reference}")
    run, _ = said_by(recipe, cache)
    lines = [line.model_dump() for line in read_metrics(run)]
    first, before = lines[1], lines[0]
    assert first["loss"] == pytest.approx(numpy.log(2), abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-3), "in training both are in fp8"
    assert before["eval_kl"] == pytest.approx(0, abs=1e-3), "in evaluation both are in 16 bits"


SHARING = {
    "dpo": [],
    "dpo live packed": [
        "preference.reference=live",
        "data.packing=true",
        "data.max_length=64",
        "lora.targets=[q_proj]",
    ],
    "orpo": ["data.train_on=all"],
    "simpo": ["engine.policy=host"],
}


@pytest.mark.parametrize("case", SHARING)
def test_pairs_train_alike_whether_they_share_their_prompt_or_not(
    case, tiny_llama, pairs, cache, tmp_path, monkeypatch
):
    words = ["train.max_steps=4", "train.micro_batch=3", *SHARING[case]]
    found = {}
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(Fusion, "shares_prompts", False)
            shutil.rmtree(cache / "reference", ignore_errors=True)
        recipe = recipe_of(tiny_llama, pairs, tmp_path / str(shares), case.split()[0], *words)
        run, _ = said_by(recipe, cache)
        tokens = [line.tokens for line in read_metrics(run) if line.loss is not None]
        found[shares] = losses(run), adapter_of(run), tokens
    assert sum(found[True][2]) < sum(found[False][2]), "a prompt that is shared is computed once"
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-5)
    for name, tensor in found[False][1].items():
        assert found[True][1][name].numpy() == pytest.approx(tensor.numpy(), abs=1e-4), name


def test_a_run_resumes_to_the_same_losses_with_the_reference_of_its_beginning(tiny_llama, pairs, cache, tmp_path):
    """Whether the cache still has the reference or not: a checkpoint's adapter is not what it is computed with."""
    words = ["train.max_steps=8", "train.save_every=4", "train.evaluate_every=4"]
    recipe = recipe_of(tiny_llama, pairs, tmp_path / "whole", "dpo", *words)
    whole, _ = said_by(recipe, cache)
    kept = list((cache / "reference").iterdir())
    assert kept
    for name in ("from the cache", "computed again"):
        cut = tmp_path / name.replace(" ", "-")
        shutil.copytree(whole.folder, cut)
        for path in (cut / "adapter", cut / "checkpoints" / "checkpoint-8"):
            shutil.rmtree(path)
        for file in ("summary.json", "README.md", "loss.png"):
            (cut / file).unlink()
        if name == "computed again":
            shutil.rmtree(cache / "reference")
        console = Console(file=io.StringIO(), width=200)
        resumed = resume(cut, console=console, cache=cache)
        assert ("rows, from the cache" in console.file.getvalue()) == (name == "from the cache")
        assert losses(resumed) == losses(whole)
        assert all((adapter_of(resumed)[key] == value).all() for key, value in adapter_of(whole).items())


def test_an_adapter_that_is_trained_further_is_its_own_reference(tiny_llama, pairs, cache, tmp_path):
    first, _ = said_by(recipe_of(tiny_llama, pairs, tmp_path / "first", "orpo", "train.max_steps=12"), cache)
    recipe = recipe_of(tiny_llama, pairs, tmp_path / "second", "dpo", "train.max_steps=8", f"adapter={first.adapter}")
    second, _ = said_by(recipe, cache)
    evaluations = [line.model_dump() for line in read_metrics(second) if line.eval_loss is not None]
    assert evaluations[0]["eval_loss"] == pytest.approx(numpy.log(2), abs=1e-4)
    assert evaluations[-1]["eval_loss"] < 0.69
    live = ["preference.reference=live", f"adapter={first.adapter}"]
    for objective, words, what in (("dpo", live, "its own reference"), ("kto", live[1:], "merge the adapter")):
        with pytest.raises(RecipeError, match=what) as caught:
            recipe_of(tiny_llama, pairs, tmp_path / "no", objective, *words)
        print(caught.value)


CONTRADICTIONS = {
    "unused": (["preference.gamma=2"], "preference: gamma has no effect with train.objective=dpo"),
    "form": (["data.form=alpaca"], "data.form: alpaca is for rows with one answer"),
    "split": (["data.overlength=split"], "data.overlength: an answer that is judged as a whole cannot be split"),
    "prompts": (["data.train_on=all"], "compares answers only"),
    "noise": (["train.neftune_alpha=5"], "noise would change the likelihoods"),
    "rate": (["train.learning_rate=auto"], "auto judges the rate by a loss in nats per token"),
    "stream": (
        ["data.streaming=true", "train.max_steps=3"],
        "the rows of a stream are not known before the first step",
    ),
    "lone": (["train.objective=kto", "train.micro_batch=1"], "it needs at least 2"),
    "imitating": (
        ["train.objective=supervised", "preference.beta=1"],
        "beta has no effect with train.objective=supervised",
    ),
}


@pytest.mark.parametrize("words, what", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_options_that_contradict_the_objective_are_refused(words, what):
    with pytest.raises(RecipeError, match=what) as caught:
        load_recipe(None, ["model.path=m", "data.path=d", "train.objective=dpo", *words])
    print(caught.value)


@pytest.mark.parametrize("words", [[], ["data.packing=true"], ["engine.fused=false"], ["preference.reference=live"]])
def test_several_processes_train_as_one(words, forks, tiny_llama, pairs, cache, tmp_path):
    """45 rows in steps of 6: the last step of the epoch is filled with rows that count for nothing."""
    split = {1: ["train.micro_batch=6"], 2: ["train.processes=2", "train.micro_batch=3"]}
    found = {}
    for count, own in split.items():
        root = tmp_path / str(count)
        root.mkdir()
        common = [
            "--cache", cache, "train", tiny_llama, pairs, f"out={root / 'run'}", *FAST, "train.objective=dpo",
            "data.validation=11", "train.accumulation=1", "train.max_steps=10", "train.evaluate_every=5", *own, *words,
        ]  # fmt: skip
        if "data.packing=true" in words:
            common += ["data.max_length=32", "train.micro_batch=1" if count == 2 else "train.micro_batch=2"]
        ended = forks.run(root, common, None, count)
        assert ended["status"] == 0, (root / "said.txt").read_text()
        lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        keys = ("loss", "margin", "logp_rejected", "eval_loss", "eval_accuracy")
        found[count] = [[line[key] for key in keys if key in line] for line in lines]
    assert len(found[1]) == 13
    for one, two in zip(found[1], found[2], strict=True):
        assert two == pytest.approx(one, abs=2e-4)


def test_kto_runs_on_several_processes_though_a_micro_batch_may_have_no_answer_that_counts(
    forks,
    tiny_llama,
    labels,
    cache,
    tmp_path,
):
    """45 rows in steps of 6: the second process has no row of its own in the last step."""
    words = ["--cache", cache, "train", tiny_llama, labels, f"out={tmp_path / 'run'}", *FAST, "train.objective=kto"]
    words += [
        "data.validation=11",
        "train.accumulation=1",
        "train.max_steps=8",
        "train.processes=2",
        "train.micro_batch=3",
    ]
    ended = forks.run(tmp_path, words, None, 2)
    assert ended["status"] == 0, (tmp_path / "said.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(numpy.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[-1]["eval_accuracy"] > 0.5


def test_kto_measures_one_held_out_row_against_the_reference_itself(tiny_llama, labels, cache, tmp_path):
    """Its own answer is no estimate of how far the model has moved: a good one would have a loss of 0.5 whatever is learnt."""
    good = write(
        tmp_path / "good.jsonl", [row for row in map(json.loads, labels.read_text().splitlines()) if row["label"]]
    )
    recipe = recipe_of(tiny_llama, good, tmp_path / "run", "kto", "data.validation=1", "train.max_steps=8")
    run, _ = said_by(recipe, cache)
    evaluations = [line.model_dump() for line in read_metrics(run) if line.eval_loss is not None]
    assert evaluations[-1]["eval_loss"] < 0.5 - 1e-3
    assert evaluations[-1]["eval_accuracy"] == 1
    assert evaluations[-1]["eval_kl"] == 0


def steps(watch, count=WINDOW, **measured):
    usual = {"logp_chosen": -10.0, "reward_chosen": 0.0, "reward_rejected": 0.0}
    return [line for _ in range(count) for line in watch.see({**usual, **measured})]


def test_notices_say_once_what_goes_wrong_and_what_to_do():
    watch = PreferenceWatch()
    assert steps(watch, change_chosen=-FALL / 2, reward_chosen=1.0, reward_rejected=-APART / 2) == []
    (fall,) = steps(watch, 3 * WINDOW, change_chosen=-2 * FALL)
    print(fall)
    assert "less likely than under the reference" in fall
    assert "train.learning_rate" in fall
    (apart,) = steps(watch, 3 * WINDOW, change_chosen=0.0, reward_chosen=5.5, reward_rejected=-APART)
    print(apart)
    assert "apart, where the loss is flat" in apart
    assert PreferenceWatch().see({}) == []


def test_without_a_reference_the_first_steps_are_what_is_compared_with():
    watch = PreferenceWatch()
    assert steps(watch, reward_chosen=-0.5, reward_rejected=-0.5) == []
    longer = {"logp_chosen": -40.0, "reward_chosen": -0.5, "reward_rejected": -0.5}
    assert steps(watch, **longer) == [], "longer answers are not less likely ones"
    (fall,) = steps(watch, 2 * WINDOW, reward_chosen=-1.0, reward_rejected=-1.0)
    print(fall)
    assert "per token is 1.6 times that of the first 10 steps" in fall


def test_a_step_without_bad_answers_is_left_out_of_the_mean():
    watch = PreferenceWatch()
    nan = float("nan")
    assert steps(watch, reward_chosen=1.0, reward_rejected=nan, change_chosen=nan) == []
    assert steps(watch, 2 * WINDOW, reward_chosen=2 * APART, reward_rejected=nan, change_chosen=1.0) == []


@pytest.fixture(scope="module")
def preferred(tiny_llama, pairs, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("preferred") / "run"
    words = ["train.max_steps=30", "data.validation=16", "train.keep_best=false"]
    return train(recipe_of(tiny_llama, pairs, out, "dpo", *words), console=Console(quiet=True), cache=cache)


def test_evaluation_tells_preference_accuracy_and_length_bias(preferred, cache):
    console = Console(file=io.StringIO(), width=200)
    found = evaluate(preferred, Measures(answers=4), None, console, cache).preferences
    assert (found.rows, found.by) == (16, "log-likelihood")
    accuracy, longer = found.metrics
    assert accuracy.tuned.mean > 0.85
    assert accuracy.tuned.interval[0] < accuracy.tuned.mean <= accuracy.tuned.interval[1]
    assert accuracy.tuned.mean > accuracy.base.mean
    assert found.reward_accuracy.mean > 0.85
    assert 0 < found.longer_chosen.mean < 1
    assert longer.difference is None, "a bias is no merit"
    stored = json.loads((preferred.folder / "evaluation.json").read_text())
    assert stored["preferences"]["rows"] == 16
    assert "preference accuracy: base" in console.file.getvalue()
    for name in ("report.html", "report.md"):
        report = (preferred.folder / name).read_text()
        assert "16 held-out pairs" in report
        assert "longer answer chosen in the data" in report


def test_a_gate_can_require_preferences(preferred, cache):
    evaluation = evaluate(preferred, Measures(answers=0, samples=[]), None, Console(quiet=True), cache)
    texts = ["preference_accuracy>=0.5", "preference_accuracy>=base", "longer_answer_preferred<=0.0001"]
    required = parse_requirements(texts, [], 0, pairs=True)
    assert [judge(each, evaluation).outcome for each in required][::2] == ["met", "missed"]
    with pytest.raises(RecipeError, match="nothing named preference_accuracy will be measured"):
        parse_requirements(texts, [], 0)


def test_the_base_s_preferences_do_not_depend_on_batches(preferred, cache, monkeypatch):
    first = evaluate(preferred, Measures(answers=0, samples=[]), None, Console(quiet=True), cache).preferences
    monkeypatch.setattr("nybble.evaluate.preferences.MEASURED_TOKENS", 1)
    again = evaluate(preferred, Measures(answers=0, samples=[]), None, Console(quiet=True), cache).preferences
    assert again == first


def test_the_command_line_evaluates_a_run_with_labels(tiny_llama, labels, cache, tmp_path, capsys):
    words = ["train.max_steps=4"]
    run, _ = said_by(recipe_of(tiny_llama, labels, tmp_path / "run", "kto", *words), cache)
    app(["--cache", str(cache), "eval", str(run.folder), "--answers", "2", "--tasks", "none"], standalone_mode=False)
    stored = json.loads((run.folder / "evaluation.json").read_text())
    assert "preferences" not in stored or stored["preferences"] is None
    assert stored["held_out"]["rows"] < 8, "answers that are labelled as bad are not to be imitated"
