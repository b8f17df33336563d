"""Runs that work from any folder: what a recipe names is found again, and a folder is never looked for on the Hub."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import pytest
import yaml

import nybble.model.base.checkpoint as checkpoint
from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.data.rows.formats import Message
from nybble.data.text.template import BUILT_IN
from nybble.errors import DataError, ModelError, RecipeError, RunError
from nybble.evaluate.rows import rows_of, with_rows
from nybble.preflight.data_check import check
from nybble.recipe import Recipe, absolute_paths, load_recipe
from nybble.recipe.paths import absolute_path, absolute_tree
from nybble.run.folder import open_run
from nybble.run.marks import COMPLETE
from nybble.training.train import resume, train
from tests.training.test_train import FAST, interrupted

WORDS = ["train.max_steps=2", "train.evaluate_every=1", "train.samples=0"]


@pytest.fixture
def project(tiny_llama, rows, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with models/l2 and data/rows.jsonl, which is the current one; any question to the Hub fails the test."""

    def asked(name: str, *rest: object) -> None:
        raise AssertionError(f"the Hub was asked for {name}")

    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    shutil.copytree(tiny_llama, folder / "models" / "l2")
    shutil.copy(rows, folder / "data" / "rows.jsonl")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(checkpoint, "fetch", asked)
    return folder


def recipe_of(*words: str, model="models/l2", data="data/rows.jsonl") -> Recipe:
    return load_recipe(None, [f"model.path={model}", f"data.path={data}", *FAST, *WORDS, *words])


def test_local_paths_become_absolute_and_everything_else_stays(tmp_path, monkeypatch):
    folder = tmp_path / "[old] work"
    for name in ("models/l2", "adapter", "data", "tasks"):
        (folder / name).mkdir(parents=True)
    for name in ("data/a.jsonl", "data/b.jsonl", "own.jinja", "plain"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))

    def of(key: str, value: object) -> object:
        recipe = absolute_paths(Recipe.model_validate({"lora": {}} | nested(key, value)))
        found = recipe
        for part in key.split("."):
            found = getattr(found, part)
        tree = absolute_tree(json.loads(json.dumps(nested(key, value))))
        for part in key.split("."):
            tree = tree[part]
        assert tree == found
        return found

    def nested(key: str, value: object) -> dict:
        return value if not key else nested(key.rpartition(".")[0], {key.rpartition(".")[2]: value})

    root = str(folder)
    assert of("model.path", "models/l2") == f"{root}/models/l2"
    assert of("model.path", "./models/../models/l2/") == f"{root}/models/l2"
    assert of("model.path", "~/models/l2") == f"{root}/models/l2"
    assert of("model.path", "meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert of("adapter", "adapter") == f"{root}/adapter"
    assert of("out", "runs/not/yet") == f"{root}/runs/not/yet"
    assert of("train.eval_data", "tasks") == f"{root}/tasks"
    assert of("data.path", "data/a.jsonl") == f"{root}/data/a.jsonl"
    assert of("data.path", ["data", "org/rows"]) == [f"{root}/data", "org/rows"]
    assert of("data.path", {"data/a.jsonl": 2.0, "org/rows": 1.0}) == {f"{root}/data/a.jsonl": 2.0, "org/rows": 1.0}
    assert of("data.validation", "data/b.jsonl") == f"{root}/data/b.jsonl"
    assert of("data.validation", 0.1) == 0.1
    assert of("data.template", "own.jinja") == f"{root}/own.jinja"
    (folder / "tool_use").mkdir()
    for name in ("auto", "model", *BUILT_IN, "tool_use"):  # of nybble, and one of a model
        assert of("data.template", name) == name, "a template's name, whatever else is called so"
    assert of("data.template", "./plain") == f"{root}/plain"
    pattern = of("data.path", "data/*.jsonl")
    assert pattern == f"{tmp_path}/[[]old] work/data/*.jsonl"
    monkeypatch.chdir(tmp_path)
    from nybble.data.rows.sources import find_sources

    assert [file.name for file in find_sources(pattern)[0].files] == ["a.jsonl", "b.jsonl"]


def test_a_link_in_a_path_is_kept(tmp_path, monkeypatch):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "rows").touch()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path)
    assert pathlib.Path(absolute_path("link/../rows")).exists()
    assert absolute_path("link") == str(tmp_path / "link")


def test_a_run_works_from_any_folder(project, tmp_path, cache, quiet, monkeypatch):
    (project / "held.jsonl").write_text(
        "".join((project / "data" / "rows.jsonl").read_text().splitlines(keepends=True)[:6])
    )
    run = train(recipe_of("data.validation=held.jsonl"), console=quiet, cache=cache)
    assert run.folder == pathlib.Path("runs/l2-rows")
    recorded = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert recorded["model"]["path"] == str(project / "models" / "l2")
    assert recorded["data"]["path"] == str(project / "data" / "rows.jsonl")
    assert recorded["data"]["validation"] == str(project / "held.jsonl")
    start, summary = (json.loads((run.folder / name).read_text()) for name in ("start.json", "summary.json"))
    assert start["recipe"]["model"]["path"] == summary["base"]["name"] == str(project / "models" / "l2")
    adapters = [run.adapter, *run.checkpoints.iterdir()]
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(project / "models" / "l2")
    monkeypatch.chdir(tmp_path)
    opened = open_run(project / run.folder)
    answerer = load_answerer(opened, cache)
    assert answerer.answer([(Message("user", "say one"),)], Sampling(max_new_tokens=2))
    prepared, why = rows_of(opened, answerer.tokenizer, cache)
    assert prepared is not None, why
    assert prepared.cached  # what was tokenised in training is found again


def test_check_keeps_what_train_finds_again(project, cache, quiet):
    recipe = recipe_of()
    assert check(recipe, quiet, cache=project / "cache")
    assert len(list((project / "cache" / "tokens").iterdir())) == 1
    train(recipe, console=quiet, cache=project / "cache")
    assert len(list((project / "cache" / "tokens").iterdir())) == 1


def test_a_missing_base_folder_is_not_looked_up_on_the_hub(project, tmp_path, cache, quiet, monkeypatch, here):
    run = train(recipe_of(), console=quiet, cache=cache)
    (project / "models" / "l2").rename(project / "models" / "now")
    for folder in (run.folder, run.adapter):
        with pytest.raises(ModelError) as caught:
            load_answerer(open_run(folder), cache)
        print(caught.value)
        assert f"the base of {folder} is missing: there is no folder {project / 'models' / 'l2'}" in str(caught.value)
        assert f"nybble chat {folder} --base FOLDER" in str(caught.value)
    for words in (
        ["chat", run.folder, "--prompt", "x"],
        ["export", run.folder, "--to", "merged"],
        ["serve", run.folder],
    ):
        done = here("--cache", cache, *words)
        assert (done.returncode, "--base FOLDER" in done.stderr) == (1, True), done.stderr
    answerer = load_answerer(open_run(run.folder, "models/now"), cache)
    assert answerer.answer([(Message("user", "say one"),)], Sampling(max_new_tokens=2))


def as_of_0_5_1(run: pathlib.Path, project: pathlib.Path) -> None:
    """The record as the last release wrote it: places as they were typed, another version, and without newer options."""
    for file in (run / "recipe.yaml", run / "start.json", *run.rglob("adapter_config.json")):
        file.write_text(file.read_text().replace(f"{project}/", ""))
    for mark in run.rglob(COMPLETE):  # empty in a checkpoint, and none in an adapter
        mark.write_bytes(b"") if mark.parent.name != "adapter" else mark.unlink()
    start = json.loads((run / "start.json").read_text())
    start["versions"]["nybble"] = "0.5.1"
    start["recipe"]["train"].pop("samples", None)
    start["recipe"].pop("export", None)
    (run / "start.json").write_text(json.dumps(start))


def test_a_run_of_the_last_release_resumes_and_answers(project, tmp_path, cache, quiet, monkeypatch):
    words = ["train.max_steps=6", "train.evaluate_every=2", "train.samples=2", "out=cut"]  # samples: the default
    interrupted(monkeypatch, 3, recipe_of(*words), quiet, cache)
    as_of_0_5_1(project / "cut", project)
    assert "path: models/l2" in (project / "cut" / "recipe.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"the base of .*cut is missing") as caught:  # and not a Hub id
        resume(project / "cut", console=quiet, cache=cache)
    assert "move it back" in str(caught.value)
    monkeypatch.chdir(project)
    run = resume("cut", console=quiet, cache=cache)
    as_of_0_5_1(project / "cut", project)
    assert load_answerer(open_run("cut"), cache).answer([(Message("user", "say"),)], Sampling(max_new_tokens=2))
    monkeypatch.chdir(tmp_path)
    for folder in (project / "cut", project / run.adapter):
        with pytest.raises(ModelError, match=r"the base of .* is missing: there is no folder .*models/l2"):
            load_answerer(open_run(folder), cache)
        assert load_answerer(open_run(folder, str(project / "models" / "l2")), cache)


def test_what_changed_is_still_refused_after_a_move(project, cache, quiet, monkeypatch):
    interrupted(monkeypatch, 1, recipe_of("out=cut", "train.save_every=1", "train.max_steps=4"), quiet, cache)
    recipe = project / "cut" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.0002", "learning_rate: 0.001"))
    with pytest.raises(RunError, match=r"train.learning_rate: 0.0002 -> 0.001"):
        resume("cut", console=quiet, cache=cache)


def test_moved_rows_are_named_and_compared_with_the_record(project, cache, quiet, here):
    run = train(recipe_of("out=run"), console=quiet, cache=cache)
    tokenizer = load_answerer(run, cache).tokenizer
    moved = (project / "data" / "rows.jsonl").rename(project / "elsewhere.jsonl")
    done = here("--cache", cache, "eval", "run", "--tasks", "none", "--answers", "0")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "nybble eval run --data FILE" in " ".join(done.stdout.split())
    found, why = rows_of(with_rows(open_run("run"), ["elsewhere.jsonl"]), tokenizer, cache)
    assert found is not None, why
    done = here("--cache", cache, "eval", "run", "--tasks", "none", "--answers", "0", "--data", "elsewhere.jsonl")
    assert done.returncode == 0, done.stderr
    assert "held_out" in json.loads((project / "run" / "evaluation.json").read_text())
    moved.write_text(moved.read_text().replace("say", "tell", 1))
    found, why = rows_of(with_rows(open_run("run"), ["elsewhere.jsonl"]), tokenizer, cache)
    assert (found, why) == (None, "the data changed since the run was trained")


def test_paths_replace_the_sources_of_a_run_in_order(project, tuned_run):
    def of(path: object, validation: object, *places: str) -> tuple[object, object]:
        data = tuned_run.recipe.data.model_copy(update={"path": path, "validation": validation})
        recipe = tuned_run.recipe.model_copy(update={"data": data})
        moved = with_rows(type(tuned_run)(tuned_run.folder, recipe), places).recipe.data
        return moved.path, moved.validation

    assert of("a", 0.1, "x") == ("x", 0.1)
    assert of("a", "v", "x") == ("x", "v")
    assert of("a", "v", "x", "y") == ("x", "y")
    assert of(["a", "b"], "v", "x", "y") == (["x", "y"], "v")
    assert of({"a": 2.0, "b": 1.0}, "v", "x", "y", "z") == ({"x": 2.0, "y": 1.0}, "z")
    assert of("a", 0.1, "data/rows.jsonl") == (str(project / "data" / "rows.jsonl"), 0.1)
    with pytest.raises(RecipeError) as caught:
        of(["a", "b"], "v", "x")
    print(caught.value)
    assert "given 1 times" in str(caught.value)
    assert "a, b, v" in str(caught.value)
    assert "--data FILE --data FILE --data FILE, in that order" in str(caught.value)
    bare = project / "bare"
    shutil.copytree(tuned_run.adapter, bare)
    with pytest.raises(RecipeError, match="is an adapter without a run"):
        with_rows(open_run(bare), ["x"])


def test_the_base_of_a_bare_adapter_is_searched_in_the_current_folder_and_beside_it(
    project, tuned_run, monkeypatch, tmp_path
):
    bare = project / "adapters" / "bare"
    shutil.copytree(tuned_run.adapter, bare, ignore=shutil.ignore_patterns(COMPLETE))
    config = json.loads((bare / "adapter_config.json").read_text())

    def opened(name: str) -> str:
        (bare / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        return open_run(bare).recipe.model.path

    assert opened("models/l2") == str(project / "models" / "l2")
    monkeypatch.chdir(tmp_path)
    assert opened("models/l2") == "models/l2"  # nothing says that it is not a Hub id
    assert os.path.samefile(opened("../../models/l2"), project / "models" / "l2")
    assert opened("") == ""


def test_a_wrong_new_path_of_rows_stops_the_evaluation(tuned_run, tmp_path):
    with pytest.raises(DataError, match="there is no file") as caught:
        with_rows(open_run(tuned_run.folder), [str(tmp_path / "nowhere.jsonl")])
    print(caught.value)
    assert caught.value.fix == f"ls {tmp_path}"
