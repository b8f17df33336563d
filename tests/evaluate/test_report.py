"""The report of an evaluation: what it says first, that it says all, and that it stays one file that shows text as text."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from nybble.evaluate.report.page import write_report
from nybble.evaluate.report.wording import duration, headline, number_text, p_text
from nybble.run.evaluation import Evaluation
from nybble.run.log import MetricsLine

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
UNDECIDED = "no difference shown"


def score(mean, half=0.05):
    return {"mean": mean, "stderr": half / 2, "interval": [mean - half, mean + half]}


def task(name, base, tuned, verdict, **more):
    return {
        "name": name, "metric": "acc_norm", "higher_is_better": True, "version": "1.0", "fewshot": 5, "rows": 200,
        "of": 10042, "data": f"{name}.jsonl.gz", "template": False, "base": score(base), "tuned": score(tuned),
        "difference": score(tuned - base, 0.013), "p": 0.0217, "p_adjusted": 0.0434, "verdict": verdict,
        "detectable": 0.0312, "over_subjects": None, "contamination": None, **more,
    }  # fmt: skip


def held_out(verdict="better", tuned=2.2):
    return {
        "what": "validation rows of the run", "rows": 100, "tokens": 4312, "base": {"loss": 2.91, "perplexity": 18.36},
        "tuned": {"loss": tuned, "perplexity": 9.03}, "difference": score(tuned - 2.91, 0.06), "p": 0.0, "p_adjusted": 0.0,
        "verdict": verdict, "detectable": 0.0512,
    }  # fmt: skip


BARE = {"run": "my-run", "date": "2026-11-24T23:00:00+00:00"}
SKILL = {"what": "orders as JSON", "base": "0 of 100", "base, 5 examples": "1 of 100", "tuned": "93 of 100"}
SUBJECTS = {"subjects": 57, "base": score(0.461), "tuned": score(0.427), "difference": score(-0.034), "p": 0.0023}
FULL = {
    **BARE,
    "versions": {"python": "3.11.2", "nybble": "9.8.7"},
    "base": {"name": "meta-llama/Llama-2-7b-hf", "fingerprint": "sha256:aaaa", "quantization": "nf4"},
    "adapter": "sha256:bbbb", "dtype": "bfloat16", "device": "NVIDIA H200", "limit": 200, "seconds": 812.3,
    "tasks": [
        task("arc_easy", 0.74, 0.791, "better", contamination={"flagged": 3, "base": 0.7321, "tuned": 0.7832}),
        task("hellaswag", 0.57, 0.578, UNDECIDED, detectable=0.0441, template=True),
        task("mmlu", 0.458, 0.421, "worse", over_subjects=SUBJECTS),
        task("wikitext", 12.25, 12.31, UNDECIDED, metric="word_perplexity", higher_is_better=False, detectable=0.25),
    ],
    "missing": [{"task": "truthfulqa_mc2", "why": "no file for it in bench"}],
    "held_out": held_out(),
    "texts": [{
        "name": "wiki.txt", "tokens": 5001,
        "base": {"loss": 2.512, "perplexity": 12.33}, "tuned": {"loss": 2.553, "perplexity": 12.85},
    }],
    "generation": {"rows": 50, "metrics": [
        {"name": "ROUGE-L", "base": score(0.234), "tuned": score(0.345), "difference": score(0.111), "p": 0.0021,
         "verdict": "better", "detectable": 0.0876},
        {"name": "distinct answers", "base": {"mean": 0.62, "stderr": None, "interval": None},
         "tuned": {"mean": 0.98, "stderr": None, "interval": None}, "difference": None, "p": None, "verdict": None,
         "detectable": None},
    ]},
    "skill": SKILL,
    "samples": [{"prompt": "Why is the sky blue?", "expected": "Scattering.", "base": "", "tuned": "Air scatters."}],
    "lengths": {"17": 4, "23": 9, "900": 1}, "max_length": 1024,
    "training": {"steps": 100, "seconds": 812.1, "tokens": 123456, "tokens_per_second": 1234.5, "peak_memory_gb": 8.13,
                 "device": "NVIDIA H200", "trainable_parameters": 39976960, "template": "alpaca"},
    "recipe": "model:\n  path: meta-llama/Llama-2-7b-hf\n",
}  # fmt: skip
METRICS = [
    *({"step": step, "loss": 3.0 / step} for step in range(1, 41)),
    {"step": 20, "eval_loss": 1.5}, {"step": 40, "eval_loss": 1.25}, {"step": 30, "loss": float("nan")},
    {"step": 20, "task/gsm8k": 0.1}, {"step": 40, "task/gsm8k": 0.2},
]  # fmt: skip
HARSH = "<script>alert(1)</script> & | `x` *b* \n\n```\n# h\n~~~ " + "Wort" * 300 + " ‮ مرحبا 今天 🙂 \ud800 {{ 7*7 }}"


def record(results):
    """What a dictionary says, None like a key that is not there."""
    return Evaluation.model_validate(
        {"tasks": [], **{key: value for key, value in results.items() if value is not None}}
    )


def write(folder, results=FULL, metrics=METRICS):
    write_report(folder, record(results), [MetricsLine.model_validate(line) for line in metrics])
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where the report of FULL lies and where that of what is harsh, with both pages of each: for tests that only read."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("full", "harsh")}
    return {name: (folder, *write(folder, FULL if name == "full" else harsh())) for name, folder in folders.items()}


def said(results):
    return [(line.kind, line.label + line.text) for line in headline(record({**BARE, **results}))]


def harsh():
    tasks = [task(f"{HARSH} {number}", 0.5, 0.4, "worse", over_subjects=SUBJECTS) for number in range(12)]
    sample = {"prompt": HARSH, "expected": HARSH, "base": "", "tuned": None}
    why = [{"task": HARSH, "why": HARSH}]
    return {
        **FULL, "run": HARSH, "tasks": tasks, "samples": [sample, sample], "missing": why, "recipe": HARSH,
        "skill": {"what": HARSH, HARSH: HARSH}, "texts": [{**FULL["texts"][0], "name": HARSH}],
    }  # fmt: skip


def table_rows(markdown):
    """Tables of Markdown outside code blocks: the cells of each line, by table."""
    outside, fence = [], None
    for line in markdown.splitlines():
        mark = re.match(r"`{3,}", line)
        if mark and fence is None:
            fence = mark[0]
        elif fence is not None:
            fence = None if line == fence else fence
        else:
            outside.append(line)
    tables = re.findall(r"(?:^\|.*\|\s*\n?)+", "\n".join(outside), re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in one.splitlines() if line.strip()] for one in tables]


def test_what_got_worse_comes_first_with_its_numbers():
    lines = said({"tasks": FULL["tasks"], "held_out": held_out()})
    assert [kind for kind, _ in lines] == ["worse", "better"]
    worse = "Worse (forgetting) on 1 of 4 benchmarks: mmlu 45.8% to 42.1% (−3.7 points, 95% [−5.0, −2.4])."
    assert lines[0][1] == worse
    assert lines[1][1].startswith(
        "Better on 1 of 4 benchmarks: arc_easy 74.0% to 79.1% (+5.1 points, 95% [+3.8, +6.4]). "
    )
    assert "Also: held-out loss 2.910 to 2.200 (−0.710 nats per token, 95% [−0.770, −0.650])" in lines[1][1]
    assert "perplexity 18.4 to 9.0" in lines[1][1]


def test_of_many_worse_benchmarks_the_largest_have_numbers_and_all_are_named():
    tasks = [task(f"task{number}", 0.8, 0.79 - number / 100, "worse") for number in range(9)]
    ((_, text), *_) = said({"tasks": tasks})
    assert text.startswith("Worse (forgetting) on all 9 benchmarks: task8 80.0% to 71.0%")
    assert all(f"task{number}" in text for number in range(9))
    assert text.count("points") == 4


def test_a_worse_loss_comes_first_and_is_not_called_forgetting():
    lines = said({"tasks": [task("piqa", 0.5, 0.6, "better")], "held_out": held_out("worse", tuned=3.5)})
    assert lines[0][1].startswith("Worse: held-out loss 2.910 to 3.500 (+0.590 nats")
    assert lines[1][1].startswith("Better on the one benchmark: piqa")


def test_if_nothing_was_shown_the_smallest_detectable_difference_is_given():
    tasks = [task("a", 0.5, 0.51, UNDECIDED, detectable=0.0213), task("b", 0.5, 0.49, UNDECIDED, detectable=0.05)]
    ((kind, text),) = said({"tasks": tasks, "held_out": held_out(UNDECIDED)})
    assert kind == "plain"
    assert text == (
        "No difference shown on all 2 benchmarks, nor in held-out loss. Smallest detectable "
        "difference: 2.1 points (a) to 5.0 points (b) and 0.051 nats per token (held-out loss)."
    )
    ((_, text),) = said({"tasks": [task("a", 0.5, 0.5, UNDECIDED, detectable=None)]})
    assert (
        text == "No difference shown on the one benchmark. With this few items no difference could have been detected."
    )


def test_a_skill_is_reported_as_counts_without_a_verdict():
    lines = said({"skill": SKILL, "held_out": held_out()})
    assert lines[0] == ("plain", "Measured: orders as JSON: base 0 of 100; base, 5 examples 1 of 100; tuned 93 of 100.")
    assert lines[1][0] == "better"
    untested = {key: held_out()[key] for key in ("what", "rows", "tokens", "base", "tuned")}
    assert said({"held_out": untested}) == [
        ("plain", "Measured: held-out loss 2.910 to 2.200 nats per token, perplexity 18.4 to 9.0.")
    ]
    assert said({})[0][1].startswith("Nothing compared")


@pytest.mark.parametrize("form", ["html", "md"])
def test_every_number_is_in_the_report(written, form):
    _, html, markdown = written["full"]
    text = html if form == "html" else markdown.replace("\\", "")
    numbers = (
        "74.0% 79.1% +5.1 [69.0,79.0] [74.1,84.1] [+3.8,+6.4] 0.043 3.1_points 4.4_points of_10,042 57.0% 57.8% "  # tasks
        "12.250 12.310 +0.060 0.250 lower_is_better 46.1% 42.7% −3.4 57_subjects 0.002 without:_73.2%_to_78.3% "
        "2.910 2.200 −0.710 [−0.770,−0.650] 18.36 9.03 <_0.001 0.051_nats 100_rows,_4,312_tokens 2.512 2.553 12.33 12.85 "
        "0.234 0.345 +0.111 0.088 62.0% 98.0% 93_of_100 1_of_100 1,234 123,456 8.13_GB 39,976,960 14_min 9.8.7 sha256:bbbb"
    )
    plain = re.sub(r"&lt;", "<", re.sub(r"\s+", "", re.sub(r"<[^<>]*>", "", text)))
    missing = [number for number in numbers.split() if number.replace("_", "") not in plain]
    assert missing == []
    assert text.index("mmlu") < text.index("arc_easy")
    assert re.search(r"Worse \(forgetting\)(</b>|\*\*) on 1 of 4 benchmarks", text)


def test_sections_without_results_are_left_out(written, tmp_path):
    full = "".join(written["full"][1:])
    named = {"tasks": "Benchmarks", "generation": "Answers", "samples": "Samples", "training": "Cost of training",
             "missing": "Not measured", "skill": "Skill:", "recipe": "ecipe", "lengths": "Lengths"}  # fmt: skip
    for key, title in named.items():
        html, markdown = write(tmp_path, {**FULL, "lengths": None, key: None}, [])
        assert re.search(rf"(<h[23]>|## |!\[)[^<\n]*{title}", full), title
        assert not re.search(rf"(<h[23]>|## |!\[)[^<\n]*{title}", html + markdown), title
    html, markdown = write(tmp_path, {**FULL, "held_out": None, "texts": []}, [])
    assert "<h2>Held-out loss" not in html
    assert "Loss</h3>" not in html
    for page in write(tmp_path, BARE, []):
        assert "Nothing compared" in page
        assert not re.search(r"<h2>|<table|^## |None|–", page, re.MULTILINE)


def test_what_the_demo_gives_is_enough(tmp_path):
    html, _ = write(tmp_path, {**BARE, "skill": SKILL, "held_out": held_out(), "samples": FULL["samples"]})
    assert 'style="width: 93.0%"' in html
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Skill: orders as JSON", "Plots", "Held-out loss", "Samples"]


def test_text_from_data_stays_text(written):
    _, html, markdown = written["harsh"]
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 20
    assert "{{ 7*7 }}" in html
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "\\<script\\>" in outside
    assert not re.search(r"(?<!\\)<script", outside)
    assert not re.search(r"^# h", outside, re.MULTILINE)


def test_whitespace_of_samples_is_kept_and_long_ones_are_collapsed(tmp_path):
    sample = {"prompt": "\n  two\n\tthree", "expected": "", "base": "long " * 400, "tuned": " \n"}
    html, markdown = write(tmp_path, {**BARE, "samples": [sample]}, [])
    assert '<pre dir="auto">\n\n  two\n\tthree</pre>' in html  # HTML drops the first line break of a pre
    assert html.count("<details>") == 1
    assert "all 2,000 characters" in html
    assert ">Expected<" not in html
    assert html.count("(empty)") == 1
    assert "```text\n\n  two\n\tthree\n```" in markdown


@pytest.mark.parametrize("results", [FULL, harsh()], ids=["full", "harsh"])
def test_the_page_loads_nothing_and_is_small(tmp_path, results):
    html, _ = write(tmp_path, results, [{"step": step, "loss": step % 7 / 3} for step in range(1, 20_001)])
    loads = re.findall(r"""(?:src|href|action|data)\s*=\s*["'](?!#)[^"']*|@import[^;]*|url\((?!#)[^)]*""", html)
    assert loads == []
    assert not re.search(r"<(?:link|iframe|object|embed|script|base|img)\b", html)
    assert len(html.encode()) < 1_000_000
    assert list(tmp_path.rglob("*.writing*")) == []


def test_ids_of_plots_are_their_own_and_found(written):
    _, html, _ = written["full"]
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert used
    assert used <= set(ids)
    assert not re.search(r"(?:fill|stroke): #", html.split("</style>", 1)[1]), "a colour that dark mode cannot change"


@pytest.mark.parametrize("name", ["full", "harsh"])
def test_markdown_tables_are_complete_and_plots_are_beside_them(written, name):
    folder, _, markdown = written[name]
    tables = table_rows(markdown)
    assert len(tables) == 6
    for rows in tables:
        assert len(rows) > 2
        assert {len(cells) for cells in rows} == {len(rows[0])}, rows
        assert set("".join(rows[1])) <= set("- ")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) == 4
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_benchmarks_without_spread_are_drawn_and_described(tmp_path):
    bare = {"mean": 0.5, "stderr": None, "interval": None}
    spreadless = {"base": bare, "tuned": bare, "difference": {**bare, "mean": 0.0}, "detectable": None}
    lone = {**task("tiny", 0.5, 0.5, UNDECIDED), **spreadless}
    html, _ = write(tmp_path, {**BARE, "tasks": [lone]}, [])
    assert '<td data-label="Detectable"><span>none</span></td>' in html
    assert "<h3>Benchmarks</h3>" in html


def test_numbers_as_text():
    assert [number_text(value, 1) for value in (-0.04, -1234.56, None, float("inf"))] == ["0.0", "−1,234.6", "–", "∞"]
    assert [p_text(value) for value in (0.0, 0.0009, 0.0434, 1.0, None)] == [
        "< 0.001",
        "< 0.001",
        "0.043",
        "1.000",
        "–",
    ]
    assert [duration(value) for value in (3.21, 95, 812, 9000)] == ["3.2 s", "95 s", "14 min", "2 h 30 min"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("results", [FULL, harsh()], ids=["full", "harsh"])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path, results, width):
    write(tmp_path, results)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="page" src="report.html" style="border:0;width:{width}px;height:900px" onload="'
        "document.title = 'wide ' + document.getElementById('page').contentDocument.documentElement.scrollWidth"
        '"></iframe>'
    )
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", frame.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r"<title>wide (\d+)</title>", shown.stdout)
    assert found, shown.stdout + shown.stderr
    assert int(found[1]) <= width
