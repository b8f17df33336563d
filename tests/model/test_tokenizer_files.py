"""What a tokenizer's files may say without harm, and tokenizers that are read elsewhere than with a base."""

from __future__ import annotations

import contextlib
import json
import shutil
import time

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.chat.loading import load_template
from nybble.data.rows.formats import Message
from nybble.data.text.template import choose_template
from nybble.data.text.tokens import EncodingError, encode, encode_prompt
from nybble.errors import ModelError
from nybble.model.adapter import patterns
from nybble.model.adapter.lora import load_adapter
from nybble.model.adapter.patterns import check_patterns
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_config
from nybble.model.tokenizer.expressions import KNOWN, _expressions
from nybble.model.tokenizer.load import load_tokenizer
from nybble.run.folder import open_run
from tests.conftest import SHARED
from tests.corpus.cases import nybble

ROW = (Message("user", "one two three four five"), Message("assistant", "six seven eight nine ten"))


def copied(tiny_llama, folder, name="tokenizer.json", **values):
    return changed(shutil.copytree(tiny_llama, folder), name, **values)


def changed(folder, name="tokenizer.json", **values):
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**content, **values}))
    return folder


def ids(folder) -> list[int]:
    tokenizer = load_tokenizer(folder)
    (tokens,) = encode(choose_template(tokenizer, "plain", "prompt"), [ROW])
    return tokens.ids


def test_truncation_and_padding_left_on_change_nothing(tiny_llama, tmp_path):
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": 8,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    wanted = ids(tiny_llama)
    assert len(wanted) > 10
    assert ids(copied(tiny_llama, tmp_path / "cut", truncation=cut)) == wanted
    assert ids(copied(tiny_llama, tmp_path / "padded", padding=pad)) == wanted
    both = copied(
        tiny_llama,
        tmp_path / "both",
        "tokenizer_config.json",
        tokenizer_truncation={**cut, "direction": "right", "strategy": "longest_first"},
        model_max_length=5,
    )
    assert ids(both) == wanted


def test_a_sentencepiece_file_beside_tokenizer_json_is_not_read(tiny_llama, tmp_path):
    for name, content in (("garbled", bytes(range(256))), ("empty", b""), ("text", b"hello\n")):
        folder = shutil.copytree(tiny_llama, tmp_path / name)
        (folder / "tokenizer.model").write_bytes(content)
        assert ids(folder) == ids(tiny_llama)


def test_code_that_a_tokenizer_names_is_not_run_and_the_user_is_not_asked(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    names = {
        "AutoTokenizer": ["tokenization_own.Own", None],
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Own",
    }
    folder = copied(tiny_llama, tmp_path / "own", "tokenizer_config.json", auto_map=names, tokenizer_class="Own")
    changed_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**changed_config, "auto_map": names}))
    for file in ("tokenization_own.py", "own.py"):
        (folder / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    load_config(find_checkpoint(str(folder)), None)
    for _ in range(2):  # with a config.json, and as a run keeps it
        with pytest.raises(ModelError, match="it comes with its own code, and nybble runs no code") as caught:
            load_tokenizer(folder)
        assert "PreTrainedTokenizerFast" in caught.value.fix
        (folder / "config.json").unlink(missing_ok=True)
    assert not (tmp_path / "ran").exists()


def panics(folder):
    """All but one character is taken away from a text, and on what is left tokenizers panics."""
    erase = {"type": "Replace", "pattern": {"Regex": "[^§]"}, "content": ""}
    return changed(folder, normalizer=erase, pre_tokenizer={"type": "FixedLength", "length": 0})


def lacks_a_byte(folder):
    """One character has no token, and what stands for such is none either."""
    described = json.loads((folder / "tokenizer.json").read_text())
    del described["model"]["vocab"]["Â"]  # the first of the two bytes of §
    return changed(folder, model={**described["model"], "unk_token": "<none>"})


@pytest.mark.parametrize(
    ("damage", "said"), [(panics, "chunk size must be non-zero"), (lacks_a_byte, "Unk token `<none>` not found")]
)
def test_a_row_on_which_tokenizers_fails_is_named(damage, said, tiny_llama, tmp_path, cache):
    folder = damage(shutil.copytree(tiny_llama, tmp_path / "model"))
    rows = tmp_path / "rows.jsonl"
    answers = [f"{'§' if n in (3, 8) else 'three'} {n}" for n in range(1, 41)]
    rows.write_text("".join(json.dumps({"instruction": f"say {a}", "output": a}) + "\n" for a in answers))
    words = ("data", "check", rows, folder, "data.max_length=512", "data.validation=0")
    said_first = nybble(*words, cache=cache)
    print(said_first.text)
    assert said_first.status == 1
    plain = " ".join(said_first.text.split())
    assert f"lines 3 and 8: the tokenizer fails on this text: {said}" in plain
    assert "use the tokenizer that came with the weights" in plain
    dropped = nybble(*words, "data.bad_rows=drop", cache=cache)
    assert dropped.status == 0, dropped.text
    template = choose_template(load_tokenizer(folder), "alpaca", "alpaca")
    with pytest.raises(EncodingError, match=said):
        encode_prompt(template, (Message("user", "§"),))


def test_bytes_that_are_not_utf8_are_no_prompt(tiny_tokenizer):
    template = choose_template(tiny_tokenizer, "alpaca", "alpaca")
    with pytest.raises(EncodingError, match="half a surrogate pair, which is not a character") as caught:
        encode_prompt(template, (Message("user", "a \udcff"),))  # as Python reads the byte 0xff in a command line
    print(caught.value)
    assert "UTF-8" in caught.value.fix


def test_the_damaged_tokenizer_of_a_run_is_one_sentence(tuned_run, tiny_llama, tmp_path):
    folder = shutil.copytree(tuned_run.folder, tmp_path / "run")
    file = folder / "tokenizer" / "tokenizer.json"
    whole = file.read_text()
    for text, told in ((whole[:500], "is not valid JSON"), ("[]", "is not a JSON object"), (None, "has no tokenizer")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ModelError, match=told):
            load_template(open_run(folder), tiny_llama)


def test_expressions_of_known_models_are_not_tried(smollm2):
    files = [smollm2 / "tokenizer.json", *SHARED.glob("*/tokenizer.json")]
    for file in files:
        described = json.loads(file.read_text())
        assert set(_expressions([described["normalizer"], described["pre_tokenizer"], described["decoder"]])) <= KNOWN


def test_an_unknown_harmless_expression_is_accepted(tiny_llama, tmp_path):
    split = {"type": "Split", "pattern": {"Regex": r"[a-z]{1,7}|\s"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {"type": "Sequence", "pretokenizers": [split, level]}
    folder = copied(tiny_llama, tmp_path / "own", pre_tokenizer=parts)
    assert AutoTokenizer.from_pretrained(folder).decode(ids(folder)[1:-1]).startswith("one two")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def names(model):
    return [name for name, _ in model.named_modules()]


@pytest.fixture
def soon(monkeypatch):
    """Expressions are given up after half a second, not five; on a busy machine somewhat later."""
    monkeypatch.setattr(patterns, "SECONDS", 0.5)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("target_modules", r"(\w+\.?)+!", "still running after "),
        ("exclude_modules", r"(.*)*(.*)*(.*)*x", "still running after "),
        ("modules_to_save", [r"(\w+\.?)+!"], "still running after "),
        ("layers_pattern", [r"(\w+\.?)+!"], "still running after "),
        ("rank_pattern", {r"(\w+\.?)+!": 4}, "still running after "),
        ("alpha_pattern", {"q_proj": 2, ".*": 3, r"(\w+\.?)+!": 4}, "still running after "),
        ("target_modules", "(", "it is not a valid expression: missing )"),
        ("rank_pattern", {"(?i)Q_PROJ": 2}, "it is not a valid expression: global flags not at the start"),
        ("target_modules", "a{99999999999}", "it is not a valid expression"),
        ("target_modules", "x" * 20_000 + "*", "it has 20,001 characters"),
    ],
)
def test_an_expression_that_explodes_is_refused_by_its_field(soon, names, field, value, told):
    changes = {"target_modules": ["q_proj"], field: value}
    if field == "layers_pattern":
        changes["layers_to_transform"] = [0]
    with pytest.raises(ModelError) as caught:
        check_patterns(LoraConfig(**changes), names, "ADAPTER")
    print(caught.value)
    assert f"{field} contains a regular expression that cannot be used (" in caught.value.what
    assert told in caught.value.what
    assert (value if isinstance(value, str) else list(value)[-1])[:3] in caught.value.what
    assert caught.value.where == "ADAPTER"


def test_many_expressions_have_one_deadline(soon, names):
    slow = {rf"(a+)+b{n}|(\w+\.?){{1,{n % 9 + 1}}}!": 4 for n in range(3000)}
    began = time.monotonic()
    with contextlib.suppress(ModelError):
        check_patterns(LoraConfig(target_modules=["q_proj"], rank_pattern=slow), names, "ADAPTER")
    assert time.monotonic() - began < 8


def test_ordinary_expressions_are_accepted(names):
    config = LoraConfig(
        target_modules=r".*\.(q|v)_proj", exclude_modules=r".*\.0\..*", rank_pattern={r"layers\.1\..*q_proj": 4}
    )
    check_patterns(config, names, "ADAPTER")
    check_patterns(LoraConfig(target_modules=r"(?i).*\.Q_PROJ"), names, "ADAPTER")  # flags stand where PEFT leaves them
    check_patterns(LoraConfig(target_modules=["(", r"(\w+\.?)+!"]), names, "ADAPTER")  # names, which PEFT only compares


def test_an_adapter_with_such_an_expression_does_not_load(soon, model, tuned_run, tmp_path):
    folder = shutil.copytree(tuned_run.folder / "adapter", tmp_path / "adapter")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "target_modules": r"(\w+\.?)+!"}))
    with pytest.raises(ModelError, match="target_modules contains a regular expression"):
        load_adapter(model, folder)
