"""Hostile tokenizers, templates, sizes and regular expressions, and a process in which they may hang or fill memory.

Each case changes a copy of the tiny Llama. `opened` reads it as every command does: configuration, tokenizer, template, one row.
"""

# ruff: noqa: E501 - a template or a case is easier to read on one line

from __future__ import annotations

import functools
import json
import os
import pathlib
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from nybble.data.rows.formats import Message
from nybble.data.text.template import choose_template
from nybble.data.text.tokens import encode
from nybble.errors import NybbleError
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_config
from nybble.model.tokenizer.load import load_tokenizer
from tests.corpus.cases import Case, Outcome

SECONDS = 30  # until a case has hung; the longest that is meant takes 20
MEMORY = 3_000_000_000  # bytes beyond what the process has when it begins
ROW = (Message("user", "one two"), Message("assistant", "three"))
TURNS = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def bounded(function: Callable[[], object], seconds: float = SECONDS) -> Outcome:
    """Call a function in a process that is ended when it takes too long or too much memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 99
        try:
            os.close(reader)
            own = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, resource.RLIM_INFINITY))
            status, text = 0, "ok"
            try:
                function()
            except NybbleError as error:
                status, text = error.exit_code, str(error)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the case has failed
                status, text = 98, f"{type(error).__name__}: {error}"
            os.write(writer, text.encode(errors="replace")[:60_000])
        finally:
            os._exit(status)
    os.close(writer)
    said, until = b"", time.monotonic() + seconds
    with os.fdopen(reader, "rb") as pipe:
        while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            if not (piece := os.read(pipe.fileno(), 65536)):
                break
            said += piece
        else:
            os.kill(child, signal.SIGKILL)
            said += b"it hung"
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode(errors="replace"))


def opened(folder: pathlib.Path) -> None:
    """A model folder as every command reads it, up to one row of ids."""
    load_config(find_checkpoint(str(folder)), None)
    tokenizer = load_tokenizer(folder)
    encode(choose_template(tokenizer, "auto", "messages"), [ROW])


def edit(name: str, change: Callable[[Any], object]) -> Callable[[pathlib.Path], object]:
    """Change what a JSON file of the folder holds."""

    def make(folder: pathlib.Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return make


def fields(name: str, **values: object) -> Callable[[pathlib.Path], object]:
    return edit(name, lambda content: content.update(values))


def bytes_of(name: str, content: bytes) -> Callable[[pathlib.Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def pipe_at(name: str) -> Callable[[pathlib.Path], object]:
    def make(folder: pathlib.Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def folder_at(name: str) -> Callable[[pathlib.Path], object]:
    def make(folder: pathlib.Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def large(name: str, size: int) -> Callable[[pathlib.Path], object]:
    def make(folder: pathlib.Path) -> None:
        with (folder / name).open("wb") as stream:
            stream.truncate(size)

    return make


def gone(*names: str) -> Callable[[pathlib.Path], object]:
    def make(folder: pathlib.Path) -> None:
        for name in names:
            (folder / name).unlink()

    return make


def numbered(token: str, number: object) -> Callable[[pathlib.Path], object]:
    return edit("tokenizer.json", lambda content: content["model"]["vocab"].update({token: number}))


def added(number: object, content: object = "<new>") -> Callable[[pathlib.Path], object]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entry = {"id": number, "content": content, **plain, "special": True}
    return edit("tokenizer.json", lambda whole: whole["added_tokens"].append(entry))


def splitting(pattern: str) -> Callable[[pathlib.Path], object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return fields("tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})


def normalizing(*contents: str) -> Callable[[pathlib.Path], object]:
    parts = [{"type": "Replace", "pattern": {"String": "o"}, "content": content} for content in contents]
    return fields("tokenizer.json", normalizer={"type": "Sequence", "normalizers": parts})


def templated(source: str) -> Callable[[pathlib.Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(source)


def tokenizer_case(
    name: str, make: Callable[[pathlib.Path], object], *names: str, file: str = "tokenizer.json"
) -> Case:
    return Case(f"tokenizer-{name}", make, 1, (*names, file))


def template_case(name: str, source: str, *names: str) -> Case:
    return Case(f"template-{name}", templated(source), 1, ("the template model", *names))


CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
PROCESSOR = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}]}
SLOT = {"Sequence": {"id": "A", "type_id": 0}}
TOKENIZERS = [
    *(
        tokenizer_case(f"{kind}-{name}", bytes_of(name, content), told, file=name)
        for name in ("tokenizer.json", CONFIG)
        for kind, content, told in (
            ("cut", b'{"model": {"voc', "is not valid JSON"),
            ("empty", b"", "is empty"),
            ("zeros", b"\0" * 4096, "is empty"),
            ("list", b"[1, 2]", "is not a JSON object"),
            ("utf16", '{"a": 1}'.encode("utf-16"), "is not UTF-8"),
            ("binary", bytes(range(256)) * 8, "is not UTF-8"),
            ("deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply"),
            ("digits", b'{"a": ' + b"9" * 5000 + b"}", "has a number of more than 4,300 digits"),
            ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9085657\n", "is a git-lfs pointer"),
            ("html", b"<!doctype html><p>404", "is not valid JSON"),
        )
    ),
    *(
        tokenizer_case(f"pipe-{name}", pipe_at(name), "is a pipe", file=name)
        for name in ("tokenizer.json", CONFIG, MAP, "tokenizer.model", "chat_template.jinja", "added_tokens.json", "merges.txt")
    ),
    *(
        tokenizer_case(f"folder-{name}", folder_at(name), "is a folder", file=name)
        for name in ("tokenizer.json", CONFIG, "tokenizer.model")
    ),
    tokenizer_case("gigabyte", large("tokenizer.json", 1 << 30), "1,073,741,824 bytes"),
    tokenizer_case("gigabyte-config", large(CONFIG, 1 << 30), "1,073,741,824 bytes", file=CONFIG),
    tokenizer_case("gigabyte-model", large("tokenizer.model", 1 << 30), "1,073,741,824 bytes", file="tokenizer.model"),
    tokenizer_case("gigabyte-template", large("chat_template.jinja", 1 << 30), "bytes", file="chat_template.jinja"),
    tokenizer_case("pointer-model", bytes_of("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
                   "is a git-lfs pointer", file="tokenizer.model"),
    tokenizer_case("model-alone", lambda folder: (gone("tokenizer.json")(folder), bytes_of("tokenizer.model", b"no model")(folder)),
                   "has tokenizer.model but no tokenizer.json"),
    tokenizer_case("missing", gone("tokenizer.json", CONFIG), "has no tokenizer"),
    tokenizer_case("id-4e9", numbered("zz", 4_000_000_000), "'zz'", "4000000000"),
    tokenizer_case("id-beyond-32-bits", numbered("zz", 10**12), "'zz'"),
    tokenizer_case("id-negative", numbered("zz", -1), "'zz'", "-1"),
    tokenizer_case("id-text", numbered("zz", "7"), "'zz'"),
    tokenizer_case("id-fraction", numbered("zz", 1.5), "'zz'", "1.5"),
    tokenizer_case("id-true", numbered("zz", True), "'zz'", "true"),
    tokenizer_case("id-twice", numbered("zz", 5), "two tokens", "the id 5", "'zz'"),
    tokenizer_case("added-4e9", added(4_000_000_000), "'<new>'", "4000000000"),
    tokenizer_case("added-negative", added(-5), "'<new>'", "-5"),
    tokenizer_case("added-long", added(400, "x" * 1_000_000), "a token"),
    tokenizer_case("added-number", added(400, 7), "added_tokens"),
    tokenizer_case("added-object", fields("tokenizer.json", added_tokens={}), "added_tokens"),
    tokenizer_case("vocabulary-empty", edit("tokenizer.json", lambda whole: whole["model"].update(vocab={})), "model.vocab"),
    tokenizer_case("vocabulary-text", edit("tokenizer.json", lambda whole: whole["model"].update(vocab="x")), "model.vocab"),
    tokenizer_case("model-null", fields("tokenizer.json", model=None), "model", "an object"),
    tokenizer_case("model-foreign", edit("tokenizer.json", lambda whole: whole["model"].update(type="Magic")), "no tokenizer can be"),
    tokenizer_case("merges-unknown", edit("tokenizer.json", lambda whole: whole["model"].update(merges=[["zzzz", "yyyy"]])),
                   "no tokenizer can be loaded"),
    tokenizer_case("merges-garbled", edit("tokenizer.json", lambda whole: whole["model"].update(merges=[3])), "no tokenizer can be"),
    tokenizer_case("dropout", edit("tokenizer.json", lambda whole: whole["model"].update(dropout=0.5)), "model.dropout", "0.5"),
    tokenizer_case("version", fields("tokenizer.json", version="9.0"), "no tokenizer can be loaded"),
    tokenizer_case("expression-explodes", splitting(r"(e+)+$"), "(e+)+$"),
    tokenizer_case("expression-explodes-on-spaces", splitting(r"(\s|\s\s)+x"), "regular expression that cannot be used"),
    tokenizer_case("expression-none", splitting(r"(a"), "cannot be"),
    tokenizer_case("expression-long", splitting("a|" * 10_000 + "b"), "20,001 characters"),
    tokenizer_case("normalizer-doubles", normalizing(*["oo"] * 60), "the normalizer", "times as long"),
    tokenizer_case("normalizer-long", normalizing("o" * 1_000_000), "the normalizer", "1,000,000 times as long"),
    tokenizer_case("normalizer-charsmap", fields("tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
                   "no tokenizer can be loaded"),
    tokenizer_case("processor-4e9", fields("tokenizer.json", post_processor={
        **PROCESSOR, "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, SLOT],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [4_000_000_000], "tokens": ["<s>"]}}}), "an id in post_processor", "4000000000"),
    tokenizer_case("processor-many", fields("tokenizer.json", post_processor={
        **PROCESSOR, "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 1000 + [SLOT],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}), "1,001 tokens to every text"),
    *(
        tokenizer_case(f"config-{name}-{number}", fields(CONFIG, **{name: value}), name, file=CONFIG)
        for number, (name, value) in enumerate([
            ("model_max_length", "x"), ("model_max_length", -1), ("chat_template", 5), ("chat_template", [5]),
            ("chat_template", [{"name": 1, "template": "x"}]), ("chat_template", {"default": 7}), ("bos_token", 3), ("eos_token", []),
            ("unk_token", {"text": "x"}), ("added_tokens_decoder", {"x": {"content": "<a>"}}), ("added_tokens_decoder", []),
            ("added_tokens_decoder", {"4": 5}), ("extra_special_tokens", 5), ("extra_special_tokens", [5]),
            ("additional_special_tokens", "x"), ("tokenizer_class", 7), ("padding_side", "up"), ("truncation_side", 1),
            ("add_bos_token", "yes"), ("clean_up_tokenization_spaces", "no"),
        ])
    ),
    tokenizer_case("config-decoder-4e9", fields(CONFIG, added_tokens_decoder={"400000000": {"content": "<a>"}}), "'<a>'", file=CONFIG),
    tokenizer_case("map-list", bytes_of(MAP, b"[]"), "is not a JSON object", file=MAP),
    tokenizer_case("map-number", bytes_of(MAP, b'{"pad_token": 4}'), "pad_token", file=MAP),
    tokenizer_case("added-file-4e9", bytes_of("added_tokens.json", b'{"<a>": 4000000000}'), "'<a>'", file="added_tokens.json"),
]  # fmt: skip
LOOPS = "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
HOUR = "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
TEMPLATES = [
    template_case("loops", HOUR, "still at work after 5 seconds"),
    template_case("loops-filtered", HOUR.replace("j in r", "j in r if false"), "5 seconds"),
    template_case("macros-twice", "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "5 seconds"),
    template_case("macro-endless", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    template_case("loop-recursive", "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}", "5 seconds"),
    template_case("compares", "{% set a = 'a' * 3000000 %}{% for i in range(99999) %}{{ 'b' if (a ~ 'b') in (a ~ 'c') }}{% endfor %}",
                  "is refused"),
    template_case("block-endless", "{% block a %}{{ self.a() }}{% endblock %}", "calls itself without end"),
    *(
        template_case(name, LOOPS.replace("BODY", body), "is refused", "builds a value of more than")
        for name, body in (("doubles", "ns.x ~ ns.x"), ("adds", "ns.x + ns.x"), ("lists", "[ns.x, ns.x]"),
                           ("objects", "{'a': ns.x, 'b': ns.x}"), ("namespaces", "namespace(a=ns.x, b=ns.x)"),
                           ("joins", "[ns.x, ns.x] | join"), ("formats", "'%s%s' % (ns.x, ns.x)"), ("calls", "'{0}{0}'.format(ns.x)"))
    ),
    template_case("doubles-in-a-block", "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}"
                  "{% endset %}{% set ns.x = y %}{% endfor %}", "is refused"),
    *(
        template_case(name, "{{ " + expression + " }}", "is refused")
        for name, expression in (
            ("times", "'a' * 10**10"), ("power", "7 ** 10000000"), ("digits", "(9 ** 4000) * (9 ** 4000)"), ("percent", "'%9999999999d' % 1"),
            ("percent-star", "'%*d' % (9999999999, 1)"), ("format", "'{:>9999999999}'.format(1)"), ("format-given", "'{:>{w}}'.format(1, w=10**10)"),
            ("format-filter", "'%9999999999d' | format(1)"), ("format-map", "'{a:>9999999999}'.format_map({'a': 1})"),
            ("center", "'a' | center(10**9)"), ("ljust", "'a'.ljust(10**9)"), ("zfill", "'a'.zfill(10**9)"),
            ("indent", "('a\n' * 1000) | indent(10**6)"), ("replace", "('a' * 100000) | replace('a', 'b' * 100000)"),
            ("replace-method", "('a' * 100000).replace('a', 'b' * 100000)"), ("join", "range(100000) | join('b' * 100000)"),
            ("join-method", "('b' * 100000).join(range(100000) | map('string'))"), ("tabs", "('\t' * 1000).expandtabs(10**8)"),
            ("translate", "('a' * 100000).translate({97: 'b' * 100000})"), ("bytes", "(5).to_bytes(10**9)"),
            ("batch", "[1] | batch(10**9, 'x') | list"), ("slice", "[1] | slice(10**9) | list"), ("sum", "[[1]] | sum(start=[])"),
            ("wordwrap", "('a' * 100000) | wordwrap(1, wrapstring='x' * 100000)"), ("tojson", "[[[1]]] | tojson(indent=10**9)"),
            ("tojson-separators", "(['a'] * 1000) | tojson(separators=('x' * 100000, 'y'))"), ("base", "('f' * 100000) | int(base=16)"),
            ("messages", "[messages] * 100000"), ("urls", "('http://a.b ' * 10000) | urlize(target='x' * 100000)"),
        )
    ),
    template_case("literal", "{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}", "is refused", "writes more than"),
    template_case("long", "x" * 300_000, "300,000 characters"),
    Case("template-ten-megabytes", templated("x" * 10_000_000), 1, ("chat_template.jinja", "10,000,000 bytes")),
    template_case("nested-brackets", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    template_case("nested-ifs", "{% if true %}" * 2000 + "{% endif %}" * 2000, "nested too deeply"),
    template_case("nested-fors", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
    template_case("chained-filters", "{{ 'a'" + " | upper" * 20_000 + " }}", "nested too deeply"),
    template_case("undefined", "{{ a.b.c }}", "'a' is undefined"),
    template_case("raises", "{{ raise_exception('only in Latin') }}", "only in Latin"),
    template_case("syntax", "a\n{% if %}", "is not valid Jinja: line 2"),
    template_case("unclosed", "a\nb\n{% for m in messages %}", "is not valid Jinja: line 3"),
    template_case("filter-unknown", "{{ 'a' | shout }}", "is not valid Jinja", "shout"),
    template_case("include", "{% include '/etc/passwd' %}", "no loader"),
    template_case("import", "{% import 'os' as os %}", "no loader"),
    template_case("extends", "{% extends 'base' %}", "no loader"),
    template_case("classes", "{{ ''.__class__.__mro__ }}", "unsafe"),
    template_case("divides", "{{ 1 / 0 }}", "ZeroDivisionError"),
    template_case("overflows", "{{ 10.0 ** 400 }}", "OverflowError"),
    template_case("random-words", "{{ lipsum(n=100000) }}", "lipsum"),
    template_case("range", "{{ range(10**9) | list }}", "Range too big"),
    template_case("on-a-word", TURNS + "{% if 'one two' in messages[0].content %}" + HOUR + "{% endif %}", "5 seconds"),
    template_case("on-length", TURNS + "{{ 'a' * (10**9 if messages[0].content == 'one two' else 0) }}", "builds a value"),
]  # fmt: skip


def config_case(name: str, field: str, value: object, *names: str) -> Case:
    return Case(f"config-{name}", fields("config.json", **{field: value}), 1, (field, *names, "config.json"))


CONFIGS = [
    config_case("layers", "num_hidden_layers", 10**6, "1,000,000"),
    config_case("vocabulary", "vocab_size", 10**12, "1,000,000,000,000"),
    config_case("width", "hidden_size", 10**9, "1,000,000,000"),
    config_case("middle", "intermediate_size", 10**9, "1,000,000,000"),
    config_case("heads", "num_attention_heads", 10**8),
    config_case("groups", "num_key_value_heads", 10**8),
    config_case("head", "head_dim", 10**8),
    config_case("positions", "max_position_embeddings", 10**12, "1,000,000,000,000"),
    config_case("digits", "vocab_size", 10**4000, "a number of many digits"),
    config_case("kernel", "_attn_implementation", "someone/kernel", "'someone/kernel'"),
    config_case("kernel-public", "attn_implementation", "someone/kernel:attention", "'someone/kernel:attention'"),
    config_case("kernel-internal", "_attn_implementation_internal", "someone/kernel", "'someone/kernel'"),
    config_case("kernel-object", "_attn_implementation", {"": "someone/kernel"}, "someone/kernel"),
]
CASES = [*TOKENIZERS, *TEMPLATES, *CONFIGS]


def run(case: Case, folder: pathlib.Path) -> Outcome:
    """A case in a process of its own; `folder` holds a copy of the tiny Llama."""
    case.make(folder)
    return bounded(functools.partial(opened, folder))
