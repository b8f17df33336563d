"""The register. A library's new version is held against it first: `tests/test_couplings.py` walks it.

Each symbol is there in the installed version with the parameters that are relied upon, each file mentions it, and nothing private
is used in `src` without an entry.
"""

from __future__ import annotations

from nybble.couplings.coupling import Coupling

START = "checked before work begins (`unmet`)"
SUITE = "by tests/test_couplings.py alone: what is done without it is slower, or an error of Python that names it"

COUPLINGS = (
    # torch
    Coupling(
        "whether a backward's graph is kept", "torch",
        ("torch._C._autograd:_get_current_graph_task_keep_graph",), ("engine/graph.py",),
        "buffers that a second backward needs would be used up by the first", START,
    ),
    Coupling(
        "parameters asked past their classes", "torch",
        ("torch._C:DisableTorchFunctionSubclass",), ("weights/watched.py",),
        "bitsandbytes' parameters answer through a Python function, 2 us each", START,
    ),
    Coupling(
        "a module's own dictionaries", "torch",
        tuple(f"torch.nn:Module#{name}" for name in (
            "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
        )),
        ("weights/watched.py", "weights/structure.py"),
        "a changed adapter or a new hook would go unnoticed by the fused layers", "a KeyError when a model is fused",
    ),
    Coupling(
        "version counters", "torch", ("torch:Tensor._version",), ("engine/layer_function.py", "engine/workspace.py"),
        "weights changed in place between forward and backward would go unnoticed", START,
    ),
    Coupling(
        "the tensor that a view shows", "torch", ("torch:Tensor._base",), ("training/optimizer.py",),
        "gradients would be gathered at every look", START,
    ),
    Coupling(
        "what moves a module", "torch", ("torch.nn:Module._apply",), ("engine/embedding.py",),
        "an embedding that was to stay on the host would move to the device", START, ("self", "fn", "recurse"),
    ),
    Coupling(
        "copies made by DataParallel", "torch", ("torch.nn:Module#_is_replica",), ("engine/batch_plan.py",),
        "layers on several devices would share one workspace", "by tests/test_couplings.py alone",
    ),
    Coupling(
        "attention's kernels, forward and backward apart", "torch",
        tuple(f"torch.ops.aten:{name}" for name in (
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
            "_flash_attention_forward", "_flash_attention_backward",
            "_efficient_attention_forward", "_efficient_attention_backward",
        )),
        ("engine/attention/cuda.py", "engine/attention/plain.py"),
        "other arguments or results", f"{START}; on CUDA each is tried on a small batch, and left out if it fails",
    ),
    Coupling(
        "the allocator's settings", "torch", ("torch._C:_accelerator_setAllocatorSettings",), ("model/device.py",),
        "segments would not grow in place: 0.13 GB more on a 7B", START,
    ),
    Coupling(
        "the processor's bfloat16", "torch", ("torch.cpu:_is_avx512_bf16_supported",), ("model/device.py",),
        "the compute type on a CPU", START,
    ),
    # transformers
    Coupling(
        "Trainer's steps that are overridden", "transformers",
        tuple(f"transformers:Trainer.{name}" for name in (
            "_run_epoch", "_get_train_sampler", "_clip_grad_norm", "_save_checkpoint", "_load_best_model", "_prepare_inputs",
        )),
        ("training/trainer.py",),
        "an override that is never called: another order of rows, checkpoints without their mark, an unproven best one", START,
    ),
    Coupling(
        "the epoch as a keyword", "transformers", ("transformers:Trainer._run_epoch",), ("training/trainer.py",),
        "several processes would begin a resumed epoch in the first one's order", START, ("self", "epoch"),
        written=('kwargs["epoch"]',),
    ),
    Coupling(
        "a step's batches", "transformers", ("transformers:Trainer.get_batch_samples",), ("training/trainer.py",),
        "batches would be fetched while the device waits", START, ("self", "epoch_iterator", "num_batches", "device"),
    ),
    Coupling(
        "GPUs of one process", "transformers", ("transformers:TrainingArguments#_n_gpu",), ("training/arguments.py",),
        "Trainer would wrap a 4-bit model in DataParallel", "the engine refuses DataParallel",
    ),
    Coupling(
        "how long nothing has improved", "transformers",
        ("transformers:EarlyStoppingCallback#early_stopping_patience_counter",), ("training/trainer.py",),
        "a run resumed after its early stop", "an AttributeError before the first step",
    ),
    Coupling(
        "names in a checkpoint", "transformers",
        ("transformers.trainer_utils:PREFIX_CHECKPOINT_DIR", "transformers.trainer:TRAINER_STATE_NAME",
         "transformers.trainer:OPTIMIZER_NAME", "transformers.trainer:SCHEDULER_NAME"),
        ("training/checkpoints.py",),
        "no checkpoint would count as whole", "a run's first checkpoint is read back",
        written=("trainer_state.json", "optimizer.pt", "scheduler.pt"),
    ),
    Coupling(
        "the environment of chat templates", "transformers",
        ("transformers.utils.chat_template_utils:_compile_jinja_template",), ("data/text/sandbox.py",),
        "templates would render in another way than in Transformers", "an ImportError at start", ("chat_template",),
    ),
    Coupling(
        "hooks that capture outputs", "transformers",
        ("transformers.utils.output_capturing:install_output_capuring_hook",), ("weights/watched.py",),
        "layers stay unfused once hidden states were asked for", "the run's report says that layers are not fused",
        written=("transformers.utils.output_capturing",),
    ),
    Coupling(
        "what a Llama backbone hands on to its layers", "transformers",
        ("transformers.models.llama.modeling_llama:LlamaModel.forward",), ("engine/batch_plan.py",),
        "the plan of a batch does not reach the layers, which then keep their own forward", START,
        ("self", "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"),
    ),
    Coupling(
        "the parts of a Llama layer", "transformers",
        ("transformers.models.llama.modeling_llama:LlamaDecoderLayer#self_attn",
         "transformers.models.llama.modeling_llama:LlamaAttention#head_dim",
         "transformers.models.llama.modeling_llama:LlamaAttention#attention_dropout",
         "transformers.models.llama.modeling_llama:LlamaAttention#scaling",
         "transformers.models.llama.modeling_llama:LlamaRMSNorm#variance_epsilon"),
        ("engine/reader.py",),
        "a layer with more in it would be computed as without",
        "classes and names are compared; a layer that differs is not fused",
    ),
    Coupling(
        "what from_pretrained reports", "transformers",
        tuple(f"transformers.utils.loading_report:LoadStateDictInfo#{name}" for name in (
            "missing_keys", "unexpected_keys", "mismatched_keys",
        )),
        ("model/base/soundness.py",),
        "weights of another shape would be left random", "a KeyError when a model is loaded",
    ),
    Coupling(
        "RoPE's settings and frequencies", "transformers",
        ("transformers:PretrainedConfig.standardize_rope_params",
         "transformers.models.llama.modeling_llama:LlamaRotaryEmbedding#inv_freq"),
        ("model/base/load.py", "model/base/files.py"),
        "model.rope_scaling would have no effect", START,
    ),
    Coupling(
        "which attention a configuration asks for", "transformers",
        ("transformers:PretrainedConfig._attn_implementation", "transformers:PretrainedConfig#_attn_implementation_internal"),
        ("model/base/fields.py",),
        "a config.json that names somebody's code as its attention would not be refused here", "Transformers' own error",
    ),
    Coupling(
        "generation from token ids", "transformers", ("transformers:TextGenerationPipeline.forward",), ("generate/pipeline.py",),
        "prompts would have to be tokenised once more, from text", "an error at the first answer", ("self", "model_inputs"),
        written=("self.forward(",),
    ),
    Coupling(
        "which parameters decay", "transformers", ("transformers.trainer_pt_utils:get_parameter_names",),
        ("training/optimizer.py",), "older checkpoints would not fit the optimiser's groups", "an ImportError at start",
    ),
    Coupling(
        "results of continuous batching", "transformers",
        tuple(f"transformers.generation.continuous_batching.requests:GenerationOutput#{name}" for name in (
            "generated_tokens", "error",
        )),
        ("generate/continuous.py",),
        "answers of the engine continuous", "an error of its first request",
    ),
    # accelerate
    Coupling(
        "hooks of a model that is spread", "accelerate", ("accelerate.hooks:add_hook_to_module",), ("engine/fuse.py",),
        "layers on several devices would be fused as if on one", "a test fuses a model with such hooks", written=("_hf_hook",),
    ),
    Coupling(
        "batches skipped on resuming", "accelerate",
        ("accelerate.data_loader:SkipBatchSampler", "accelerate.data_loader:DataLoaderShard.set_epoch"), ("training/trainer.py",),
        "a resumed epoch in another order", "a test resumes within an epoch to the same losses", written=("set_epoch",),
    ),
    # peft
    Coupling(
        "the state of a LoRA layer", "peft",
        tuple(f"peft.tuners.lora.layer:LoraLayer#{name}" for name in (
            "_disable_adapters", "_active_adapter", "merged_adapters", "lora_A", "lora_B", "lora_dropout", "lora_variant",
            "scaling", "fan_in_fan_out",
        )),
        ("weights/structure.py", "weights/projections.py"),
        "an adapter that is switched off, merged or varied would be computed as a plain one",
        "each layer is looked at when it is read (`weights.structure`)",
    ),
    Coupling(
        "LoRA layers by exact type", "peft", ("peft.tuners.lora:Linear4bit", "peft.tuners.lora.layer:Linear"),
        ("weights/projections.py",), "layers of a new type are not fused", "the run's report says which and why",
    ),
    Coupling(
        "an adapter's names in a file", "peft",
        ("peft.utils.save_and_load:get_peft_model_state_dict", "peft.utils.save_and_load:load_peft_weights"),
        ("model/adapter/lora.py",),
        "tensors without a place", "each tensor of a file is held against the model's", ("model", "state_dict", "adapter_name"),
    ),
    # bitsandbytes
    Coupling(
        "a 4-bit layer", "bitsandbytes",
        ("bitsandbytes.nn:Linear4bit#compute_dtype", "bitsandbytes.nn:Params4bit#quant_state"),
        ("weights/structure.py", "weights/projections.py"),
        "layers would compute in float32, or be taken for not quantised yet",
        "each layer is looked at when it is read (`weights.structure`)",
    ),
    Coupling(
        "repacking on a CPU", "bitsandbytes",
        ("bitsandbytes.nn:Linear4bit#support_avx512bf16_for_cpu",), ("weights/on_cpu.py",),
        "gradients at a cosine of 0.07 after an evaluation, and nothing says so", "each layer is looked at before it is set",
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
        "weights would be dequantised wrongly", "each weight's is looked at when it is read (`weights.structure`)",
    ),
    Coupling(
        "how a quantised weight is stored", "bitsandbytes",
        ("bitsandbytes.utils:unpack_tensor_to_dict", "bitsandbytes.functional:QuantState.from_dict"),
        ("weights/stored.py",),
        "sound checkpoints would be refused", "a copy is read back before it is kept", ("tensor_data",),
    ),
    Coupling(
        "the scales of LLM.int8", "bitsandbytes", ("bitsandbytes.nn:Int8Params#SCB",), ("weights/frozen.py",),
        "damaged 8-bit weights would pass", "by tests/test_couplings.py alone",
    ),
    Coupling(
        "the optimiser's loop", "bitsandbytes",
        ("bitsandbytes.optim:AdamW8bit.update_step", "bitsandbytes.optim:AdamW8bit#initialized",
         "bitsandbytes.optim:AdamW8bit#is_paged"),
        ("training/optimizer.py",),
        "a step that updates nothing", START, ("self", "group", "p", "gindex", "pindex"),
    ),
    Coupling(
        "loggers that are silenced", "bitsandbytes",
        ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"), ("cli/app.py",),
        "lines on the terminal that help nobody", SUITE, written=("bitsandbytes.autograd._functions",),
    ),
    # triton
    Coupling(
        "the end of a launch", "triton",
        ("triton.runtime.jit:JITFunction.run", "triton.compiler.compiler:CompiledKernel#packed_metadata",
         "triton.compiler.compiler:CompiledKernel#function", "triton.compiler.compiler:CompiledKernel.run"),
        ("kernels/triton/launch.py",),
        "a kernel that is given other pointers than it reads", "outside these versions kernels are launched in Triton's own way",
    ),
    # datasets
    Coupling(
        "a data set's fingerprint", "datasets", ("datasets:Dataset#_fingerprint",), ("data/rows/hub.py",),
        "changed rows would be taken from the cache", "an AttributeError before any row is read", written=("._fingerprint",),
    ),
    Coupling(
        "rows behind a selection", "datasets", ("datasets:Dataset#_indices", "datasets:Dataset.data"), ("data/sets/prepare.py",),
        "columns in the order of the file", "an AttributeError before training",
    ),
    Coupling(
        "rows written one by one", "datasets",
        ("datasets.arrow_writer:ArrowWriter", "datasets.arrow_writer:ArrowWriter.finalize"),
        ("data/sets/cached_rows.py",), "no rows in the cache", "rows are read back before they are used",
        ("schema", "features", "path"),
    ),
    # huggingface_hub
    Coupling(
        "the HTTP client's faults", "huggingface-hub", ("huggingface_hub.errors:HfHubHTTPError",),
        ("data/rows/hub.py", "model/hub_faults.py"),
        "a network fault would end in a traceback", "a test stands in for the Hub", written=("HfHubHTTPError.__bases__[0]",),
    ),
    Coupling(
        "the layout of the Hub's cache", "huggingface-hub", ("huggingface_hub.constants:HF_HUB_CACHE",),
        ("model/base/downloads.py", "model/hub.py"),
        "a digest in a file's name would not be compared; a folder's name is taken for the commit",
        "a test stands in for the Hub", written=('"blobs"', "folder.name"),
    ),
    # what benchmarks, serves and reports
    Coupling(
        "a benchmark's progress", "lm-eval",
        ("lm_eval.models.huggingface:HFLM._loglikelihood_tokens", "lm_eval.models.huggingface:HFLM._model_call"),
        ("evaluate/harness.py",), "no progress is shown", SUITE, ("self", "requests"),
    ),
    Coupling(
        "a benchmark's requests", "lm-eval",
        tuple(f"lm_eval.models.huggingface:HFLM.{name}" for name in ("loglikelihood", "loglikelihood_rolling", "generate_until")),
        ("evaluate/harness.py",), "each process would answer all requests", SUITE, ("self", "requests"),
    ),
    Coupling(
        "the index of tasks", "lm-eval", ("lm_eval.tasks:TaskManager.task_index", "lm_eval.tasks:TaskManager.all_tasks"),
        ("evaluate/harness.py",), "benchmarks on local files", "an AttributeError before a model is loaded",
    ),
    Coupling(
        "signals of a server", "uvicorn",
        tuple(f"uvicorn:Server{name}" for name in ("#_captured_signals", "#force_exit", ".handle_exit", ".shutdown")),
        ("serve/server.py",), "Ctrl-C would cut answers off, or not end the process", START,
    ),
    Coupling(
        "one connection of a server", "uvicorn",
        tuple(f"uvicorn.protocols.http.h11_impl:H11Protocol{name}" for name in (
            "._unsupported_upgrade_warning", ".send_400_response", ".on_response_complete", ".data_received",
            "#conn", "#cycle", "#limit_concurrency", "#connections",
        )),
        ("serve/connection.py",), "connections without deadlines or limit", START,
    ),
    Coupling(
        "the event loop that a connection is given", "uvicorn", ("uvicorn.protocols.http.h11_impl:H11Protocol",),
        ("serve/connection.py",), "no connection is accepted", START, ("config", "server_state", "app_state", "_loop"),
        written=("_loop",),
    ),
    Coupling(
        "what h11 says of malformed requests", "h11", ("h11:RemoteProtocolError", "h11:Connection.next_event"),
        ("serve/connection.py",), "an error's text shows bytearray(...)", "a test sends malformed HTTP",
    ),
    Coupling(
        "the compiler of templates", "jinja2", ("jinja2.compiler:CodeGenerator.visit_Template",), ("data/text/sandbox.py",),
        "templates without limits", "tests render endless templates", ("self", "node", "frame"),
    ),
    Coupling(
        "what a template's namespace holds", "jinja2", ("jinja2.utils:Namespace#_Namespace__attrs",), ("data/text/meter.py",),
        "a template's text would not be counted", "tests render endless templates",
    ),
    Coupling(
        "panics of Rust code", "tokenizers", ("tokenizers:Tokenizer",), ("errors.py",),
        "a damaged tokenizer would end in a traceback", "the corpus of damaged tokenizers", written=("PanicException",),
    ),
    Coupling(
        "how a command is found", "typer", ("typer.core:TyperGroup.resolve_command", "typer.core:TyperCommand.format_help"),
        ("cli/app.py",), "an option before its command would be an unknown one", "tests of the command line",
        ("self", "ctx", "args"),
    ),
    Coupling(
        "the key that wandb finds", "wandb", ("wandb:api",), ("training/trackers.py",),
        "runs go offline; wandb 0.31 says that it will remove it",
        "an AttributeError before training", written=("wandb.api.api_key",),
    ),
)  # fmt: skip
