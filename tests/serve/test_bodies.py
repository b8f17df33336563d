"""The chunks of a stream, which are made once for each token."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from nybble.serve.answers import Choice, Piece
from nybble.serve.bodies import CompletionReply, event
from nybble.serve.chat_request import ChatRequest
from nybble.serve.completion_request import CompletionRequest
from nybble.serve.protocol import parse

TEXTS = ["a", ' "quoted"\\', "line\nline\t\x00", "\ue000", '"\ue000"', "\u2028 \u00e9 \u597d \U0001f600", "\u007f"]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("name", ["run", "\ue000", '"\ue000"'])
def test_a_chunk_around_text_is_the_one_that_json_makes(kind, usage, name):
    body = {"model": name, "stream": True, "stream_options": {"include_usage": usage}, "n": 2}
    asked = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatRequest else {"prompt": "x"}
    parsed = parse(kind, json.dumps(body | asked).encode())
    job = SimpleNamespace(id="x-1", created=5, model=SimpleNamespace(name=name), parsed=parsed)
    reply = CompletionReply(job)
    for text in TEXTS:
        for index in (0, 1):
            choice = Choice(index, None, None, [])
            choice.text += text
            piece = Piece(choice, text, ())
            assert reply.piece(piece) == [event(chunk) for chunk in reply._chunks(piece)]
            choice.finish = "stop"
            assert reply.piece(piece) == [event(chunk) for chunk in reply._chunks(piece)]
            assert all(b'"stop"' in sent for sent in reply.piece(piece)[-1:])
