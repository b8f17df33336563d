"""The ledger against tensors that are really there."""

from __future__ import annotations

import re

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaForCausalLM

from nybble.export.gguf.quants import K_QUANTS, OWN_QUANTS
from nybble.model.adapter.lora import attach_adapter
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base, measure
from nybble.plan import file_bytes, generation_bytes, ledger
from nybble.plan.shapes import LLAMA_2_7B, ModelShape, Projection
from nybble.recipe import LoraOptions, ModelOptions
from nybble.training.optimizer import FlatAdamW8bit
from tests.conftest import ROOT, write_llama

CPU = torch.device("cpu")
LLAMAS = {
    "grouped": {},
    "every head its own": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "wider heads": {"head_dim": 40},
    "odd MLP": {"intermediate_size": 131},
}


def tables_of(state) -> int:
    nested = state.state2.code.nbytes + state.offset.nbytes if state.nested else 0
    return state.code.nbytes + nested


def absmax_of(state) -> int:
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


@pytest.mark.parametrize("double", [True, False], ids=["nested", "not nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("inputs, outputs", [(64, 64), (256, 129), (192, 576), (7, 9), (65, 3), (1, 1), (130, 257)])
def test_a_4_bit_weight_to_the_byte(inputs: int, outputs: int, kind: str, double: bool) -> None:
    layer = Linear4bit(inputs, outputs, bias=False, compress_statistics=double, quant_type=kind)
    layer.load_state_dict({"weight": torch.randn(outputs, inputs)})
    weight = layer.to(CPU).weight
    found = weight.data.nbytes, absmax_of(weight.quant_state), tables_of(weight.quant_state)
    assert ledger.stored_weight(Projection(inputs, outputs), kind, double, 2) == found


@pytest.mark.parametrize("quantization, double", [("nf4", True), ("nf4", False), ("int8", True), ("none", True)])
@pytest.mark.parametrize("llama", LLAMAS)
def test_a_loaded_base_to_the_byte(tmp_path, llama: str, quantization: str, double: bool) -> None:
    folder = write_llama(tmp_path / "llama", **LLAMAS[llama])
    options = ModelOptions(path=str(folder), quantization=quantization, double_quantization=double)
    model = load_base(find_checkpoint(str(folder)), options, torch.bfloat16, CPU, tmp_path / "cache").model
    found = ledger.base_bytes(ModelShape.from_config(model.config.to_dict()), quantization, double, 2)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inner = [layer for layer in layers if layer is not model.lm_head]
    assert found.codes == sum(layer.weight.data.nbytes for layer in inner)
    states = [layer.weight.quant_state for layer in inner if isinstance(layer, Linear4bit)]
    scales = [layer.weight.SCB for layer in inner if isinstance(layer, Linear8bitLt)]
    assert found.absmax == sum(map(absmax_of, states)) + sum(scale.nbytes for scale in scales)
    assert found.tables == sum(map(tables_of, states))
    assert found.embedding == model.get_input_embeddings().weight.nbytes
    assert found.head == (0 if "tied" in llama else model.lm_head.weight.nbytes)
    assert found.norms == sum(part.nbytes for name, part in model.named_parameters() if "norm" in name)
    uncounted = found.tables + sum(scale.nbytes for scale in scales)
    assert found.total - uncounted == measure(model).bytes


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Each tensor once: 8-bit tables are shared."""
    parts = {id(part): part for state in optimizer.state.values() for part in state.values() if torch.is_tensor(part)}
    return sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "flat"])
def test_an_optimiser_s_state_after_one_step(tmp_path, optimizer: str) -> None:
    model = attach_adapter(LlamaForCausalLM.from_pretrained(write_llama(tmp_path / "llama")), LoraOptions(r=50))
    trained = [part for part in model.parameters() if part.requires_grad]
    assert min(part.numel() for part in trained) < ledger.SMALL_STATE < max(part.numel() for part in trained)
    kinds = {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit, "flat": FlatAdamW8bit}
    stepped = kinds[optimizer](trained, lr=1e-3)
    sizes = [part.numel() for group in stepped.param_groups for part in group["params"]]
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert ledger.GRADIENT * sum(part.numel() for part in trained) == sum(part.grad.nbytes for part in trained)
    assert ledger.ADAPTER * sum(part.numel() for part in trained) == sum(part.nbytes for part in trained)
    stepped.step()
    kind = "adamw" if optimizer == "adamw" else "adamw_8bit"
    assert ledger.optimizer_state(sizes, kind) == (state_bytes(stepped), 0)
    paged = ledger.optimizer_state(sizes, "paged_adamw_8bit")
    assert paged.total == state_bytes(stepped) or optimizer == "adamw"
    assert paged.paged == sum(2 * size for size in sizes if size >= ledger.UNPAGED)
    assert (paged.paged > 0) == (optimizer == "flat"), "what is flat is large enough to be paged"


@pytest.mark.parametrize("llama", ["grouped", "every head its own", "wider heads"])
def test_a_token_in_the_cache(tmp_path, llama: str) -> None:
    model = LlamaForCausalLM.from_pretrained(write_llama(tmp_path / "llama", **LLAMAS[llama]), dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(11)[None], past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 11 * generation_bytes.kv_cache_bytes_per_token(ModelShape.from_config(model.config.to_dict()), 2)


def test_the_loss_of_llama_2() -> None:
    whole, chunk = (ledger.loss_bytes(8192, 32000, 4096, chunked=chunked) for chunked in (False, True))
    assert (whole, chunk) == (8192 * 32000 * 14, 1024 * 32000 * 2 + 4 * 8192 * 4096 * 2)
    few = ledger.loss_bytes(5, 32000, 4096, chunked=True)
    assert few == ledger.loss_bytes(256, 32000, 4096, chunked=True), "rows are filled up"


def test_a_saved_adapter_and_a_run_s_folder(tmp_path) -> None:
    model = attach_adapter(LlamaForCausalLM.from_pretrained(write_llama(tmp_path / "llama")), LoraOptions(r=4))
    trained = sum(part.numel() for part in model.parameters() if part.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert file_bytes.adapter_file_bytes(trained) == sum(part.nbytes for part in saved.values())
    assert file_bytes.checkpoint_bytes(trained) == 3 * file_bytes.adapter_file_bytes(trained)
    assert file_bytes.run_folder_bytes(trained, 2) == (4 * 12 + 4) * trained


def test_files_of_llama_2_7b() -> None:
    parameters = LLAMA_2_7B.parameters.total
    assert file_bytes.download_bytes(LLAMA_2_7B) == 2 * parameters
    assert file_bytes.export_bytes("merged", parameters) == int(2 * parameters * 1.02)
    assert file_bytes.export_bytes("adapter", parameters, adapter=1000) == 1020
    quants = {quant: file_bytes.export_bytes("gguf", parameters, [quant]) for quant in (*OWN_QUANTS, *K_QUANTS)}
    assert quants["Q8_0"] == int(parameters * 8.5 / 8 * 1.02)
    assert quants["Q4_K_M"] == int(parameters * (4.9 + 16) / 8 * 1.02), "made of an F16 that is there meanwhile"
    both = file_bytes.export_bytes("gguf", parameters, ["Q4_K_M", "Q6_K"])
    assert both < quants["Q4_K_M"] + quants["Q6_K"], "of one"
    base = ledger.base_bytes(LLAMA_2_7B, "nf4", True, 2)
    assert round(base.total / 1e9, 2) == 3.87
    assert file_bytes.cached_copy_bytes(base.total) == int(1.1 * base.total)


ONE_PLACE = {
    r"virtual_memory\(|mem_get_info": {"plan/free_memory.py"},
    r"hidden_size\W*(\])?\s*// |// .*num_attention_heads": {"plan/shapes.py"},
}


@pytest.mark.parametrize("pattern", ONE_PLACE)
def test_nobody_else_asks_for_memory_or_derives_a_head_s_size(pattern: str) -> None:
    source = ROOT / "src" / "nybble"
    files = {
        file.relative_to(source).as_posix() for file in source.rglob("*.py") if re.search(pattern, file.read_text())
    }
    assert files == ONE_PLACE[pattern]


def test_the_buffers_of_streamed_weights():
    """tests/engine/test_streamed_weights.py compares them with what is allocated."""
    layer = ledger.streamed_layer_bytes(LLAMA_2_7B, "nf4", True, 2)
    assert layer == pytest.approx(104.4e6, rel=1e-3)
    assert ledger.streamed_layer_bytes(LLAMA_2_7B, "nf4", False, 2) == pytest.approx(113.8e6, rel=1e-2)
    assert ledger.streamed_layer_bytes(LLAMA_2_7B, "none", False, 2) == 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    buffers = [ledger.streamed_bytes(LLAMA_2_7B, "nf4", True, 2, resident) for resident in (0, 30, 31, 32)]
    assert buffers == [2 * layer, 2 * layer, layer, 0]
    assert [ledger.aligned(size) for size in (0, 1, 256, 257)] == [0, 256, 256, 512]
    with pytest.raises(AssertionError, match="8-bit weights are not streamed"):
        ledger.streamed_layer_bytes(LLAMA_2_7B, "int8", False, 2)
