"""Each artefact through the program of its user, and what that program's answers are worth."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Sequence
from dataclasses import asdict

from nybble.errors import ExportError
from nybble.export.compare import Comparison
from nybble.export.loaders import GET_LLAMA_CPP, has_llama_cpp, through_llama_cpp, through_peft, through_transformers
from nybble.export.parity import NEW_TOKENS, Reference, Verdict, judge
from nybble.export.source import Source
from nybble.model.base import quantization_plan
from nybble.model.device import choose_device
from nybble.run import versions, write_json
from transformers import PreTrainedTokenizerBase

REPORT = "parity.json"


def check_adapter(folder: pathlib.Path, source: Source, reference: Reference, tokenizer: PreTrainedTokenizerBase) -> Verdict:
    """An adapter folder, through PEFT."""
    plan = None
    if source.checkpoint.quantized_as is None and source.quantization != "none":
        plan = quantization_plan(source.quantization, source.run.recipe.model.double_quantization, source.computed)
    device = choose_device(source.run.recipe.model.device)
    given = through_peft(folder, source.checkpoint.folder, plan, source.computed, reference, device)
    return judge("adapter", reference, given, None, tokenizer)


def check_merged(
    folder: pathlib.Path, source: Source, reference: Reference, base: str, tokenizer: PreTrainedTokenizerBase
) -> Verdict:
    """A merged folder, through Transformers."""
    given = through_transformers(folder, reference, choose_device(source.run.recipe.model.device))
    return judge(str(source.stored).removeprefix("torch."), reference, given, base, tokenizer)


def check_gguf(
    file: pathlib.Path, quant: str, reference: Reference, base: str, tokenizer: PreTrainedTokenizerBase
) -> Verdict | str:
    """A GGUF file, through llama.cpp where it is installed."""
    if not has_llama_cpp():
        return f"{quant} not checked: llama-cpp-python is not installed ({GET_LLAMA_CPP})"
    return judge(quant, reference, through_llama_cpp(file, reference, NEW_TOKENS), base, tokenizer)


def write_report(
    file: pathlib.Path, base: str | None, comparison: Comparison | None, verdicts: Sequence[Verdict | str]
) -> None:
    """All that was measured, as JSON."""
    write_json(
        file,
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "merge_base": base,
            "comparison": None if comparison is None else asdict(comparison),
            "checks": [verdict if isinstance(verdict, str) else verdict.as_dict() for verdict in verdicts],
        },
    )


def refuse_failed(verdicts: Sequence[Verdict | str], what: str, report: pathlib.Path) -> None:
    """Raise where an artefact does not answer like the run.

    Raises:
        ExportError: with every reason.
    """
    failed = [verdict for verdict in verdicts if isinstance(verdict, Verdict) and not verdict.passed]
    if not failed:
        return
    reasons = [f"  - {verdict.kind} in {verdict.by}: {failure}" for verdict in failed for failure in verdict.failures]
    raise ExportError(
        f"{what} does not answer like the run, and is not kept:\n" + "\n".join(reasons),
        where=str(report),
        fix="the report shows prompts and answers side by side; another type is --quant Q8_0, --dtype bfloat16 or --to merged",
    )
