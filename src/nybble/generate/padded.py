"""The default engine: runs of one base through the Transformers text-generation pipeline, in padded batches."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import psutil
import torch
from transformers import PreTrainedModel

from nybble.chat.answerer import Answerer, load_answerers
from nybble.errors import RunError
from nybble.run.folder import Run
from nybble.generate.batching import Batch, Batcher
from nybble.serve.mailbox import Answer, Mailbox, Model, Request
from nybble.serve.metrics import Metrics
from nybble.generate.sampling import Draw, Steps

SHARE = 0.4  # of the free memory for a batch's keys and values: growing by a token, a layer's are there twice


class PipelineEngine:
    """Several runs of one base, and the base itself, from one base in memory.

    Args:
        answerers: by the name that the API knows them by; all on one model.
        base: the name of the base.
        queue: answers that may wait.
    """

    name = "pipeline"

    def __init__(self, answerers: dict[str, Answerer], base: str, metrics: Metrics, *, queue: int) -> None:
        first = next(iter(answerers.values()))
        positions, rows = first.model.config.max_position_embeddings, first.model.config.vocab_size
        self.queue = queue
        self.models = {
            name: Model(name, own.template, positions, base, rows, own.system) for name, own in answerers.items()
        }
        self.models[base] = Model(base, first.template, positions, None, rows)
        self.speakers = {name: (own, True) for name, own in answerers.items()} | {base: (first, False)}
        self.about = (
            "the default, on any device: the Transformers pipeline; requests for one model are batched, "
            f"different models ({', '.join(self.models)}) take turns"
        )
        self.adapters = {name: str(own.updates) for name, own in answerers.items()}
        ends = {name: frozenset(own.pipeline().stops()) for name, (own, _) in self.speakers.items()}
        self.batcher = Batcher(
            self._generate, ends, metrics, queue=queue, room=cache_tokens(first.model.get_base_model()),
            rows_are_free=first.model.device.type != "cpu",
        )  # fmt: skip

    def refuses(self, request: Request) -> tuple[str, str] | None:
        """Nothing."""
        return None

    def submit(self, requests: Sequence[Request], mailbox: Mailbox) -> list[Answer]:
        """Queue requests, all or none."""
        return self.batcher.submit(requests, mailbox)

    def healthy(self) -> bool:
        """Whether batches are made."""
        return self.batcher.thread.is_alive()

    def close(self) -> None:
        """End the thread."""
        self.batcher.close()

    def _generate(self, batch: Batch) -> None:
        """One batch through the pipeline. Sampling is done by `Draw`, so generate itself is greedy."""
        answerer, tuned = self.speakers[batch.model]
        draw = Draw(batch.rows)
        settings = {
            "do_sample": False,
            "max_new_tokens": max(row.left for row in batch.rows),
            "logits_processor": [draw],
            "stopping_criteria": [Steps(batch, draw)],
        }
        with answerer.as_tuned(tuned):
            answerer.pipeline().generate([row.prompt for row in batch.rows], settings)


def cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens' keys and values fit into the memory that is free now.

    Two numbers of head_dim a layer and key-value head: 0.5 MB a token on Llama 2 7B in 16 bits.
    """
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.finfo(model.dtype).bits // 8
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * width * size
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, int(SHARE * free / each))


def load_pipeline(
    runs: Sequence[Run], metrics: Metrics, *, device: str, queue: int, cache: pathlib.Path | None = None
) -> PipelineEngine:
    """Load the runs' base with an adapter for each.

    Raises:
        RunError: two runs of one name, or of different bases.
        ModelError: the base is gone or not the one that the adapters fit.
    """
    names = run_names(runs)
    answerers = dict(zip(names, load_answerers(runs, cache, device, dequantise=True), strict=True))
    return PipelineEngine(answerers, base_name(runs[0], names), metrics, queue=queue)


def run_names(runs: Sequence[Run]) -> list[str]:
    """What the API calls the runs: their folders' names."""
    folders = {run.folder.resolve().name: run.folder for run in runs}
    if len(folders) < len(runs):
        twice = next(run for run in runs if folders[run.folder.resolve().name] is not run.folder)
        name = twice.folder.resolve().name
        raise RunError(
            f"two runs have the name {name}, and requests choose by name: {twice.folder} and {folders[name]}",
            fix="rename one of the folders; a run can be moved",
        )
    return list(folders)


def base_name(run: Run, taken: Sequence[str]) -> str:
    """What the API calls the base: its Hub id, or its folder's name; never a path."""
    path = run.recipe.model.path
    name = pathlib.Path(path).resolve().name if pathlib.Path(path).exists() else path
    return f"{name}-base" if name in taken else name
