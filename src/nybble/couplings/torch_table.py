"""The couplings to torch and Triton."""

from __future__ import annotations

from nybble.couplings.coupling import AT_START, Coupling

TORCH = (
    # torch
    Coupling(
        "whether a backward's graph is retained", "torch",
        ("torch._C._autograd:_get_current_graph_task_keep_graph",), ("engine/graph.py",),
        "buffers that a second backward needs would be used up by the first", AT_START,
    ),
    Coupling(
        "reading parameters past their classes", "torch",
        ("torch._C:DisableTorchFunctionSubclass",), ("generate/kept.py", "weights/packed.py", "weights/watched.py"),
        "bitsandbytes' parameters answer through a Python function, 2 us each", AT_START,
    ),
    Coupling(
        "a module's own dictionaries", "torch",
        tuple(f"torch.nn:Module#{name}" for name in (
            "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
        )),
        ("weights/watched.py", "weights/structure.py", "engine/embedding.py"),
        "a changed adapter or a new hook would go unnoticed by the fused layers", "a KeyError when a model is fused",
    ),
    Coupling(
        "copies of several tensors at once", "torch", ("torch:_foreach_copy_",), ("generate/decoder/plain_step.py",),
        "answers on a CPU would be slower", AT_START,
    ),
    Coupling(
        "version counters", "torch", ("torch:Tensor._version",),
        ("engine/layer_function.py", "engine/product_fp8.py", "engine/workspace.py", "generate/kept.py", "weights/packed.py"),
        "weights changed in place between forward and backward, or between two answers, would go unnoticed", AT_START,
    ),
    Coupling(
        "the base tensor of a view", "torch", ("torch:Tensor._base",), ("training/optimizer.py",),
        "gradients would be gathered at every access", AT_START,
    ),
    Coupling(
        "what moves a module", "torch", ("torch.nn:Module._apply",),
        ("engine/embedding.py", "weights/moving.py"),
        "weights that should stay on the host would move to the device", AT_START, ("self", "fn", "recurse"),
    ),
    Coupling(
        "what DistributedDataParallel leaves alone", "torch",
        ("torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",),
        ("distributed/data_parallel.py",),
        "frozen weights would be sent to every process, and refused where they are on the host", AT_START,
    ),
    Coupling(
        "copies made by DataParallel", "torch", ("torch.nn:Module#_is_replica",), ("engine/batch_plan.py",),
        "layers on several devices would share one workspace", "only by tests/test_couplings.py",
    ),
    Coupling(
        "attention kernels with separate forward and backward", "torch",
        tuple(f"torch.ops.aten:{name}" for name in (
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
            "_flash_attention_forward", "_flash_attention_backward",
            "_efficient_attention_forward", "_efficient_attention_backward",
        )),
        ("engine/attention/cuda.py", "engine/attention/plain.py", "generate/decoder/prompt_pass.py"),
        "other arguments or results", f"{AT_START}; on CUDA each is tried on a small batch, and left out if it fails",
    ),
    Coupling(
        "the allocator's settings", "torch", ("torch._C:_accelerator_setAllocatorSettings",), ("model/device.py",),
        "segments would not grow in place: 0.13 GB more on a 7B", AT_START,
    ),
    Coupling(
        "the processor's bfloat16", "torch", ("torch.cpu:_is_avx512_bf16_supported",), ("model/device.py",),
        "the compute type on a CPU", AT_START,
    ),
    Coupling(
        "products in fp8 with a scale for each row", "torch", ("torch:_scaled_mm",), ("kernels/triton/scaled.py",),
        "fp8 products would fail: scales would be read as another kind, or the result could not be written in place",
        f"{AT_START}; tests/kernels holds products against their reference, on a GPU where there is one",
    ),
    # triton
    Coupling(
        "the end of a launch", "triton",
        ("triton.runtime.jit:JITFunction.run", "triton.compiler.compiler:CompiledKernel#packed_metadata",
         "triton.compiler.compiler:CompiledKernel#function", "triton.compiler.compiler:CompiledKernel.run"),
        ("kernels/triton/launch.py",),
        "a kernel would get other pointers than it reads", "outside these versions kernels are launched in Triton's own way",
    ),
)  # fmt: skip
