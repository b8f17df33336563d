"""The couplings to PEFT and bitsandbytes."""

from __future__ import annotations

from nybble.couplings.coupling import AT_START, BY_TESTS, Coupling

ADAPTERS = (
    # peft
    Coupling(
        "the state of a LoRA layer", "peft",
        tuple(f"peft.tuners.lora.layer:LoraLayer#{name}" for name in (
            "_disable_adapters", "_active_adapter", "merged_adapters", "lora_A", "lora_B", "lora_dropout", "lora_variant",
            "scaling", "fan_in_fan_out",
        )),
        ("weights/structure.py", "weights/projections.py"),
        "an adapter that is disabled, merged or a variant would be computed as a plain one",
        "each layer is checked when it is read (`weights.structure`)",
    ),
    Coupling(
        "LoRA layers by exact type", "peft", ("peft.tuners.lora:Linear4bit", "peft.tuners.lora.layer:Linear"),
        ("weights/projections.py",), "layers of a new type would not be fused", "the run's report says which and why",
    ),
    Coupling(
        "an adapter's names in a file", "peft",
        ("peft.utils.save_and_load:get_peft_model_state_dict", "peft.utils.save_and_load:load_peft_weights"),
        ("model/adapter/lora.py",),
        "tensors without a parameter", "each tensor of a file is compared with the model's",
        ("model", "state_dict", "adapter_name"),
    ),
    # bitsandbytes
    Coupling(
        "a 4-bit layer", "bitsandbytes",
        ("bitsandbytes.nn:Linear4bit#compute_dtype", "bitsandbytes.nn:Params4bit#quant_state"),
        ("weights/structure.py", "weights/projections.py"),
        "layers would compute in float32, or seem not quantised yet",
        "each layer is checked when it is read (`weights.structure`)",
    ),
    Coupling(
        "repacking on a CPU", "bitsandbytes",
        ("bitsandbytes.nn:Linear4bit#support_avx512bf16_for_cpu",), ("weights/on_cpu.py",),
        "gradients silently at a cosine of 0.07 after an evaluation", "each layer is checked before it is set",
    ),
    Coupling(
        "the mark of a repacked weight", "bitsandbytes",
        ("bitsandbytes.functional:_convert_weight_packed_for_cpu",), ("weights/frozen.py",),
        "as above, if the first guard fails", "pytest: its warning is an error", written=("packing_format_for_cpu",),
    ),
    Coupling(
        "the state of a quantised weight", "bitsandbytes",
        tuple(f"bitsandbytes.functional:QuantState#{name}" for name in (
            "absmax", "code", "blocksize", "nested", "state2", "offset", "shape", "quant_type", "dtype",
        )),
        ("weights/structure.py", "weights/frozen.py", "weights/stored.py"),
        "weights would be dequantised wrongly", "each weight's state is checked when it is read (`weights.structure`)",
    ),
    Coupling(
        "how a quantised weight is stored", "bitsandbytes",
        ("bitsandbytes.utils:unpack_tensor_to_dict", "bitsandbytes.functional:QuantState.from_dict"),
        ("weights/stored.py",),
        "sound checkpoints would be refused", "a copy is read back before it is cached", ("tensor_data",),
    ),
    Coupling(
        "the scales of LLM.int8", "bitsandbytes", ("bitsandbytes.nn:Int8Params#SCB",), ("weights/frozen.py",),
        "damaged 8-bit weights would not be noticed", "only by tests/test_couplings.py",
    ),
    Coupling(
        "the optimiser's loop", "bitsandbytes",
        ("bitsandbytes.optim:AdamW8bit.update_step", "bitsandbytes.optim:AdamW8bit#initialized",
         "bitsandbytes.optim:AdamW8bit#is_paged", "bitsandbytes.optim:AdamW8bit.get_state_buffer"),
        ("training/optimizer.py",),
        "a step would update nothing", AT_START, ("self", "group", "p", "gindex", "pindex"),
    ),
    Coupling(
        "loggers that are silenced", "bitsandbytes",
        ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"), ("cli/app.py",),
        "useless lines on the terminal", BY_TESTS, written=("bitsandbytes.autograd._functions",),
    ),
)  # fmt: skip
