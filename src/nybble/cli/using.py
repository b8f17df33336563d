"""Commands that take a run: chat, eval, export, serve."""

from __future__ import annotations

import pathlib
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from nybble.cli.app import Folder, app, cache_folder, quiet
from nybble.cli.extras import make_converter, make_harness
from nybble.errors import ServeError
from nybble.installed import install_extra
from nybble.terminal import tell

Target = Literal["adapter", "merged", "gguf"]
MergeBase = Literal["auto", "original", "dequantised"]
Stored = Literal["auto", "bfloat16", "float16"]


@app.command()
def chat(
    context: typer.Context,
    run: Folder,
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and stop.")] = None,
    system: Annotated[
        str | None, typer.Option(help="System message; by default the training rows', '' for none.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the base model's answer beside the tuned one's.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
) -> None:
    """Talk to a run; it answers in the template it was trained with."""
    from nybble.places import check_cache
    from nybble.run import open_run

    opened, cache = open_run(run, base), cache_folder(context)
    check_cache(cache)
    quiet()
    from nybble.data.formats import Message
    from nybble.inference.chat import answer_once, opening, speakers, talk
    from nybble.inference.pipeline import Sampling, load_answerer

    console = Console()
    with console.status("loading"):
        answerer = load_answerer(opened, cache, device=device, dequantise=True)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if prompt is None:
        talk(answerer, sampling, console, system=system, compare=compare)
        return
    asked = (*opening(answerer, system), Message("user", prompt))
    answer_once(answerer, dict.fromkeys(speakers(compare), asked), sampling, console, Console(stderr=True))


@app.command("eval")
def evaluate(
    context: typer.Context,
    run: Folder,
    tasks: Annotated[
        str, typer.Option(help="Benchmarks by lm-eval's names, with commas between them; none goes without.")
    ] = "hellaswag,arc_easy,arc_challenge,piqa,winogrande",
    limit: Annotated[int, typer.Option(min=0, help="Items a benchmark; 0 for all.")] = 200,
    data_dir: Annotated[
        pathlib.Path | None, typer.Option(help="Folder with the benchmarks' rows, TASK.SPLIT.jsonl; else the Hub.")
    ] = None,
    text: Annotated[list[pathlib.Path] | None, typer.Option(help="A text whose perplexity is measured.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="Held-out prompts to answer and score.")] = 50,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the run's rows are now, if they moved: each of its sources, then its validation file."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
) -> None:
    """Did it get better? Base against tuned: benchmarks, held-out loss, answers; a report in RUN/report.html."""
    from nybble.places import check_cache, check_report
    from nybble.run import open_run

    opened, cache = open_run(run, base), cache_folder(context)
    check_report(opened.folder)
    check_cache(cache)
    names = [] if tasks == "none" else list(dict.fromkeys(name for name in tasks.split(",") if name))
    from nybble.evaluate.texts import read_texts

    read_texts(text or ())  # what is wrong with one is said before torch is loaded
    quiet()
    harness = make_harness(names, data_dir, limit or None) if names else None
    from nybble.evaluate.evaluation import Asked
    from nybble.evaluate.evaluation import evaluate as measure
    from nybble.evaluate.rows import with_rows
    from nybble.evaluate.tell import tell_results
    from nybble.trackers import log_evaluation

    console = Console()
    opened = with_rows(opened, data) if data else opened
    results = measure(opened, Asked(names, text or (), answers), harness, console, cache)
    tell_results(results, opened.folder, console)
    if notice := log_evaluation(opened.recipe.tracker, opened.folder, results):
        tell(console, Text(notice, "dim"), hang=2)


@app.command()
def export(
    context: typer.Context,
    run: Folder,
    to: Annotated[Target, typer.Option(help="adapter (PEFT), merged (a Transformers folder) or gguf (llama.cpp).")],
    out: Annotated[pathlib.Path | None, typer.Option(help="Where to; without it, RUN/export/TO.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to this repository of the Hub, private.")] = None,
    merge_base: Annotated[
        MergeBase, typer.Option(help="What the adapter is added to; auto takes what is closer to the run.")
    ] = "auto",
    dtype: Annotated[Stored, typer.Option(help="Of merged weights; auto is the base's own 16-bit type.")] = "auto",
    quant: Annotated[str, typer.Option(help="GGUF types, with commas: F16, Q8_0, Q4_0, Q4_K_M and its kin.")] = "Q8_0",
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
) -> None:
    """Make an artefact that answers like the run, checked in the program that loads it. Gives RUN/export/TO."""
    from nybble.places import check_cache, check_export
    from nybble.run import open_run

    opened, cache = open_run(run, base), cache_folder(context)
    check_export(out or run / "export" / to)
    check_cache(cache)
    quants = list(dict.fromkeys(name.upper() for name in quant.split(",") if name))
    quiet()
    converter = make_converter() if to == "gguf" else None
    from nybble.export.export import Wanted
    from nybble.export.export import export as make
    from nybble.export.preflight import check_quants

    if to == "gguf":
        check_quants(quants)
    make(opened, Wanted(to, out, merge_base, dtype, quants, push), Console(), cache, converter=converter)


@app.command()
def serve(
    context: typer.Context,
    runs: Annotated[list[pathlib.Path], typer.Argument(metavar="RUN [RUN2 ...]", help="Run folders of one base.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Key that requests must bring; other users of this machine can read it here.")
    ] = None,
    api_key_file: Annotated[
        pathlib.Path | None, typer.Option(help="File with the key in its first line; - is standard input.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web page whose scripts may use the server (CORS), e.g. https://app.example; repeatable."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name to answer to without a key, besides localhost; repeatable.")
    ] = None,
    engine: Annotated[str, typer.Option(help="pipeline, continuous (one merged run) or vllm.")] = "pipeline",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    queue: Annotated[int, typer.Option(min=16, help="Answers that may wait; more are sent away with 429.")] = 128,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one request may take.")] = 600,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers to the log.")] = False,
) -> None:
    """Answer on an OpenAI-compatible API, with a small page: http://127.0.0.1:8000/."""
    from nybble.places import check_cache
    from nybble.run import open_run

    opened, cache = [open_run(run, base) for run in runs], cache_folder(context)
    check_cache(cache)
    quiet()
    try:
        from nybble.serve.app import Limits
        from nybble.serve.guard import make_door
        from nybble.serve.server import Place, read_key
        from nybble.serve.server import serve as listen
    except ModuleNotFoundError as error:
        raise ServeError(
            f"the server needs packages that are not installed ({error})", fix=install_extra("serve")
        ) from error
    door = make_door(read_key(api_key, api_key_file), allow_origin or (), allow_host or ())
    place, limits = Place(host, port, door), Limits(timeout, log_prompts, queue)
    try:
        listen(opened, place, Console(), engine=engine, device=device, limits=limits, cache=cache)
    except KeyboardInterrupt:  # uvicorn raises it again once everything has finished
        return
