"""From a run to an artefact, as numbered steps; what does not answer like the run is not kept."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.data.template import Template
from nybble.errors import ExportError
from nybble.evaluate.rows import rows_of
from nybble.evaluate.tell import progress_bar
from nybble.export.artefacts import Contents, generation_settings, write_adapter, write_gguf_words, write_merged
from nybble.export.card import Subject, write_card
from nybble.export.compare import ROWS, Comparison, compare
from nybble.export.gate import REPORT, check_adapter, check_gguf, check_merged, refuse_failed, write_report
from nybble.export.licence import find_licence, hub_id
from nybble.export.loading import adapter_lines, gguf_beside, gguf_lines, merged_lines
from nybble.export.merge import Merge, Model
from nybble.export.parity import QUESTIONS, Reference, Verdict, ask_run
from nybble.export.publish import check_push, push
from nybble.export.room import check_disk, needed
from nybble.export.shards import Tensors
from nybble.export.source import Source, merges_of, open_source
from nybble.export.tell import tell_comparison, tell_verdicts
from nybble.export.updates import read_updates
from nybble.inference.pipeline import load_answerer
from nybble.run import CACHE, Run, write_text


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        to: adapter, merged or gguf.
        out: the folder; None is RUN/export/TO.
        merge_base: auto, original or dequantised.
        dtype: of merged weights: auto, bfloat16 or float16.
        quants: GGUF types.
        repo: on the Hub, to push to.
    """

    to: str
    out: pathlib.Path | None = None
    merge_base: str = "auto"
    dtype: str = "auto"
    quants: Sequence[str] = ("Q8_0",)
    repo: str | None = None


class Converter(Protocol):
    """What writes GGUF files: `nybble.export.gguf.Converter`, where the gguf package is installed."""

    def check(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that could not be written."""

    def write(self, file: pathlib.Path, model: Any, quant: str, done: Callable[[int], None]) -> None:
        """Write one file."""


@dataclass(frozen=True)
class Measured:
    """What the run said before it was put away."""

    reference: Reference
    comparison: Comparison | None
    tokenizer: PreTrainedTokenizerBase
    template: Template


def export(
    run: Run, wanted: Wanted, console: Console, cache: pathlib.Path = CACHE, converter: Converter | None = None
) -> pathlib.Path:
    """Make an artefact of a run, hold it against the run, and put it in its place; returns its folder.

    Args:
        run: a finished run, or an adapter folder.
        wanted: which artefact.
        console: progress and results.
        cache: where quantised bases, tokenised data and digests are kept.
        converter: what writes GGUF; None where none is wanted.

    Raises:
        NybbleError: whatever is wrong with run, base, disk or Hub, or how the artefact differs; nothing half-written stays.
    """
    # 1. What is there: target, token, run and base.
    target = wanted.out or run.folder / "export" / wanted.to
    refuse_taken(target)
    if wanted.repo is not None:
        check_push(wanted.repo)
    source = open_source(run, wanted.dtype, cache)
    tell(console, source.notices)
    adapter = sum(file.stat().st_size for file in source.run.adapter.glob("adapter_*"))
    check_disk(target, needed(wanted.to, _parameters(source), wanted.quants, adapter), str(target))
    # 2. What the run answers, and how far each merge would be from it; then the run is put away.
    measured, merges = _measure(source, wanted, console, cache, converter)
    base = _choose(measured, merges, wanted, console)
    # 3. The artefact, beside its place.
    licence = find_licence(source.checkpoint)
    generation, notice = generation_settings(source.checkpoint.folder, measured.tokenizer, measured.template)
    tell(console, [notice] if notice else [])
    contents = Contents(source.run, source.config, measured.tokenizer, measured.template, generation, licence)
    with beside(target) as folder:
        files = _write(folder, contents, source, wanted, merges.get(base or ""), console, converter)
        # 4. Through its user's program, and into its place.
        verdicts = _check(folder, files, source, wanted, measured, base)
        tell_verdicts(verdicts, console)
        failed = target.with_name(f"{target.name}.failed.json")
        if any(isinstance(verdict, Verdict) and not verdict.passed for verdict in verdicts):
            write_report(failed, base, measured.comparison, verdicts)
        refuse_failed(verdicts, str(target), failed)
        write_report(folder / REPORT, base, measured.comparison, verdicts)
        _write_card(folder, files, source, contents, wanted, base, measured.comparison, verdicts)
    failed.unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    console.print(f"done      {target}, {size / 1e9:.2f} GB; its README.md says how to load it", soft_wrap=True)
    # 5. To the Hub.
    if wanted.repo is not None:
        with console.status(f"uploading to {wanted.repo}"):
            page = push(target, wanted.repo)
        console.print(f"pushed    {page}")
    return target


def refuse_taken(target: pathlib.Path) -> None:
    """Raise where something stands already: an artefact is never written over."""
    if target.exists():
        raise ExportError(
            f"{target} exists already", fix=f"--out ANOTHER for a second one, or remove it: rm -r {target}"
        )


def tell(console: Console, notices: Sequence[str]) -> None:
    """What is worth knowing, a line each."""
    for notice in notices:
        console.print(f"          [yellow]{notice}[/]", highlight=False)


@contextlib.contextmanager
def beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that takes its target's place when all went well, and is gone when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parameters(source: Source) -> int:
    """Of the whole model, by its shapes."""
    config = source.config
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer = 2 * width * (queries + keys) + 3 * width * inner + 2 * width
    heads = 1 if config.tie_word_embeddings else 2
    return int(config.num_hidden_layers * layer + heads * config.vocab_size * width + width)


def _measure(
    source: Source, wanted: Wanted, console: Console, cache: pathlib.Path, converter: Converter | None
) -> tuple[Measured, dict[str, Merge]]:
    """Ask the run, and measure each base against it; the live model is freed on return."""
    is_adapter = wanted.to == "adapter"
    updates = {} if is_adapter else read_updates(source.run.adapter)
    if is_adapter:
        _check_whole(source.run.adapter)
    with console.status("loading the run"):
        answerer = load_answerer(source.run, cache)
    if converter is not None:
        converter.check(source.config, answerer.tokenizer)
    merges: dict[str, Merge] = {}
    if not is_adapter:
        merges, notice = merges_of(source, updates, wanted.merge_base, cache)
        tell(console, [notice] if notice else [])
    validation = None
    if not source.run.is_bare_adapter:
        with console.status("reading the run's data"):
            prepared, why = rows_of(source.run, answerer.tokenizer, cache)
        tell(console, [why] if why else [])
        validation = prepared.validation if prepared is not None else None
    with progress_bar(console, "the run answers", QUESTIONS) as show:
        reference = ask_run(answerer, validation, merges, show)
    comparison = None
    if merges:
        samples, what = _compared_rows(validation, reference)
        with progress_bar(console, "comparing bases", len(samples)) as show:
            comparison = compare(answerer, merges, samples, what, show)
    return Measured(reference, comparison, answerer.tokenizer, answerer.template), merges


def _check_whole(adapter: pathlib.Path) -> None:
    """Read the adapter's header, which PEFT would fail on in its own words."""
    files = [file for file in adapter.glob("adapter_model.*") if file.suffix in (".safetensors", ".bin")]
    if not files:
        raise ExportError(f"there are no adapter weights in {adapter}", fix=f"ls {adapter}")
    Tensors(files)


def _compared_rows(validation: Dataset | None, reference: Reference) -> tuple[list[dict[str, Any]], str]:
    """Validation rows; where there are none, the prompts and what the run answered."""
    if validation is not None:
        rows = validation.select(range(min(ROWS, len(validation))))
        return [{"input_ids": row["input_ids"], "trained": row["trained"]} for row in rows], "validation rows"
    samples = [
        {"input_ids": row, "trained": [place >= len(question.prompt) for place in range(len(row))]}
        for question, row in zip(reference.questions, reference.rows, strict=True)
        if len(row) > len(question.prompt)
    ]
    return samples, "answers of its own, there being no validation rows"


def _choose(measured: Measured, merges: Mapping[str, Merge], wanted: Wanted, console: Console) -> str | None:
    """The base that was asked for, or the closest; None for an adapter."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if measured.comparison is None:
        return None
    base = wanted.merge_base if wanted.merge_base in merges else measured.comparison.closest
    tell_comparison(measured.comparison, base, console)
    return base


def _write(
    folder: pathlib.Path, contents: Contents, source: Source, wanted: Wanted, merge: Merge | None, console: Console,
    converter: Converter | None,
) -> list[pathlib.Path]:  # fmt: skip
    """The artefact's files; returns those of GGUF."""
    if merge is None:
        write_adapter(folder, contents)
        return []
    if wanted.to == "merged":
        with progress_bar(console, "merging", sum(spec.bytes for spec in merge.specs())) as show:
            write_merged(folder, contents, merge, show)
        return []
    assert converter is not None, "who writes GGUF?"
    name = source.run.folder.resolve().name
    licence = contents.licence
    model = Model(name, merge, source.config, contents.tokenizer, contents.template.source, contents.template.end_id,
                  source.checkpoint.name, licence.name, licence.link)  # fmt: skip
    files = []
    for quant in wanted.quants:
        file = folder / f"{name}-{quant}.gguf"
        with progress_bar(console, f"writing {quant}", _parameters(source)) as show:
            converter.write(file, model, quant, show)
        files.append(file)
    write_gguf_words(folder, contents, files[0].name)
    return files


def _check(
    folder: pathlib.Path, files: Sequence[pathlib.Path], source: Source, wanted: Wanted, measured: Measured,
    base: str | None,
) -> list[Verdict | str]:  # fmt: skip
    """Through the program that its user loads it with."""
    if base is None:
        return [check_adapter(folder, source, measured.reference, measured.tokenizer)]
    if wanted.to == "merged":
        return [check_merged(folder, source, measured.reference, base, measured.tokenizer)]
    pairs = zip(files, wanted.quants, strict=True)
    return [check_gguf(file, quant, measured.reference, base, measured.tokenizer) for file, quant in pairs]


def _write_card(
    folder: pathlib.Path, files: Sequence[pathlib.Path], source: Source, contents: Contents, wanted: Wanted,
    base: str | None, comparison: Comparison | None, verdicts: Sequence[Verdict | str],
) -> None:  # fmt: skip
    loading, beside_it = {
        "adapter": lambda: (adapter_lines(source), []),
        "merged": lambda: (merged_lines(), ["`Modelfile` is for Ollama: `ollama create NAME -f Modelfile`."]),
        "gguf": lambda: (gguf_lines(files[0].name), gguf_beside([file.name for file in files])),
    }[wanted.to]()
    stored = str(source.stored).removeprefix("torch.")
    kind = {
        "adapter": "A LoRA adapter",
        "merged": f"A language model in {stored}, the adapter merged into the {base} base",
        "gguf": f"A language model in GGUF ({', '.join(wanted.quants)}), the adapter merged into the {base} base",
    }[wanted.to]
    subject = Subject(
        source.run, wanted.to, kind, loading, beside_it, base, hub_id(source.checkpoint), contents.licence, comparison,
        verdicts,
    )  # fmt: skip
    write_text(folder / "README.md", write_card(subject))
