"""A GGUF file asked by llama.cpp: python -m nybble.export.llama JOB.json.

A process of its own, and the one module that knows llama-cpp-python. Prompts of conversations go through the file's own template
and tokenizer, by the functions that llama-cpp-python's create_chat_completion calls.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import llama_cpp
import numpy
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def main(job: pathlib.Path) -> None:
    """Answer a job: a file, and questions as loaders.py writes them."""
    asked = json.loads(job.read_text(encoding="utf-8"))
    questions = asked["questions"]
    longest = max(len(question["row"]) + asked["new_tokens"] for question in questions)
    model = llama_cpp.Llama(asked["file"], n_ctx=longest, n_batch=512, logits_all=True, verbose=False, seed=0)
    formatter = _formatter(model)
    stops = [token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(_vocabulary(model), token)]
    arrays: dict[str, Any] = {}
    prompts, answers = [], []
    for number, question in enumerate(questions):
        start = len(question["prompt"])
        prompts.append(_prompt(model, formatter, question["messages"]) if formatter and question["messages"] else None)
        model.reset()
        model.eval(question["row"])
        arrays[f"logits{number}"] = numpy.array(model.scores[start - 1 : len(question["row"]) - 1], dtype=numpy.float32)
        answers.append(_greedy(model, question["prompt"], set(stops), asked["new_tokens"]))
    told = {
        "by": f"llama-cpp-python {llama_cpp.__version__}",
        "template": formatter is not None,
        "prompts": prompts,
        "answers": answers,
        "stops": stops,
    }
    numpy.savez(asked["result"], told=numpy.array(json.dumps(told)), **arrays)


def _vocabulary(model: llama_cpp.Llama) -> Any:
    return llama_cpp.llama_model_get_vocab(model.model)


def _formatter(model: llama_cpp.Llama) -> Jinja2ChatFormatter | None:
    """The file's own chat template, as create_chat_completion uses it."""
    template = model.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    words = [
        model._model.token_get_text(token) if token >= 0 else "" for token in (model.token_eos(), model.token_bos())
    ]
    return Jinja2ChatFormatter(
        template=template, eos_token=words[0], bos_token=words[1], stop_token_ids=[model.token_eos()]
    )


def _prompt(model: llama_cpp.Llama, formatter: Jinja2ChatFormatter, messages: Any) -> list[int]:
    rendered = formatter(messages=messages)
    ids: list[int] = model.tokenize(rendered.prompt.encode(), add_bos=not rendered.added_special, special=True)
    return ids


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
