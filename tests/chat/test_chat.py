"""Chat in the terminal, and the system message that a run was trained with: in chat, on the page, in the Modelfile."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import nybble
from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.chat.terminal import COMMANDS, answer_once, opening, talk
from nybble.data.rows.formats import Message
from nybble.export.gguf.modelfile import write_modelfile
from nybble.run.folder import open_run
from nybble.serve.bodies import model_entry
from nybble.serve.engine import ServedModel
from tests.training.test_train import recipe_for, train

SYSTEM = "Say it backwards."


@pytest.fixture(scope="module")
def taught(tiny_llama, cache, tmp_path_factory):
    """A run whose rows have a system message, but for a few."""
    folder = tmp_path_factory.mktemp("taught")
    with (folder / "rows.jsonl").open("w") as stream:
        for n in range(40):
            turns = [{"role": "user", "content": f"say one two {n}"}, {"role": "assistant", "content": "two one"}]
            system = [{"role": "system", "content": SYSTEM if n % 5 else f"Odd {n}."}] if n % 7 else []
            stream.write(json.dumps({"messages": [*system, *turns]}) + "\n")
    words = ["data.template=llama2", "train.max_steps=6", "train.learning_rate=5e-2", "train.samples=0"]
    return train(
        recipe_for(tiny_llama, folder / "rows.jsonl", folder / "run", *words), console=Console(quiet=True), cache=cache
    )


@pytest.fixture(scope="module")
def answerer(taught, cache):
    return load_answerer(str(taught.folder), cache)


def said(answerer, *lines, compare=False, system=None, tokens=4, asked=None):
    """What a conversation shows; `asked` gets every conversation that the model was given."""
    console = Console(file=io.StringIO(), width=100)
    typed = iter(lines)

    def read(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    talk(answerer, Sampling(tokens), console, compare=compare, system=system, read=read)
    return console.file.getvalue()


@pytest.fixture
def given(monkeypatch):
    """Every conversation that is answered, and by whom, as the real function gets it."""
    import nybble.chat.terminal as chat

    seen, real = [], chat._answer

    def spy(answerer, side, conversation, sampling, console):
        continuation = real(answerer, side, conversation, sampling, console)
        seen.append((side, conversation, continuation.text))
        return continuation

    monkeypatch.setattr(chat, "_answer", spy)
    return seen


def test_the_system_message_of_most_rows_is_recorded_and_used(taught, answerer, given):
    assert open_run(taught.folder).system == answerer.system == SYSTEM
    told = said(answerer, "say one", "/system off", "say one", "/system Be brief.", "say one", "/system")
    print(told)
    assert f"the training rows' system message: {SYSTEM}" in told
    assert "your system message: Be brief." in told
    assert [conversation[:-1] for _, conversation, _ in given] == [
        (Message("system", SYSTEM),),
        (),
        (Message("system", "Be brief."),),
    ]
    assert opening(answerer, None) == (Message("system", SYSTEM),)
    assert opening(answerer, "") == ()
    assert opening(answerer, "x") == (Message("system", "x"),)


def test_a_run_without_a_record_of_it_has_none(taught, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "recipe.yaml").write_text((taught.folder / "recipe.yaml").read_text())
    assert open_run(folder).system == ""
    summary = json.loads((taught.folder / "summary.json").read_text())
    del summary["data"]["system"]  # as 0.5.1 wrote it
    (folder / "summary.json").write_text(json.dumps(summary))
    assert open_run(folder).system == ""


def test_each_model_continues_from_its_own_answers(answerer, given):
    said(answerer, "say one", "say two", compare=True)
    assert [who for who, _, _ in given] == ["base", "tuned"] * 2
    for who in ("base", "tuned"):
        (_, first, answer), (_, second, _) = [entry for entry in given if entry[0] == who]
        expected = (*first, Message("assistant", answer)) if answer else first[:-1]
        assert second == (*expected, Message("user", "say two"))
    assert given[0][2] != given[1][2], "the two answer alike: their histories could not be told apart"


def test_unknown_commands_are_refused_and_paths_are_messages(answerer, given):
    told = said(answerer, "/reset", "/etc/hosts is a file", " /reset", "/help", "/new", "/exit", "never read")
    print(told)
    assert f"there is no command /reset; the commands are {', '.join(COMMANDS)}" in told
    assert [conversation[-1].content for _, conversation, _ in given] == ["/etc/hosts is a file", "/reset"]
    assert told.count("/new starts a new chat") == 2


def test_a_cut_answer_is_marked(answerer):
    told = said(answerer, "say one", tokens=1)
    assert "(cut off after 1 token; --max-new-tokens allows more)" in told
    out, remarks = (Console(file=io.StringIO(), width=100) for _ in range(2))
    answer_once(answerer, {"tuned": (Message("user", "say one"),)}, Sampling(1), out, remarks)
    assert "cut off" not in out.file.getvalue()
    assert "cut off" in remarks.file.getvalue()


def test_a_modelfile_and_the_list_of_models_have_the_system_message(answerer):
    text = write_modelfile("./m.gguf", answerer.tokenizer, answerer.template.source, "</s>", SYSTEM)
    assert f'\nSYSTEM """{SYSTEM}"""\n' in text
    assert "SYSTEM" not in write_modelfile("./m.gguf", answerer.tokenizer, answerer.template.source, "</s>")
    odd = write_modelfile("./m.gguf", answerer.tokenizer, answerer.template.source, "</s>", 'three """ quotes')
    assert "contains quotes that a Modelfile cannot express" in odd
    assert model_entry(ServedModel("run", answerer.template, 512, "base", 400, system=SYSTEM), 0)["system"] == SYSTEM


def test_python_opens_a_folder_and_lists_its_names(answerer, taught):
    assert set(dir(nybble)) == {*nybble.__all__, "__version__"}
    assert nybble.load is load_answerer
    assert "load" in vars(nybble), "a name is looked up once"
    (answer,) = answerer.answer([(nybble.Message("user", "say one"),)], Sampling(3))
    assert isinstance(answer, str)
    with pytest.raises(nybble.NybbleError, match="there is no folder /nowhere"):
        nybble.load("/nowhere")


def test_extreme_seeds_and_temperatures_of_the_command_line(tuned_run, cache, here):
    words = ("--cache", cache, "chat", tuned_run.folder, "--prompt", "say red", "--max-new-tokens", 2)
    greedy, cold = here(*words), here(*words, "--temperature", "1e-320")
    assert (cold.returncode, cold.stdout) == (0, greedy.stdout), cold.stderr
    refused = here(*words, "--temperature", "1", "--seed", 2**70)
    assert refused.returncode == 2
    assert "--seed" in refused.stderr
