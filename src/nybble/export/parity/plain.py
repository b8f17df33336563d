"""A Transformers model asked without nybble's generator: by its own generate, as its users ask it, and for logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from nybble.data.order import batches
from nybble.engine.loss import last_hidden

NEW_TOKENS = 48  # of an answer: enough for most to end or to go astray
BATCH_TOKENS = 4096  # of padded prompts and answers: 2 GB of Llama 2 7B's keys and values, beside its weights


@dataclass(frozen=True)
class GreedyAnswer:
    """What a model answers to a question.

    Attributes:
        ids: greedy, without what ends it.
        ended: whether it stopped by itself.
    """

    ids: list[int]
    ended: bool


def generated(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int) -> list[GreedyAnswer]:
    """Greedy answers that the model's generation settings end; prompts of similar length in one batch, padded on the left."""
    stops = own_stops(model)
    answers: dict[int, GreedyAnswer] = {}
    for batch in batches([len(prompt) + NEW_TOKENS for prompt in prompts], BATCH_TOKENS):
        longest = max(len(prompts[n]) for n in batch)
        gaps = [longest - len(prompts[n]) for n in batch]
        ids = [[pad_id] * gap + prompts[n] for n, gap in zip(batch, gaps, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                use_cache=True,
                pad_token_id=pad_id,
            )
        made = output[:, longest:].tolist()
        answers |= {n: _until(row, stops) for n, row in zip(batch, made, strict=True)}
    return [answers[n] for n in range(len(prompts))]


def own_stops(model: PreTrainedModel) -> set[int]:
    """The tokens at which a model's generation settings stop."""
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _until(row: list[int], stops: set[int]) -> GreedyAnswer:
    end = next((n for n, token in enumerate(row) if token in stops), None)
    return GreedyAnswer(row[:end], end is not None)


def next_logits(model: PreTrainedModel, rows: Sequence[list[int]], starts: Sequence[int]) -> list[torch.Tensor]:
    """What follows each row's prompt: (len(row) - start, vocabulary) float32 logits on the CPU."""
    head = model.get_output_embeddings()
    logits: dict[int, torch.Tensor] = {}
    for batch in batches([len(row) for row in rows], BATCH_TOKENS):
        longest = len(rows[batch[0]])
        ids = torch.tensor([rows[n] + [0] * (longest - len(rows[n])) for n in batch], device=model.device)
        mask = torch.tensor([[1] * len(rows[n]) + [0] * (longest - len(rows[n])) for n in batch], device=model.device)
        with torch.inference_mode():
            hidden = last_hidden(model, model.get_decoder(), {"input_ids": ids, "attention_mask": mask})
            for n, states in zip(batch, hidden, strict=True):
                logits[n] = head(states[starts[n] - 1 : len(rows[n]) - 1]).float().cpu()
    return [logits[n] for n in range(len(rows))]
