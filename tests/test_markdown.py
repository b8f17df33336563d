"""Hostile names and texts in the cards and the report of Markdown, read as GitHub and the Hub read them."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nybble.evaluate.report.page import write_report
from nybble.export.card import Subject
from nybble.export.card import write_card as export_card
from nybble.export.licence import Licence
from nybble.markdown import code, escaped, fence, front_matter, storable
from nybble.run.evaluation import Evaluation
from nybble.run.folder import open_run
from nybble.run.records import write_record
from nybble.run.summary import Summary
from nybble.training.card import draw_loss
from nybble.training.card import write_card as run_card

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> | a ` b ``` c\n\n---\nlicense: evil\n---\n# heading\n"
    "[link](javascript:alert(1)) ![picture](x) *b* &amp; <!-- ~~~ $x$ \\ {{ 7*7 }} \"quoted\" 'too' \u202e \x1b[31m \ud800\n```\n"
)
NAME = "a <b>|`x` $\\frac{ '#' *y* \udcff"  # of a folder: no slash, and a byte that is not UTF-8
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
texts = st.text(st.sampled_from("<>&|`*_[]()#~$!\\-= \n\tab1:'\"") | st.characters(codec="utf-8"), max_size=60)


def rendered(text: str) -> tuple[str, str]:
    """Front matter and page."""
    found = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    return (found[1], MARKDOWN.render(text[found.end() :])) if found else ("", MARKDOWN.render(text))


def is_tame(page: str, headings: int) -> None:
    """No element that the text brought, and as many headings as the template has."""
    assert not re.search(r"<(script|b|img src=\"x|!--)", page), page
    assert not re.search(r"<a [^>]*javascript", page)
    assert len(re.findall(r"<h[1-6]>", page)) == headings, page
    rows = [re.findall(r"<t[hd]\b", row) for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]  # fmt: skip
    assert rows
    assert all(rows)


def plain(page: str) -> str:
    """The text of a page."""
    for name, character in (("lt", "<"), ("gt", ">"), ("quot", '"'), ("amp", "&")):
        page = re.sub(r"<[^<>]*>", "", page) if name == "lt" else page
        page = page.replace(f"&{name};", character)
    return page


@given(texts)
@example("_a_ __b__ *c*")
@example("1. a")
@example("``` | ```")
def test_text_is_read_as_it_is(text):
    text = " ".join(text.split()).translate({0: None})
    table = f"| a | b |\n| --- | --- |\n| {escaped(text)} | x |\n"
    page = MARKDOWN.render(table)
    cells = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert [plain(cell) for cell in cells] == [text.strip(), "x"], page
    assert set(re.findall(r"<(\w+)", page)) <= {"table", "thead", "tbody", "tr", "th", "td"}


@given(texts)
@example("a|b`c``d")
def test_code_is_read_as_it_is(text):
    text = " ".join(text.split()).translate({0: None}).replace("\\|", "|")
    if not text:
        return
    page = MARKDOWN.render(f"| a | b |\n| --- | --- |\n| {code(text)} | x |\n")
    cells = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert [plain(cell).strip() for cell in cells] == [text.strip(), "x"], page


@given(texts)
@example("```\nout")
def test_nothing_ends_a_fence(text):
    page = MARKDOWN.render(f"{fence(text)}\n\nafter\n")
    assert page.count("<pre>") == 1
    assert page.endswith("</pre>\n<p>after</p>\n")


@given(texts)
@example("---\nlicense: evil\n---")
@example("yes")
def test_front_matter_says_what_it_was_given(text):
    said = front_matter({"base_model": text, "tags": ["x"]})
    assert len(re.findall(r"^---", said, re.MULTILINE)) == 2
    assert yaml.safe_load(said.split("\n---\n")[0]) == {"base_model": " ".join(text.split()), "tags": ["x"]}


def test_the_report_shows_hostile_rows_as_text(tmp_path):
    score = {"mean": 0.5, "interval": [0.4, 0.6]}
    task = {"name": HOSTILE, "metric": HOSTILE, "data": HOSTILE, "base": score, "tuned": score, "verdict": "worse",
            "difference": {"mean": 0.1, "interval": [0.0, 0.2]}, "p": 0.01, "rows": 5, "of": 9, "version": HOSTILE}  # fmt: skip
    results = {
        "run": HOSTILE, "date": "2026-11-24T23:00:00+00:00", "tasks": [task], "texts": [], "recipe": HOSTILE,
        "samples": [{"prompt": HOSTILE, "expected": HOSTILE, "base": HOSTILE, "tuned": HOSTILE}], "adapter": HOSTILE,
        "skill": {"what": HOSTILE, HOSTILE: HOSTILE}, "missing": [{"task": HOSTILE, "why": HOSTILE}],
        "base": {"name": HOSTILE, "quantization": HOSTILE, "fingerprint": HOSTILE}, "device": HOSTILE, "dtype": HOSTILE,
        "training": {"device": HOSTILE, "template": HOSTILE}, "versions": {HOSTILE: HOSTILE},
    }  # fmt: skip
    write_report(tmp_path, Evaluation.model_validate(results), [])
    _, page = rendered((tmp_path / "report.md").read_text(encoding="utf-8"))
    is_tame(page, headings=9)
    assert plain(page).count("<script>alert(1)</script>") > 15
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|img)", html)


@pytest.fixture
def hostile(tuned_run, tmp_path):
    """A run in a folder of a hostile name, whose record holds hostile text wherever a text can stand."""
    folder = tmp_path / NAME
    shutil.copytree(tuned_run.folder, folder)
    run = open_run(folder)
    model, data = (part.model_copy(update={"path": HOSTILE}) for part in (run.recipe.model, run.recipe.data))
    run = type(run)(folder, run.recipe.model_copy(update={"model": model, "data": data}))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"device": HOSTILE, "adapter": {**summary["adapter"], "targets": [HOSTILE, "q_proj"]}}
    summary["base"] |= {"name": HOSTILE, "fingerprint": "sha256:0", "quantization": HOSTILE}
    summary["data"] |= {"template": HOSTILE, "path": HOSTILE}
    return run, Summary.model_validate(summary)


def test_a_runs_card_and_curve_stand_hostile_names(hostile):
    run, summary = hostile
    run_card(run, summary)
    draw_loss(run, run.folder / "loss.png")
    front, page = rendered((run.folder / "README.md").read_text(encoding="utf-8"))
    fields = yaml.safe_load(front)
    assert set(fields) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert fields["base_model"] == storable(" ".join(HOSTILE.split()))
    is_tame(page, headings=2)
    assert "<h1>a &lt;b&gt;|`x` $\\frac{ '#' *y* ?</h1>" in page


def test_an_exports_card_stands_hostile_names(hostile):
    run, summary = hostile
    write_record(run.folder / "summary.json", summary)
    entry = {"mean": 0.4, "interval": [0.3, 0.5]}
    task = {"name": HOSTILE, "metric": HOSTILE, "base": entry, "tuned": entry, "difference": None, "verdict": HOSTILE}
    (run.folder / "evaluation.json").write_text(json.dumps({"date": HOSTILE, "tasks": [task]}))
    licence = Licence(HOSTILE, None, None, None, ())
    card = export_card(
        Subject(run, "adapter", "A LoRA adapter", f"load({HOSTILE!r})\n```", [], None, None, licence, None, [])
    )
    front, page = rendered(card)
    fields = yaml.safe_load(front)
    assert fields["license"] == storable(" ".join(HOSTILE.split()))
    assert fields["library_name"] == "peft"
    is_tame(page, headings=7)
