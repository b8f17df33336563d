"""What an adapter in memory changes: counts, and one line of text."""

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
        count: modules with an A and a B.
        zero: how many of them change nothing, because A, B or the scaling is zero.
        negative: how many of them are subtracted, because alpha is negative.
        whole: what else is trained: names of modules, or embeddings of single tokens.
        unknown: fields of the configuration that this PEFT does not know.
    """

    count: int
    zero: int
    negative: int = 0
    whole: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether the model answers like its base."""
        return self.zero == self.count and not self.whole

    @property
    def is_odd(self) -> bool:
        """Whether training would not normally leave an adapter like this."""
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
    """Count the updates of an adapter, in one pass over its numbers on their device.

    Args:
        model: the model.
        name: PEFT's name of the adapter.
        folder: the folder it was loaded from.
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
    """Whether the update may change anything: A and B, or B's bias, are not zero."""
    if name in layer.lora_embedding_A:
        parts = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        return all(bool(part.any()) for part in parts)
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None and b.bias.any():
        return True
    return bool(a.weight.any()) and bool(b.weight.any())


def is_untrained(model: PeftModel) -> bool:
    """Whether every update of the adapter is zero, as before training, so that it changes nothing."""
    updates = updates_of(model)
    return updates.count > 0 and updates.zero == updates.count


def targets_of(model: PeftModel) -> list[str]:
    """Names of the adapted layers, without their paths; PEFT's configuration may have a regular expression instead."""
    return sorted({name.rpartition(".")[2] for name in model.targeted_module_names})
