"""The records of a run: older ones are read, files keep their keys, one of a newer version is refused in a sentence."""

from __future__ import annotations

import ast
import dataclasses
import json
import pathlib
import re

import pytest

from nybble.data.text.tokenise import Counts
from nybble.errors import RunError
from nybble.export.records import Parity
from nybble.recipe import Recipe
from nybble.run.evaluation import Evaluation, MetricEntry, ScoreEntry, SkillEntry
from nybble.run.folder import Run, open_run
from nybble.run.identity import check_unchanged
from nybble.run.log import MetricsLine, SampleLine, append_line, check_logs, cut_logs, read_metrics
from nybble.run.records import read_record, write_record
from nybble.run.start import RecordedRecipe, check_recipe, halved_from, read_start, start_record, write_start
from nybble.run.summary import DataSummary, Summary
from tests.conftest import ROOT

OLD = ROOT / "tests" / "release_0_5_1" / "run"
EVALUATION_0_6 = {
    "run": "r", "date": "2026-11-27T01:02:49+00:00", "versions": {"nybble": "0.6.0"},
    "base": {"name": "m", "fingerprint": "sha256:1", "quantization": "nf4"}, "adapter": "sha256:2", "dtype": "float32",
    "device": "cpu", "limit": None, "seconds": 1.5, "tasks": [], "missing": [], "texts": [],
    "held_out": {
        "what": "validation rows of the run", "rows": 4, "tokens": 52, "base": {"loss": 5.25, "perplexity": 192.3},
        "tuned": {"loss": 0.5, "perplexity": 1.6}, "difference": {"mean": -4.75, "stderr": 0.4, "interval": [-7.5, 0.0]},
        "p": 0.125, "p_adjusted": 0.125, "verdict": "no difference shown", "detectable": None,
    },
    "samples": [{"prompt": "a", "expected": "b", "base": "c", "tuned": "d"}],
    "generation": {"rows": 4, "metrics": [
        {"name": "distinct answers", "base": {"mean": 1.0, "stderr": None, "interval": None},
         "tuned": {"mean": 0.5, "stderr": None, "interval": None}, "difference": None, "p": None, "verdict": None,
         "detectable": None},
    ]},
    "lengths": {"17": 4}, "max_length": 1024,
    "training": {"steps": 57, "seconds": 141.6, "tokens": 14229, "tokens_per_second": 129.2, "peak_memory_gb": 2.017,
                 "device": "cpu", "trainable_parameters": 4884480, "template": "model"},
    "recipe": "model: {}\n", "skill": {"what": "sums", "base": "0 of 9", "tuned": "9 of 9"},
}  # fmt: skip
PARITY_0_6 = {
    "date": "2026-11-27T00:43:09+00:00", "versions": {"nybble": "0.6.0"}, "merge_base": "original",
    "comparison": {
        "rows": 4, "tokens": 17, "what": "validation rows", "perplexity": 2.5,
        "bases": {"original": {"kl": 0.1, "error": 0.01, "perplexity": 2.6, "agreement": 0.9}},
    },
    "checks": ["Q8_0 not checked: why", {
        "passed": False, "kind": "F16", "by": "llama.cpp", "failures": ["it is other"],
        "numbers": {"tokens": 17, "kl": 0.5, "kl_worst": 0.6, "difference_mean": 0.1, "difference_worst": 0.2,
                    "equal_likeliest": 1.0, "expected_kl": 0.0, "kl_limit": 0.01, "questions": 1, "equal_answers": 0,
                    "run_ended": 1, "artefact_ended": 0},
        "answers": [{"prompt": "a", "run": "b", "artefact": "c", "first_difference": 0, "run_ended": True,
                     "artefact_ended": False}],
    }],
}  # fmt: skip


def written(file: pathlib.Path, value: object) -> pathlib.Path:
    file.write_text(json.dumps(value))
    return file


@pytest.mark.parametrize(
    ("name", "record", "stored"),
    [
        ("summary.json", Summary, json.loads((OLD / "summary.json").read_text())),
        ("evaluation.json", Evaluation, EVALUATION_0_6),
        ("parity.json", Parity, PARITY_0_6),
    ],
)
def test_a_record_without_a_version_is_read_and_written_with_the_same_keys_and_values(tmp_path, name, record, stored):
    whole = read_record(written(tmp_path / name, stored), record)
    write_record(tmp_path / name, whole)
    assert (tmp_path / name).read_text() == json.dumps({"version": 1, **stored}, indent=2, ensure_ascii=False) + "\n"
    assert read_record(tmp_path / name, record) == whole


def test_start_json_is_written_as_before_without_a_version_which_0_7_0_would_refuse(tmp_path):
    text = (OLD / "start.json").read_text()
    write_start(tmp_path / "start.json", read_start(OLD / "start.json"), {"template.json": {"size": 1, "digest": "0"}})
    kept = json.loads((tmp_path / "start.json").read_text())
    assert kept.pop("files") == {"template.json": {"size": 1, "digest": "0"}}
    assert json.dumps(kept) == json.dumps(json.loads(text))
    now = start_record(Recipe(), "1", "sha256:1", None).as_json()
    assert list(now) == ["recipe", "data", "base", "versions", "quantized_base"], "as 0.7.0 wrote it, and in that order"
    assert list(now["recipe"]) == [name for name in Recipe.model_fields if name != "out"]


def test_a_recipes_sections_are_all_recorded(tmp_path):
    """One that is new is not lost on the way."""
    recorded = RecordedRecipe.model_validate({"model": {}, "data": {}, "objective": {"beta": 0.1}})
    assert recorded.as_json()["objective"] == {"beta": 0.1}
    start = start_record(Recipe(), "1", "sha256:1", None)
    write_start(tmp_path / "start.json", start, {})
    (tmp_path / "recipe.yaml").touch()
    check_unchanged(Run(tmp_path, Recipe()), start)
    other = start_record(Recipe.model_validate({"train": {"seed": 7}}), "2", "sha256:1", None)
    with pytest.raises(RunError) as caught:
        check_unchanged(Run(tmp_path, Recipe()), other)
    assert "train.seed: 42 -> 7" in caught.value.what
    assert "data: '1' -> '2'" in caught.value.what


@pytest.mark.parametrize(
    ("now", "differing"),
    [
        ({"micro_batch": 2, "accumulation": 8}, []),
        ({"micro_batch": 2, "accumulation": 4}, ["train.micro_batch: 4 -> 2"]),
        ({"micro_batch": 2, "accumulation": 8, "seed": 7}, ["train.seed: 42 -> 7"]),
    ],
)
def test_a_step_may_be_split_otherwise_as_long_as_it_has_the_same_rows(tmp_path, now, differing):
    start = start_record(Recipe(), "1", "sha256:1", None)
    write_start(tmp_path / "start.json", start, {})
    recipe = Recipe.model_validate({"train": now})
    for check in (
        lambda: check_unchanged(Run(tmp_path, recipe), start_record(recipe, "1", "sha256:1", None)),
        lambda: check_recipe(recipe, tmp_path / "recipe.yaml"),
    ):
        if not differing:
            check()
            continue
        with pytest.raises(RunError) as caught:
            check()
        print(caught.value)
        assert [line[4:] for line in caught.value.what.splitlines()[1:]] == differing
    assert halved_from(start, recipe) == 4
    assert halved_from(start, Recipe()) is None


def test_a_recorded_micro_batch_that_is_not_a_number_is_a_difference(tmp_path):
    start = start_record(Recipe(), "1", "sha256:1", None)
    start.recipe.train["micro_batch"] = "four"
    write_start(tmp_path / "start.json", start, {})
    with pytest.raises(RunError, match=r"train\.micro_batch: 'four' -> 4"):
        check_recipe(Recipe(), tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["summary.json", "start.json", "evaluation.json"])
def test_a_record_of_a_newer_version_is_refused_in_a_sentence(tmp_path, name):
    """Whatever else it has become."""
    written(tmp_path / name, {"version": 2, "date": [], "quantized_base": 7})
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RunError) as caught:
        getattr(Run(tmp_path, Recipe()), name.removesuffix(".json"))()
    print(caught.value)
    assert caught.value.what == (
        f"a newer nybble wrote {name}: its format is version 2, and this nybble reads up to version 1"
    )
    assert caught.value.where == str(tmp_path / name)
    assert "pip install -U nybble" in caught.value.fix


@pytest.mark.parametrize("version", ["2", 1.5, True])
def test_a_version_that_is_not_a_number_is_damage(tmp_path, version):
    file = written(tmp_path / "evaluation.json", {**EVALUATION_0_6, "version": version})
    with pytest.raises(RunError, match=r"version in evaluation\.json: should be a whole number"):
        read_record(file, Evaluation)


def test_a_run_of_0_5_1_is_read_by_attributes():
    run = Run(OLD, Recipe())
    summary, start = run.summary(), run.start()
    assert (summary.data.template, summary.data.system, summary.base.quantized) == ("model", "", None)
    assert (summary.validation_loss.kept, summary.seconds_in_steps) == (5.627167441628196, None)
    assert (start.quantized_base, start.files, start.is_base_a_folder) == (None, None, True)
    assert run.evaluation() is None
    first, second = read_metrics(run)[:2]
    assert (first.step, first.eval_loss, first.loss) == (0, 6.045474659312855, None)
    assert (second.tokens, second.seconds) == (235, 0.0231)


def test_what_is_counted_of_the_rows_is_recorded():
    counted = [field.name for field in dataclasses.fields(Counts)]
    assert list(DataSummary.model_fields) == ["path", "fingerprint", "template", *counted]


def test_records_do_not_change_and_know_their_types(tmp_path):
    evaluation = Evaluation.model_validate(EVALUATION_0_6)
    with pytest.raises(ValueError, match="frozen"):
        evaluation.date = "later"
    entry = MetricEntry(name="a", base=ScoreEntry(mean=1.0), tuned=ScoreEntry(mean=None))
    assert entry.as_json() == {"name": "a", "base": {"mean": 1.0}, "tuned": {"mean": None}}
    assert SkillEntry(what="x", ways={"y": "z"}).as_json() == {"what": "x", "y": "z"}


def test_lines_are_written_and_cut_as_they_are(tmp_path):
    run = Run(tmp_path, Recipe())
    append_line(run.metrics, MetricsLine(step=0, eval_loss=2.5, scores={"arc_easy": 0.25}))
    append_line(run.metrics, MetricsLine(step=1, loss=2.0, tokens=7, seconds=0.5))
    assert run.metrics.read_text() == (
        '{"step": 0, "eval_loss": 2.5, "task/arc_easy": 0.25}\n{"step": 1, "loss": 2.0, "tokens": 7, "seconds": 0.5}\n'
    )
    append_line(run.samples, SampleLine(step=1, prompt="a", answer="b", expected="c"))
    odd = '{"mine":  1, "step": 1}\n'
    with run.metrics.open("a") as stream:
        stream.write(f'\n{odd}{{"step": 2, "loss": "nan"}}\n{{"st')
    assert read_metrics(run)[0].scores == {"arc_easy": 0.25}
    before = run.metrics.read_text()
    assert [line.step for line in cut_logs(run, 1)] == [0, 1, 1]
    assert run.metrics.read_text() == before.replace("\n\n", "\n").partition('{"step": 2')[0]
    assert run.samples.read_text() == '{"step": 1, "prompt": "a", "answer": "b", "expected": "c"}\n'
    assert cut_logs(run, 0)[0].eval_loss == 2.5
    assert run.samples.read_text() == ""
    with run.metrics.open("a") as stream:
        stream.write('x\n{"step": 0}\n')
    with pytest.raises(RunError) as caught:
        check_logs(run, 0)
    assert caught.value.where == f"{run.metrics}:2"


def test_what_an_objective_measures_is_a_key_of_its_line_too(tmp_path):
    run = Run(tmp_path, Recipe())
    append_line(run.metrics, MetricsLine(step=3, loss=0.5, margin=0.25))
    (line,) = read_metrics(run)
    assert line.as_json() == {"step": 3, "loss": 0.5, "margin": 0.25}


RECORDS = re.compile(r"(summary|start|evaluation|parity|metrics|samples)\.jsonl?$")
KEYS = {
    *("validation_loss", "held_out", "trainable_parameters", "tokens_per_second", "peak_memory_gb", "quantized_base"),
    *("eval_loss", "over_subjects", "detectable", "p_adjusted", "equal_answers", "kl_limit", "artefact_ended"),
}


def test_records_are_read_through_their_models_only():
    """Nobody else parses these files, or looks for their keys by string."""
    trainer = {
        f"src/nybble/training/{name}.py" for name in ("callbacks", "recorder", "ending", "watching")
    }  # what Trainer logs
    gate = {"src/nybble/export/parity/verdict.py"}
    for file in sorted((ROOT / "src" / "nybble").rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        if file.parent.name == "run" or name in trainer | gate:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                assert node.slice.value not in KEYS, f"{name}:{node.lineno} reads {node.slice.value!r} by string"
            reads = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "read_object", "read_text", "read_bytes", "loads", "load", "open",
            )  # fmt: skip
            if reads:
                named = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert not any(isinstance(text, str) and RECORDS.search(text) for text in named), (
                    f"{name}:{node.lineno}"
                )


def test_open_run_reads_the_record_of_a_run(tmp_path):
    """recipe.yaml and start.json of 0.5.1 agree."""
    assert open_run(OLD).start().data.startswith("06a1")
