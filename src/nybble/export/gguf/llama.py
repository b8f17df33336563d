"""Run a GGUF file in llama.cpp: python -m nybble.export.gguf.llama JOB.json.

This is a separate process, and the only module that knows llama-cpp-python. Conversations go through create_chat_completion, as
they do for its users.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import llama_cpp
import numpy


class PromptSeen(Exception):  # noqa: N818
    """Raised instead of an answer, with the tokens of a conversation's prompt."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__()
        self.ids = ids


class PromptReader(llama_cpp.Llama):  # type: ignore[misc]
    """A model that returns the prompt of create_chat_completion, not an answer; some templates have a special function for it."""

    def create_completion(self, *_: Any, prompt: list[int], **__: Any) -> Any:
        """Called by create_chat_completion after tokenising."""
        raise PromptSeen(prompt)

    def prompt_of(self, messages: Any) -> list[int]:
        """The tokens of a conversation."""
        try:
            self.create_chat_completion(messages)
        except PromptSeen as seen:
            return list(map(int, seen.ids))
        raise AssertionError("create_chat_completion does not call create_completion any more")


def main(job: pathlib.Path) -> None:
    """Run a job: a GGUF file, and questions in the form that loaders.py writes."""
    task = json.loads(job.read_text(encoding="utf-8"))
    questions = task["questions"]
    longest = max(len(question["row"]) + task["new_tokens"] for question in questions)
    model = PromptReader(task["file"], n_ctx=longest, n_batch=512, logits_all=True, verbose=False, seed=0)
    has_template = "tokenizer.chat_template" in model.metadata
    stops = [token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(_vocabulary(model), token)]
    arrays: dict[str, Any] = {}
    prompts, answers = [], []
    for number, question in enumerate(questions):
        start = len(question["prompt"])
        prompts.append(model.prompt_of(question["messages"]) if has_template and question["messages"] else None)
        model.reset()
        model.eval(question["row"])
        arrays[f"logits{number}"] = numpy.array(model.scores[start - 1 : len(question["row"]) - 1], dtype=numpy.float32)
        answers.append(_greedy(model, question["prompt"], set(stops), task["new_tokens"]))
    report = {
        "by": f"llama-cpp-python {llama_cpp.__version__}",
        "template": has_template,
        "prompts": prompts,
        "answers": answers,
        "stops": stops,
    }
    numpy.savez(task["result"], report=numpy.array(json.dumps(report)), **arrays)


def _vocabulary(model: llama_cpp.Llama) -> Any:
    return llama_cpp.llama_model_get_vocab(model.model)


def _greedy(model: llama_cpp.Llama, prompt: list[int], stops: set[int], limit: int) -> tuple[list[int], bool]:
    model.reset()
    ids: list[int] = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token in stops:
            return ids, True
        ids.append(int(token))
        if len(ids) == limit:
            break
    return ids, False


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
