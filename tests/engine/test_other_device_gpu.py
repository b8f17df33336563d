"""A model on a GPU that is not the current one, as in a script with device_map={"": 1}."""

from __future__ import annotations

import pytest
import torch

from nybble.engine.fuse import fuse, fusion
from tests.conftest import write_llama
from tests.engine.test_engine import batch_of, gradients, load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("other") / "llama", num_hidden_layers=3, rms_norm_eps=1e-5)


@pytest.mark.parametrize("weights", ["device", "host"])
@pytest.mark.parametrize("policy", ["auto", "host", "layer-input"])
def test_it_computes_where_it_is(llama, policy, weights):
    found = []
    for index in (0, 1):
        assert torch.cuda.current_device() == 0
        model = fuse(
            load(llama, device=f"cuda:{index}" if weights == "device" else "cpu").to(f"cuda:{index}"),
            policy,
            weights=weights,
        )
        batch = {name: ids.to(f"cuda:{index}") for name, ids in batch_of().items()}
        loss, parts = gradients(model, batch)
        assert fusion(model).fallen_back == 0
        model.eval()
        with torch.no_grad():
            answer = model(**batch).logits
        assert answer.get_device() == index
        found.append((loss, {name: part.cpu() for name, part in parts.items()}, answer.cpu()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][2], found[1][2])
    assert all(torch.equal(part, found[1][1][name]) for name, part in found[0][1].items())
