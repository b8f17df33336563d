"""Loading artefacts as their users do, and asking them the same questions as the run."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nybble.errors import ExportError
from nybble.export.parity.plain import GreedyAnswer, generated, next_logits, own_stops
from nybble.export.parity.prompts import PLAIN
from nybble.export.parity.reference import Reference
from nybble.export.parity.verdict import Observed
from nybble.installed import module_command
from nybble.model.base.load import weights_alone
from nybble.plan.free_memory import device_memory, host_memory
from nybble.weights.on_cpu import stay_unpacked

LLAMA_CPP = "nybble.export.gguf.llama"
"""Run in a separate process: a build of llama.cpp that does not suit the processor ends with a signal, not an exception."""
OVERHEAD = 3_000_000_000  # bytes besides a model's weights on a GPU: keys and values, activations, CUDA's own
GET_LLAMA_CPP = "make llama-cpp, or pip install llama-cpp-python"


def placement_for(size: int, device: torch.device) -> dict[str, Any] | None:
    """Keyword arguments of `from_pretrained` for a model of this size: on the device, on GPU and CPU, or None if it does not fit.

    A 7B that was trained in 4 bits on a card with 12 GB takes 13.5 GB after merging.
    """
    available = host_memory().free
    if device.type != "cuda":
        return {"device_map": {"": device}} if size < available else None
    free = device_memory(device).free - OVERHEAD
    if size < free:
        return {"device_map": {"": device}}
    if size > max(free, 0) + available:
        return None
    number = device.index if device.index is not None else torch.cuda.current_device()
    return {"device_map": "auto", "max_memory": {number: max(free, 0), "cpu": available}}


def through_transformers(folder: pathlib.Path, reference: Reference, placement: Mapping[str, Any]) -> Observed:
    """Observe a merged folder with AutoModelForCausalLM and AutoTokenizer.

    Args:
        folder: the artefact.
        reference: the run's answers.
        placement: keyword arguments of `from_pretrained`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **placement).eval()
    return _observe(model, tokenizer, reference, own_stops(model), f"transformers {transformers.__version__}")


def through_peft(
    folder: pathlib.Path, base: pathlib.Path, plan: BitsAndBytesConfig | None, dtype: torch.dtype, reference: Reference,
    device: torch.device,
) -> Observed:  # fmt: skip
    """Observe an adapter folder with PeftModel on its base, quantised as the card says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extra = {} if plan is None else {"quantization_config": plan}
    if (folder / "config.json").exists():  # the run scaled RoPE
        extra["config"] = AutoConfig.from_pretrained(folder)
    with weights_alone(base) as weights:
        loaded = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, device_map={"": device}, **extra)
    stay_unpacked(loaded)  # otherwise bitsandbytes repacks the weights on a CPU, and may download a kernel from the Hub
    model = PeftModel.from_pretrained(loaded, folder).eval().get_base_model()
    settings = transformers.GenerationConfig.from_pretrained(folder)
    model.generation_config = settings
    return _observe(model, tokenizer, reference, own_stops(model), f"transformers {transformers.__version__} with PEFT")


def _observe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: Reference, stops: set[int], by: str
) -> Observed:
    has_template = tokenizer.chat_template is not None
    prompts = [
        _templated(tokenizer, question.messages) if question.messages is not None and has_template else None
        for question in reference.questions
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = generated(model, [question.prompt for question in reference.questions], pad)
    starts = [len(question.prompt) for question in reference.questions]
    logits = next_logits(model, reference.rows, starts)
    plain = tokenizer(PLAIN, split_special_tokens=True)["input_ids"]
    return Observed(by, has_template, prompts, answers, logits, frozenset(stops), plain)


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    return ids


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed; it is not imported for this."""
    return importlib.util.find_spec("llama_cpp") is not None


def through_llama_cpp(file: pathlib.Path, reference: Reference, new_tokens: int) -> Observed:
    """Observe a GGUF file with llama-cpp-python in a child process.

    Raises:
        ExportError: the child failed; with its last line of output.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = pathlib.Path(folder) / "job.json", pathlib.Path(folder) / "result.npz"
        questions = [
            {"messages": question.messages, "prompt": question.prompt, "row": row}
            for question, row in zip(reference.questions, reference.rows, strict=True)
        ]
        settings = {"file": str(file), "result": str(result), "new_tokens": new_tokens, "end": reference.end_id}
        job.write_text(json.dumps({**settings, "questions": questions}), encoding="utf-8")
        child = subprocess.run(module_command(LLAMA_CPP, str(job)), capture_output=True, text=True, check=False)
        if child.returncode:
            lines = child.stderr.strip().splitlines()
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
            raise ExportError(
                f"llama.cpp cannot load or run {file.name}: it ended with {how}{': ' + lines[-1] if lines else ''}",
                fix="if it is a signal, build llama-cpp-python for this processor: make llama-cpp",
            )
        with numpy.load(result) as arrays:
            report = json.loads(str(arrays["report"]))
            logits = [torch.from_numpy(arrays[f"logits{n}"].astype(numpy.float32)) for n in range(len(questions))]
    answers = [GreedyAnswer(ids, ended) for ids, ended in report["answers"]]
    return Observed(report["by"], report["template"], report["prompts"], answers, logits, frozenset(report["stops"]))
