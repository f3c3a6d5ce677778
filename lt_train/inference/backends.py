"""The backend of an evaluation: the model in this process, or servers whose answers were compared with the checkpoint's."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.draft import Draft
from lt_train.inference.engine import Engine
from lt_train.inference.per_prompt import PerPrompt
from lt_train.inference.requests import Backend
from lt_train.recipe.schema import Eval, Prompt
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import write_json


def engine_for(
    eval_config: Eval,
    model: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    draft: Draft | None = None,
    per_prompt: PerPrompt | None = None,
) -> Engine:
    return Engine(
        model,
        tokenizer,
        kv_budget=eval_config.kv_budget,
        max_slots=eval_config.batch_size,
        prefill_chunk=eval_config.prefill_chunk,
        per_prompt=per_prompt,
        draft=draft,
    )


def servers_for(
    eval_config: Eval,
    model: HybridForCausalLM,
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    questions: Mapping[str, str],
    stop_ids: tuple[int, ...],
    out: Path,
    report: Callable[[str], None],
) -> Backend:
    """The servers of `eval_config`, after each was found to compute what `model` does; out/servers.json records the comparison.

    Args:
        model: what the servers should serve, from the folder `checkpoint`. It is cast to fp32, the measure for the comparison.
        questions: problem id -> text, for servers that take messages only.

    Raises:
        UserError: no checkpoint to serve yet, or a server that cannot be used (see `check_server`).
    """
    from lt_train.inference.servers.backend import OpenAIBackend  # openai takes a second to import
    from lt_train.inference.servers.check import chat_messages, check_server
    from lt_train.inference.servers.pool import ServerSettings

    if not checkpoint.is_dir():
        raise UserError(
            f"eval.backend: openai: {checkpoint} is missing, so there is nothing to serve. Fix: Export first (with this evaluation "
            "left out), serve that folder, then evaluate"
        )
    settings = ServerSettings(
        tuple(eval_config.servers),
        eval_config.served_model,
        eval_config.concurrency,
        eval_config.timeout,
        eval_config.stall,
        api_key=os.environ.get("OPENAI_API_KEY"),
    )
    report(f"comparing the answers of {', '.join(settings.urls)} with the checkpoint's")
    checked = check_server(settings, model.float(), checkpoint, tokenizer, prompt, stop_ids)
    write_json(out / "servers.json", {"servers": list(settings.urls), **asdict(checked)})
    return OpenAIBackend(
        tokenizer,
        stop_ids,
        settings,
        messages=lambda request: chat_messages(prompt, questions[request.problem]),
        report=report,
    )
