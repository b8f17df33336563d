"""The seam itself, on a tiny Llama: what both generators do alike."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
from transformers import LlamaForCausalLM

from nybble.generate.continuous import Continuous
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.padded import Padded
from nybble.generate.request import BusyError, GenerationError, Request, complete
from nybble.generate.worker import Worker

NOTHING = frozenset()
PROMPTS = [[1, 40, 50, 60], [1, 40, 50], [1, 40, 50, 60, 70, 80, 90], [5, 6], [1, 40, 50, 61, 62]]


@pytest.fixture(scope="module")
def model(peaky_llama):
    return LlamaForCausalLM.from_pretrained(peaky_llama, dtype=torch.float32).eval()


def decoder(model, pad_id, **options):
    return make_decoder(model, **options)


@pytest.fixture(params=[Padded, Continuous, decoder])
def make(request, model):
    """Makes a generator of either kind; all are closed in the end.

    Each gets a copy of the model: continuous batching switches it to paged attention for good, and `greedy` needs it as it was.
    """
    made = []

    def build(**options):
        made.append(request.param(copy.deepcopy(model), 0, **options))
        return made[-1]

    yield build
    for generator in made:
        generator.close()


@pytest.fixture
def generator(make):
    return make()


def ask(prompt, tokens=12, stops=NOTHING, **more):
    return Request(prompt, tokens, None, frozenset(stops), **more)


def greedy(model, prompt, tokens=12):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


class Heard:
    """A sink that remembers who called it."""

    def __init__(self, on_token=lambda: None):
        self.ids, self.finish, self.error, self.threads = [], [], [], set()
        self.on_token = on_token

    def begin(self, cached, prompt):
        pass

    def put(self, token):
        self.ids.append(token.id)
        self.threads.add(threading.current_thread())
        self.on_token()

    def end(self, finish):
        self.finish.append(finish)

    def fail(self, error):
        self.error.append(error)


def test_each_prompt_is_answered_as_the_model_answers_it_alone(generator, model):
    requests = [ask(prompt, 12) for prompt in PROMPTS * 10]  # more than are computed at once
    answers = complete(generator, requests)
    expected = {tuple(prompt): greedy(model, prompt) for prompt in PROMPTS}
    assert [answer.ids for answer in answers] == [expected[tuple(request.prompt)] for request in requests]
    assert {answer.finish for answer in answers} == {"length"}
    assert generator.step() is False


def test_requests_of_one_batch_end_each_at_their_own_stop_and_length(generator, model):
    whole = greedy(model, PROMPTS[0])
    stop = whole[4]
    first = whole.index(stop)
    requests = [ask(PROMPTS[0]), ask(PROMPTS[0], stops={stop}), ask(PROMPTS[0], 3), ask(PROMPTS[0], first + 1, {stop})]
    answers = complete(generator, requests)
    assert [answer.ids for answer in answers] == [whole, whole[: first + 1], whole[:3], whole[: first + 1]]
    assert [answer.finish for answer in answers] == ["length", "stop", "length", "stop"]


def test_the_models_own_eos_token_ends_nothing(generator, model):
    """Only a request's stop ids do: the tiny model's configuration says 2."""
    end = greedy(model, PROMPTS[0])[2]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, end
    try:
        (answer,) = complete(generator, [ask(PROMPTS[0])])
    finally:
        model.generation_config.eos_token_id = before
    assert len(answer.ids) == 12


def test_on_token_gets_each_token_with_the_number_of_its_request(generator):
    told = []
    answers = complete(generator, [ask(prompt, 5) for prompt in PROMPTS], lambda n, token: told.append((n, token.id)))
    for number, answer in enumerate(answers):
        assert [token_id for n, token_id in told if n == number] == answer.ids
    assert complete(generator, []) == []


def test_a_request_that_is_cancelled_stops_and_the_others_do_not(generator, model):
    handles = []
    sinks = [Heard(), Heard(lambda: len(sinks[1].ids) == 3 and handles[1].cancel()), Heard()]
    handles += generator.submit([ask(PROMPTS[0], 40), ask(PROMPTS[1], 300), ask(PROMPTS[2], 40)], sinks)
    handles[2].cancel()  # before it begins
    while generator.step():
        pass
    assert sinks[1].finish == sinks[2].finish == ["cancelled"]
    assert 3 <= len(sinks[1].ids) < 300
    assert sinks[2].ids == []
    assert (sinks[0].ids, sinks[0].finish) == (greedy(model, PROMPTS[0], 40), ["length"])


def test_a_deadline_ends_an_answer_with_what_it_has(generator):
    now = time.monotonic()
    late, soon, never = complete(
        generator, [ask(PROMPTS[0], deadline=now - 1), ask(PROMPTS[0], 400, deadline=now + 0.05), ask(PROMPTS[0])]
    )
    assert (late.ids, late.finish) == ([], "deadline")
    assert soon.finish == "deadline"
    assert len(soon.ids) < 400
    assert soon.ids[:12] == never.ids[: len(soon.ids)]
    assert never.finish == "length"


def test_sampling_without_a_seed_differs_and_a_nucleus_of_nothing_is_greedy(generator, model):
    answers = complete(generator, [ask(PROMPTS[0], temperature=3.0) for _ in range(6)])
    assert len({tuple(answer.ids) for answer in answers}) > 3
    (only,) = complete(generator, [ask(PROMPTS[0], temperature=2.0, top_k=1)])
    assert only.ids == greedy(model, PROMPTS[0])


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request([], 3, None, NOTHING), "no tokens"),
        (Request([1, 400], 3, None, NOTHING), "token 400, but the model's ids go from 0 to 399"),
        (Request([1, -1], 3, None, NOTHING), "token -1"),
        (Request([1], -1, None, NOTHING), "max_tokens is -1"),
        (Request([1], 3, "other", NOTHING), "no adapter 'other'"),
    ],
)
def test_an_invalid_request_is_refused_together_with_the_others_submitted_with_it(generator, request_, why):
    sink = Heard()
    with pytest.raises(GenerationError, match=why):
        generator.submit([ask(PROMPTS[0]), request_], [sink, Heard()])
    assert generator.step() is False
    assert sink.ids == []


def test_a_full_queue_refuses_all_or_none(make):
    generator = make(queue=40)
    generator.submit([ask(PROMPTS[0], 2)] * 38, [Heard() for _ in range(38)])
    with pytest.raises(BusyError) as caught:
        generator.submit([ask(PROMPTS[0], 2)] * 60, [Heard() for _ in range(60)])
    assert caught.value.seconds >= 1
    while generator.step():
        pass
    assert len(complete(generator, [ask(PROMPTS[0], 2)] * 40)) == 40


def test_closing_cancels_what_waits_and_refuses_what_comes(generator):
    sink = Heard()
    generator.submit([ask(PROMPTS[0], 400)], [sink])
    generator.close()
    assert (sink.finish, sink.error) == (["cancelled"], [])
    with pytest.raises(GenerationError, match="was closed"):
        generator.submit([ask(PROMPTS[0])], [Heard()])
    generator.close()


def test_ctrl_c_cancels_and_the_next_answer_is_whole(generator, model):
    def interrupt(number, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(generator, [ask(PROMPTS[0], 300)] * 40, interrupt)
    (answer,) = complete(generator, [ask(PROMPTS[0])])
    assert answer.ids == greedy(model, PROMPTS[0])


def test_a_worker_answers_in_its_own_thread_and_ends_with_what_it_serves(generator, model):
    worker = Worker(generator)
    sinks = [Heard() for _ in PROMPTS]
    worker.submit([ask(prompt) for prompt in PROMPTS], sinks)
    until = time.monotonic() + 30
    while not all(sink.finish for sink in sinks):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert [sink.ids for sink in sinks] == [greedy(model, prompt) for prompt in PROMPTS]
    assert {thread for sink in sinks for thread in sink.threads} == {worker.thread}
    long = Heard()
    worker.submit([ask(PROMPTS[0], 500)], [long])
    while not long.ids:
        assert time.monotonic() < until
        time.sleep(0.01)
    worker.close()
    assert long.finish == ["cancelled"]
    assert not worker.thread.is_alive()
