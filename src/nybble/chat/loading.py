"""From runs to models that answer."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence

from nybble.chat.answerer import Answerer
from nybble.chat.templates import load_template
from nybble.errors import RunError
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.paths import check_cache, default_cache
from nybble.model.adapter.lora import add_adapter, load_adapter
from nybble.model.adapter.updates import updates_of
from nybble.model.base.bits import trained_base
from nybble.model.base.cached import check_unchanged
from nybble.model.base.checkpoint import find_base, fingerprint
from nybble.model.base.load import load_base
from nybble.model.device import choose_device, choose_dtype
from nybble.run.folder import Run, open_run, refuse_unfinished
from nybble.weights.on_cpu import dequantise_if_it_fits

logger = logging.getLogger(__name__)


def load_answerer(
    run: Run | str | pathlib.Path, cache: pathlib.Path | None = None, device: str = "auto", *, dequantise: bool = False
) -> Answerer:
    """Load a run to answer with: the base as in training, with the run's adapter, tokenizer and template.

    Args:
        run: the run, or the path of its folder.
        cache: where quantised bases are cached; None for the user's own cache.
        device: auto, cuda or cpu.
        dequantise: on a CPU with enough memory, keep the base's weights dequantised: the same answers, sooner.

    Raises:
        RunError: there is no run.
        ModelError: the base is gone, does not fit the adapter, or is not the one that the run was trained on;
            `open_run(path, base)` sets another path.
    """
    (answerer,) = load_answerers([run if isinstance(run, Run) else open_run(run)], cache, device, dequantise=dequantise)
    return answerer


def load_answerers(
    runs: Sequence[Run], cache: pathlib.Path | None = None, device: str = "auto", *, dequantise: bool = False
) -> list[Answerer]:
    """Load several runs of one base, which is in memory once; each answers with its own adapter. Arguments as `load_answerer`.

    Raises:
        ModelError: as `load_answerer`.
        RunError: the runs have different bases, or the training of one has not ended.
    """
    for run in runs:
        if not run.adapter.exists():  # a damaged adapter is reported when it is read
            refuse_unfinished(run)
    options, cache = runs[0].recipe.model, cache or default_cache()
    check_cache(cache)
    torch_device = choose_device(device if device != "auto" else options.device)
    dtype, _ = choose_dtype(options.dtype, torch_device)
    checkpoint = find_base(runs[0])
    with explained_disk_errors(cache):
        check_one_base(runs, cache)
        base = load_base(checkpoint, options, dtype, torch_device, cache, trained_base(runs[0]))
    notices = list(base.notices)
    for run in runs[1:]:
        if base.bits is not None:
            notices += check_unchanged(base.bits, base.fingerprint, trained_base(run), run.folder)
    for notice in dict.fromkeys(notices):
        logger.warning("%s", notice)
    names = ["default", *(f"run{number}" for number in range(2, len(runs) + 1))]  # PEFT allows no dots in a name
    model = load_adapter(base.model, runs[0].adapter)
    for run, name in zip(runs[1:], names[1:], strict=True):
        add_adapter(model, run.adapter, name)
    updates = [updates_of(model, name, run.adapter) for run, name in zip(runs, names, strict=True)]
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # saved in float32; training computed with this type
            parameter.data = parameter.data.to(dtype)
    model.eval()
    if dequantise:
        dequantise_if_it_fits(model)
    answerers = []
    for run, name, changes in zip(runs, names, updates, strict=True):
        tokenizer, template = load_template(run, checkpoint.folder)
        answerers.append(Answerer(
            model, tokenizer, template, base.fingerprint, checkpoint.folder, changes, name, run.system, base.bits, cache,
        ))  # fmt: skip
    return answerers


def check_one_base(runs: Sequence[Run], cache: pathlib.Path | None = None) -> None:
    """Refuse runs whose bases differ in their weights or in how they are quantised.

    Raises:
        RunError: it names the base of each.
    """
    by_base: dict[tuple[object, ...], list[str]] = {}
    for run in runs:
        options = run.recipe.model
        digest = fingerprint(find_base(run), cache or default_cache())
        base = (digest, options.quantization, options.double_quantization, options.dtype, repr(options.rope_scaling))
        by_base.setdefault(base, []).append(f"{run.folder} on {options.path} ({options.quantization}, {options.dtype})")
    if len(by_base) > 1:
        listed = "\n".join(f"  - {line}" for lines in by_base.values() for line in lines)
        raise RunError(
            f"the runs have {len(by_base)} different bases, but a server loads only one:\n{listed}",
            fix="start one server per base, each on its own --port",
        )
