"""Every way in which the Hub can refuse or be away, produced by a stand-in and met by a real client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nybble.errors import ModelError
from nybble.model import hub
from nybble.model.base.checkpoint import DESCRIPTION_PATTERNS
from tests.standin_hub import Account, Repo, StandinHub, commit_of

# Answers a list of [token, function, arguments] with [kind, text, fix] each.
CLIENT = """
import json, os, sys
from nybble.errors import HubError
from nybble.model import hub
for token, function, arguments in json.load(sys.stdin):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        print(json.dumps(["value", getattr(hub, function)(*arguments), None], default=str))
    except HubError as error:
        print(json.dumps(["HubError", str(error), error.fix]))
"""
ROWS_CLIENT = """
import json
from nybble.data.rows.sources import find_sources, read_rows
from nybble.errors import DataError
for name, revision in (("org/rows", None), ("org/rows", "v1"), ("org/rows", "v9"), ("org/none", None)):
    try:
        rows = list(read_rows(find_sources(name, revision=revision)))
        print(json.dumps([[row.values["n"] for row in rows], rows[0].origin]))
    except DataError as error:
        print(json.dumps([str(error), ""]))
"""
STREAM_CLIENT = """
import itertools, json, pathlib, sys
from nybble.data.sets.prepare import prepare
from nybble.errors import DataError
from nybble.model.tokenizer.load import load_tokenizer
from nybble.recipe import DataOptions
tokenizer, cache = load_tokenizer(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])
for path in ("org/chats", "org/parquet", {"org/chats": 3, "org/parquet": 1}, "org/broken"):
    try:
        data = prepare(DataOptions(path=path, streaming=True, validation=2), tokenizer, 0, cache)
        samples = list(itertools.islice(data.train, 1000))
        held = list(data.validation["origin"])
        print(json.dumps([data.counts.forms, held, [sample["origin"] for sample in samples]]))
    except DataError as error:
        print(json.dumps([error.what, error.where, error.fix]))
"""
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "LICENSE.txt",
    "model.safetensors",
)
UNWANTED = (
    "pytorch_model.bin",
    "consolidated.00.pth",
    "model.gguf",
    "onnx/model.onnx",
    "original/params.json",
)
ACCOUNTS = {
    "hf_accepted": Account("ada", {"org/gated": "accepted", "org/private": "accepted"}),
    "hf_unasked": Account("bob"),
    "hf_pending": Account("cleo", {"org/gated": "pending"}),
    "hf_rejected": Account("dan", {"org/gated": "rejected"}),
    "hf_narrow": Account("eve", {"org/gated": "accepted"}, reads_gated=False),
}

# name: token, repository, revision, what the message must say, what its fix must say
REFUSALS = {
    "gated, no token": (None, "org/gated", None, "gated, and this machine is not logged in", "hf auth login"),
    "gated, licence not accepted": (
        "hf_unasked",
        "org/gated",
        None,
        "not accepted its licence",
        "/org/gated",
    ),
    "gated, pending": ("hf_pending", "org/gated", None, "is awaiting its authors' review", "settings/gated-repos"),
    "gated, rejected": ("hf_rejected", "org/gated", None, "rejected your request", "have access to"),
    "gated, narrow token": ("hf_narrow", "org/gated", None, "fine-grained token", "settings/tokens"),
    "gated, bad token": ("hf_stale", "org/gated", None, "wrong, revoked or expired", "hf auth login --force"),
    "private, no token": (None, "org/private", None, "misspelt, or private", "hf auth login"),
    "private, not shared": ("hf_unasked", "org/private", None, "that this account may see", "hf auth whoami"),
    "missing, no token": (None, "org/mdoel", None, "does not say which", "check the spelling"),
    "missing, token": ("hf_unasked", "org/mdoel", None, "that this account may see", "check the spelling"),
    "missing revision": (None, "org/model", "v9", "no branch, tag or commit 'v9'", "/org/model/commits/main"),
    "no name at all": (
        None,
        "./models/llama",
        None,
        "neither a folder on this machine",
        "meta-llama/Llama-2-7b-hf",
    ),
    "Meta's own format": (None, "org/meta", None, "Meta's own format", "-hf"),
    "GGUF only": (None, "org/gguf", None, "GGUF files", "made from"),
    "no weights": (None, "org/bare", None, "has no weights", "Transformers' format"),
}


def write(folder: Path, names: tuple[str, ...], mark: str = "") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{mark}{name} of {folder.name}")
    return folder


def sharded(folder: Path) -> Path:
    shards = {f"layer{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    write(folder, ("config.json", "tokenizer.json", *shards.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def ask(environment: dict[str, str], *cases: tuple[str | None, str, list[Any]]) -> list[tuple[str, Any, str]]:
    """Run the cases in one process; returns what each gave."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def streamed(root: Path) -> list[Repo]:
    """Data sets of JSON lines, of parquet, and of lines that stop being JSON."""
    folders = {name: root / name for name in ("chats", "parquet", "broken")}
    for folder in folders.values():
        folder.mkdir()
    lines = "".join(json.dumps({"prompt": f"red {n}", "completion": "blue"}) + "\n" for n in range(200))
    (folders["chats"] / "train.jsonl").write_text(lines)
    (folders["broken"] / "train.jsonl").write_text(lines + "{broken\n")
    turns = [{"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "b", "weight": 1.0}]
    table = pyarrow.Table.from_pylist([{"id": n, "conversations": [*turns] * (n + 1)} for n in range(50)])
    pyarrow.parquet.write_table(table, folders["parquet"] / "train-00000-of-00001.parquet")
    return [Repo(f"org/{name}", folder, kind="dataset") for name, folder in folders.items()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandinHub, Path]]:
    root = tmp_path_factory.mktemp("hub")
    rows, old_rows = root / "rows", root / "old_rows"
    for folder, text in ((rows, '{"n": 1}\n{"n": 2}\n'), (old_rows, '{"n": 3}\n')):
        folder.mkdir()
        (folder / "train.jsonl").write_text(text)
    model = write(root / "model", FILES + UNWANTED)
    repos = [
        Repo("org/model", model, revisions={"old": write(root / "old", FILES, "old ")}),
        Repo("org/gated", model, gated=True),
        Repo("org/private", model, private=True),
        Repo("org/sharded", sharded(root / "sharded")),
        Repo("org/pickled", write(root / "pickled", ("config.json", "pytorch_model.bin", "training_args.bin"))),
        Repo("org/meta", write(root / "meta", ("params.json", "tokenizer.model", "consolidated.00.pth"))),
        Repo("org/gguf", write(root / "gguf", ("config.json", "model.Q4_0.gguf"))),
        Repo("org/bare", write(root / "bare", ("config.json", "tokenizer.json"))),
        Repo("org/rows", rows, kind="dataset", revisions={"v1": old_rows}),
        *streamed(root),
    ]
    with StandinHub(repos, ACCOUNTS) as server:
        yield server, root


@pytest.fixture(scope="module")
def refusals(world: tuple[StandinHub, Path]) -> dict[str, list[tuple[str, Any, str]]]:
    """Each refusal's answers to check_access and to fetch, all from one process."""
    server, root = world
    cases = [
        (token, function, [repo, revision])
        for token, repo, revision, _, _ in REFUSALS.values()
        for function in ("check_access", "fetch")
    ]
    answers = ask(server.environment(root / "refused"), *cases)
    assert not list(root.glob("refused/hub/*/blobs/*")), "a refused model left files behind"
    return dict(zip(REFUSALS, zip(answers[::2], answers[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_of_the_hub_is_explained(name: str, refusals: dict[str, Any]) -> None:
    _, repo, _, words, cure = REFUSALS[name]
    for kind, message, fix in refusals[name]:
        print(message)
        assert kind == "HubError"
        assert words in message
        assert repo in message or "token" in message
        assert cure in fix
        assert "Client Error" not in message


def test_only_what_a_model_needs_is_downloaded(world: tuple[StandinHub, Path]) -> None:
    server, root = world
    server.requests.clear()
    answers = ask(
        server.environment(root / "home"),
        (None, "check_access", ["org/model", None]),
        (None, "fetch", ["org/model", None]),
        (None, "fetch", ["org/model", "old"]),
        (None, "fetch", ["org/pickled", None]),
        (None, "fetch", ["org/sharded", None, ["*.json"]]),
        ("hf_accepted", "fetch", ["org/gated", None]),
        ("hf_accepted", "fetch", ["org/private", None]),
        ("hf_accepted", "whoami", []),
        (None, "whoami", []),
        ("hf_stale", "whoami", []),
        (None, "fetch", ["org/model", None, ["*.parquet"]]),
    )
    values = [value for _, value, _ in answers]
    commit = commit_of(root / "model")
    assert values[0] == commit
    contents = [sorted(path.name for path in Path(value[0]).iterdir()) for value in values[1:7]]
    assert values[1][1] == commit
    assert contents[0] == contents[1] == contents[4] == contents[5] == sorted(FILES)
    assert values[2][1] == commit_of(root / "old")
    assert (Path(values[2][0]) / "config.json").read_text() == "old config.json of old"
    assert contents[2] == ["config.json", "pytorch_model.bin"]
    assert contents[3] == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert values[7:9] == ["ada", None]
    assert "wrong, revoked or expired" in values[9]
    assert "no file named like *.parquet" in values[10]
    asked = " ".join(server.requests)
    assert not any(name in asked for name in (*UNWANTED[1:], "training_args.bin", "00001-of-00002"))


def test_check_access_downloads_nothing(world: tuple[StandinHub, Path]) -> None:
    server, root = world
    server.requests.clear()
    [(_, commit, _)] = ask(server.environment(root / "looked"), (None, "check_access", ["org/sharded", None]))
    assert commit == commit_of(root / "sharded")
    assert not any(line.startswith("GET") and "/resolve/" in line for line in server.requests)
    assert not list(root.glob("looked/hub/*/blobs/*"))


def test_without_the_hub_the_cache_is_used_or_the_reason_given(
    world: tuple[StandinHub, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, root = world
    home, empty = root / "kept", root / "empty"
    first = ask(
        server.environment(home),
        (None, "fetch", ["org/sharded", None]),
        (None, "fetch", ["org/model", "old"]),
    )
    with StandinHub([]) as away:
        pass
    tell = [(None, "check_access", ["org/sharded", None]), (None, "fetch", ["org/sharded", None])]
    tell += [(None, "fetch", ["org/model", "old"]), (None, "fetch", ["org/model", commit_of(root / "old")])]
    monkeypatch.setattr(server, "down", 503)
    for environment in (
        away.environment(home),
        server.environment(home, HF_HUB_OFFLINE="1"),
        server.environment(home),
    ):
        answers = ask(environment, *tell)
        assert [kind for kind, _, _ in answers] == ["value"] * 4, answers
        assert answers[0][1] == commit_of(root / "sharded")
        assert answers[1][1] == first[0][1]
        assert answers[2][1] == answers[3][1] == first[1][1]

    for environment, words, cure in (
        (away.environment(empty), "cannot be reached", "check the network"),
        (server.environment(empty, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        (server.environment(empty), "answers 503", "wait a few minutes"),
    ):
        for kind, message, fix in ask(environment, *tell[:2], ("hf_accepted", "whoami", [])):
            print(message)
            assert (kind, words in message, cure in fix) == ("HubError", True, True)

    next(Path(first[0][1][0]).glob("model-00002*")).unlink()
    [(kind, message, _)] = ask(away.environment(home), (None, "fetch", ["org/sharded", None]))
    assert kind == "HubError"
    assert "is not fully in the cache" in message


def test_a_broken_download_says_that_it_can_be_resumed(
    world: tuple[StandinHub, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, root = world
    monkeypatch.setattr(server, "cut_off", "model.safetensors")
    [(kind, message, fix)] = ask(server.environment(root / "broken"), (None, "fetch", ["org/model", None]))
    print(message)
    assert (kind, fix) == ("HubError", "run the command again: it resumes where it stopped")
    assert "download of 'org/model' was cut off" in message


def answers_of(client: str, *words: object, environment: dict[str, str]) -> list[Any]:
    """What a script says in JSON, a line each."""
    command = [sys.executable, "-c", client, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_datasets_load_through_the_standin(world: tuple[StandinHub, Path]) -> None:
    server, root = world
    answers = answers_of(ROWS_CLIENT, environment=server.environment(root / "rows_home"))
    newest, older, revision, missing = answers
    assert newest == [[1, 2], "org/rows[train]:row 1"]
    assert older == [[3], "org/rows[train]:row 1"]
    assert "org/rows has no revision v9" in revision[0]
    assert "neither a local file nor a Hub data set" in missing[0]


@pytest.mark.slow
def test_datasets_stream_through_the_standin(world: tuple[StandinHub, Path], tiny_llama: Path) -> None:
    server, root = world
    answers = answers_of(
        STREAM_CLIENT, tiny_llama, root / "stream_cache", environment=server.environment(root / "stream_home")
    )
    lines, parquet, mixed, broken = answers
    for (forms, held, origins), name, count in ((lines, "chats", 200), (parquet, "parquet", 50)):
        assert sum(forms.values()) == count
        assert {*held, *origins} == {f"org/{name}[train]:row {n}" for n in range(1, count + 1)}
        assert not {*held} & {*origins}
        assert len(origins) == 1000, "over and over"
    assert mixed[0] == {"prompt": 200, "sharegpt": 50}
    assert 0.65 < sum("chats" in origin for origin in mixed[2]) / 1000 < 0.85
    assert "reading stopped: JSON parse error" in broken[0]
    assert broken[1] == "org/broken[train]:row 1"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (None, "There is no folder"),
        (("params.json", "consolidated.00.pth", "tokenizer.model"), "Meta's own format"),
        (("tokenizer.json", "model.safetensors"), "has no config.json"),
        (("config.json",), "has no weights"),
        (("config.json", "adapter_config.json", "adapter_model.safetensors"), "has no weights"),
        (("adapter_config.json", "adapter_model.safetensors"), "is a LoRA adapter, not a base model"),
    ],
)
def test_a_folder_that_is_not_a_model_is_refused(names: tuple[str, ...] | None, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if names is not None:
        write(folder, names)
    with pytest.raises(ModelError, match=words):
        hub.check_folder(folder)


def test_a_folder_is_checked_against_its_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    hub.check_folder(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"is missing model-00002-of-00002\.safetensors"):
        hub.check_folder(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ModelError, match=r"is missing a readable model\.safetensors\.index"):
        hub.check_folder(folder)


def test_an_adapter_beside_the_weights_is_not_fetched_and_named_templates_are() -> None:
    """And an adapter in safetensors does not make the base's own .bin a second copy."""
    names = ["config.json", "pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors", "onnx/model.onnx"]
    names += ["chat_template.jinja", "additional_chat_templates/rag.jinja", "additional_chat_templates/notes.md"]
    base = ["adapter_config.json", "additional_chat_templates/rag.jinja", "chat_template.jinja", "config.json"]
    assert hub._wanted(names, None) == [*base, "pytorch_model.bin"]
    assert hub._wanted(names, DESCRIPTION_PATTERNS) == base
