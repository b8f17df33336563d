"""Where people look past the usual batch, a fused model gives what a plain one gives, or says that it does not."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import DynamicCache

from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.engine.loss import summed_cross_entropy
from nybble.errors import EngineError
from nybble.plan.policies import LADDER
from tests.conftest import write_llama
from tests.engine.test_engine import DEVICE, assert_same, batch_of, gradients, load

LENGTH = 17
SPANS = {
    "right": [(0, 17), (0, 9), (0, 1)],
    "left": [(0, 17), (8, 17), (16, 17)],
    "both": [(3, 12), (0, 17), (5, 6)],
    "an empty row": [(0, 17), (17, 17), (2, 15)],
    "nothing but padding": [(17, 17)],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Three layers, grouped heads, and attention that is not flat."""
    return write_llama(
        tmp_path_factory.mktemp("plain") / "llama", num_hidden_layers=3, initializer_range=0.15, rms_norm_eps=1e-5
    )


@pytest.fixture(scope="module")
def plain(llama):
    return load(llama, "none")


@pytest.fixture(scope="module")
def fused(plain):
    return fuse(copy.deepcopy(plain))


def padded(spans, length=LENGTH):
    """A batch whose labels are trained everywhere, padding included."""
    batch = batch_of(len(spans), length)
    mask = torch.zeros_like(batch["input_ids"])
    for row, (begin, end) in enumerate(spans):
        mask[row, begin:end] = 1
    batch["input_ids"][mask == 0] = 2
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone(), "attention_mask": mask}


def adapters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_like(ours, theirs):
    """`assert_same` where a gradient may be as good as zero: padding that sees one token, or none, weighs nothing."""
    most = max(gradient.norm() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * most, name
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()


@pytest.mark.parametrize("policy", ["keep-all", "drop-qkv", "layer-input"])
@pytest.mark.parametrize("kind", SPANS)
def test_padding_is_as_plain_where_its_labels_are_trained(plain, kind, policy):
    model, batch = fuse(copy.deepcopy(plain), policy), padded(SPANS[kind])
    assert_like(gradients(model, batch), gradients(plain, batch))
    assert fusion(model).fused == 3
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(sorted), min_size=1, max_size=5))
def test_padding_of_any_rows(plain, fused, spans):
    batch = padded(spans)
    assert_like(gradients(fused, batch), gradients(plain, batch))
    assert fusion(fused).fused == 3


def test_a_mask_without_padding_costs_nothing(fused):
    batch = padded([(0, LENGTH)] * 2)
    del batch["attention_mask"]
    expected = gradients(fused, batch)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert gradients(fused, batch)[0] == expected[0]


def test_a_layer_that_falls_back_sees_the_same_padding(plain):
    model, batch = copy.deepcopy(plain), padded(SPANS["both"])
    attention = model.get_base_model().model.layers[1].self_attn
    attention.o_proj.base_layer.bias = torch.nn.Parameter(torch.ones(64, device=DEVICE), requires_grad=False)
    expected = gradients(model, batch)
    assert_same(gradients(fuse(model), batch), expected)
    assert (fusion(model).fused, fusion(model).fallen_back) == (2, 1)


def test_padding_does_not_hide_positions(plain, fused):
    batch = padded(SPANS["left"])
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_same(gradients(fused, batch), gradients(plain, batch))
    assert fusion(fused).fused == 3


@pytest.mark.parametrize("embedded", [False, True])
def test_masks_with_holes_and_masks_of_four_dimensions_fall_back_with_a_reason(plain, fused, embedded):
    batch = padded(SPANS["right"])
    if embedded:
        batch["inputs_embeds"] = plain.get_input_embeddings()(batch.pop("input_ids")).detach()
    batch["attention_mask"][0, 4] = 0
    assert_same(gradients(fused, batch), gradients(plain, batch))
    print(fusion(fused).describe())
    assert "3 not fused: an attention mask with holes between real tokens" in fusion(fused).describe()
    whole = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril()
    whole[:, :, 5:, 3] = False
    batch["attention_mask"] = whole
    assert_same(gradients(fused, batch), gradients(plain, batch))
    print(fusion(fused).describe())
    assert "3 not fused: an attention mask other than padding" in fusion(fused).describe()


@pytest.mark.parametrize("kind", ["right", "left", "both"])
def test_generation_without_a_cache_from_padded_prompts(plain, kind):
    model, batch = fuse(copy.deepcopy(plain)).eval(), padded(SPANS[kind])
    plain = copy.deepcopy(plain).eval()
    words = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**prompt, **words), plain.generate(**prompt, **words))
    if kind == "left":
        assert fusion(model).fused == 3


KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"use_dora": True},
    "replicated layers": {"layer_replication": [[0, 2], [1, 3]], "target_modules": ["up_proj", "down_proj"]},
}


@pytest.mark.filterwarnings("ignore:Adapter other was active which is now deleted")
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_s_own_tests_do_to_a_model_with_padding_on_the_right(llama, kind):
    """Every logit of every row, as their masks leave them."""
    batch = {name: part for name, part in padded([(0, 5), (0, 4)], 5).items() if name != "labels"}

    def life(model):
        seen = {}

        def look(name, **words):
            with torch.no_grad():
                seen[name] = model(**{**batch, "use_cache": False, **words}).logits

        model.eval()
        look("adapted")
        embedded = model.get_input_embeddings()(batch["input_ids"])
        seen["embedded"] = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits.detach()
        with model.disable_adapter():
            look("disabled")
        model.merge_adapter()
        look("merged")
        model.unmerge_adapter()
        look("unmerged")
        torch.manual_seed(2)
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        model.set_adapter("other")
        look("other")
        if kind != "DoRA":
            look("a row each", adapter_names=["default", "__base__"])
            model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type="linear")
            model.set_adapter("both")
            look("weighted")
        model.delete_adapter("other")
        model.set_adapter("default")
        look("one deleted")
        seen["generated"] = model.generate(**batch, max_new_tokens=3, use_cache=False, pad_token_id=0).float()
        model = model.merge_and_unload()
        look("unloaded")
        return seen

    adapted = load(llama, "none", **KINDS[kind])
    expected, ours = life(copy.deepcopy(adapted)), life(fuse(copy.deepcopy(adapted)))
    assert ours.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(
            ours[name], logits, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert (expected["adapted"] - expected["disabled"]).abs().max() > 1e-2
    assert (expected["adapted"] - expected["other"]).abs().max() > 1e-2


def together(*tasks, rounds=8):
    """Every task in a thread of its own, so many times, all beginning at once; what went wrong is raised."""
    barrier, failed = threading.Barrier(len(tasks)), []

    def go(task):
        try:
            barrier.wait()
            for _ in range(rounds):
                task()
        except (AssertionError, RuntimeError, EngineError) as error:
            failed.append(error)

    threads = [threading.Thread(target=go, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def answer(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def slopes(model, batch):
    """The adapters' gradients, apart from what other threads add up in `grad`."""
    return torch.autograd.grad(model(**batch).loss, adapters(model))


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_threads_that_call_one_model_get_its_logits(llama, quant):
    model = fuse(load(llama, quant)).eval()
    batches = [batch_of(4, 51), batch_of(3, 20, seed=1), padded([(0, 30), (7, 51)], 51)]
    alone = [answer(model, batch) for batch in batches]

    def same(batch, expected):
        return lambda: torch.testing.assert_close(answer(model, batch), expected, rtol=1e-5, atol=1e-5)

    together(*(same(batch, expected) for batch, expected in zip(batches, alone, strict=True)))


@pytest.mark.parametrize("policy", ["auto", "layer-input", "host"])
def test_threads_that_train_one_model_get_its_gradients_while_another_asks(llama, policy):
    model = fuse(load(llama), policy)
    for _ in range(2):  # past the first step, where weights begin to stay dequantised
        gradients(model, batch_of())
        model.zero_grad()
    batches = [batch_of(4, 51), padded(SPANS["both"])]
    alone, asked = [slopes(model, batch) for batch in batches], answer(model, batch_of())

    def same(batch, expected):
        def task():
            for ours, theirs in zip(slopes(model, batch), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

        return task

    together(
        *(same(batch, expected) for batch, expected in zip(batches, alone, strict=True)),
        lambda: torch.testing.assert_close(answer(model, batch_of()), asked, rtol=1e-5, atol=1e-5),
    )


def test_a_thread_that_fails_lets_the_others_go_on(fused):
    narrow = {
        "inputs_embeds": torch.zeros(2, 37, 63, device=DEVICE),
        "attention_mask": None,
    }  # a layer fails in its turn
    with pytest.raises(RuntimeError):
        together(lambda: fused(**narrow), rounds=1)
    together(lambda: gradients(fused, batch_of()), rounds=1)


@pytest.mark.parametrize("policy", [*LADDER, "auto"])
def test_backward_twice_with_retain_graph(plain, policy):
    """Two losses of one forward, one of them twice, the last without anything kept."""

    def run(model):
        model.zero_grad()
        out = model(**padded(SPANS["right"]))
        out.loss.backward(retain_graph=True)
        first = torch.autograd.grad(out.logits.square().mean(), adapters(model), retain_graph=True)
        out.logits.square().mean().backward()
        named = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
        return out.loss.item(), {**named, **{str(n): part for n, part in enumerate(first)}}

    model = fuse(copy.deepcopy(plain), policy)
    assert_same(run(model), run(plain))
    assert fusion(model).fused == 3


def test_backward_twice_with_dropout_drops_the_same(llama):
    model = fuse(load(llama, "none", lora_dropout=0.3))
    loss = model(**batch_of()).loss
    first = torch.autograd.grad(loss, adapters(model), retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(loss, adapters(model)), first, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_backward_twice_without_retain_graph_names_the_fix(plain, fused):
    for model in (plain, fused):
        loss = (
            model(**batch_of(), output_hidden_states=True).hidden_states[2].sum()
        )  # torch's own norm would say it first
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="a second time") as caught:
            loss.backward()
    print(caught.value)
    assert "through a fused layer: the first has freed what it needs; call the first with retain_graph=True" in str(
        caught.value
    )


def test_second_derivatives_are_refused(fused):
    loss = fused(**batch_of()).loss
    with pytest.raises(EngineError) as caught:
        torch.autograd.grad(loss, adapters(fused), create_graph=True)
    print(caught.value)
    assert "create_graph=True, and the fused engine has no second derivatives" in str(caught.value)
    assert "nybble.unfuse(model)" in str(caught.value)
    loss.backward()  # nothing was lost


def test_a_step_between_forward_and_backward_is_refused_as_plain_torch_refuses_it(plain):
    for model in (copy.deepcopy(plain), fuse(copy.deepcopy(plain))):
        loss = model(**batch_of()).loss
        with torch.no_grad():
            adapters(model)[3].mul_(2)
        with pytest.raises(RuntimeError) as caught:
            loss.backward()
    print(caught.value)
    assert "an adapter's weights were changed in place between a fused layer's forward and its backward" in str(
        caught.value
    )


def test_backward_of_the_chunked_loss_works_while_its_graph_is_retained():
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    loss = summed_cross_entropy(hidden, head, torch.arange(5))
    (first,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    torch.testing.assert_close(first, 3 * second)
    with pytest.raises(EngineError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward()
    torch.testing.assert_close(hidden.grad, second)
    with pytest.raises(RuntimeError, match="through the chunked loss: the first has freed what it needs"):
        loss.backward()


def cached(plain, fused, *, train, **words):
    """Losses and caches of both, with config.use_cache as from_pretrained leaves it."""
    found = []
    for model in (copy.deepcopy(plain), fuse(copy.deepcopy(fused))):
        model.config.use_cache = model.get_base_model().config.use_cache = True
        out = model.train(train)(**batch_of(2, 20), **words)
        found.append((out.loss.item(), type(out.past_key_values), fusion(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    return found[0][1], found[1][1], found[1][2]


@pytest.mark.parametrize("train", [True, False])
def test_a_requested_cache_is_built(plain, fused, train):
    theirs, ours, done = cached(plain, fused, train=train, use_cache=True)
    assert theirs is ours is DynamicCache
    print(done.describe())
    assert "3 not fused: a key-value cache is built; pass use_cache=False to stay fused" in done.describe()


def test_training_builds_no_cache_without_a_request(plain, fused):
    theirs, ours, done = cached(plain, fused, train=True)
    assert (theirs, ours, done.fused) == (DynamicCache, type(None), 3)
    theirs, ours, done = cached(plain, fused, train=False)
    assert theirs is ours is DynamicCache
    assert done.fused == 0
    with torch.no_grad():
        theirs, ours, done = cached(plain, fused, train=True)
    assert theirs is ours is DynamicCache


def test_checkpointing_keeps_transformers_from_a_cache(plain, fused):
    both = [copy.deepcopy(model) for model in (plain, fused)]
    for model in both:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    theirs, ours, done = cached(*both, train=True, use_cache=True)
    assert theirs is ours is type(None)
    assert done.fused == 3


def test_packed_rows_that_a_cache_hides_fall_back_with_a_reason(plain, fused, caplog):
    positions = torch.cat([torch.arange(11), torch.arange(9)]).repeat(2, 1).to(DEVICE)
    *_, done = cached(plain, fused, train=True, position_ids=positions)
    print(done.describe())
    assert "Transformers does not see while config.use_cache is on; pass use_cache=False" in done.describe()
    assert "decoder layers fall back to the original forward: rows are packed" in caplog.text
    *_, done = cached(plain, fused, train=True, position_ids=positions, use_cache=False)
    assert done.fused == 3


def test_attention_that_is_not_causal_falls_back_with_a_reason(plain, fused):
    assert_same(gradients(fused, batch_of(), is_causal=False), gradients(plain, batch_of(), is_causal=False))
    print(fusion(fused).describe())
    assert "3 not fused: attention is not causal (is_causal=False)" in fusion(fused).describe()
    model = fuse(copy.deepcopy(plain))
    model.get_base_model().config.is_causal = False
    expected = gradients(unfuse(copy.deepcopy(model)), batch_of())
    assert_same(gradients(model, batch_of()), expected)
    assert fusion(model).fused == 0


def test_hidden_states_of_every_layer(plain, fused):
    words = {**padded(SPANS["both"]), "output_hidden_states": True}
    for ours, theirs in zip(fused(**words).hidden_states, plain(**words).hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert fusion(fused).fused == 3
    gradients(fused, batch_of())
    assert fusion(fused).fused == 3, "Transformers leaves hooks behind"
    words["output_attentions"] = True
    fused(**words)
    assert "3 not fused: attentions are requested" in fusion(fused).describe()


def test_a_second_adapter_between_two_backwards(llama):
    """Each goes back through what its forward met."""
    model = load(llama, "none")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    def run():
        model.zero_grad()
        model.set_adapter("default")
        first = model(**batch_of()).loss
        model.set_adapter("other")
        second = model(**batch_of()).loss
        first.backward(retain_graph=True)
        (first + second).backward()
        return second.item(), {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run()
    fuse(model)
    assert_same(run(), expected)
