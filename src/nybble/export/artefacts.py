"""Writing the files of each kind of artefact into a folder."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from nybble.data.text.template import Template
from nybble.export.gguf.modelfile import write_modelfile
from nybble.export.licence import Licence
from nybble.export.merge.merge import Merge
from nybble.export.merge.shards import write_shards
from nybble.files.writing import write_json, write_text
from nybble.model.adapter.config import CONFIG
from nybble.model.adapter.tensors import weights_file
from nybble.run.folder import Run

IGNORED_WHEN_GREEDY = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


@dataclass(frozen=True)
class Contents:
    """What every artefact contains.

    Attributes:
        run: the run.
        config: the model's configuration, with the run's RoPE scaling.
        tokenizer: the run's tokenizer.
        template: the run's chat template.
        generation: generation settings that can be saved, with every token that ends an answer.
        licence: the base's licence.
    """

    run: Run
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    template: Template
    generation: GenerationConfig
    licence: Licence

    @property
    def end(self) -> str:
        """The token that ends an answer, as text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.template.end_id))


def write_adapter(folder: pathlib.Path, contents: Contents) -> None:
    """Write PEFT's files, the tokenizer with its template, the stop tokens, and the configuration if the run scaled RoPE."""
    for file in (contents.run.adapter / CONFIG, weights_file(contents.run.adapter)):  # only files that were checked
        shutil.copyfile(file, folder / file.name)
    _write_tokenizer(folder, contents)
    if contents.run.recipe.model.rope_scaling is not None:
        _write_config(folder, contents.config)


def write_merged(folder: pathlib.Path, contents: Contents, merge: Merge, done: Callable[[int], None]) -> None:
    """Write a plain Transformers folder.

    Args:
        folder: an existing folder.
        contents: what goes with the weights.
        merge: the weights.
        done: called with the bytes written so far.
    """
    write_shards(folder, merge.specs(), merge.stored, done)
    config = type(contents.config).from_dict(contents.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures, config.dtype, config.use_cache = ["LlamaForCausalLM"], merge.dtype, True
    config.tie_word_embeddings = merge.tied and not merge.unties
    _write_config(folder, config)
    _write_tokenizer(folder, contents)
    text = write_modelfile(".", contents.tokenizer, contents.template.source, contents.end, contents.run.system)
    write_text(folder / "Modelfile", text)


def write_gguf_companions(folder: pathlib.Path, contents: Contents, file: str) -> None:
    """Write what goes with GGUF files, which contain tokenizer and template themselves."""
    text = write_modelfile(f"./{file}", contents.tokenizer, contents.template.source, contents.end, contents.run.system)
    write_text(folder / "Modelfile", text)
    _write_licence(folder, contents.licence)


def generation_settings(
    base: pathlib.Path, tokenizer: PreTrainedTokenizerBase, template: Template
) -> tuple[GenerationConfig, str | None]:
    """The base's generation settings with the run's stop tokens, corrected if Transformers would refuse to save them.

    Llama 2's set a temperature without sampling. Such settings have no effect, so they are left out.
    """
    settings, notice = GenerationConfig(), None
    if (base / "generation_config.json").exists():
        try:
            settings = GenerationConfig.from_pretrained(base)
        except ValueError as error:
            notice = f"generation_config.json left out: Transformers cannot read it ({str(error).splitlines()[0]})"
    ends = settings.eos_token_id
    stops = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    tokens = {
        "eos_token_id": list(dict.fromkeys([template.end_id, tokenizer.eos_token_id, *stops])),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings.update(**tokens)
    if _can_be_saved(settings):
        return settings, notice
    odd = [name for name in IGNORED_WHEN_GREEDY if not settings.do_sample and getattr(settings, name, None) is not None]
    settings.update(**dict.fromkeys(odd))
    if _can_be_saved(settings):
        what = (
            f"generation_config.json: {', '.join(odd)} left out, which Transformers refuses to save without do_sample"
        )
        return settings, what
    return GenerationConfig(
        **tokens
    ), "generation_config.json left out, which Transformers refuses to save; the stop tokens are kept"


def _can_be_saved(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def _write_tokenizer(folder: pathlib.Path, contents: Contents) -> None:
    """Write tokenizer, template, stop tokens and licence."""
    before, contents.tokenizer.chat_template = contents.tokenizer.chat_template, contents.template.source
    contents.tokenizer.save_pretrained(folder)
    contents.tokenizer.chat_template = before
    contents.generation.save_pretrained(folder)
    _write_licence(folder, contents.licence)


def _write_config(folder: pathlib.Path, config: PretrainedConfig) -> None:
    """Write config.json, with RoPE under the names of transformers 5 and, for older programs, also of 4."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(written["rope_parameters"])
    written["rope_theta"] = rope.pop("rope_theta")
    written["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_json(file, written)


def _write_licence(folder: pathlib.Path, licence: Licence) -> None:
    for file in licence.files:
        shutil.copyfile(file, folder / file.name)
    if licence.notice is not None:
        write_text(folder / "Notice", licence.notice + "\n")
