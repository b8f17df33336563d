"""Whether an export can work, before anything is trained: converter, architecture, tokenizer, disk."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.errors import ExportError
from nybble.export.gguf.quants import GET_QUANTIZER, K_QUANTS, OWN_QUANTS, QUANTIZER, GgufConverter
from nybble.files.paths import check_free_space
from nybble.plan.file_bytes import export_bytes
from nybble.plan.shapes import ModelShape


@dataclass(frozen=True)
class Preflight:
    """Checks the exports of a run; `train` calls it before its first step.

    Attributes:
        targets: adapter, merged, gguf.
        quants: GGUF types.
        converter: writes GGUF; None if no GGUF is requested.
    """

    targets: Sequence[str]
    quants: Sequence[str]
    converter: GgufConverter | None

    def __call__(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: pathlib.Path) -> None:
        """Raise if an export of this model could not work.

        Args:
            config: the base's configuration, with the run's RoPE scaling.
            tokenizer: the base's tokenizer.
            folder: the run folder, which need not exist.

        Raises:
            ModelError: llama.cpp has no name for the tokenizer.
            ExportError: llama.cpp does not support the RoPE scaling, or a program is missing.
            RunError: there is too little space on the disk.
        """
        if "gguf" in self.targets:
            assert self.converter is not None, "GGUF was requested without a converter"
            self.converter.check(config, tokenizer)
            check_quants(self.quants)
        parameters = ModelShape.from_config(config.to_dict()).parameters.total
        size = sum(export_bytes(to, parameters, self.quants) for to in self.targets)
        check_free_space(
            folder, size, f"export.to={list(self.targets)}", "free some space, or out=FOLDER on another disk"
        )


def check_quants(quants: Sequence[str]) -> None:
    """Refuse types that cannot be written on this machine.

    Raises:
        ExportError: there is no type, an unknown one, or a K-quant without llama-quantize.
    """
    if not quants:
        raise ExportError("--quant names no type", fix=f"one of {', '.join((*OWN_QUANTS, *K_QUANTS))}, comma-separated")
    for quant in quants:
        if quant not in (*OWN_QUANTS, *K_QUANTS):
            raise ExportError(
                f"--quant {quant}: no such type",
                fix=f"one of {', '.join((*OWN_QUANTS, *K_QUANTS))}, comma-separated",
            )
        if quant in K_QUANTS and shutil.which(QUANTIZER) is None:
            raise ExportError(f"{quant} needs llama.cpp's {QUANTIZER}, which is not on the PATH", fix=GET_QUANTIZER)
