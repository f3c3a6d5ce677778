"""Load an export as a stranger would, and write down what it computes. Run as a script, by a Python that must not see lt_train.

    python -P bare_process.py REQUEST.json

It imports torch, transformers and safetensors only. verify.py runs `observe` on the model in memory, this script on what it loads.

Shapes: B rows, T columns, K the last columns of a row (at most KEPT_COLUMNS), N new tokens, V vocabulary.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 16
KEPT_COLUMNS = 128
PROBE_TEXT = "How many primes lie below 20? Écrivez la réponse: \\boxed{8}\n"


@dataclass(frozen=True)
class Request:
    """What the script is asked: paths and plain values only, it travels as JSON."""

    folder: str
    prompts: str
    answers: str
    device: str
    threads: int
    own_code: bool


@dataclass(frozen=True)
class Observation:
    """What a model makes of one batch.

    Attributes:
        logits_BKV: of the last columns. sequences_BN: the tokens generated greedily, ends of answers forbidden.
        scores_BNV: what each of them was chosen by.
    """

    logits_BKV: Tensor
    sequences_BN: Tensor
    scores_BNV: Tensor


def main() -> None:
    sys.modules["lt_train"] = None  # importing it fails from here on, however it is installed
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(request.threads)
    model = load(request)
    prompts = load_file(request.prompts)
    tensors = {}
    for number in range(len(prompts) // 2):
        seen = observe(model, prompts[f"input_ids.{number}"], prompts[f"attention_mask.{number}"], model.generation_config)
        tensors |= {f"{name}.{number}": value.contiguous() for name, value in vars(seen).items()}
    tokenizer = AutoTokenizer.from_pretrained(request.folder)
    facts = {
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer_class": type(tokenizer).__name__,
        "probe_ids": json.dumps(probe_ids(tokenizer)),
    }
    save_file(tensors, request.answers, metadata=facts)


def load(request: Request) -> PreTrainedModel:
    """As the model card says, and with nothing missing or left over."""
    where = {} if request.device == "cpu" else {"device_map": request.device}
    code = {"trust_remote_code": True} if request.own_code else {}
    model, info = AutoModelForCausalLM.from_pretrained(request.folder, dtype="auto", output_loading_info=True, **code, **where)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind != "error_msgs"}
    if wrong:
        raise SystemExit(f"the weights do not fit the class {type(model).__name__}: {wrong}")
    return model.eval()


@torch.no_grad()
def observe(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, generation: GenerationConfig) -> Observation:
    """Args: input_ids, attention_mask: [B, T], padded on the left. generation: the export's own defaults."""
    batch = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
    logits_BKV = model(**batch, use_cache=False, logits_to_keep=KEPT_COLUMNS).logits
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
    return Observation(
        logits_BKV.float().cpu(), made.sequences[:, input_ids.shape[1] :].cpu(), torch.stack(made.scores, dim=1).float().cpu()
    )


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
