"""--push against the stand-in for the Hub: what arrives, that it is private, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.standin_hub import Account, Repo, StandinHub

# Answers a list of [token, repository] with the page or the error.
CLIENT = """
import json, os, pathlib, sys
from nybble.errors import HubError
from nybble.export.publish import check_push, push
for token, repo in json.load(sys.stdin):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        check_push(repo)
        print(json.dumps(["page", push(pathlib.Path(sys.argv[1]), repo, 'parity.json'), ""]))
    except HubError as error:
        print(json.dumps(["HubError", error.what, error.fix]))
"""
CARD = "---\nlicense: llama2\nbase_model: meta-llama/Llama-2-7b-hf\n---\n# x\n"


@pytest.fixture
def artefact(tmp_path):
    folder = tmp_path / "artefact"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "model.safetensors").write_bytes(b"\x00" * 3000)
    (folder / "parity.json").write_text('{"prompt": "of a validation row"}')
    return folder


def ask(hub, artefact, home, *asked):
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(artefact)],
        input=json.dumps(asked), capture_output=True, text=True, env=hub.environment(home), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for kind, text, fix in answers:
        print(kind, text, fix)
    return answers


def test_an_artefact_is_uploaded_privately_and_refusals_are_explained(artefact, tmp_path):
    accounts = {"hf_writes": Account("ada", writes=True), "hf_reads": Account("bob")}
    standing = tmp_path / "standing"
    standing.mkdir()
    accounts["hf_writes"].standing["ada/open"] = "accepted"
    with StandinHub([Repo("ada/open", standing)], accounts) as hub:
        hub.uploads = tmp_path / "hub"
        answers = ask(
            hub, artefact, tmp_path / "home",
            ["hf_writes", "ada/model"], ["hf_writes", "ada/open"], ["hf_reads", "ada/other"], [None, "ada/model"],
            ["hf_nobody", "ada/model"], ["hf_writes", "not a name"],
        )  # fmt: skip
        assert answers[0] == ["page", f"{hub.endpoint}/ada/model (private)", ""]
        uploaded = tmp_path / "hub" / "ada" / "model"
        assert {file.name: file.read_bytes() for file in uploaded.iterdir() if file.name != ".gitattributes"} == {
            file.name: file.read_bytes() for file in artefact.iterdir() if file.name != "parity.json"
        }, "rows of the data are not published with the model"
        assert answers[1] == ["page", f"{hub.endpoint}/ada/open (public, as it was)", ""]
        said = [f"{text} {fix}" for _, text, fix in answers[2:]]
        assert "status 403" in said[0]
        assert "a token with write access" in said[0]
        assert f"hf upload ada/other {artefact} --private --exclude parity.json" in said[0]
        assert "not logged in" in said[1]
        assert "does not accept this machine's token" in said[2]
        assert "is not a valid Hub name" in said[3]
        hub.down = 503
        (answer,) = ask(hub, artefact, tmp_path / "home", ["hf_writes", "ada/model"])
        assert "answers 503" in answer[1]


def test_faults_that_the_hub_finds_in_a_card_are_reported(artefact, tmp_path):
    (artefact / "README.md").write_text(CARD.replace("meta-llama/Llama-2-7b-hf", "/home/me/llama"))
    with StandinHub([], {"hf_writes": Account("ada", writes=True)}) as hub:
        hub.uploads = tmp_path / "hub"
        (answer,) = ask(hub, artefact, tmp_path / "home", ["hf_writes", "ada/model"])
        assert "base_model" in answer[1] + answer[2]
        assert f"hf upload ada/model {artefact} --private" in answer[2]


def test_nothing_is_uploaded_where_the_hub_makes_a_new_repository_public(artefact, tmp_path):
    with StandinHub([], {"hf_writes": Account("ada", writes=True)}) as hub:
        hub.uploads, hub.opens = tmp_path / "hub", True
        (answer,) = ask(hub, artefact, tmp_path / "home", ["hf_writes", "ada/model"])
        assert "public although private was requested" in answer[1]
        assert list((tmp_path / "hub" / "ada" / "model").iterdir()) == []
