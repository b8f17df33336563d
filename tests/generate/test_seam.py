"""Everything that makes tokens goes through nybble.generate: nobody else calls generate or imports what generates."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "nybble"
# What Transformers generates with. GenerationConfig is not among them: it is a file beside a model's weights.
CLASSES = {
    "Cache", "DynamicCache", "GenerationMixin", "LogitsProcessor", "LogitsProcessorList", "StaticCache", "StoppingCriteria",
    "StoppingCriteriaList", "TextGenerationPipeline", "TextIteratorStreamer", "TextStreamer", "pipeline",
    "ContinuousBatchingConfig", "ContinuousBatchingManager",
}  # fmt: skip
CALLS = {"generate", "generate_batch", "init_continuous_batching", "create_completion", "prepare_inputs_for_generation"}
EXCEPTIONS = {
    "export/parity/plain.py": "an artefact answers by its user's own generate: a check of nybble by nybble would not be one",
    "export/gguf/llama.py": "llama.cpp's own loop, in a process of its own",
}
# lm-eval's generation tasks call generate inside lm-eval (HFLM), not in nybble: their scores are those of its users.


def offences(source: str) -> list[str]:
    """Lines of a file that make tokens by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            found.append(f"{node.lineno}: .{node.func.attr}(")
        elif isinstance(node, ast.Import):
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if is_generation(alias.name)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            found += [
                f"{node.lineno}: {alias.name}"
                for alias in node.names
                if alias.name in CLASSES or is_generation(f"{node.module}.{alias.name}")
            ]
        elif isinstance(node, ast.Attribute) and node.attr in CLASSES and ast.unparse(node.value) == "transformers":
            found.append(f"{node.lineno}: transformers.{node.attr}")
    return found


def is_generation(module: str) -> bool:
    return module.startswith(("transformers.generation", "transformers.pipelines", "transformers.cache_utils"))


def test_only_generate_generates_tokens():
    made = {file.relative_to(SOURCE).as_posix(): offences(file.read_text()) for file in SOURCE.rglob("*.py")}
    outside = {name: lines for name, lines in made.items() if lines and not name.startswith("generate/")}
    assert outside.keys() == EXCEPTIONS.keys(), outside
    assert any(lines for name, lines in made.items() if name.startswith("generate/")), "the walk sees the seam itself"


@pytest.mark.parametrize(
    "source",
    [
        "model.generate(ids)",
        "self.answerer.model.generate(**inputs)[0]",
        "from transformers import AutoTokenizer, TextStreamer",
        "from transformers.generation.streamers import BaseStreamer",
        "from transformers.cache_utils import DynamicCache",
        "import transformers.pipelines",
        "import transformers\nask = transformers.pipeline('text-generation')",
    ],
)
def test_the_walk_sees(source):
    assert len(offences(source)) == 1
