"""What an adapter in memory changes: counted, and put into one line."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from peft import PeftModel
from peft import __version__ as peft_version
from peft.tuners.lora import LoraLayer

from nybble.model.adapter.config import CONFIG, read_content, unknown_options


@dataclass(frozen=True)
class Updates:
    """What an adapter in memory changes.

    Attributes:
        count: modules with an A and a B of their own.
        zero: of these, those whose A or B is zero, or whose scaling is: they change nothing.
        negative: of these, those that are subtracted: their alpha is negative.
        whole: what is trained beside them: names of modules, or embeddings of single tokens.
        unknown: fields of its configuration that this PEFT does not know.
    """

    count: int
    zero: int
    negative: int = 0
    whole: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether the model answers as its base does."""
        return self.zero == self.count and not self.whole

    @property
    def is_odd(self) -> bool:
        """Whether it is not as training leaves an adapter."""
        return bool(self.zero or self.negative or self.unknown)

    def __str__(self) -> str:
        plural = "s" * (self.count != 1)
        if self.zero == 0:
            text = f"{self.count:,} LoRA module{plural}, {'all ' * (self.count > 1)}non-zero"
        elif self.zero < self.count:
            text = f"{self.zero:,} of {self.count:,} LoRA modules {'is' if self.zero == 1 else 'are'} zero"
        else:
            text = f"all {self.count:,} LoRA modules are zero" if self.count > 1 else "its one LoRA module is zero"
            text += ": it answers like the base" * self.changes_nothing
        text += f"; {self.negative:,} subtracted (alpha is negative)" if self.negative else ""
        text += f"; {', '.join(self.whole)} trained in full" if self.whole else ""
        return text + (
            f"; {CONFIG} sets {', '.join(self.unknown)}, which PEFT {peft_version} ignores" if self.unknown else ""
        )


def updates_of(model: PeftModel, name: str = "default", folder: str | pathlib.Path | None = None) -> Updates:
    """Count the updates of an adapter: a pass over its numbers, on their device.

    Args:
        model: the model.
        name: PEFT's name of the adapter.
        folder: where it was loaded from.
    """
    zero, scalings = 0, []
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            scalings.append(module.scaling[name])
            zero += scalings[-1] == 0 or not _changes(module, name)
    config = model.peft_config[name]
    tokens = ["embeddings of single tokens"] if config.trainable_token_indices else []
    whole = (*sorted(config.modules_to_save or []), *tokens)
    unknown = unknown_options(read_content(pathlib.Path(folder))) if folder is not None else []
    return Updates(len(scalings), zero, sum(scaling < 0 for scaling in scalings), whole, tuple(unknown))


def _changes(layer: LoraLayer, name: str) -> bool:
    """Whether B A, or B's bias, is not zero for sure."""
    if name in layer.lora_embedding_A:
        parts = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        return all(bool(part.any()) for part in parts)
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None and b.bias.any():
        return True
    return bool(a.weight.any()) and bool(b.weight.any())


def is_untrained(model: PeftModel) -> bool:
    """Whether every update of the adapter is zero, as at the start: it then changes nothing."""
    updates = updates_of(model)
    return updates.count > 0 and updates.zero == updates.count


def targets_of(model: PeftModel) -> list[str]:
    """Names of the layers that carry the adapter, without their paths; PEFT's configuration may have a regular expression."""
    return sorted({name.rpartition(".")[2] for name in model.targeted_module_names})
