"""Names that TRL, PEFT, DeepSpeed and transformers accept, written out so that checking a recipe imports none of them.

Importing SFTConfig alone takes seconds.

tests/recipe/test_upstream_names.py holds these lists against the installed classes and prints what to change when a version moves.
"""

TRL_SFT_CONFIG_NAMES = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
    label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
    torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
    save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names train_sampling_strategy length_column_name ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank model_init_kwargs
    trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs dataset_num_proc
    eos_token max_length truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of
    eval_packing completion_only_loss assistant_only_loss loss_type activation_offloading pad_token
    """.split()  # noqa: SIM905
)

PEFT_LORA_CONFIG_NAMES = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
    trainable_token_indices loftq_config eva_config corda_config lora_ga_config use_dora velora_config
    alora_invocation_tokens use_qalora qalora_group_size monteclora_config layer_replication runtime_config
    lora_bias target_parameters use_bdlora arrow_config kasa_config ensure_weight_tying
    """.split()  # noqa: SIM905
)

DEEPSPEED_ZERO_NAMES = frozenset(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint offload_param
    offload_optimizer zenflow sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
    stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save
    stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
    stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients
    parameter_alignment zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
    zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
    log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
    """.split()  # noqa: SIM905
)

SCHEDULER_NAMES = frozenset(
    """
    linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt reduce_lr_on_plateau
    cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay greedy
    """.split()  # noqa: SIM905
)

TRL_SET_BY_RECIPE = {
    "output_dir": "use name: the run lies in runs/<name>/",
    "run_name": "use name",
    "seed": "use seed",
    "data_seed": "use seed",
    "bf16": "use model.dtype",
    "fp16": "use model.dtype",
    "bf16_full_eval": "use model.dtype",
    "fp16_full_eval": "use model.dtype",
    "trust_remote_code": "use model.trust_remote_code",
    "model_init_kwargs": "use the settings of `model`",
    "max_length": "use data.max_length",
    "truncation_mode": "use data.overlong",
    "packing": "use data.packing",
    "packing_strategy": "use data.packing",
    "eval_packing": "use data.packing",
    "padding_free": "use data.packing",
    "dataset_text_field": "use data.format",
    "dataset_kwargs": "use data.format",
    "chat_template_path": "use prompt.chat_template",
    "completion_only_loss": "the loss is on the answer alone",
    "assistant_only_loss": "the loss is on the answer alone",
    "eos_token": "the answer ends with the token that ends a turn in the chat template",
    "learning_rate": "use train.learning_rate",
    "num_train_epochs": "use train.epochs",
    "max_steps": "use train.max_steps",
    "per_device_train_batch_size": "use train.micro_batch_size",
    "gradient_accumulation_steps": "it follows from train.batch_size and train.micro_batch_size",
    "per_device_eval_batch_size": "use train.micro_batch_size",
    "auto_find_batch_size": "use train.micro_batch_size",
    "lr_scheduler_type": "use train.lr_scheduler",
    "warmup_steps": "use train.warmup_ratio",
    "weight_decay": "use train.weight_decay",
    "max_grad_norm": "use train.max_grad_norm",
    "gradient_checkpointing": "use train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "use train.gradient_checkpointing",
    "activation_checkpointing": "use train.gradient_checkpointing",
    "activation_checkpointing_kwargs": "use train.gradient_checkpointing",
    "save_strategy": "use train.save_steps",
    "save_steps": "use train.save_steps",
    "save_total_limit": "use train.keep_checkpoints",
    "save_only_model": "a checkpoint must hold all that resuming needs",
    "ignore_data_skip": "a resumed run goes on in the same order of data",
    "resume_from_checkpoint": "a run goes on from its last whole checkpoint by itself",
    "eval_strategy": "use train.eval_steps",
    "eval_steps": "use train.eval_steps",
    "logging_strategy": "use train.logging_steps",
    "logging_steps": "use train.logging_steps",
    "logging_nan_inf_filter": "a loss that is no number must show",
    "include_num_input_tokens_seen": "tokens are counted always",
    "disable_tqdm": "progress is shown by lt-train",
    "report_to": "use track.wandb",
    "project": "use track.project",
    "deepspeed": "use train.deepspeed",
    "ddp_find_unused_parameters": "every weight that is trained takes part in each step",
    "use_cpu": "the CPU serves where there is no accelerator",
    "parallelism_config": "context parallelism drops the mask of streaming layers",
    "use_cache": "training keeps no cache",
    "do_train": "use the commands of lt-train",
    "do_eval": "use the commands of lt-train",
    "do_predict": "use the commands of lt-train",
}
"""Arguments of SFTConfig that a recipe sets elsewhere: name -> what to do instead, or why not."""

PEFT_SET_BY_RECIPE = {
    "r": "use lora.rank",
    "lora_alpha": "use lora.alpha",
    "lora_dropout": "use lora.dropout",
    "target_modules": "use lora.targets",
    "layers_to_transform": "use lora.layers",
    "layers_pattern": "use lora.layers",
    "base_model_name_or_path": "use model.base",
    "revision": "use model.revision",
    "task_type": "it is causal language modelling",
    "peft_type": "it is LoRA",
    "peft_version": "PEFT writes it",
    "auto_mapping": "PEFT writes it",
    "inference_mode": "use the commands of lt-train",
    "layer_replication": "it would shift which layers stream",
}
"""Arguments of LoraConfig that a recipe sets elsewhere: name -> what to do instead, or why not."""
