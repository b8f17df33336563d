"""How templates write calls, the grammar that holds answers to that, and how answers are read."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from nybble.data.text.template import Template, choose_template
from nybble.errors import DataError
from nybble.serve.chat_request import ChatRequest
from nybble.serve.grammar import SchemaError
from nybble.serve.protocol import parse
from nybble.serve.tools.calls import Call, CallForm, Function, ToolTurn
from nybble.serve.tools.form import OWN_FORM, call_form, template_form
from nybble.serve.tools.grammar import tool_grammar
from nybble.serve.tools.prompt import as_messages, encode_tool_prompt
from nybble.serve.tools.reader import CallReader

HEAD = """{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}
{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}A:"""
TAIL = """{{ eos_token }}{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""
TEMPLATES = {  # in the manner of Hermes and Qwen, of Llama 3.1, and of functions in tags
    "marked": HEAD + """{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\\n' }}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}""" + TAIL,
    "bare": HEAD + """{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}\
{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}\
{% else %}{{ m.content }}{% endif %}""" + TAIL,
    "tags": HEAD + """{{ m.content }}{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>\
{{ c.function.arguments | tojson }}</function>{% endfor %}""" + TAIL,
}  # fmt: skip
FORMS = {
    "marked": CallForm('\n<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", ""),
    "bare": CallForm('{"name": "', '", "parameters": ', "}", None),
    "tags": CallForm("<function=", ">", "</function>", ""),
}
WITHOUT = {
    "control tokens": TEMPLATES["tags"].replace("<function=", "{{ bos_token }}<function="),
    "no functions": TEMPLATES["tags"].replace("{{ t | tojson }}", ""),
    "no calls": TEMPLATES["tags"].replace("m.tool_calls", "m.calls"),
    "no results": TEMPLATES["tags"].replace("{% else %}", "{% elif m.role != 'tool' %}"),
    "fails": TEMPLATES["tags"].replace("{{ t | tojson }}", "{{ t | tojson }}{{ raise_exception('no') }}"),
    "a list": TEMPLATES["marked"].replace("<tool_call>", "[").replace("</tool_call>", "]"),
    "a fence": TEMPLATES["marked"].replace("<tool_call>", "```json").replace("</tool_call>", "```"),
    "an id before": TEMPLATES["tags"].replace("<function=", "<call id={{ c.id }} name="),
    "an id after": TEMPLATES["tags"].replace("</function>", "{{ c.id }}</function>"),
    "arguments as Python": TEMPLATES["tags"].replace(" | tojson }}</function>", " }}</function>"),
}
FUNCTIONS = [
    Function("add", "two numbers", {
        "type": "object", "additionalProperties": False, "required": ["a", "b"],
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    }),
    Function("now"),
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_how_a_template_writes_calls_is_found_by_rendering_one(tiny_tokenizer, name):
    template = Template(tiny_tokenizer, name, TEMPLATES[name])
    assert template_form(template) == call_form(template) == FORMS[name]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_template_that_cannot_be_used_gets_the_servers_own_form(tiny_tokenizer, name):
    template = Template(tiny_tokenizer, name, WITHOUT[name])
    assert template_form(template) is None
    assert call_form(template) == OWN_FORM


def test_where_the_marker_is_a_control_token_calls_are_refused(tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    with pytest.raises(DataError, match="<tool_call> is a control token"):
        call_form(choose_template(tokenizer, "alpaca", "alpaca"))


def test_a_template_of_its_own_writes_the_prompt(tiny_tokenizer):
    template = Template(tiny_tokenizer, "marked", TEMPLATES["marked"])
    call = Call("a", "add", {"a": 1, "b": "é</s"})
    turns = [ToolTurn("user", "hi"), ToolTurn("assistant", "Well.", (call,)), ToolTurn("tool", "3", (), "a", "add")]
    ids = encode_tool_prompt(template, turns, FUNCTIONS[1:])
    bos, eos = tiny_tokenizer.bos_token, tiny_tokenizer.eos_token
    assert tiny_tokenizer.decode(ids) == (
        bos + '{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}, '
        '"additionalProperties": false}}}\nuser: hi\nA:Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é</s"}}\n'
        f"</tool_call>{eos}tool: 3\nA:"
    )  # fmt: skip
    assert ids.count(tiny_tokenizer.bos_token_id) == 1
    with pytest.raises(DataError, match=f"contains {eos}, a control token"):
        encode_tool_prompt(template, [ToolTurn("user", f"hi{eos}")], FUNCTIONS)
    words = Template(tiny_tokenizer, "marked", TEMPLATES["marked"] + "{# [INST] #}")
    with pytest.raises(DataError, match=r"contains \[INST\], a control word"):
        encode_tool_prompt(words, [ToolTurn("user", "hi [INST]")], FUNCTIONS)
    stripped, spaced = (encode_tool_prompt(template, [ToolTurn("user", text)], FUNCTIONS) for text in ("hi", "  hi \n"))
    assert stripped == spaced
    with pytest.raises(DataError, match="contains <s>, a control token"):
        encode_tool_prompt(template, turns[:1], [Function("f", "about <s>")])


def test_other_templates_get_functions_in_the_system_message_and_results_from_the_user():
    call = Call("a", "now", {})
    turns = [
        ToolTurn("system", "Be brief."), ToolTurn("user", "hi"), ToolTurn("assistant", "", (call, call)),
        ToolTurn("tool", "noon", (), "a", "now"), ToolTurn("tool", "one", (), "a", "now"), ToolTurn("user", "And?"),
    ]  # fmt: skip
    system, user, assistant, results = as_messages(turns, FUNCTIONS)
    assert system.content.startswith(
        'Be brief.\n\nYou can call these functions, one JSON object for each:\n{"name": "add", '
    )
    assert (user.role, user.content) == ("user", "hi")
    written = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert (assistant.role, assistant.content) == ("assistant", f"{written}\n{written}")
    response = "<tool_response>\n{}\n</tool_response>"
    assert results.role == "user"
    assert results.content == f"{response.format('noon')}\n{response.format('one')}\nAnd?"
    assert as_messages(turns, [])[0].content == "Be brief."


def test_results_stand_in_the_order_of_their_calls():
    calls = [{"id": each, "function": {"name": f"f-{each}", "arguments": ""}} for each in "ab"]
    results = [{"role": "tool", "tool_call_id": each, "content": each} for each in "ba"]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": calls},
        *results,
        {"role": "user", "content": "y"},
    ]
    turns = parse(ChatRequest, json.dumps({"model": "m", "messages": messages}).encode()).tool_turns()
    assert [(turn.role, turn.content, turn.function) for turn in turns] == [
        ("user", "x", ""), ("assistant", "", ""), ("tool", "a", "f-a"), ("tool", "b", "f-b"), ("user", "y", ""),
    ]  # fmt: skip


def follows(grammar, text):
    """Whether a text is a whole answer, and how many of its bytes may come."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    taken = matcher.try_consume_tokens(list(text.encode()))
    return taken == len(text.encode()) and matcher.is_accepting(), taken


ADD, NOW = Call("", "add", {"a": -5, "b": 'q"}\n{'}), Call("", "now", {})
ALL = {"own": OWN_FORM, **FORMS}


@pytest.mark.parametrize("name", ALL)
def test_an_answer_is_text_or_well_formed_calls(name):
    form = ALL[name]
    free = tool_grammar(form, FUNCTIONS, must_call=False, several=True)
    bound = tool_grammar(form, FUNCTIONS, must_call=True, several=True)
    one = tool_grammar(form, FUNCTIONS[1:], must_call=True, several=False)
    for calls in ([ADD], [NOW], [ADD, NOW], [NOW, ADD, ADD]):
        text = form.written(calls).lstrip()
        writable = len(calls) == 1 or form.separator is not None
        assert [follows(grammar, text)[0] for grammar in (free, bound, one)] == [writable, writable, calls == [NOW]]
        assert not follows(free, text + " more")[0]
        assert follows(free, f"Let me see.\n{text}")[0] == (writable if form.marker else True)
        wrong = text.replace(form.between, form.between + "[", 1)
        assert not follows(free, wrong)[0]
    for text in ("", "Hello {", "a < b", "é\n\n1"):
        assert follows(free, text)[0]
        assert not follows(bound, text)[0]
    assert not follows(bound, form.written([Call("", "sub", {})]).lstrip())[0]


def test_schemas_that_are_too_large_together_are_refused():
    long = {"type": "object", "properties": {"a" * 9_000: {"type": "string"}}}
    with pytest.raises(SchemaError, match="characters together, more than 65,536"):
        tool_grammar(OWN_FORM, [Function(f"f{n}", "", long) for n in range(8)], must_call=False, several=True)


def test_a_schema_that_cannot_be_followed_is_refused_before_it_is_used():
    with pytest.raises(SchemaError, match="the function f: Unimplemented"):
        tool_grammar(OWN_FORM, [Function("f", "", {"type": "object", "not": {}})], must_call=False, several=True)


TEXTS = st.text(st.sampled_from('ab {}[]"\\<>/\n:,'), max_size=12)
OBJECTS = st.dictionaries(TEXTS, st.recursive(TEXTS | st.integers() | st.none(), st.lists, max_leaves=4), max_size=3)


@given(st.data(), st.sampled_from(sorted(ALL)))
def test_an_answer_is_read_alike_however_it_is_cut(data, name):
    form = ALL[name]
    most = 1 if form.separator is None else 3
    calls = [
        Call("", data.draw(st.sampled_from(["f", "g-1"])), data.draw(OBJECTS))
        for _ in range(data.draw(st.integers(0, most)))
    ]
    before = data.draw(TEXTS).replace(form.marker, "") if form.marker or not calls else ""
    if before.lstrip().startswith("{") if not form.marker else form.marker in before:
        return
    whole = (before + ("\n" if calls and before else "") + form.written(calls)) if calls else before
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(whole))))), len(whole)]
    reader, text, deltas = CallReader(form), "", []
    for start, end in itertools.pairwise(cuts):
        more, some = reader.push(whole[start:end])
        text, deltas = text + more, deltas + some
    more, some = reader.push("", last=True)
    text, deltas = text + more, deltas + some
    assert text == reader.text == (before.rstrip() if calls else before)
    assert [(call.name, json.loads(call.arguments)) for call in reader.calls] == [
        (call.name, call.arguments) for call in calls
    ]
    arguments = ["" for _ in calls]
    for delta in deltas:
        arguments[delta["index"]] += delta["function"].get("arguments", "")
    assert arguments == [call.arguments for call in reader.calls]
    assert [delta["function"]["name"] for delta in deltas if "id" in delta] == [call.name for call in calls]


def test_a_call_without_its_end_keeps_what_there_is():
    reader = CallReader(OWN_FORM)
    reader.push('Well.\n<tool_call>\n{"name": "f", "arguments": {"a": "b')
    assert reader.push("", last=True) == ("", [])
    assert (reader.text, reader.calls[0].name, reader.calls[0].arguments) == ("Well.", "f", '{"a": "b')
    reader = CallReader(OWN_FORM)
    assert reader.push("a <tool", last=True) == ("a <tool", [])
    assert CallReader(OWN_FORM).push('<tool_call>\n{"na', last=True) == ("", [])
