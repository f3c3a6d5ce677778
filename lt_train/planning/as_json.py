"""The plan as data, for programs (`lt-train plan --json`): sizes in bytes, times in hours, counts as numbers."""

from typing import Any

from lt_train.planning.plan import RecipePlan, TrainingPlan


def plan_as_json(plan: RecipePlan) -> dict[str, Any]:
    """
    Returns:
        name, works, machine, model; and training, profile and kv_cache, each null where the recipe has none. What is unknown, as
        the tokens of data that are not local, is null. `suggestions` are changes each of which alone makes it fit.
        `streaming_layers` counts those with streaming heads: an upper bound where KV heads are yet to be chosen.
    """
    spec, machine = plan.shape.spec, plan.machine
    return {
        "name": plan.recipe.name,
        "works": plan.works,
        "machine": {
            "gpus": machine.gpus,
            "cpu": machine.cpu,
            "memory_bytes": machine.memory,
            "usable_bytes": machine.usable,
            "tflops": machine.tflops,
            "efficiency": machine.efficiency,
        },
        "model": {
            "base": plan.recipe.model.base,
            "parameters": plan.shape.base_parameters,
            "active_parameters": plan.shape.active_parameters,
            "layers": spec.num_layers,
            "streaming_layers": len(spec.streaming_layers),
            "kv_heads": spec.num_layers * plan.shape.key_heads,
            "streaming_kv_heads": spec.number_of_streaming_heads(plan.shape.key_heads),
            "w_sink": spec.w_sink,
            "w_recent": spec.w_recent,
            "sliding_layers": len(spec.sliding_layers),
            "sliding_window": spec.sliding_window,
            "learned_sinks": spec.learned_sinks,
        },
        "training": None if plan.training is None else _training(plan, plan.training),
        "profile": _profile(plan),
        "kv_cache": _kv_cache(plan),
    }


def _training(plan: RecipePlan, training: TrainingPlan) -> dict[str, Any]:
    setup, memory, work, compute = training.setup, training.memory, training.work, training.compute
    return {
        "fits": training.fits,
        "trained_parameters": plan.shape.trainable,
        "dtype": "bf16" if setup.bf16 else "fp32",
        "sharding": setup.sharding.name,
        "micro_batch_size": setup.micro_batch,
        "row_tokens": setup.length,
        "sequence_parallel": setup.sequence_parallel,
        "accumulation_steps": training.accumulation,
        "undivided": training.undivided,
        "peak_bytes": memory.peak,
        "peak_phase": memory.phase.value,
        "host_bytes": memory.host,
        "allocations": [
            {
                "name": allocation.name,
                "bytes": allocation.size,
                "at_peak": memory.phase in allocation.phases,
                "source": allocation.source,
            }
            for allocation in memory.allocations
        ],
        "options": [
            {
                "deepspeed": option.file,
                "sharding": option.sharding.name,
                "peak_bytes": option.peak,
                "host_bytes": option.host,
                "largest_micro_batch_size": option.micro_batch,
            }
            for option in training.options
        ],
        "suggestions": training.suggestions,
        "samples": None if work is None else len(work.samples.lengths),
        "tokens": None if work is None else work.tokens,
        "epochs": None if work is None else work.epochs,
        "optimizer_steps": None if work is None else work.steps,
        "flop": None if compute is None else compute.total,
        "hours": None if compute is None or plan.machine.cpu else compute.hours(plan.machine),
    }


def _profile(plan: RecipePlan) -> dict[str, Any] | None:
    needed = plan.profile
    if needed is None:
        return None
    return {
        "fits": plan.profile_fits,
        "gpus": needed.gpus,
        "peak_bytes": needed.peak,
        "weights_bytes": needed.weights,
        "hidden_states_bytes": needed.states,
        "workspace_bytes": needed.workspace,
        "sample_tokens": needed.length,
        "hours": None if plan.machine.cpu else plan.profile_hours[0],
        "most_hours": None if plan.machine.cpu else plan.profile_hours[1],
        "suggestions": plan.profile_suggestions,
    }


def _kv_cache(plan: RecipePlan) -> dict[str, Any] | None:
    cache = plan.cache
    if cache is None:
        return None
    hybrid, full = cache.sequences
    return {
        "evaluation": cache.evaluation,
        "sequence_tokens": cache.tokens,
        "hybrid_bytes": cache.hybrid,
        "full_bytes": cache.full,
        "hybrid_sequences": hybrid,
        "full_sequences": full,
        f"vllm_sequences_by_streaming_{'kv_heads' if plan.shape.spec.split_layers else 'layers'}": cache.vllm,
    }
