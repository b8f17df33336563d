"""The three kinds of artefact: how each is written, how its users load it, and what its card says."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from nybble.evaluate.console import progress_bar
from nybble.export import loading_code
from nybble.export.artefacts import Contents, write_adapter, write_gguf_companions, write_merged
from nybble.export.finished_run import FinishedRun
from nybble.export.gguf.quants import GgufConverter
from nybble.export.merge.merge import Merge, MergedModel
from nybble.export.parity.loaders import (
    GET_LLAMA_CPP,
    has_llama_cpp,
    placement_for,
    through_llama_cpp,
    through_peft,
    through_transformers,
)
from nybble.export.parity.plain import NEW_TOKENS
from nybble.export.parity.reference import Reference
from nybble.export.parity.verdict import Verdict, judge
from nybble.markdown import code
from nybble.model.base.load import quantization_plan
from nybble.model.device import choose_device
from nybble.plan.shapes import ModelShape
from nybble.terminal import bytes_text


class Target(Protocol):
    """A kind of artefact: how it is written, checked and described."""

    def write(self, folder: pathlib.Path, contents: Contents, console: Console) -> None:
        """Write its files."""

    def check(self, folder: pathlib.Path, reference: Reference, contents: Contents) -> list[Verdict | str]:
        """Compare its answers, in the program that its users run, with those of the run; text says what was not checked."""

    def describe(self) -> tuple[str, str, list[str]]:
        """For the card: what it is, the code that loads it, and further sentences on its use."""


@dataclass(frozen=True)
class AdapterTarget:
    """PEFT's files with tokenizer and template."""

    source: FinishedRun

    def write(self, folder: pathlib.Path, contents: Contents, console: Console) -> None:
        """Copy the run's files."""
        write_adapter(folder, contents)

    def check(self, folder: pathlib.Path, reference: Reference, contents: Contents) -> list[Verdict | str]:
        """Check it with PEFT, on the base, which is quantised again."""
        source, plan = self.source, None
        if source.quantizes:
            double = source.run.recipe.model.double_quantization
            plan = quantization_plan(source.quantization, double, source.computed)
        device = choose_device(source.run.recipe.model.device)
        observed = through_peft(folder, source.checkpoint.folder, plan, source.computed, reference, device)
        return [judge("adapter", reference, observed, None, contents.tokenizer)]

    def describe(self) -> tuple[str, str, list[str]]:
        """For the card."""
        return "A LoRA adapter", loading_code.adapter_lines(self.source), []


@dataclass(frozen=True)
class MergedTarget:
    """A plain Transformers folder."""

    source: FinishedRun
    merge: Merge
    base: str

    def write(self, folder: pathlib.Path, contents: Contents, console: Console) -> None:
        """Write the weights in shards, and the files that go with them."""
        with progress_bar(console, "merging", sum(spec.bytes for spec in self.merge.specs())) as show:
            write_merged(folder, contents, self.merge, show)

    def check(self, folder: pathlib.Path, reference: Reference, contents: Contents) -> list[Verdict | str]:
        """Check it with Transformers alone, if it fits into memory."""
        size = sum(spec.bytes for spec in self.merge.specs())
        placement = placement_for(size, choose_device(self.source.run.recipe.model.device))
        if placement is None:
            return [f"{self._stored} not checked: its {bytes_text(size, 1)} do not fit into free memory"]
        observed = through_transformers(folder, reference, placement)
        return [judge(self._stored, reference, observed, self.base, contents.tokenizer)]

    def describe(self) -> tuple[str, str, list[str]]:
        """For the card."""
        what = f"A language model in {self._stored}, the adapter merged into the {self.base} base"
        return (
            what,
            loading_code.merged_lines(),
            ["With Ollama: `ollama create NAME -f Modelfile`, then `ollama run NAME`."],
        )

    @property
    def _stored(self) -> str:
        return str(self.source.stored).removeprefix("torch.")


@dataclass(frozen=True)
class GgufTarget:
    """GGUF files, one per type."""

    source: FinishedRun
    merge: Merge
    base: str
    quants: Sequence[str]
    converter: GgufConverter

    def write(self, folder: pathlib.Path, contents: Contents, console: Console) -> None:
        """Write the files, and a Modelfile for the first."""
        licence, template = contents.licence, contents.template
        model = MergedModel(
            self._name, self.merge, self.source.config, contents.tokenizer, template.source, template.end_id,
            self.source.checkpoint.name, licence.name, licence.link,
        )  # fmt: skip
        parameters = ModelShape.from_config(self.source.config.to_dict()).parameters.total
        for quant in self.quants:
            with progress_bar(console, f"writing {quant}", parameters) as show:
                self.converter.write(folder / self._file(quant), model, quant, show)
        write_gguf_companions(folder, contents, self._file(self.quants[0]))

    def check(self, folder: pathlib.Path, reference: Reference, contents: Contents) -> list[Verdict | str]:
        """Check it with llama.cpp, if that is installed."""
        if not has_llama_cpp():
            return [f"{', '.join(self.quants)} not checked: llama-cpp-python is not installed ({GET_LLAMA_CPP})"]
        verdicts: list[Verdict | str] = []
        for quant in self.quants:
            observed = through_llama_cpp(folder / self._file(quant), reference, NEW_TOKENS)
            verdicts.append(judge(quant, reference, observed, self.base, contents.tokenizer))
        return verdicts

    def describe(self) -> tuple[str, str, list[str]]:
        """For the card."""
        what = f"A language model in GGUF ({', '.join(self.quants)}), the adapter merged into the {self.base} base"
        file = self._file(self.quants[0])
        command = code(f"llama-cli -m {shlex.quote(file)}")
        return what, loading_code.gguf_lines(file), [
            f"Or {command}; with Ollama: `ollama create NAME -f Modelfile`, then `ollama run NAME`."
        ]  # fmt: skip

    @property
    def _name(self) -> str:
        """The run's name on one line: a line break in a folder's name would break the Modelfile."""
        return "".join(c if c.isprintable() else "_" for c in self.source.run.folder.resolve().name)

    def _file(self, quant: str) -> str:
        return f"{self._name}-{quant}.gguf"
