"""A frozen reference beside the model in training: the base with the adapter off, or an earlier adapter, as DPO needs it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from nybble.engine.fuse import fuse, fusion
from tests.conftest import write_llama
from tests.engine.test_engine import DEVICE, batch_of, load

BATCH = {"input_ids": batch_of()["input_ids"]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("reference") / "llama", num_hidden_layers=2, rms_norm_eps=1e-5)


def logits(model):
    return model(**BATCH).logits


def policy_step(model, optimizer, reference=lambda: None):
    """One step, in which the reference is asked before the model, and between its forward and its backward."""
    asked = [reference()]
    loss = torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), BATCH["input_ids"][:, 1:].flatten())
    asked.append(reference())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), asked


def trained(model):
    return [part for part in model.parameters() if part.requires_grad]


@pytest.mark.parametrize("policy", ["auto", "keep-all", "drop-qkv", "host"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_base_is_the_reference_between_the_steps_of_training(llama, quant, policy):
    model = load(llama, quant, lora_dropout=0.1)
    with model.disable_adapter(), torch.no_grad():
        plain = logits(model)
    alone = fuse(copy.deepcopy(model), policy)
    fuse(model, policy)

    def reference():
        with torch.no_grad(), model.disable_adapter():
            return logits(model)

    optimizers = [torch.optim.AdamW(trained(each), lr=1e-2) for each in (model, alone)]
    base = reference()
    torch.testing.assert_close(base, plain, rtol=1e-6, atol=1e-6)
    for step in range(3):
        losses = []
        for each, optimizer, asked_for in zip((model, alone), optimizers, (reference, lambda: None), strict=True):
            torch.manual_seed(step)
            loss, asked = policy_step(each, optimizer, asked_for)
            losses.append(loss)
            assert all(answer is None or torch.equal(answer, base) for answer in asked), "the base, bit for bit"
        assert losses[0] == losses[1], "the reference leaves the model in training as it was"
    assert len(trained(model)) == 28
    for ours, theirs in zip(trained(model), trained(alone), strict=True):
        assert torch.equal(ours, theirs)
    model.eval()
    with torch.no_grad():
        assert (logits(model) - base).abs().max() > 1e-2
    assert (fusion(model).fused, fusion(model).fallen_back) == (2, 0)


def test_with_gradients_a_disabled_adapter_is_the_base_and_gets_none(llama):
    model = load(llama, "none")
    with model.disable_adapter():
        plain = logits(model)
        fuse(model, "drop-qkv")
        x = model.get_input_embeddings()(BATCH["input_ids"]).requires_grad_()
        out = model(inputs_embeds=x).logits
        torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)
        out.sum().backward()
    assert x.grad.norm() > 0
    assert all(part.grad is None for name, part in model.named_parameters() if "lora" in name)
    logits(model).sum().backward()
    assert all(part.grad is not None for name, part in model.named_parameters() if "lora" in name)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_an_earlier_adapter_is_the_reference(llama, quant):
    """PEFT lets `set_adapter` train what it activates: the reference is frozen by no_grad, and then by the switch back."""
    model = load(llama, quant)
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model.add_adapter("earlier", LoraConfig(**settings))
    model.to(DEVICE)

    def reference():
        model.set_adapter("earlier")
        with torch.no_grad():
            answer = logits(model)
        model.set_adapter("default")
        return answer

    plain = reference()
    alone = fuse(copy.deepcopy(model))
    alone.set_adapter("default")
    fuse(model)
    first = reference()
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=1e-5)
    optimizers = [torch.optim.AdamW(trained(each), lr=1e-2) for each in (model, alone)]
    for _ in range(3):
        ours, asked = policy_step(model, optimizers[0], reference)
        theirs, _ = policy_step(alone, optimizers[1])
        assert ours == theirs
        assert all(torch.equal(answer, first) for answer in asked)
    assert (fusion(model).fused, fusion(model).fallen_back) == (2, 0)
