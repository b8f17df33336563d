"""Loads runs into an engine: models with their names, and the generator that answers for them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from nybble.chat.answerer import Answerer
from nybble.chat.loading import load_answerers
from nybble.chat.templates import load_template
from nybble.errors import ServeError
from nybble.files.paths import default_cache
from nybble.generate.constraint import Constrain
from nybble.generate.continuous import Continuous
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.padded import PATIENCE, Padded
from nybble.generate.request import Observer
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.model.device import choose_device, choose_dtype
from nybble.recipe import ModelOptions
from nybble.run.folder import Run
from nybble.serve.engine import Engine, ServedModel
from nybble.serve.grammar import make_constrain
from nybble.serve.names import base_name, merged_folder, run_names
from nybble.serve.threaded import InThread
from nybble.weights.watched import Ineligible


def load_named(
    observer: Observer, *, engine: str, runs: Sequence[Run], device: str, queue: int, cache: pathlib.Path | None,
    fp8_cache: bool,
) -> Engine:  # fmt: skip
    """Load runs into the engine of that name: auto, pipeline, decoder or continuous. Raises what its own loader does.

    Raises:
        ServeError: the cache is to be in fp8, and the engine is not the decoder.
    """
    if fp8_cache:
        if engine not in ("auto", "decoder"):
            raise ServeError(f"the engine {engine} has no cache in fp8", fix="--engine decoder, or --kv-cache bf16")
        return load_decoder(runs, observer, device=device, queue=queue, cache=cache, fp8_cache=True)
    load = {"auto": load_auto, "pipeline": load_pipeline, "decoder": load_decoder, "continuous": load_continuous}[
        engine
    ]
    return load(runs, observer, device=device, queue=queue, cache=cache)


def load_auto(
    runs: Sequence[Run], observer: Observer, *, device: str, queue: int, cache: pathlib.Path | None = None
) -> Engine:
    """Load the runs' base with an adapter for each into the decoder, or into the pipeline if the decoder cannot compute them.

    Raises:
        RunError, ModelError: as `load_pipeline`.
    """
    answerers, base = _load_answerers(runs, device, cache)
    try:
        return decoder_engine(answerers, base, observer, queue=queue, cache=cache)
    except Ineligible as why:
        engine = pipeline_engine(answerers, base, observer, queue=queue)
        return replace(engine, about=f"{engine.about} (the faster decoder cannot compute this model: {why})")


def load_pipeline(
    runs: Sequence[Run], observer: Observer, *, device: str, queue: int, cache: pathlib.Path | None = None
) -> Engine:
    """Load the runs' base with an adapter for each.

    Raises:
        RunError: two runs have the same name, or different bases.
        ModelError: the base is gone, or does not fit the adapters.
    """
    answerers, base = _load_answerers(runs, device, cache)
    return pipeline_engine(answerers, base, observer, queue=queue)


def pipeline_engine(answerers: dict[str, Answerer], base: str, observer: Observer, *, queue: int) -> Engine:
    """Several runs of one base, and the base itself, which is in memory once, in padded batches.

    Args:
        answerers: by their names in the API; all share one model.
        base: the base's name in the API.
        observer: is notified of the generator's load.
        queue: how many answers may wait.
    """
    first = next(iter(answerers.values()))
    padded = Padded(
        first.model, first.tokenizer.pad_token_id, queue=queue, patience=PATIENCE, constrain=_constrain(answerers),
        observer=observer,
    )  # fmt: skip
    together = "share batches" if padded.scheduler.mixes_adapters else "take turns"
    about = (
        "the Transformers pipeline; requests are batched, "
        f"and different models ({', '.join([*answerers, base])}) {together}"
    )
    models = _served_models(answerers, base, padded.positions, padded.vocabulary)
    return Engine("pipeline", about, models, _changes(answerers), queue, InThread(padded), first.folder)


def load_decoder(
    runs: Sequence[Run], observer: Observer, *, device: str, queue: int, cache: pathlib.Path | None = None,
    fp8_cache: bool = False,
) -> Engine:  # fmt: skip
    """Load the runs' base with an adapter for each, for nybble's own decoder.

    Raises:
        ServeError: the decoder cannot compute this model.
        RunError, ModelError: as `load_pipeline`.
    """
    answerers, base = _load_answerers(runs, device, cache)
    try:
        return decoder_engine(answerers, base, observer, queue=queue, cache=cache, fp8_cache=fp8_cache)
    except Ineligible as why:
        fix = "--kv-cache bf16" if fp8_cache else "--engine pipeline"
        raise ServeError(f"the decoder cannot compute this model: {why}", fix=fix) from None


def decoder_engine(
    answerers: dict[str, Answerer], base: str, observer: Observer, *, queue: int, cache: pathlib.Path | None = None,
    fp8_cache: bool = False,
) -> Engine:  # fmt: skip
    """As `pipeline_engine`, with nybble's own decoder.

    Raises:
        Ineligible: the decoder cannot compute this model.
    """
    first = next(iter(answerers.values()))
    constrain = _constrain(answerers)
    decoder = make_decoder(
        first.model, queue=queue, observer=observer, cache=cache, constrain=constrain, fp8_cache=fp8_cache
    )
    decoder.steps.warm_up()
    about = (
        f"nybble's own loop in {decoder.steps.about}; requests join and leave at every token, whichever model they name; "
        f"the cache holds {decoder.steps.tokens:,} tokens{' in fp8' if fp8_cache else ''}"
    )
    models = _served_models(answerers, base, decoder.positions, decoder.vocabulary)
    return Engine("decoder", about, models, _changes(answerers), queue, InThread(decoder), first.folder)


def _load_answerers(runs: Sequence[Run], device: str, cache: pathlib.Path | None) -> tuple[dict[str, Answerer], str]:
    """The runs by their names in the API, and their base's name."""
    names = run_names(runs)
    answerers = dict(zip(names, load_answerers(runs, cache, device, dequantise=True), strict=True))
    return answerers, base_name(runs[0], names)


def _served_models(
    answerers: dict[str, Answerer], base: str, positions: int, vocabulary: int
) -> dict[str, ServedModel]:
    """The runs and their base, by the names that requests choose them by."""
    first = next(iter(answerers.values()))
    models = {
        name: ServedModel(name, own.template, positions, base, vocabulary, own.adapter, own.system)
        for name, own in answerers.items()
    }
    return models | {base: ServedModel(base, first.template, positions, None, vocabulary)}


def _constrain(answerers: dict[str, Answerer]) -> Constrain | None:
    """What makes the generator follow grammars, in the tokens of each adapter; the base has those of the first."""
    first = next(iter(answerers.values()))
    tokenizers: dict[str | None, PreTrainedTokenizerBase] = {None: first.tokenizer}
    tokenizers |= {own.adapter: own.tokenizer for own in answerers.values()}
    return make_constrain(tokenizers, first.model.config.vocab_size)


def _changes(answerers: dict[str, Answerer]) -> dict[str, str]:
    return {name: str(own.updates) for name, own in answerers.items()}


def load_continuous(
    runs: Sequence[Run], observer: Observer, *, device: str, queue: int, cache: pathlib.Path | None = None
) -> Engine:
    """Load a merged run.

    Raises:
        ServeError: there are several runs, or the run was not merged.
    """
    if len(runs) > 1:
        raise ServeError(
            "the engine continuous serves one merged run; several adapters on one base need another",
            fix=f"nybble serve {runs[0].folder} --engine continuous, or several runs with --engine auto",
        )
    run = runs[0]
    folder = merged_folder(run, "continuous")
    torch_device = choose_device(device if device != "auto" else run.recipe.model.device)
    dtype, _ = choose_dtype(run.recipe.model.dtype, torch_device)
    base = load_base(
        find_checkpoint(str(folder)), ModelOptions(quantization="none"), dtype, torch_device, cache or default_cache()
    )
    tokenizer, template = load_template(run, folder)
    generator = Continuous(base.model.eval(), tokenizer.pad_token_id, queue=queue, observer=observer)
    name = run.folder.resolve().name
    model = ServedModel(name, template, generator.positions, None, generator.vocabulary, system=run.system)
    about = "Transformers' continuous batching on the merged run; each request joins the running batch"
    return Engine("continuous", about, {name: model}, {}, queue, InThread(generator), folder)
