"""The commands that take a run: chat, eval, export, serve."""

from __future__ import annotations

import pathlib
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from nybble.cli.app import Folder, app, cache_folder, silence_libraries
from nybble.cli.extras import make_converter, make_harness
from nybble.errors import ServeError
from nybble.installed import install_extra
from nybble.terminal import tell

Target = Literal["adapter", "merged", "gguf"]
MergeBase = Literal["auto", "original", "dequantised"]
MIN_TEMPERATURE = 1e-5  # logits divided by less would overflow; only the likeliest token would be left anyway
WeightType = Literal["auto", "bfloat16", "float16"]


@app.command()
def chat(
    context: typer.Context,
    run: Folder,
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and exit.")] = None,
    system: Annotated[
        str | None, typer.Option(help="System message; default: that of the training rows; '' for none.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answers too.")] = False,
    base: Annotated[str | None, typer.Option(help="New location of the base model, if it moved.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = None,
) -> None:
    """Talk to a run; it answers in the template it was trained with."""
    from nybble.files.paths import check_cache
    from nybble.run.folder import open_run

    opened, cache = open_run(run, base), cache_folder(context)
    check_cache(cache)
    silence_libraries()
    from nybble.chat.answerer import Sampling
    from nybble.chat.loading import load_answerer
    from nybble.chat.terminal import answer_once, opening, sides, talk
    from nybble.data.rows.formats import Message

    console = Console()
    with console.status("loading"):
        answerer = load_answerer(opened, cache, device=device, dequantise=True)
    odd = answerer.updates.is_odd
    if prompt is None or odd:  # with --prompt, which scripts use, only what is odd is reported
        output = console if prompt is None else Console(stderr=True)
        tell(output, f"adapter   {answerer.updates}", "yellow" if odd else "dim")
    sampling = Sampling(max_new_tokens, temperature if temperature >= MIN_TEMPERATURE else 0.0, top_p, seed)
    if prompt is None:
        talk(answerer, sampling, console, system=system, compare=compare)
        return
    messages = (*opening(answerer, system), Message("user", prompt))
    answer_once(answerer, dict.fromkeys(sides(compare), messages), sampling, console, Console(stderr=True))


@app.command("eval")
def evaluate(
    context: typer.Context,
    run: Folder,
    tasks: Annotated[
        str, typer.Option(help="lm-eval benchmarks, comma-separated; or none.")
    ] = "hellaswag,arc_easy,arc_challenge,piqa,winogrande",
    limit: Annotated[int, typer.Option(min=0, help="Items per benchmark; 0 for all.")] = 200,
    data_dir: Annotated[
        pathlib.Path | None, typer.Option(help="Folder with the benchmarks' rows, TASK.SPLIT.jsonl; default: the Hub.")
    ] = None,
    text: Annotated[
        list[pathlib.Path] | None, typer.Option(help="Text file to measure perplexity on; repeatable.")
    ] = None,
    answers: Annotated[int, typer.Option(min=0, help="Held-out prompts to answer and score.")] = 50,
    data: Annotated[
        list[str] | None,
        typer.Option(help="New location of the run's data, if it moved: each source, then the validation file."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="New location of the base model, if it moved.")] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="What must be shown, such as 'arc_easy>=base-0.02'; exit status 1 if missed, 3 if not shown."
        ),
    ] = None,
) -> None:
    """Compare base and tuned model: benchmarks, held-out loss, answers. Writes RUN/report.html."""
    from nybble.files.outputs import check_report
    from nybble.files.paths import check_cache
    from nybble.run.folder import open_run

    opened, cache = open_run(run, base), cache_folder(context)
    check_report(opened.folder)
    check_cache(cache)
    names = [] if tasks == "none" else list(dict.fromkeys(name for name in tasks.split(",") if name))
    from nybble.data.rows.formats import TARGETS
    from nybble.evaluate.gate import judge, parse_requirements, tell_judgements
    from nybble.evaluate.texts import read_texts

    pairs = TARGETS[opened.recipe.train.objective] == "pairs"
    requirements = parse_requirements(require or (), names, answers, pairs=pairs)
    read_texts(text or ())  # a fault in one is reported before torch is loaded
    silence_libraries()
    harness = make_harness(names, data_dir, limit or None) if names else None
    from nybble.evaluate.console import tell_results
    from nybble.evaluate.evaluation import Measures
    from nybble.evaluate.evaluation import evaluate as run_evaluation
    from nybble.evaluate.rows import with_rows
    from nybble.training.trackers import log_evaluation

    console = Console()
    opened = with_rows(opened, data) if data else opened
    results = run_evaluation(opened, Measures(names, text or (), answers), harness, console, cache)
    tell_results(results, opened.folder, console)
    if notice := log_evaluation(opened.recipe.tracker, opened.folder, results):
        tell(console, Text(notice, "dim"), hang=2)
    if status := tell_judgements([judge(each, results) for each in requirements], console):
        raise typer.Exit(status)


@app.command()
def export(
    context: typer.Context,
    run: Folder,
    to: Annotated[Target, typer.Option(help="adapter (PEFT), merged (a Transformers folder) or gguf (llama.cpp).")],
    out: Annotated[pathlib.Path | None, typer.Option(help="Output folder; default: RUN/export/TO.")] = None,
    push: Annotated[str | None, typer.Option(help="Also upload it to this Hub repository, as private.")] = None,
    merge_base: Annotated[
        MergeBase, typer.Option(help="Base to merge into; auto takes the one closer to the run.")
    ] = "auto",
    dtype: Annotated[
        WeightType, typer.Option(help="Type of merged weights; auto is the base's own 16-bit type.")
    ] = "auto",
    quant: Annotated[
        str, typer.Option(help="GGUF types, comma-separated: F16, Q8_0, Q4_0, Q4_K_M and other K-quants.")
    ] = "Q8_0",
    base: Annotated[str | None, typer.Option(help="New location of the base model, if it moved.")] = None,
) -> None:
    """Export a model, verified to answer like the run. Writes RUN/export/TO."""
    from nybble.files.outputs import check_export
    from nybble.files.paths import check_cache
    from nybble.run.folder import open_run

    opened, cache = open_run(run, base), cache_folder(context)
    check_export(out or run / "export" / to)
    check_cache(cache)
    quants = list(dict.fromkeys(name.upper() for name in quant.split(",") if name))
    silence_libraries()
    converter = make_converter() if to == "gguf" else None
    from nybble.export.export import ExportRequest
    from nybble.export.export import export as make_export
    from nybble.export.precheck import check_quants

    if to == "gguf":
        check_quants(quants)
    make_export(opened, ExportRequest(to, out, merge_base, dtype, quants, push), Console(), cache, converter=converter)


@app.command()
def serve(
    context: typer.Context,
    runs: Annotated[
        list[pathlib.Path], typer.Argument(metavar="RUN [RUN2 ...]", help="Run folders that share a base.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; a non-local one needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="API key that requests must send; other users of this machine can see it here.")
    ] = None,
    api_key_file: Annotated[
        pathlib.Path | None, typer.Option(help="File whose first line is the API key; - is standard input.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web page whose scripts may use the server (CORS), e.g. https://app.example; repeatable."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name accepted without a key, besides localhost; repeatable.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="auto (decoder where it can, else pipeline), decoder, pipeline, continuous (one merged run) or vllm."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    kv_cache: Annotated[
        str,
        typer.Option(help="Keys and values of the decoder: bf16, or fp8 (on a GPU), which holds twice as many tokens."),
    ] = "bf16",
    base: Annotated[str | None, typer.Option(help="New location of the base model, if it moved.")] = None,
    queue: Annotated[
        int, typer.Option(min=16, help="Answers that may wait; beyond that, requests get status 429.")
    ] = 128,
    timeout: Annotated[float, typer.Option(min=1, help="Time limit per request, in seconds.")] = 600,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers to the log.")] = False,
) -> None:
    """Serve runs on an OpenAI-compatible API, with a chat page: http://127.0.0.1:8000/."""
    from nybble.files.paths import check_cache
    from nybble.run.folder import open_run

    if kv_cache not in ("bf16", "fp8"):
        raise ServeError(f"there is no cache in {kv_cache}", fix="--kv-cache bf16, or --kv-cache fp8")
    opened, cache = [open_run(run, base) for run in runs], cache_folder(context)
    check_cache(cache)
    silence_libraries()
    try:
        from nybble.serve.app import Limits
        from nybble.serve.guard import make_access_rules
        from nybble.serve.server import Address, read_key
        from nybble.serve.server import serve as start_server
    except ModuleNotFoundError as error:
        raise ServeError(
            f"the server needs packages that are not installed ({error})", fix=install_extra("serve")
        ) from error
    access = make_access_rules(read_key(api_key, api_key_file), allow_origin or (), allow_host or ())
    address, limits = Address(host, port, access), Limits(timeout, log_prompts, queue)
    if engine == "vllm":
        from nybble.serve.vllm import serve_with_vllm

        serve_with_vllm(opened, address, device=device, limits=limits)
        return
    try:
        start_server(
            opened, address, Console(), engine=engine, device=device, limits=limits, cache=cache,
            fp8_cache=kv_cache == "fp8", prepare="nybble.cli.app:silence_libraries",
        )  # fmt: skip
    except KeyboardInterrupt:  # uvicorn raises it again once everything has finished
        return
