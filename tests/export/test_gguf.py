"""GGUF: token ids and logits in llama.cpp are ours, whatever the vocabulary and RoPE; a spoilt file is caught; K-quants."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import gguf
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaConfig

from nybble.data.rows.formats import Message
from nybble.data.text.template import choose_template
from nybble.data.text.tokens import encode_prompt
from nybble.errors import ExportError
from nybble.export import export as module
from nybble.export.export import ExportRequest, export
from nybble.export.gguf import writer as writer
from nybble.export.gguf.modelfile import go_template, write_modelfile
from nybble.export.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, read_vocabulary
from nybble.export.gguf.writer import Converter, interleave, rope_factors
from nybble.export.merge.merge import Merge, MergedModel, Original
from nybble.export.parity.loaders import has_llama_cpp, through_llama_cpp
from nybble.export.parity.prompts import Question
from nybble.export.parity.reference import Reference
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_config
from nybble.model.tokenizer.load import load_tokenizer
from tests.conftest import small_tokenizer, write_llama

llama_cpp_here = pytest.mark.skipif(not has_llama_cpp(), reason="make llama-cpp builds it")
TEXTS = [
    "Hello world", "", " ", "  two  spaces ", "[INST] x [/INST]", "1234567 3.14", "Zähle naïve 你好 🙂", "a\n\n\tb\r\nc",
    "def f(x):\n    return x**2  # ok", "don't I'LL we've", "▁literal▁", "ﬁ ½ é é", "\x00\x01", "aaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.org/?q=1&r=2", *("x" + " " * count + "y" for count in range(1, 20)),
    "The quick brown fox jumps over the lazy dog. " * 5,
]  # fmt: skip
VOCABULARY = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=special) for text, special in json.load(sys.stdin)]))
"""


def model_of(folder, template="auto", form="messages") -> tuple[MergedModel, object]:
    checkpoint = find_checkpoint(str(folder))
    config, tokenizer = load_config(checkpoint, None), load_tokenizer(checkpoint.folder)
    chosen = choose_template(tokenizer, template, form)
    merge = Merge(Original(folder), {}, config.tie_word_embeddings, torch.float32)
    return MergedModel(
        "m", merge, config, tokenizer, chosen.source, chosen.end_id, "base", "llama2", "https://x.org"
    ), chosen


def in_llama_cpp(file, texts):
    done = subprocess.run(
        [sys.executable, "-c", VOCABULARY, str(file)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@llama_cpp_here
@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_token_ids_in_llama_cpp_are_ours(kind, llama2_like, tiny_llama, tmp_path):
    folder = llama2_like if kind == "sentencepiece" else tiny_llama
    model, template = model_of(folder)
    Converter().write(tmp_path / "m.gguf", model, "F16", lambda done: None)
    plain = in_llama_cpp(tmp_path / "m.gguf", [(text, False) for text in TEXTS])
    for text, ids in zip(TEXTS, plain, strict=True):
        ours = model.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours, text
    turns = [(Message("user", text.strip()),) for text in TEXTS if text.strip() and "INST" not in text]
    turns += [(Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))]
    rendered = [
        model.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in own], chat_template=model.template, tokenize=False,
            add_generation_prompt=True,
        )
        for own in turns
    ]  # fmt: skip
    templated = in_llama_cpp(tmp_path / "m.gguf", [(text, True) for text in rendered])
    for own, ids in zip(turns, templated, strict=True):
        assert ids == encode_prompt(template, own), own


ROPES = {
    "plain": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64, "rope_theta": 500.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}},
    "biases": {"attention_bias": True},
    "wide heads": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.slow
@llama_cpp_here
@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_logits_in_llama_cpp_are_those_of_transformers(changes, tmp_path):
    folder = write_llama(tmp_path / "base", initializer_range=0.1, **changes)
    torch.manual_seed(3)
    if changes.get("attention_bias"):
        live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, parameter in live.named_parameters():
            if name.endswith(".bias"):
                parameter.data.normal_()
        live.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    model, template = model_of(folder)
    Converter().write(tmp_path / "m.gguf", model, "F16", lambda done: None)
    row = torch.randint(3, 400, (200,)).tolist()
    reference = Reference([Question(row[:1])], [], [row], [], {}, template.end_id, template.source)
    given = through_llama_cpp(tmp_path / "m.gguf", reference, 1)
    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = live(torch.tensor([row])).logits[0, :-1]
    difference = (given.logits[0] - expected).abs().max() / expected.std()
    print(difference)
    assert difference < 0.02
    assert template.end_id in given.stops


@pytest.mark.slow
@llama_cpp_here
def test_all_types_pass_the_gate_in_llama_cpp(peaky_run, cache, tmp_path, quiet):
    wanted = ExportRequest("gguf", tmp_path / "out", quants=("F16", "Q8_0", "Q4_0"))
    folder = export(peaky_run, wanted, quiet, cache, Converter())
    checks = json.loads((folder / "parity.json").read_text())["checks"]
    assert [check["kind"] for check in checks] == ["F16", "Q8_0", "Q4_0"]
    assert all(check["passed"] and check["by"].startswith("llama-cpp-python") for check in checks)
    f16, q8, q4 = (check["numbers"] for check in checks)
    assert f16["kl"] < q8["kl"] < q4["kl"]
    assert f16["equal_answers"] == f16["questions"] == 10


def eos(monkeypatch):
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_eos_token_id", lambda self, number: self.add_uint32("tokenizer.ggml.eos_token_id", 0)
    )
    monkeypatch.setattr(gguf.GGUFWriter, "add_eot_token_id", lambda self, number: None)
    read = writer.read_vocabulary

    def without_name(*words):  # llama.cpp takes a token named </s> for an end whatever the file says
        vocabulary = read(*words)
        return dataclasses.replace(
            vocabulary, tokens=[token if token != "</s>" else "[end]" for token in vocabulary.tokens]
        )

    monkeypatch.setattr(writer, "read_vocabulary", without_name)


def template(monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", lambda self, text: None)


def tensor(monkeypatch):
    slices = Merge.slices
    damaged = "model.layers.0.mlp.down_proj.weight"
    monkeypatch.setattr(
        Merge, "slices", lambda self, name, *on: (rows * (name != damaged) for rows in slices(self, name, *on))
    )


def tokenizer(monkeypatch):
    read = writer.read_vocabulary

    def without_merge(*words):
        vocabulary = read(*words)
        return dataclasses.replace(vocabulary, merges=vocabulary.merges[:3] + vocabulary.merges[4:])

    monkeypatch.setattr(writer, "read_vocabulary", without_merge)


@pytest.mark.slow
@llama_cpp_here
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (eos, "it would never end"),
        (template, "the chat template is lost"),
        (tensor, "differ from the run's by"),
        (tokenizer, "has other tokens from position"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_file_is_noticed_in_llama_cpp(spoil, said, peaky_run, cache, tmp_path, quiet, monkeypatch):
    measured, merges = module._measure(
        module.open_finished_run(peaky_run, "auto", cache), ExportRequest("gguf"), quiet, cache, Converter()
    )
    monkeypatch.setattr(module, "_measure", lambda *_: (measured, merges))
    spoil(monkeypatch)
    with pytest.raises(ExportError) as caught:
        export(peaky_run, ExportRequest("gguf", tmp_path / "out"), quiet, cache, Converter())
    print(caught.value)
    assert said in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["out.failed.json"]


@pytest.mark.slow
@llama_cpp_here
def test_a_file_that_llama_cpp_cannot_load_is_an_error_and_no_crash(tiny_llama, tmp_path):
    model, template = model_of(tiny_llama)
    file = tmp_path / "m.gguf"
    Converter().write(file, model, "F16", lambda done: None)
    file.write_bytes(file.read_bytes()[:-5000])
    reference = Reference([Question([1, 5])], [], [[1, 5, 6]], [], {}, template.end_id, template.source)
    with pytest.raises(
        ExportError, match=r"llama.cpp cannot load or run m.gguf: it ended with (status|signal)"
    ) as caught:
        through_llama_cpp(file, reference, 1)
    print(caught.value)


def test_k_quants_go_through_llama_quantize(tiny_llama, tmp_path, monkeypatch):
    """A program of that name that notes what it was asked, and one that fails."""
    bin = tmp_path / "bin"
    bin.mkdir()
    program = bin / "llama-quantize"
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    model, _ = model_of(tiny_llama)
    program.write_text('#!/bin/sh\ncp "$1" "$2" && echo "$3" >> "$2.asked"\n')
    program.chmod(0o755)
    file = tmp_path / "m-Q4_K_M.gguf"
    Converter().write(file, model, "Q4_K_M", lambda done: None)
    assert (tmp_path / "m-Q4_K_M.gguf.asked").read_text() == "Q4_K_M\n"
    assert gguf.GGUFReader(file).get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_F16
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == [file.name], "the F16 is gone again"
    program.write_text("#!/bin/sh\necho 'main: failed to quantize' >&2; exit 3\n")
    with pytest.raises(ExportError, match="ended with status 3: main: failed to quantize"):
        Converter().write(tmp_path / "n.gguf", model, "Q5_K_S", lambda done: None)


@pytest.mark.slow
def test_metadata_of_a_gguf_file(llama2_like, tmp_path):
    model, _ = model_of(llama2_like)
    Converter().write(tmp_path / "m.gguf", model, "Q4_0", lambda done: None)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert facts["general.license"] == "llama2"
    assert facts["general.base_model.0.name"] == "base"
    assert facts["tokenizer.ggml.model"] == "llama"
    assert facts["tokenizer.chat_template"] == model.template
    assert [facts[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")] == [1, 2, 0, 0]
    assert facts["tokenizer.ggml.add_bos_token"] is True
    assert facts["tokenizer.ggml.token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_bos_is_put_before_prompts_only_where_the_template_has_it(tiny_llama, tmp_path):
    """As servers do by the file's word: TinyLlama's chat was trained without BOS although its tokenizer puts one."""
    model, _ = model_of(tiny_llama)
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)]
    )
    bare = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    for number, (template, expected) in enumerate([("{{ bos_token }}" + bare, True), (bare, False)]):
        file = tmp_path / f"{number}.gguf"
        Converter().write(file, dataclasses.replace(model, template=template), "F16", lambda done: None)
        assert gguf.GGUFReader(file).get_field("tokenizer.ggml.add_bos_token").contents() is expected


@pytest.mark.slow
@llama_cpp_here
def test_prompts_are_those_of_create_chat_completion(tiny_llama, tmp_path):
    """For this template it has a function of its own, which trims nothing."""
    model, template = model_of(tiny_llama)
    asked = "from llama_cpp.llama_chat_format import *; print(LLAMA3_INSTRUCT_CHAT_TEMPLATE, end='')"
    text = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    model = dataclasses.replace(model, template=text)
    Converter().write(tmp_path / "m.gguf", model, "F16", lambda done: None)
    messages = ({"role": "user", "content": " one two "},)
    reference = Reference([Question([1, 5], messages)], [], [[1, 5, 6]], [], {}, template.end_id, model.template)
    (ids,) = through_llama_cpp(tmp_path / "m.gguf", reference, 1).prompts
    assert model.tokenizer.decode(ids).endswith(
        "<|end_header_id|>\n\n one two <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.slow
def test_sentencepiece_scores_come_in_the_order_of_its_own_model(llama2_like):
    """tokenizer.json has merges, tokenizer.model has scores: the pieces they rank are ranked alike."""
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(str(llama2_like / "tokenizer.model"))
    vocabulary = read_vocabulary(load_tokenizer(llama2_like), 32064)
    assert vocabulary.tokens[:32000] == [own.id_to_piece(number) for number in range(32000)]
    assert vocabulary.tokens[32000:] == [f"[PAD{number}]" for number in range(32000, 32064)]
    ranked = [number for number in range(32000) if vocabulary.scores[number] < 0]
    assert len(ranked) > 25_000
    ordered = sorted(ranked, key=lambda number: -vocabulary.scores[number])
    scores = [own.get_score(number) for number in ordered]
    assert scores == sorted(scores, reverse=True)  # runs of spaces share a score there


def test_interleaving_turns_halves_into_pairs():
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    assert interleave(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(torch.arange(8.0), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_rope_factors_are_of_llama3_only():
    assert rope_factors(LlamaConfig()) is None
    scaled = LlamaConfig(hidden_size=64, num_attention_heads=4, **ROPES["llama3"])
    factors = rope_factors(scaled)
    assert factors.shape == (8,)
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)


def test_a_modelfile_has_the_template_in_go(llama2_like, tiny_llama):
    tokenizer = load_tokenizer(llama2_like)
    source = choose_template(tokenizer, "llama2", "messages").source
    said = go_template(tokenizer, source)
    assert '{{ "[INST] " }}{{ .Content }}' not in said, "white space only as Go's own strings"
    assert said.count('{{ " </s><s>[INST] " }}') == 1
    assert '{{- if eq $before "" -}}{{ "[INST] " }}' in said, "BOS is Ollama's to put where the tokenizer puts it"
    assert '{{ "[INST] <<SYS>>\\n" }}{{ .Content }}{{ "\\n<</SYS>>\\n\\n" }}' in said
    text = write_modelfile("./m.gguf", tokenizer, source, "</s>")
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """')
    assert text.endswith('PARAMETER stop "</s>"\n')
    bare = load_tokenizer(tiny_llama)
    assert '{{ "<s>Below is' in go_template(bare, choose_template(bare, "alpaca", "alpaca").source)
    odd = "{% for m in messages %}{{ m.content }}{{ loop.index }}{{ eos_token }}{% endfor %}"
    assert go_template(bare, odd) is None
    assert "cannot be expressed in Go's templates" in write_modelfile(".", bare, odd, "</s>")
