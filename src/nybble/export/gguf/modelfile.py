"""Ollama's Modelfile, with the chat template in Go's template language.

The template is not translated: it is rendered with markers instead of the messages, and the Go template writes the text between
the markers. A template whose turns differ in form cannot be expressed like this; the Modelfile then says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nybble.data.text.rendering import render
from nybble.data.text.template import puts_bos
from nybble.errors import DataError

UNQUOTABLE = "# The run's system message contains quotes that a Modelfile cannot express: send it with each request."
MARK = "\ue0f2"  # from Unicode's private use area, so that no template uses it
IRREGULAR = (
    "# The run's chat template cannot be expressed in Go's templates: put one here, or use the file with llama.cpp."
)


def write_modelfile(source: str, tokenizer: PreTrainedTokenizerBase, template: str, end: str, system: str = "") -> str:
    """The text of a Modelfile.

    Args:
        source: the model: ./FILE.gguf, or . for a folder of safetensors.
        tokenizer: the run's tokenizer.
        template: the run's chat template, Jinja.
        end: the token that ends an answer.
        system: the system message that the run was trained with.
    """
    text = go_template(tokenizer, template)
    body = IRREGULAR if text is None else f'TEMPLATE """{text}"""'
    if system:
        body += "\n" + (UNQUOTABLE if '"""' in system or system.endswith('"') else f'SYSTEM """{system}"""')
    return f"FROM {source}\n{body}\nPARAMETER stop {json.dumps(end, ensure_ascii=False)}\n"


def go_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The chat template for Go's text/template over Ollama's .Messages, or None if it cannot be expressed."""
    one = between(tokenizer, template, ["user"])
    two = between(tokenizer, template, ["user", "assistant", "user"])
    if one is None or two is None or [two[0], two[3]] != one or not two[1].startswith(one[1]):
        return None
    begin, close = one
    gap = two[1].removeprefix(close)  # text before an answer that is not part of its prompt: Llama 2's space
    system = between(tokenizer, template, ["system", "user"])
    # Ollama puts BOS before a prompt if the tokenizer does, so then the template must not.
    bos = tokenizer.bos_token or ""
    skipped = len(bos) if puts_bos(tokenizer) and begin.startswith(bos) else 0
    lines = ['{{- $before := "" -}}', "{{- range .Messages -}}"]
    if system is not None and system[2] == close:
        lines += ['{{- if eq .Role "system" -}}', _literal(system[0][skipped:]), "{{ .Content }}", _literal(system[1])]
        lines += ['{{- else if eq .Role "user" -}}']
    else:
        lines += ['{{- if eq .Role "user" -}}']
    lines += [
        '{{- if eq $before "" -}}',
        _literal(begin[skipped:]),
        '{{- else if eq $before "assistant" -}}',
        _literal(two[2]),
    ]
    lines += [
        "{{- end -}}",
        "{{ .Content }}",
        _literal(close),
        '{{- else if eq .Role "assistant" -}}',
        _literal(gap),
        "{{ .Content }}",
    ]
    lines += ["{{- end -}}", "{{- $before = .Role -}}", "{{- end -}}"]
    return "".join(lines)


def _literal(text: str) -> str:
    """Text as a Go literal, including white space."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def between(tokenizer: PreTrainedTokenizerBase, template: str, roles: Sequence[str]) -> list[str] | None:
    """What a template writes before, between and after the messages; None if it refuses these roles."""
    messages = [{"role": role, "content": MARK} for role in roles]
    try:
        text = render(tokenizer, "of the run", template, messages, generation=True)
    except DataError:
        return None
    pieces = text.split(MARK)
    return pieces if len(pieces) == len(roles) + 1 else None
