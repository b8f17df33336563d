"""8-bit AdamW over all adapters as a few tensors: beside bitsandbytes' own, beside float32 AdamW, saved and loaded."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from transformers import Trainer, TrainingArguments

from nybble.training.optimizer import FlatAdamW8bit, make_optimizer

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SHAPES = [
    (64, 96),
    (16, 64),
    (3, 5),
    (128, 64),
]  # one smaller than a block, so that the blocks of the next do not align


@pytest.fixture(params=[2**25, 7200], ids=["together", "two shares"], autouse=True)
def shares(request, monkeypatch):
    """How many tensors the parameters become: the last is larger than the smaller limit."""
    monkeypatch.setattr("nybble.training.optimizer.MAX_NUMBERS", request.param)
    return 1 if request.param == 2**25 else 2


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def descend(optimizer: torch.optim.Optimizer, parts: list[torch.nn.Parameter], steps: range) -> None:
    """Steps on gradients that depend on the step and the parameter only."""
    for step in steps:
        optimizer.zero_grad()
        for place, part in enumerate(parts):
            noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(100 * step + place))
            part.grad = noise.to(part.device) + part.detach()
        optimizer.step()


def test_it_follows_float32_adamw_as_closely_as_bitsandbytes_own():
    found = {}
    for name, kind in {"exact": torch.optim.AdamW, "flat": FlatAdamW8bit, "apart": AdamW8bit}.items():
        parts = parameters()
        kinds = {} if name != "apart" else {"min_8bit_size": 0}
        descend(kind(parts, **SETTINGS, **kinds), parts, range(20))
        found[name] = torch.cat([part.detach().flatten() for part in parts])
    moved = (found["exact"] - torch.cat([part.detach().flatten() for part in parameters()])).norm()
    off = {name: ((found[name] - found["exact"]).norm() / moved).item() for name in ("flat", "apart")}
    print(off)
    assert off["flat"] < 0.05
    assert off["flat"] < 1.2 * off["apart"]


def test_after_saving_and_loading_it_continues_bit_for_bit():
    parts = parameters()
    optimizer = FlatAdamW8bit(parts, **SETTINGS)
    descend(optimizer, parts, range(5))
    state = copy.deepcopy(optimizer.state_dict())
    again = [torch.nn.Parameter(part.detach().clone()) for part in parts]
    descend(optimizer, parts, range(5, 10))
    loaded = FlatAdamW8bit(again, **SETTINGS)
    loaded.load_state_dict(state)
    descend(loaded, again, range(5, 10))
    for mine, theirs in zip(parts, again, strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_of_paged_state_goes_on_without_a_gpu(tmp_path):
    """Saved tensors keep bitsandbytes' mark that CUDA may move them; its next step would."""
    parts = parameters()
    optimizer = FlatAdamW8bit(parts, **SETTINGS)
    descend(optimizer, parts, range(5))
    for state in optimizer.state.values():
        for name in ("state1", "state2"):
            state[name].is_paged, state[name].page_deviceid = True, 0
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    wrapped = FlatAdamW8bit._FSDP_WRAPPED_QUANT_STATE_KEY
    assert all(state[wrapped]["state1"].is_paged for state in saved["state"].values()), "nothing to lose"
    again = [torch.nn.Parameter(part.detach().clone()) for part in parts]
    loaded = FlatAdamW8bit(again, **SETTINGS, is_paged=True)
    with pytest.warns(UserWarning, match="not supported on CPU"):
        loaded.load_state_dict(saved)
    assert not any(hasattr(state["state1"], "is_paged") for state in loaded.state.values())
    descend(loaded, again, range(5, 10))
    for state in optimizer.state.values():
        for name in ("state1", "state2"):
            del state[name].is_paged
    descend(optimizer, parts, range(5, 10))
    for mine, theirs in zip(parts, again, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("is_paged", [True, False], ids=["to paged", "to resident"])
def test_paged_state_that_was_saved_goes_on_bit_for_bit(is_paged, place, tmp_path):
    """One process loads checkpoints on its host, several on their GPUs."""
    parts = [torch.nn.Parameter(torch.randn(size, 300, device="cuda")) for size in (400, 500)]  # 100,000 are paged

    optimizer = FlatAdamW8bit(parts, **SETTINGS, is_paged=True)
    descend(optimizer, parts, range(3))
    assert all(state["state1"].is_paged for state in optimizer.state.values())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = [torch.nn.Parameter(part.detach().clone()) for part in parts]
    descend(optimizer, parts, range(3, 6))
    loaded = FlatAdamW8bit(again, **SETTINGS, is_paged=is_paged)
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location=place, weights_only=True))
    descend(loaded, again, range(3, 6))
    for mine, theirs in zip(parts, again, strict=True):
        assert torch.equal(mine, theirs)


def test_it_reports_parameters_that_it_cannot_update():
    parts = parameters()
    optimizer = FlatAdamW8bit(parts, **SETTINGS)
    descend(optimizer, parts, range(1))
    optimizer.zero_grad()
    with pytest.raises(AssertionError, match="4 parameters have no gradient"):
        optimizer.step()
    parts[1].data = parts[1].data.clone()
    with pytest.raises(AssertionError, match="a parameter's data was replaced"):
        optimizer.step()


def test_gathered_gradients_are_those_of_the_parts(shares):
    parts = parameters()
    optimizer = FlatAdamW8bit(parts, **SETTINGS)
    for part in parts:
        part.grad = part.detach().clone()
    exact = torch.nn.utils.get_total_norm([part.grad for part in parts])
    norm = torch.nn.utils.clip_grad_norm_(optimizer.gather(), 0.5)
    assert norm == pytest.approx(exact.item(), rel=1e-6)
    assert torch.nn.utils.get_total_norm([part.grad for part in parts]) == pytest.approx(0.5, rel=1e-3)
    kept = [whole.grad for whole in optimizer.gather()]
    assert len(kept) == shares
    for whole, gradient in zip(optimizer.gather(), kept, strict=True):
        assert whole.grad is gradient, "gathered twice"
    for part in parts:  # a step that the loss scaling skipped, then new gradients
        part.grad = torch.ones_like(part)
    assert all(whole.grad.eq(1).all() for whole in optimizer.gather())
    optimizer.step()
    assert all(whole.grad is None for whole in optimizer.flat_parameters), "the gradients of all stay in memory"


def test_a_share_s_gradients_are_freed_before_the_next_is_gathered(shares, monkeypatch):
    parts = parameters()
    optimizer = FlatAdamW8bit(parts, **SETTINGS)
    for part in parts:
        part.grad = part.detach().clone()
    own, alive, cat = [weakref.ref(part.grad) for part in parts], [], torch.cat
    monkeypatch.setattr(
        "nybble.training.optimizer.torch.cat",
        lambda found: alive.append(sum(gradient() is not None for gradient in own)) or cat(found),
    )
    optimizer.gather()
    assert alive == {1: [4], 2: [4, 1]}[shares]
    assert [gradient() for gradient in own] == [None] * 4


def test_no_share_is_larger_than_the_limit_and_no_parameter_is_split(shares):
    optimizer = FlatAdamW8bit(parameters(), **SETTINGS)
    sizes = [whole.numel() for whole in optimizer.flat_parameters]
    assert sizes == {1: [15375], 2: [7183, 8192]}[shares]


@pytest.mark.parametrize("dtype, fused", [("float32", True), ("bfloat16", True), ("float16", None)])
def test_a_fused_optimiser_is_not_used_where_steps_may_be_skipped(dtype, fused):
    """GradScaler calls a fused one at an overflow too, and Accelerate then takes the step for made."""
    found = make_optimizer(torch.nn.Linear(2, 2), "adamw", getattr(torch, dtype), 1e-4, 0.0)
    assert found.defaults["fused"] is fused


class Normed(torch.nn.Module):
    """Parameters of every kind that Trainer tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(3, 3)
        self.post_attention_layernorm = torch.nn.RMSNorm(3)
        self.norm = torch.nn.RMSNorm(3)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(3, 2, bias=False)})
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)


@pytest.mark.parametrize("model", [Normed(), Normed().lora_A], ids=["every kind", "an adapter"])
def test_its_state_is_that_of_trainer_s_own_so_that_older_checkpoints_load(model, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), optim="adamw_torch_fused", learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to=[]
    )
    wanted = Trainer(model, arguments).create_optimizer()
    found = make_optimizer(model, "auto", torch.float32, 1e-3, 0.1)
    assert type(found) is type(wanted)
    for one in (found, wanted):
        sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad).backward()
        one.step()
    assert found.state_dict()["param_groups"] == wanted.state_dict()["param_groups"]
    assert found.state_dict()["state"].keys() == wanted.state_dict()["state"].keys()
    members = [[list(map(id, group["params"])) for group in one.param_groups] for one in (found, wanted)]
    assert members[0] == members[1]


@pytest.mark.parametrize("name, paged", [("adamw_8bit", False), ("paged_adamw_8bit", True)])
def test_the_8_bit_ones_are_flat(name, paged, shares):
    model = torch.nn.ParameterList(parameters())
    found = make_optimizer(model, name, torch.float32, 1e-3, 0.1)
    assert isinstance(found, FlatAdamW8bit)
    assert (found.is_paged, len(found.flat_parameters)) == (paged, shares)
