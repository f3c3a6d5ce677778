"""A process that runs the code of an export's model card, and writes down what the loaded model computes.

    cd EXPORT; python -P bare_process.py REQUEST.json

It imports torch, transformers and safetensors only, and cannot import lt_train. verify.py runs `observe` on the model in memory,
this script on the model that the card's code loads.

Shapes: B rows, T columns, K the last columns of a row (at most KEPT_COLUMNS), N new tokens, V vocab_size.
"""

import builtins
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

COMPUTED_IN = torch.float32
"""The dtype of the products that are compared. In bf16 rounding would hide a window that is off by one."""

NEW_TOKENS = 8
KEPT_COLUMNS = 128
PROBE_TEXT = "How many primes lie below 20? Écrivez la réponse: \\boxed{8}\n"
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class CheckRequest:
    """The task of the script: paths and plain values only, passed as JSON.

    Attributes:
        code: Python that leaves a `model` and a `tokenizer`; it runs as if a user had pasted it.
        parent: id of the process with which this one ends.
    """

    code: str
    prompts: str
    answers: str
    device: str
    threads: int
    parent: int


@dataclass(frozen=True)
class Observation:
    """The output of a model for one batch.

    Attributes:
        logits_BKV: of the last columns. sequences_BN: the tokens generated greedily, ends of answers forbidden.
        scores_BNV: the logits from which each of them was chosen.
    """

    logits_BKV: Tensor
    sequences_BN: Tensor
    scores_BNV: Tensor


def main() -> None:
    request = CheckRequest(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    end_with(request.parent)
    torch.set_num_threads(request.threads)
    model, tokenizer = run_card(request.code)
    model_class, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    model = model.eval().to(request.device)
    prompts = load_file(request.prompts)
    tensors: dict[str, Tensor] = {}
    for number in range(len(prompts) // 2):
        batch = prompts[f"input_ids.{number}"], prompts[f"attention_mask.{number}"]
        with computing_in(COMPUTED_IN, model):
            seen = observe(model, *batch, model.generation_config)
        tensors |= {f"{name}.{number}": value.contiguous() for name, value in vars(seen).items()}
    metadata = {
        "model_class": model_class,
        "dtype": dtype,
        "tokenizer_class": type(tokenizer).__name__,
        "probe_ids": json.dumps(probe_ids(tokenizer)),
    }
    save_file(tensors, request.answers, metadata=metadata)


def end_with(parent: int) -> None:
    """End this process as soon as `parent`, which started it, has died in whatever way."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_card(code: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Run the card's code as if it had been pasted into a Python that was started here.

    Raises:
        SystemExit: it calls input().
    """

    def refuse(question: object = "", /) -> NoReturn:
        raise SystemExit(f"the code of the model card calls input(): {question}")

    sys.modules["lt_train"] = None  # type: ignore[assignment]  # importing it fails from here on, however it is installed
    sys.path.insert(0, "")
    builtins.input = refuse
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    return names["model"], names["tokenizer"]


@contextmanager
def computing_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """While the block runs, a forward pass computes in `dtype`, from the weights as they are.

    The weights of one module at a time are cast, before it runs and back after it, so that no second model is in memory.
    """

    def cast(module: nn.Module, args: Any) -> None:
        module.to(dtype)

    def cast_back(module: nn.Module, args: Any, output: Any) -> None:
        module.to(held)

    held = next(model.parameters()).dtype
    hooks = []
    for module in model.modules():
        if dtype != held and any(True for _ in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(cast), module.register_forward_hook(cast_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def observe(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, generation: GenerationConfig) -> Observation:
    """Args: input_ids, attention_mask: [B, T], padded on the left. generation: the export's own defaults."""
    batch = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    greedy = GenerationConfig(
        do_sample=False,
        eos_token_id=generation.eos_token_id,
        pad_token_id=generation.pad_token_id,
        num_beams=1,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # generate() fills what is left open from the model's own, and warns of settings that only sampling reads
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        made = model.generate(**batch, generation_config=greedy)
    finally:
        model.generation_config = own
    sequences_BN, scores_BNV = made.sequences[:, input_ids.shape[1] :], torch.stack(made.scores, dim=1)
    return Observation(logits_of(model, input_ids, attention_mask), sequences_BN.cpu(), scores_BNV.float().cpu())


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits [B, K, V] of the last columns, on the CPU."""
    batch = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    return model(**batch, use_cache=False, logits_to_keep=KEPT_COLUMNS).logits.cpu()


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A text, and a conversation where there is a chat template, as token ids."""
    ids = [tokenizer(PROBE_TEXT)["input_ids"]]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": PROBE_TEXT}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids


if __name__ == "__main__":
    main()
