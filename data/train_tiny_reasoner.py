"""Train the tiny reasoner from scratch: 1.6 M parameters that solve ledgers step by step.

    python -m data.train_tiny_reasoner --out data/tiny-reasoner

It takes about 20 minutes on 2 CPU cores. Without a curriculum nothing is learned: the look-up (find the marked key,
read what follows it) must first pay off on ledgers of two entries. Each level has one entry more than the last and
begins once the model predicts 97 % of the answer's tokens. Problems are drawn fresh for every step, from the training
split only. The loss is taken on the answer's tokens.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data.ledger import Ledger, draw_split, rows, write_question, write_response
from data.tiny_tokenizer import END_OF_TURN, build_tokenizer

IGNORED = -100
STEPS = 10
"""Length of the longest chain; smaller ledgers are followed to their last entry."""


@dataclass(frozen=True)
class Curriculum:
    first: int = 2
    last: int = 16
    pass_accuracy: float = 0.97
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 50
    decay: int = 200
    """Steps on the last level, with the learning rate falling to zero."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        max_window_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=65536,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        layer_types=["full_attention"] * 8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def prompt_of(question: str, tokenizer: PreTrainedTokenizerFast) -> str:
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def encode_batch(ledgers: list[Ledger], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Tokens and labels of ledgers of one size, which all have the same length: (ledgers, tokens) each, no padding."""
    prompts = [prompt_of(write_question(ledger), tokenizer) for ledger in ledgers]
    texts = [prompt + write_response(ledger) + END_OF_TURN for prompt, ledger in zip(prompts, ledgers, strict=True)]
    input_ids = torch.tensor(tokenizer(texts)["input_ids"])
    labels = input_ids.clone()
    labels[:, : len(tokenizer(prompts[0])["input_ids"])] = IGNORED
    return input_ids, labels


def answer_loss(model: Qwen3ForCausalLM, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Mean loss over the answer's tokens, and the part of them that the model's first choice gets right."""
    answer_length = int((labels[0] != IGNORED).sum())
    logits = model(input_ids, logits_to_keep=answer_length + 1, use_cache=False).logits[:, :-1]
    targets = labels[:, -answer_length:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, (logits.argmax(-1) == targets).float().mean().item()


@dataclass(frozen=True)
class Progress:
    step: int
    level: int
    decaying_for: int
    loss: float
    accuracy: float
    seconds: float


def learning_rate_at(progress_step: int, decaying_for: int, plan: Curriculum) -> float:
    warm = min(1.0, (progress_step + 1) / plan.warmup)
    return plan.learning_rate * warm * (1 - decaying_for / plan.decay)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Curriculum, seed: int) -> Iterator[Progress]:
    """Take one step at a time until the curriculum ends."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    streams = {n: draw_split("train", seed, n, min(STEPS, n)) for n in range(plan.first, plan.last + 1)}
    level, step, decaying_for, accuracy, began = plan.first, 0, 0, 0.0, time.monotonic()
    model.train()
    while decaying_for < plan.decay:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, decaying_for, plan)
        loss, batch_accuracy = answer_loss(model, *encode_batch(list(islice(streams[level], plan.batch)), tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracy = 0.8 * accuracy + 0.2 * batch_accuracy
        yield Progress(step, level, decaying_for, loss.item(), accuracy, time.monotonic() - began)
        step += 1
        if level == plan.last:
            decaying_for += 1
        elif accuracy > plan.pass_accuracy:
            level, accuracy = level + 1, 0.0


@torch.inference_mode()
def solve_all(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict[str, str]], batch: int = 250
) -> list[bool]:
    """Greedy answers: whether each problem's whole response ends with the right boxed digit."""
    model.eval()
    right = list[bool]()
    for begin in range(0, len(problems), batch):
        part = problems[begin : begin + batch]
        inputs = tokenizer([prompt_of(row["problem"], tokenizer) for row in part], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        endings = [f"\\boxed{{{row['answer']}}}<|end_of_solution|>{END_OF_TURN}" for row in part]
        right += [ending in text for ending, text in zip(endings, texts, strict=True)]
    return right


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False, max_new_tokens=160
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="folder for model, tokenizer and training.json")],
    seed: Annotated[int, typer.Option(help="of weights and problems")] = 0,
    decay: Annotated[int, typer.Option(help="steps on the last level")] = Curriculum.decay,
    tests: Annotated[int, typer.Option(help="unseen problems to solve at the end")] = 2000,
) -> None:
    """Train, save, and solve unseen problems."""
    torch.manual_seed(seed)
    plan = Curriculum(decay=decay)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    level, progress = 0, None
    for progress in train(model, tokenizer, plan, seed):
        if progress.step % 20 == 0 or progress.level != level:
            rate = (progress.step + 1) / progress.seconds
            print(
                f"step {progress.step:5d}  {progress.level:2d} entries  loss {progress.loss:.4f}"
                f"  token accuracy {progress.accuracy:.3f}  {rate:.2f} steps/s  {progress.seconds:.0f} s",
                flush=True,
            )
        level = progress.level
    save(model, tokenizer, out)
    right = solve_all(model, tokenizer, list(rows("test", tests, seed=0, entries=plan.last, steps=STEPS, reach=0)))
    accuracy = sum(right) / len(right)
    record = {
        "curriculum": asdict(plan),
        "seed": seed,
        "steps": progress.step + 1,
        "seconds": round(progress.seconds),
        "torch": torch.__version__,
        "accuracy": {
            "value": accuracy,
            "n": len(right),
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(right)),
        },
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["accuracy"]))


if __name__ == "__main__":
    typer.run(main)
