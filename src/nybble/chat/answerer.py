"""A run that answers, through the Transformers text-generation pipeline.

The pipeline's own preprocess would tokenise a rendered string; it is passed over: prompts come as the token ids of the function
that training calls.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedTokenizerBase, TextGenerationPipeline
from transformers.generation.streamers import BaseStreamer

from nybble.data.rows.formats import Conversation
from nybble.data.text.kept_template import read_template
from nybble.data.text.template import Template, choose_template
from nybble.data.text.tokens import check_ids, encode_prompt
from nybble.errors import RunError
from nybble.files.places import check_cache, default_cache, explained_disk
from nybble.model.adapter.lora import add_adapter, load_adapter
from nybble.model.adapter.updates import Updates, updates_of
from nybble.model.base.bits import Bits, trained_on
from nybble.model.base.cached import check_unchanged
from nybble.model.base.checkpoint import find_base, fingerprint
from nybble.model.base.load import load_base
from nybble.model.device import choose_device, choose_dtype
from nybble.model.tokenizer.load import load_tokenizer, read_tokenizer
from nybble.run.folder import Run, check_beginning, open_run, refuse_unfinished
from nybble.weights.on_cpu import dequantise_where_room

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


@dataclass(frozen=True)
class Completion:
    """What a model went on with."""

    text: str
    ended: bool
    """Whether it stopped by itself, and not at the longest answer allowed."""


@dataclass(frozen=True)
class Answerer:
    """A base model with the adapter of a run, its tokenizer and its template."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    fingerprint: str
    """Of the base's weights."""
    updates: Updates
    """What the run's adapter changes."""
    adapter: str = "default"
    """PEFT's name of the run's adapter: several runs of one base share `model`."""
    system: str = ""
    """The system message that most training rows begin with, to be said as the first message of a conversation."""
    bits: Bits | None = None
    """Of the base, where nybble quantised it."""

    def answer(
        self, conversations: Sequence[Conversation], sampling: Sampling = GREEDY, streamer: BaseStreamer | None = None
    ) -> list[str]:
        """The assistant's next message in each conversation; all in one batch."""
        prompts = [encode_prompt(self.template, conversation) for conversation in conversations]
        return [completion.text for completion in self.complete(prompts, sampling, streamer)]

    def complete(
        self, prompts: Sequence[list[int]], sampling: Sampling, streamer: BaseStreamer | None = None
    ) -> list[Completion]:
        """What follows each prompt, given as token ids; all in one batch."""
        settings: dict[str, Any] = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_new_tokens}
        if sampling.temperature > 0:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        if streamer is not None:
            settings["streamer"] = streamer
        return self.pipeline().complete(prompts, settings)

    def pipeline(self) -> ConversationPipeline:
        """What generates, from token ids."""
        return ConversationPipeline(self.model, self.tokenizer, self.template)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """The base model's answers: the adapter is switched off meanwhile."""
        with self.model.disable_adapter():
            yield

    def as_tuned(self, tuned: bool) -> AbstractContextManager[None]:
        """The tuned model's answers, or the base's."""
        if not tuned:
            return self.as_base()
        if self.model.active_adapter != self.adapter:
            self.model.set_adapter(self.adapter, inference_mode=True)
        return contextlib.nullcontext()


class ConversationPipeline(TextGenerationPipeline):  # type: ignore[misc]
    """Text generation from the token ids of prompts."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        super().__init__(model=model.get_base_model(), tokenizer=tokenizer)  # its layers carry the adapter
        self.template = template

    def complete(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[Completion]:
        """Generate for all prompts in one padded batch."""
        return [self._completion(ids) for ids in self.generate(rows, settings)]

    def generate(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[list[int]]:
        """The tokens that follow each prompt; what all prompts begin with is computed once.

        Raises:
            DataError: a token id without an embedding.
        """
        for row in rows:
            check_ids(row, self.model.config.vocab_size, self.tokenizer)
        shared = _common_prefix(rows) if len(rows) > 1 else 0
        ids, mask = _pad_after(rows, shared, self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        stops = {"eos_token_id": self.stops(), "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True}
        with torch.inference_mode():
            cache = {"past_key_values": self._prefill(ids[:1, :shared], len(rows))} if shared else {}
            inputs = {"input_ids": ids, "attention_mask": mask, "prompt_text": ""}
            output = self._forward(inputs, **settings, **stops, **cache)["generated_sequence"].reshape(len(rows), -1)
        return [row[ids.shape[1] :].tolist() for row in output]

    def stops(self) -> list[int]:
        """The tokens that end an answer."""
        return list(dict.fromkeys([self.template.end_id, self.tokenizer.eos_token_id]))

    def _completion(self, ids: list[int]) -> Completion:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Completion(text, ended=not set(self.stops()).isdisjoint(ids))

    def _prefill(self, prefix: torch.Tensor, rows: int) -> DynamicCache:
        """Keys and values of a prefix, (1, tokens), for so many rows."""
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
        return cache


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, one left over in each to go on from."""
    first, last = min(rows), max(rows)  # what these two share, all between them share
    limit = min(map(len, rows)) - 1
    return next((n for n in range(limit) if first[n] != last[n]), limit)


def _pad_after(rows: Sequence[list[int]], shared: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (rows, longest): the shared beginning, then padding, so that all rows end together."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[*row[:shared], *[pad_id] * gap, *row[shared:]] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[*[1] * shared, *[0] * gap, *[1] * (longest - shared - gap)] for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)


def load_answerer(
    run: Run | str | pathlib.Path, cache: pathlib.Path | None = None, device: str = "auto", *, dequantise: bool = False
) -> Answerer:
    """Load a run to answer with: base as in training, adapter, tokenizer and template of the run.

    Args:
        run: the run, or the path of its folder.
        cache: where quantised bases are kept; None is this user's own place.
        device: auto, cuda or cpu.
        dequantise: on a CPU with room for them, hold the base's weights dequantised: the same answers, sooner.

    Raises:
        RunError: there is no run.
        ModelError: the base is gone, not the one the adapter fits, or not the one that the run was trained on;
            `open_run(path, base)` says where it is.
    """
    (answerer,) = load_answerers([run if isinstance(run, Run) else open_run(run)], cache, device, dequantise=dequantise)
    return answerer


def load_answerers(
    runs: Sequence[Run], cache: pathlib.Path | None = None, device: str = "auto", *, dequantise: bool = False
) -> list[Answerer]:
    """Several runs of one base, which is in memory once; `as_tuned` chooses whose adapter works. The rest as `load_answerer`.

    Raises:
        ModelError: as `load_answerer`.
        RunError: the runs are of different bases, or the training of one has not ended.
    """
    for run in runs:
        if not run.adapter.exists():  # what is wrong with one that is there is said when it is read
            refuse_unfinished(run)
    options, cache = runs[0].recipe.model, cache or default_cache()
    check_cache(cache)
    place = choose_device(device if device != "auto" else options.device)
    dtype, _ = choose_dtype(options.dtype, place)
    checkpoint = find_base(runs[0])
    with explained_disk(cache):
        check_one_base(runs, cache)
        base = load_base(checkpoint, options, dtype, place, cache, trained_on(runs[0]))
    notices = list(base.notices)
    for run in runs[1:]:
        if base.bits is not None:
            notices += check_unchanged(base.bits, base.fingerprint, trained_on(run), run.folder)
    for notice in dict.fromkeys(notices):
        logger.warning("%s", notice)
    names = ["default", *(f"run{number}" for number in range(2, len(runs) + 1))]  # PEFT takes no dots in a name
    model = load_adapter(base.model, runs[0].adapter)
    for run, name in zip(runs[1:], names[1:], strict=True):
        add_adapter(model, run.adapter, name)
    updates = [updates_of(model, name, run.adapter) for run, name in zip(runs, names, strict=True)]
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # stored in float32; training computed with it in this type
            parameter.data = parameter.data.to(dtype)
    model.eval()
    if dequantise:
        dequantise_where_room(model)
    answerers = []
    for run, name, changes in zip(runs, names, updates, strict=True):
        tokenizer, template = load_template(run, checkpoint.folder)
        answerers.append(Answerer(model, tokenizer, template, base.fingerprint, changes, name, run.system, base.bits))
    return answerers


def load_template(run: Run, base: pathlib.Path) -> tuple[PreTrainedTokenizerBase, Template]:
    """Tokenizer and template of a run, proven; of a bare adapter, its own tokenizer or that of the base's folder."""
    if run.is_bare_adapter:
        tokenizer = load_tokenizer(run.folder if (run.folder / "tokenizer_config.json").exists() else base, base)
        return tokenizer, choose_template(tokenizer, "auto", "alpaca")
    tokenizer = read_tokenizer(run.folder / "tokenizer")
    template = read_template(tokenizer, run.folder / "template.json")
    check_beginning(run)  # last: what is wrong with a file that cannot even be read is told better above
    return tokenizer, template


def check_one_base(runs: Sequence[Run], cache: pathlib.Path | None = None) -> None:
    """Runs that are to share a base must have the same weights, held in the same way.

    Raises:
        RunError: naming what each of them stands on.
    """
    stands: dict[tuple[object, ...], list[str]] = {}
    for run in runs:
        own = run.recipe.model
        mark = fingerprint(find_base(run), cache or default_cache())
        kind = (mark, own.quantization, own.double_quantization, own.dtype, repr(own.rope_scaling))
        stands.setdefault(kind, []).append(f"{run.folder} on {own.path} ({own.quantization}, {own.dtype})")
    if len(stands) > 1:
        listed = "\n".join(f"  - {place}" for places in stands.values() for place in places)
        raise RunError(
            f"the runs have {len(stands)} different bases, but a server loads only one:\n{listed}",
            fix="one server per base, each on its own --port",
        )
