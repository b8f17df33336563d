"""Chat templates within limits: rendered as Transformers renders them, and stopped if they would not end."""

# ruff: noqa: E501 - a template or a case is easier to read on one line

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil
import threading
import time
from importlib import resources

import pytest
from jinja2 import TemplateError

from nybble.data.rows.formats import Message
from nybble.data.text.meter import TemplateLimitError
from nybble.data.text.rendering import check_length, render
from nybble.data.text.sandbox import MAX_SOURCE
from nybble.data.text.template import BUILT_IN, Template, choose_template
from nybble.errors import DataError
from nybble.export.gguf.modelfile import write_modelfile

ASKED = [{"role": "user", "content": "  one <b> é\n"}]
TURNS = [*ASKED, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
TALKS = [ASKED, TURNS, [{"role": "system", "content": "be brief"}, *TURNS], [{**ASKED[0], "input": "more"}]]
OWN = {
    "loops": "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.content | trim }}"
    "{% if loop.index0 > 3 %}{% break %}{% endif %}{% else %}none{% endfor %}",
    "macros": "{% macro say(m, end='') %}{{ m['role'] ~ ': ' ~ m.content ~ end }}{% endmacro %}"
    "{% for m in messages[::-1] %}{{ say(m, end=eos_token) }}{% endfor %}{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}x{% endcall %}",
    "keywords": "{% macro say(obj, context, name, self) %}{{ obj }}{{ context }}{{ name }}{{ self }}{% endmacro %}"
    "{{ say(obj=1, context=2, name=3, self=4) }}{{ 1 is in(seq=[1]) }}{{ dict(obj=1, context=2, value=3, meter=4) }}",
    "recursive": "{% for i in [1, [2, 3]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}",
    "filters": "{{ messages | tojson(indent=2) }}{{ messages | map(attribute='content') | join('|') }}{{ messages | length }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | count }}{{ 'a b' | replace(' ', '_') | upper | indent(2) }}"
    "{{ [3, 1, 2] | sort | first }}{{ [1, 2] | sum }}{{ 'x' | default('y') }}{{ none_such | default('y') }}{{ 2.5 | round | int }}",
    "methods": "{{ messages[-1].content.split('t')[0].strip().replace('h', 'H') }}{{ '{} {:>5}'.format(1, 'a') }}"
    "{{ '%s-%03d' % ('a', 7) }}{{ ', '.join(['a', 'b']) }}{{ 'abc'[1:] }}{{ 'a' in 'abc' and 1 < 2 <= 2 }}{{ 'ab'.center(10, '*') }}",
    "namespaces": "{% set ns = namespace(text='', seen=[]) %}{% for m in messages %}{% set ns.text = ns.text + m.role[:1] %}"
    "{% set ns.seen = ns.seen + [m.content] %}{% endfor %}{{ ns.text }}{{ ns.seen }}{{ ns }}{% set a %}b{{ 1 + 2 * 3 - 4 // 2 }}{% endset %}{{ a }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "markup": "{{ '<b>' | e }}{{ ('<b>' | e) ~ '<i>' }}{{ '<b>' | safe }}{{ none }}{{ true }}{{ 1.0 }}{{ {'a': [1, 'b']} }}{{ (1, 'b') }}",
    "blocks": "{% block a %}{{ messages[0].content }}{% endblock %}{{ self.a() }}{% filter upper %}a{{ bos_token }}{% endfilter %}",
    "white": "a\n  {%- if true %}\n  b\n  {% endif %}\n{# note #}\n c {{- ' d ' -}} e\n",
}


def sources() -> dict[str, str]:
    built_in = {
        name: resources.files("nybble.data.text").joinpath(f"templates/{name}.jinja").read_text("utf-8")
        for name in BUILT_IN
    }
    found = importlib.util.find_spec("trl")
    folder = pathlib.Path(found.origin).parent / "chat_templates" if found and found.origin else pathlib.Path("none")
    return {**built_in, **OWN, **{file.name: file.read_text("utf-8") for file in sorted(folder.glob("*.jinja"))}}


@pytest.mark.parametrize("name", sources())
def test_a_template_renders_as_transformers_renders_it(name, tiny_tokenizer):
    source = sources()[name]
    for messages in TALKS:
        for generation in (False, True):
            try:
                wanted = tiny_tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False, add_generation_prompt=generation
                )
            except (TemplateError, TypeError, ValueError):
                with pytest.raises(DataError):
                    render(tiny_tokenizer, name, source, messages, generation)
            else:
                assert render(tiny_tokenizer, name, source, messages, generation) == wanted


def test_long_conversations_stay_far_below_the_limits(tiny_tokenizer):
    many = [{"role": ("user", "assistant")[n % 2], "content": "x" * 10} for n in range(4001)]
    large = [{"role": "user", "content": "x" * 5_000_000}, {"role": "assistant", "content": "y" * 5_000_000}] * 2
    for name in ("llama2", "plain", "namespaces", "macros", "filters"):
        for messages in (many[: 1001 if name == "namespaces" else None], large):
            began = time.monotonic()
            assert len(render(tiny_tokenizer, name, sources()[name], messages, False)) > 10_000
            assert time.monotonic() - began < 4


@pytest.mark.slow
def test_each_thread_has_its_own_limits(tiny_tokenizer):
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    refused = []

    def hostile() -> None:
        # A fast machine writes as much as a template may within the 5 seconds.
        with pytest.raises(TemplateLimitError, match=r"still running after 5 seconds|it writes more than"):
            render(tiny_tokenizer, "hostile", endless, ASKED, False)
        refused.append(True)

    thread = threading.Thread(target=hostile)
    thread.start()
    rendered = 0
    while thread.is_alive():
        assert render(tiny_tokenizer, "white", OWN["white"], ASKED, False)
        rendered += 1
        time.sleep(0.02)
    assert refused
    assert rendered > 10


def test_a_template_that_is_hostile_on_one_row_stops_the_pass(here, tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (model / "chat_template.jinja").write_text(turns + "{{ 'a' * 10**9 if messages[0].content == 'say 7' }}")
    talks = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "yes"}] for n in range(40)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    said = here("--cache", tmp_path / "cache", "data", "check", rows, model)
    assert said.returncode == 1
    assert "the template model is refused: it builds a value of more than" in " ".join(said.stderr.split())
    assert "data.template=alpaca, llama2, plain or a Jinja file" in " ".join(said.stderr.split())


def test_a_file_that_is_too_long_is_not_read(tiny_tokenizer, tmp_path):
    file = tmp_path / "long.jinja"
    with file.open("wb") as stream:
        stream.truncate(1 << 34)
    with pytest.raises(TemplateLimitError, match=rf"17,179,869,184 bytes, and {MAX_SOURCE:,} characters are allowed"):
        choose_template(tiny_tokenizer, str(file), "messages")
    file.write_text("short")
    check_length(file)


def test_a_modelfile_says_that_a_hostile_template_has_no_form_in_go(tiny_tokenizer):
    text = write_modelfile("./a.gguf", tiny_tokenizer, "{{ 'a' * 10**10 }}", "</s>")
    assert "cannot be expressed in Go's templates" in text


def test_the_first_of_many_turns_are_named(tiny_tokenizer):
    with pytest.raises(DataError, match=r"fails on turns of user, .*, user and 992 more: 'a' is undefined"):
        render(tiny_tokenizer, "mine", "{{ a.b }}", ASKED * 1000, False)


def test_a_run_of_any_template_fails_by_its_name(tiny_tokenizer):
    template = Template(tiny_tokenizer, "mine.jinja", "{{ ''.__class__.__mro__ }}")
    with pytest.raises(
        DataError, match=r"the template mine\.jinja fails on turns of user: access to attribute '__class__'"
    ):
        template.runs((Message("user", "a"),))
