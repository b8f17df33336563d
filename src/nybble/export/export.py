"""From a run to an artefact in numbered steps. An artefact that does not answer like the run is not kept."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from nybble.chat.loading import load_answerer
from nybble.data.text.template import Template
from nybble.evaluate.console import progress_bar
from nybble.evaluate.rows import rows_of
from nybble.export.artefacts import Contents, generation_settings
from nybble.export.card import Subject, write_card
from nybble.export.console import tell_checks, tell_comparison, tell_notices
from nybble.export.finished_run import FinishedRun, merges_of, open_finished_run
from nybble.export.gguf.quants import QUANTS, GgufConverter
from nybble.export.licence import find_licence, hub_id
from nybble.export.merge.merge import Merge
from nybble.export.merge.updates import read_updates
from nybble.export.parity.compare import ROWS, Comparison, compare
from nybble.export.parity.reference import Reference, ask_run
from nybble.export.parity.report import refuse_failed
from nybble.export.publish import check_push, push
from nybble.export.records import parity_record, write_parity
from nybble.export.targets import AdapterTarget, GgufTarget, MergedTarget, Target
from nybble.files.atomic import new_folder, no_empty_folders
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.outputs import PARITY_REPORT, check_export
from nybble.files.paths import check_cache, check_free_space, default_cache
from nybble.files.writing import write_text
from nybble.model.adapter.lora import check_stored
from nybble.plan.file_bytes import export_bytes
from nybble.plan.shapes import ModelShape
from nybble.run.folder import Run
from nybble.terminal import bytes_text, tell


@dataclass(frozen=True)
class ExportRequest:
    """Which artefact to make.

    Attributes:
        to: adapter, merged or gguf.
        out: the folder; None for RUN/export/TO.
        merge_base: auto, original or dequantised.
        dtype: the type of merged weights: auto, bfloat16 or float16.
        quants: GGUF types.
        repo: the Hub repository to push to.
    """

    to: str
    out: pathlib.Path | None = None
    merge_base: str = "auto"
    dtype: str = "auto"
    quants: Sequence[str] = QUANTS
    repo: str | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured on the run before its model was freed."""

    reference: Reference
    comparison: Comparison | None
    tokenizer: PreTrainedTokenizerBase
    template: Template


def export(
    run: Run,
    request: ExportRequest,
    console: Console,
    cache: pathlib.Path | None = None,
    converter: GgufConverter | None = None,
) -> pathlib.Path:
    """Make an artefact of a run, compare it with the run, and move it to its final location; returns its folder.

    Args:
        run: a finished run, or an adapter folder.
        request: which artefact.
        console: progress and results.
        cache: folder of quantised bases, tokenised data and digests; None for the user's default cache.
        converter: writes GGUF; None if none is requested.

    Raises:
        NybbleError: something is wrong with run, base, disk or Hub, or the artefact differs; no partial artefact is left behind.
    """
    target, cache = request.out or run.folder / "export" / request.to, cache or default_cache()
    check_export(target)
    check_cache(cache)
    if request.repo is not None:
        check_push(request.repo)
    with explained_disk_errors(target, cache), no_empty_folders(target):
        try:
            with new_folder(target) as folder:  # created first, so that another process that writes there is refused
                _export(run, request, target, folder, console, cache, converter)
        except FileExistsError:
            check_export(target)  # another process was faster
            raise
    _failure_report(target).unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    tell(console, f"done      {target}, {bytes_text(size)}; its README.md says how to load it")
    # 5. To the Hub.
    if request.repo is not None:
        with console.status(f"uploading to {request.repo}"):
            # The parity report shows validation rows, which are the user's own.
            page = push(target, request.repo, withheld=PARITY_REPORT)
        tell(console, f"pushed    {page}")
    return target


def _export(
    run: Run, request: ExportRequest, target: pathlib.Path, folder: pathlib.Path, console: Console, cache: pathlib.Path,
    converter: GgufConverter | None,
) -> None:  # fmt: skip
    # 1. Run and base.
    source = open_finished_run(run, request.dtype, cache)
    tell_notices(source.notices, console)
    adapter = sum(file.stat().st_size for file in source.run.adapter.glob("adapter_*"))
    parameters = ModelShape.from_config(source.config.to_dict()).parameters.total
    size = export_bytes(request.to, parameters, request.quants, adapter)
    check_free_space(target, size, str(target), "free some space, or --out FOLDER on another disk")
    # 2. The run's answers, and how far each merge would be from them; then the run's model is freed.
    measured, merges = _measure(source, request, console, cache, converter)
    base = _choose(measured, merges, request, console)
    # 3. The artefact, in a temporary folder.
    licence = find_licence(source.checkpoint)
    generation, notice = generation_settings(source.checkpoint.folder, measured.tokenizer, measured.template)
    tell_notices([notice] if notice else [], console)
    contents = Contents(source.run, source.config, measured.tokenizer, measured.template, generation, licence)
    artefact = _artefact(source, request, merges, base, converter)
    artefact.write(folder, contents, console)
    # 4. Its answers in the program that its users run; the caller moves it to its final location.
    with console.status("checking the artefact against the run"):
        verdicts = artefact.check(folder, measured.reference, contents)
    parity = parity_record(base, measured.comparison, verdicts)
    tell_checks(parity.checks, console)
    if parity.failed:
        write_parity(_failure_report(target), parity)
    refuse_failed(parity, str(target), _failure_report(target))
    write_parity(folder / PARITY_REPORT, parity)
    subject = Subject(
        source.run,
        request.to,
        *artefact.describe(),
        base,
        hub_id(source.checkpoint),
        licence,
        measured.comparison,
        parity.checks,
    )
    write_text(folder / "README.md", write_card(subject))


def _failure_report(target: pathlib.Path) -> pathlib.Path:
    """The path of the report on an artefact that does not answer like the run."""
    return target.with_name(f"{target.name}.failed.json")


def _measure(
    source: FinishedRun, request: ExportRequest, console: Console, cache: pathlib.Path, converter: GgufConverter | None
) -> tuple[Measured, dict[str, Merge]]:
    """Get the run's answers, and compare each base with the run; the live model is freed on return."""
    is_adapter = request.to == "adapter"
    updates = {} if is_adapter else read_updates(source.run.adapter)
    if is_adapter:
        check_stored(source.run.adapter)
    _free_memory()
    with console.status("loading the run"):
        answerer = load_answerer(source.run, cache)
    tell(console, f"adapter   {answerer.updates}", "yellow" if answerer.updates.is_odd else "")
    if converter is not None:
        converter.check(source.config, answerer.tokenizer)
    merges: dict[str, Merge] = {}
    if not is_adapter:
        merges, notice = merges_of(source, updates, request.merge_base, cache)
        tell_notices([notice] if notice else [], console)
    validation = None
    if not source.run.is_bare_adapter:
        with console.status("reading the run's data"):
            prepared, why = rows_of(source.run, answerer.tokenizer, cache)
        tell_notices([why] if why else [], console)
        validation = prepared.validation if prepared is not None else None
    with console.status("the run answers"):
        reference = ask_run(answerer, validation, merges)
    comparison = None
    if merges:
        samples, what = _compared_rows(validation, reference)
        with progress_bar(console, "comparing bases", len(samples)) as show:
            comparison = compare(answerer, merges, samples, what, show)
    return Measured(reference, comparison, answerer.tokenizer, answerer.template), merges


def _compared_rows(validation: Dataset | None, reference: Reference) -> tuple[list[dict[str, Any]], str]:
    """Validation rows, or, if there are none, the prompts with the run's answers."""
    if validation is not None:
        rows = validation.select(range(min(ROWS, len(validation))))
        return [{"input_ids": row["input_ids"], "trained": row["trained"]} for row in rows], "validation rows"
    return reference.samples, "of its own answers, as it has no validation rows"


def _free_memory() -> None:
    """Free what an earlier training, export or model left on the GPU: a Trainer is in a cycle of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _choose(measured: Measured, merges: Mapping[str, Merge], request: ExportRequest, console: Console) -> str | None:
    """The requested base, or the closest one; None for an adapter."""
    _free_memory()
    if measured.comparison is None:
        return None
    base = request.merge_base if request.merge_base in merges else measured.comparison.closest
    tell_comparison(measured.comparison, base, console)
    return base


def _artefact(
    source: FinishedRun,
    request: ExportRequest,
    merges: Mapping[str, Merge],
    base: str | None,
    converter: GgufConverter | None,
) -> Target:
    if base is None:
        return AdapterTarget(source)
    if request.to == "merged":
        return MergedTarget(source, merges[base], base)
    assert converter is not None, "GGUF was requested without a converter"
    return GgufTarget(source, merges[base], base, request.quants, converter)
