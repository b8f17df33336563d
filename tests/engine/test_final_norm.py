"""The norm after the last layer: as Transformers computes it, from less memory."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nybble.engine.final_norm import FinalNorm, forward
from nybble.engine.fuse import fuse, unfuse
from nybble.errors import EngineError
from tests.engine.test_engine import DEVICE, assert_same, batch_of, gradients, llama, load  # noqa: F401


def norm_of(hidden, dtype=torch.float32):
    norm = LlamaRMSNorm(hidden, eps=1e-5).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


def passes(norm, x, change):
    x = x.detach().requires_grad_(True)
    result = norm(x)
    result.backward(change)
    return result, x.grad


@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 33), (1, 1, 6)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_it_is_transformers_norm(shape, dtype, bound):
    torch.manual_seed(0)
    x, change = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(2))
    norm = norm_of(shape[-1], dtype)
    expected = passes(norm, x, change)
    fused = FinalNorm(norm)
    assert "_Norm" in type(norm(x.detach().requires_grad_(True)).grad_fn).__name__
    for ours, theirs in zip(passes(norm, x, change), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()
    fused.remove()
    assert "forward" not in vars(norm)
    assert all(map(torch.equal, passes(norm, x, change), expected))


def test_views_and_a_graph_that_is_kept():
    norm, x = norm_of(8), torch.randn(6, 3, 8, device=DEVICE).transpose(0, 1).requires_grad_(True)
    expected = norm(x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    FinalNorm(norm)
    result = norm(x)
    for _ in range(2):
        (ours,) = torch.autograd.grad(result.square().sum(), x, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_what_it_keeps_is_its_input(monkeypatch):
    kept = []
    norm, x = norm_of(8, torch.bfloat16), torch.randn(4, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    FinalNorm(norm)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), norm.weight.data_ptr()]


@pytest.mark.parametrize("case", ["no gradients", "trained", "other type"])
def test_other_calls_are_transformers_own_to_the_bit(case):
    norm = norm_of(8, torch.float32 if case == "other type" else torch.bfloat16)
    x = torch.randn(4, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=case != "no gradients")
    norm.weight.requires_grad_(case == "trained")
    expected = norm(x)
    FinalNorm(norm)
    result = norm(x)
    assert torch.equal(result, expected)
    assert "Norm" not in type(result.grad_fn).__name__


def test_second_derivatives_are_refused():
    norm, x = norm_of(8), torch.randn(4, 8, device=DEVICE, requires_grad=True)
    FinalNorm(norm)
    with pytest.raises(EngineError, match="no second derivatives"):
        torch.autograd.grad(norm(x).sum(), x, create_graph=True)


def test_fuse_gives_it_and_unfuse_takes_it(llama, tmp_path):  # noqa: F811
    model = load(llama, "none")
    expected = gradients(model, batch_of())
    norm = model.get_base_model().model.norm
    for _ in range(2):
        fuse(model)
        assert norm.forward.__func__ is forward
    assert_same(gradients(copy.deepcopy(model), batch_of()), gradients(model, batch_of()), 1e-12)
    torch.save(model, tmp_path / "model.pt")
    again = fuse(torch.load(tmp_path / "model.pt", weights_only=False))
    assert again.get_base_model().model.norm.forward.__func__ is forward
    unfuse(model)
    assert "forward" not in vars(norm)
    assert_same(gradients(model, batch_of()), expected, 1e-12)


def test_a_forward_that_somebody_else_put_there_stays():
    norm = norm_of(8)
    norm.forward = theirs = types.MethodType(lambda self, x: x, norm)
    FinalNorm(norm).remove()
    assert norm.forward is theirs


def test_a_forward_that_was_put_over_it_stays():
    norm = norm_of(8)
    fused = FinalNorm(norm)
    norm.forward = theirs = types.MethodType(lambda self, x: x, norm)
    fused.remove()
    assert norm.forward is theirs
    del norm.forward
    fused.remove()


def test_a_copy_s_norm_is_taken_over(llama):  # noqa: F811
    model = fuse(load(llama, "none"))
    copied = fuse(copy.deepcopy(model))
    norm = copied.get_base_model().model.norm
    assert norm.forward.__self__ is norm
    unfuse(copied)
    assert "forward" not in vars(norm)
    assert "forward" in vars(model.get_base_model().model.norm)
