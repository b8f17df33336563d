"""The couplings to Transformers and Accelerate."""

from __future__ import annotations

from nybble.couplings.coupling import AT_START, Coupling

TRANSFORMERS = (
    # transformers
    Coupling(
        "overridden methods of Trainer", "transformers",
        tuple(f"transformers:Trainer.{name}" for name in (
            "_run_epoch", "_get_train_sampler", "_clip_grad_norm", "_save_checkpoint", "_save_rng_state", "_load_best_model",
            "_prepare_inputs",
        )),
        ("training/trainer.py",),
        "an override would never be called: another order of rows, checkpoints without their mark or without random states "
        "of other machines, an unverified best one",
        AT_START,
    ),
    Coupling(
        "the epoch as a keyword", "transformers", ("transformers:Trainer._run_epoch",), ("training/trainer.py",),
        "several processes would begin a resumed epoch in the first one's order", AT_START, ("self", "epoch"),
        written=('kwargs["epoch"]',),
    ),
    Coupling(
        "a step's batches", "transformers", ("transformers:Trainer.get_batch_samples",), ("training/trainer.py",),
        "batches would be fetched while the device waits", AT_START, ("self", "epoch_iterator", "num_batches", "device"),
    ),
    Coupling(
        "GPUs of one process", "transformers", ("transformers:TrainingArguments#_n_gpu",), ("training/arguments.py",),
        "Trainer would wrap a 4-bit model in DataParallel", "the engine refuses DataParallel",
    ),
    Coupling(
        "evaluations without improvement", "transformers",
        ("transformers:EarlyStoppingCallback#early_stopping_patience_counter",), ("training/trainer.py",),
        "a run would be resumed after its early stop", "an AttributeError before the first step",
    ),
    Coupling(
        "names in a checkpoint", "transformers",
        ("transformers.trainer_utils:PREFIX_CHECKPOINT_DIR", "transformers.trainer:TRAINER_STATE_NAME",
         "transformers.trainer:OPTIMIZER_NAME", "transformers.trainer:SCHEDULER_NAME"),
        ("training/checkpoints.py",),
        "no checkpoint would count as complete", "a run's first checkpoint is read back",
        written=("trainer_state.json", "optimizer.pt", "scheduler.pt"),
    ),
    Coupling(
        "the environment of chat templates", "transformers",
        ("transformers.utils.chat_template_utils:_compile_jinja_template",), ("data/text/sandbox.py",),
        "templates would render differently than in Transformers", "an ImportError at start", ("chat_template",),
    ),
    Coupling(
        "hooks that capture outputs", "transformers",
        ("transformers.utils.output_capturing:install_output_capuring_hook",), ("weights/watched.py",),
        "layers would stay unfused once hidden states were requested", "the run's report says that layers are not fused",
        written=("transformers.utils.output_capturing",),
    ),
    Coupling(
        "keyword arguments that a Llama backbone passes to its layers", "transformers",
        ("transformers.models.llama.modeling_llama:LlamaModel.forward",), ("engine/batch_plan.py",),
        "the plan of a batch would not reach the layers, which then fall back to their original forward", AT_START,
        ("self", "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"),
    ),
    Coupling(
        "the parts of a Llama layer", "transformers",
        ("transformers.models.llama.modeling_llama:LlamaDecoderLayer#self_attn",
         "transformers.models.llama.modeling_llama:LlamaAttention#head_dim",
         "transformers.models.llama.modeling_llama:LlamaAttention#attention_dropout",
         "transformers.models.llama.modeling_llama:LlamaAttention#scaling",
         "transformers.models.llama.modeling_llama:LlamaRMSNorm#variance_epsilon"),
        ("engine/final_norm.py", "engine/reader.py"),
        "a layer with additional parts would be computed without them",
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
        "model.rope_scaling would have no effect", AT_START,
    ),
    Coupling(
        "the attention that a configuration requests", "transformers",
        ("transformers:PretrainedConfig._attn_implementation", "transformers:PretrainedConfig#_attn_implementation_internal"),
        ("model/base/fields.py",),
        "a config.json that names code as its attention would not be refused here", "Transformers' own error",
    ),
    Coupling(
        "generation from token ids", "transformers", ("transformers:TextGenerationPipeline.forward",), ("generate/pipeline.py",),
        "prompts would have to be tokenised again, from text", "an error at the first answer", ("self", "model_inputs"),
        written=("self.forward(",),
    ),
    Coupling(
        "parameters with weight decay", "transformers", ("transformers.trainer_pt_utils:get_parameter_names",),
        ("training/optimizer.py",), "older checkpoints would not fit the optimiser's groups", "an ImportError at start",
    ),
    Coupling(
        "results of continuous batching", "transformers",
        tuple(f"transformers.generation.continuous_batching.requests:GenerationOutput#{name}" for name in (
            "generated_tokens", "error",
        )),
        ("generate/continuous.py",),
        "no answers from the engine continuous", "an error of its first request",
    ),
    # accelerate
    Coupling(
        "hooks of a model spread over devices", "accelerate", ("accelerate.hooks:add_hook_to_module",), ("engine/fuse.py",),
        "layers on several devices would be fused as if on one", "a test fuses a model with such hooks", written=("_hf_hook",),
    ),
    Coupling(
        "batches skipped on resuming", "accelerate",
        ("accelerate.data_loader:SkipBatchSampler", "accelerate.data_loader:DataLoaderShard.set_epoch"), ("training/trainer.py",),
        "a resumed epoch would have another order", "a test resumes within an epoch to the same losses", written=("set_epoch",),
    ),
)  # fmt: skip
