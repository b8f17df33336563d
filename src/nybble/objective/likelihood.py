"""Cross-entropy of a batch's trained tokens, without the batch's logits: the head is applied to chunks of rows."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from nybble.data.batches import next_labels
from nybble.engine.loss import cross_entropies, last_hidden, summed_cross_entropy
from nybble.objective.objective import MicroBatch
from nybble.plan.policies import LOSS_CHUNK

MODEL_ARGUMENTS = (
    *("input_ids", "attention_mask", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
MEASURED_TOKENS = 4096  # of the padded rows in a batch that is only measured: 35 MB of hidden states for a 7B


def summed_loss(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over a batch's trained tokens, a scalar in nats that can be differentiated.

    Args:
        model: a causal language model, possibly wrapped by PEFT and DistributedDataParallel.
        batch: from `nybble.data.batches.Collator`, on the model's device.
    """
    inputs, targets, rows = _split(batch)
    head = bare(model).get_output_embeddings()
    if is_plain(head):
        return summed_cross_entropy(last_hidden(model, bare(model).get_decoder(), inputs), head.weight, targets, rows)
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[rows]  # the head has an adapter of its own
    return torch.nn.functional.cross_entropy(logits.float(), targets.flatten()[rows], reduction="sum")


def token_losses(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy of each trained token, (trained tokens,) in nats, in the order of `batch["predicting"]`; no gradients."""
    inputs, targets, rows = _split(batch)
    head = bare(model).get_output_embeddings()
    with torch.inference_mode():
        hidden = last_hidden(model, bare(model).get_decoder(), inputs).flatten(0, 1)[rows]
        row_targets = targets.flatten()[rows]
        parts = [
            torch.nn.functional.cross_entropy(
                head(hidden[n : n + LOSS_CHUNK]).float(), row_targets[n : n + LOSS_CHUNK], reduction="none"
            )
            for n in range(0, len(rows), LOSS_CHUNK)
        ]
    return torch.cat(parts)


def answer_likelihoods(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Log-likelihoods in nats, float32, that can be differentiated: of each of a batch's a answers, and last, that of the
    trained tokens of chosen answers' prompts: (a + 1,).

    Args:
        model: as for `summed_loss`.
        batch: from `nybble.data.judged_batches.JudgedCollator`, on the model's device.
    """
    inputs = {name: batch[name] for name in MODEL_ARGUMENTS if name in batch}
    head, rows, targets = bare(model).get_output_embeddings(), batch["predicting"], batch["targets"]
    if is_plain(head):
        hidden = last_hidden(model, bare(model).get_decoder(), inputs).flatten(0, 1)
        losses = cross_entropies(hidden[rows], head.weight, targets)
    else:  # the head has an adapter of its own
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[rows]
        losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    # In float64, so that the order in which a GPU adds them does not show.
    sums = torch.zeros(len(batch["answer_tokens"]) + 1, dtype=torch.float64, device=losses.device)
    return -sums.index_add(0, batch["answers"], losses.double()).float()


def bare(model: torch.nn.Module) -> PreTrainedModel:
    """The Transformers model without the wrappers of PEFT and DistributedDataParallel."""
    inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    found: PreTrainedModel = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    return found


def is_plain(head: Any) -> bool:
    """Whether a head is a frozen matrix, whose loss is computed in chunks; others compute the logits of a whole batch."""
    is_linear: bool = type(head) is torch.nn.Linear  # not a subclass, such as a quantised one
    return is_linear and head.bias is None and not head.weight.requires_grad


def _split(batch: MicroBatch) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The model's arguments, what each position predicts, and the positions that predict something."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "predicting")}
    return inputs, next_labels(batch["labels"]), batch["predicting"]
