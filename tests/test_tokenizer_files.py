"""What a tokenizer's files may say without harm, and tokenizers that are read elsewhere than with a base."""

from __future__ import annotations

import json
import shutil

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import SHARED
from nybble.data.formats import Message
from nybble.data.template import choose_template
from nybble.data.tokens import encode
from nybble.errors import ModelError
from nybble.inference.pipeline import load_template
from nybble.model.adapter import load_adapter
from nybble.model.base import load_config
from nybble.model.checkpoint import find_checkpoint
from nybble.model.patterns import check_patterns
from nybble.model.tokenizer import load_tokenizer
from nybble.model.tokenizer_trial import KNOWN, _expressions
from nybble.run import open_run

ROW = (Message("user", "one two three four five"), Message("assistant", "six seven eight nine ten"))


def changed(tiny_llama, folder, name="tokenizer.json", **values):
    shutil.copytree(tiny_llama, folder)
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
    assert ids(changed(tiny_llama, tmp_path / "cut", truncation=cut)) == wanted
    assert ids(changed(tiny_llama, tmp_path / "padded", padding=pad)) == wanted
    both = changed(
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


def test_code_that_a_tokenizer_names_is_not_run_and_nobody_is_asked(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    names = {
        "AutoTokenizer": ["tokenization_own.Own", None],
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Own",
    }
    folder = changed(tiny_llama, tmp_path / "own", "tokenizer_config.json", auto_map=names, tokenizer_class="Own")
    changed_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**changed_config, "auto_map": names}))
    for file in ("tokenization_own.py", "own.py"):
        (folder / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    load_config(find_checkpoint(str(folder)), None)
    for _ in range(2):  # with a config.json, and as a run keeps it
        with pytest.raises(ModelError, match="it comes with code of its own, and nybble runs none") as caught:
            load_tokenizer(folder)
        assert "PreTrainedTokenizerFast" in caught.value.fix
        (folder / "config.json").unlink(missing_ok=True)
    assert not (tmp_path / "ran").exists()


def test_the_damaged_tokenizer_of_a_run_is_one_sentence(tuned_run, tiny_llama, tmp_path):
    folder = shutil.copytree(tuned_run.folder, tmp_path / "run")
    file = folder / "tokenizer" / "tokenizer.json"
    whole = file.read_text()
    for text, told in ((whole[:500], "is not valid JSON"), ("[]", "is not an object"), (None, "has no tokenizer")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ModelError, match=told):
            load_template(open_run(folder), tiny_llama)


def test_expressions_of_known_models_are_not_tried(smollm2):
    files = [smollm2 / "tokenizer.json", *SHARED.glob("*/tokenizer.json")]
    for file in files:
        described = json.loads(file.read_text())
        assert set(_expressions([described["normalizer"], described["pre_tokenizer"], described["decoder"]])) <= KNOWN


def test_an_unknown_expression_that_is_harmless_is_taken(tiny_llama, tmp_path):
    split = {"type": "Split", "pattern": {"Regex": r"[a-z]{1,7}|\s"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {"type": "Sequence", "pretokenizers": [split, level]}
    folder = changed(tiny_llama, tmp_path / "own", pre_tokenizer=parts)
    assert AutoTokenizer.from_pretrained(folder).decode(ids(folder)[1:-1]).startswith("one two")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("target_modules", r"(\w+\.?)+!", "still at work after 5 seconds"),
        ("exclude_modules", r"(.*)*(.*)*(.*)*x", "still at work after 5 seconds"),
        ("modules_to_save", [r"(\w+\.?)+!"], "still at work after 5 seconds"),
        ("rank_pattern", {r"(\w+\.?)+!": 4}, "still at work after 5 seconds"),
        ("target_modules", "(", "it is no expression: missing )"),
        ("target_modules", "a{99999999999}", "it is no expression"),
        ("target_modules", "x" * 20_000 + "*", "it has 20,001 characters"),
    ],
)
def test_an_expression_that_explodes_is_refused_by_its_field(model, field, value, told):
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ModelError, match=f"{field} holds a regular expression that cannot be used .*{told[:20]}"
    ) as caught:
        check_patterns(LoraConfig(**{"target_modules": ["q_proj"], field: value}), names, "ADAPTER")
    assert told in str(caught.value)
    assert "where: ADAPTER" in str(caught.value)


def test_honest_expressions_are_taken(model):
    names = [name for name, _ in model.named_modules()]
    config = LoraConfig(
        target_modules=r".*\.(q|v)_proj", exclude_modules=r".*\.0\..*", rank_pattern={r"layers\.1\..*q_proj": 4}
    )
    check_patterns(config, names, "ADAPTER")


def test_an_adapter_with_such_an_expression_does_not_load(model, tuned_run, tmp_path):
    folder = shutil.copytree(tuned_run.folder / "adapter", tmp_path / "adapter")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, "target_modules": r"(\w+\.?)+!"}))
    with pytest.raises(ModelError, match="target_modules holds a regular expression"):
        load_adapter(model, folder)
