"""Recipes with one to three random slips in them, as texts, and random `--set` overrides."""

import json
import random
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lt_train.recipe.yaml_text import read_recipe_text
from tests.support.repository import REPOSITORY

EVERY_PART = """
name: complete
seed: 3
model:
  base: data/tiny-reasoner
  dtype: fp32
  attention: blocked
  rope_scaling: {rope_type: yarn, factor: 2.0, original_max_position_embeddings: 512}
hybrid:
  lazy_layer_ratio: 0.5
  strategy: reach
  compare: [lazy_ratio, periodic]
  w_recent: 12
  calibration: {samples: 4, max_length: 128, w_last: 8, long_reach_fraction: 0.2}
data:
  source: data/ledger/train.jsonl
  max_length: 256
  columns: {question: question, answer: combined_text}
  reasoning_tags: keep
  heldout: 8
  limit: 100
  packing: true
train:
  method: lora
  learning_rate: 1e-3
  max_steps: 4
  batch_tokens: 1024
  eval_steps: 2
  keep_best: needle
  final_weights: best
  probes: {steps: 2, device: cpu, evals: [{benchmark: needle, recall: {lengths: [64], depths: [0.5], keys: 2}, kv_budget: 1GiB}]}
  distill: {weight: 0.5, temperature: 2.0, hidden_weight: 0.1, teacher: copy}
  trl: {optim: adamw_torch, adam_beta2: 0.95, dataloader_num_workers: 0}
lora: {rank: 4, alpha: 8, targets: [q_proj, v_proj], layers: all, peft: {use_dora: false, bias: none, modules_to_save: null}}
prompt: {system: Be brief., user: "Q: {question}", stop_token: "<|im_end|>"}
eval:
  - {benchmark: needle, recall: {lengths: [64, 128], depths: [0.0, 1.0], repeats: 1, keys: 2}, variants: [base, trained]}
  - {benchmark: copying, recall: {lengths: [256], span: 16}}
  - {benchmark: custom, path: data/ledger/test.jsonl, columns: {question: problem, answer: answer}, max_new_tokens: 8, samples: 2,
     temperature: 0.6, top_p: 0.9, top_k: 20, stop: ["\\n"], thinking_budget: 4, truncated: graded, instruction: ""}
  - {benchmark: ledger, path: data/ledger/test.jsonl, backend: openai, servers: ["http://localhost:1"], max_new_tokens: 8}
  - {benchmark: heldout_loss, limit: 4}
  - {benchmark: heldout_kl, batch_size: 2}
sample: {benchmark: ledger, path: data/ledger/test.jsonl, max_new_tokens: 8, keep: all, min_tokens: 2, max_tokens: 9}
track: {wandb: offline, project: mine}
export: {dtype: fp32}
"""

ODD_VALUES = (
    *("null", "0", "-1", "-0", "1", "7", "0.3", "-0.5", "1e31", "1e-400", "1e400", ".nan", ".inf", "-.inf", "true", "false", "off"),
    *("10000000000000000000000000000000", "99999999999999999999", "1000000000001", "9" * 5000, f"0.{'3' * 5000}", "1_000", "+5"),
    *("012", "1:30", "0x1f", "0o17", "0b1", "2024-01-01", "2024-13-45", "2024-01-01 10:00:00", "1e5", "5.", "=", "~", "@x", "%x"),
    *('""', "x", '"x"', "auto", "none", "all", '"\\n"', '"\\0"', '"\\e[31mred"', '"\\u202egnp"', '"\\ud800"', '"\\U0001f600"'),
    *(f'"{"x" * 5000}"', f'"{"ä" * 400}"', f'"{"a/" * 300}"', f'"{"a.b" * 100}"', '" "', '"{question}"', "{question}", '"{0}"'),
    *("~nouser/x", '"~nouser/x"', "~", "~/x", "/", ".", "..", "../../..", "/dev/null", "/proc/1/mem/x", "a/b", "a/b/c", "x.jsonl"),
    *("data/ledger", "data/ledger/test.jsonl", "README.md", "launch/zero3.json", "data/tiny-reasoner", "http://[", "C:\\x"),
    *("[]", "{}", "[[[]]]", "[null]", "[1, x, null, []]", "[a, a]", "{a: 1}", "{null: 1}", "{5: 6}", "{[1]: 2}", "{1.5: x}"),
    *("!!bool x", "!!int ''", "!!float x", "!!null x", "!!str 5", "!!binary '*'", "!!set {a}", "!!timestamp x", "!!omap [a: 1]"),
    *("!!python/object:os.system {}", "!!python/object/apply:os.getcwd []", "!!python/name:os", "!x 3", "!!merge x", "!<x> 3"),
    *("&a [1, *a]", "&a {b: *a}", "*nowhere", "{<<: 5}", "{<<: [{a: 1}, {b: 2}]}", "{<<: &a {b: *a}}"),
    *("[" * 80 + "]" * 80, "{a: " * 80 + "}" * 80, f"[{'1, ' * 99}1]", f"{{{', '.join(f'k{at}: {at}' for at in range(60))}}}"),
    "[&a [1, 1], " + ", ".join(f"&{name} [{', '.join([f'*{inner}'] * 9)}]" for inner, name in pairwise("abcdefgh")) + "]",
)
"""Values as YAML: of other types, too large, too deep, not to be read."""

ODD_NAMES = (
    *("null", "5", "1.5", "~", '""', "' '", "? [1]", "? {a: b}", "2024-01-01", "<<", "=", "!!int ''", "!!python/name:os"),
    *(f'"{"x" * 5000}"', '"a.b"', '"\\e[31m"', '"\\ud800"', '"\\n"', '"*"', '"0"', '"ä"', '"__class__"', "model_config", "- a"),
)
"""Names of settings as YAML."""


class Mapping(list[list[Any]]):
    """[name, value] pairs: names may be odd, or given twice. A value is a Mapping, a list, or a text of YAML."""


def recipes() -> list[str]:
    """The shipped recipes without their comments, and one that has every part."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "recipes").glob("*.yaml"))]
    bare = ["\n".join(line for line in text.splitlines() if line and not line.lstrip().startswith("#")) for text in texts]
    return [*bare, EVERY_PART]


def mutants(seed: int) -> Iterator[bytes]:
    """Faulty recipes, without end; a few are valid by chance."""
    rng, texts = random.Random(seed), recipes()
    trees = [json.dumps(read_recipe_text(text).values) for text in texts]
    names = sorted({str(name) for tree in trees for place in _places(_tree(json.loads(tree))) if (name := place.name)})
    while True:
        at = rng.randrange(len(texts))
        if rng.random() < 0.1:
            yield _with_edited_bytes(texts[at].encode(), rng)
            continue
        tree = _thinned(_tree(json.loads(trees[at])), rng)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            rng.choice(SLIPS)(tree, names, rng)
        yield "".join(f"{name}: {_written(value)}\n" for name, value in tree).encode("utf-8", "surrogatepass")


def overrides(seed: int) -> Iterator[str]:
    """Values of `--set`, without end; some are valid."""
    rng, tree = random.Random(seed), _tree(read_recipe_text(EVERY_PART).values)
    paths = [place.path for place in _places(tree)]
    while True:
        path = [str(name).strip('"') for name in rng.choice(paths)]
        if rng.random() < 0.4:
            at = rng.randrange(len(path))
            odd = [*ODD_NAMES, "-1", "99", "9" * 5000, "²", "0 ", "\x00", "\ud800", "", " "]
            path[at] = rng.choice([_misspelled(path[at], rng), rng.choice(odd)])
        value = rng.choice(ODD_VALUES)
        if rng.random() < 0.1:
            value = "".join(rng.choice(string.printable + "é😀\x00\x1b\ud800") for _ in range(rng.randrange(12)))
        yield rng.choice(["=", "=", "=", "=", "=", "=", "=", "=", "==", ":", "", " = "]).join([".".join(path), value])


class Place:
    """One value in a tree: `around[at]` of a list, `around[at][1]` of a Mapping."""

    def __init__(self, around: list[Any], at: int, path: tuple[str, ...]) -> None:
        self.around, self.at, self.path = around, at, path

    @property
    def name(self) -> str | None:
        return self.around[self.at][0] if isinstance(self.around, Mapping) else None

    @name.setter
    def name(self, name: str) -> None:
        if isinstance(self.around, Mapping):
            self.around[self.at][0] = name

    @property
    def value(self) -> Any:
        return self.around[self.at][1] if isinstance(self.around, Mapping) else self.around[self.at]

    @value.setter
    def value(self, value: Any) -> None:
        if isinstance(self.around, Mapping):
            self.around[self.at][1] = value
        else:
            self.around[self.at] = value


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return Mapping([name, _tree(inner)] for name, inner in value.items())
    return [_tree(item) for item in value] if isinstance(value, list) else json.dumps(value)


def _thinned(tree: Mapping, rng: random.Random) -> Mapping:
    """The parts that a recipe needs, and about a third of the others: short texts are read sooner."""
    kept = Mapping([name, value] for name, value in tree if name in ("name", "model", "hybrid", "data") or rng.random() < 0.3)
    for part in kept:
        if part[0] == "eval":
            part[1] = rng.sample(part[1], min(len(part[1]), rng.choice([1, 1, 2])))
    return kept


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_written(inner)}" for name, inner in value) + "}"
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, list) else value


def _places(tree: Any, path: tuple[str, ...] = ()) -> Iterator[Place]:
    for at, item in enumerate(tree if isinstance(tree, list) else []):
        inner = (*path, item[0] if isinstance(tree, Mapping) else str(at))
        yield Place(tree, at, inner)
        yield from _places(item[1] if isinstance(tree, Mapping) else item, inner)


def _replace(tree: Mapping, names: Sequence[str], rng: random.Random) -> None:
    _any(tree, rng).value = rng.choice(ODD_VALUES)


def _rename(tree: Mapping, names: Sequence[str], rng: random.Random) -> None:
    place = _any(tree, rng)
    place.name = rng.choice([_misspelled(place.name or "x", rng), rng.choice(names), rng.choice(ODD_NAMES)])


def _repeat(tree: Mapping, names: Sequence[str], rng: random.Random) -> None:
    place = _any(tree, rng)
    again = [place.name, place.value] if isinstance(place.around, Mapping) else place.value
    place.around.insert(rng.randrange(len(place.around) + 1), again)


def _delete(tree: Mapping, names: Sequence[str], rng: random.Random) -> None:
    place = _any(tree, rng)
    del place.around[place.at]


def _swap(tree: Mapping, names: Sequence[str], rng: random.Random) -> None:
    one, other = _any(tree, rng), _any(tree, rng)
    if one.path[: len(other.path)] != other.path and other.path[: len(one.path)] != one.path:  # neither lies in the other
        one.value, other.value = other.value, one.value


def _insert(tree: Mapping, names: Sequence[str], rng: random.Random) -> None:
    around = _any(tree, rng).around
    name = rng.choice([rng.choice(names), rng.choice(ODD_NAMES)])
    value = rng.choice(ODD_VALUES)
    around.insert(rng.randrange(len(around) + 1), [name, value] if isinstance(around, Mapping) else value)


def _wrap(tree: Mapping, names: Sequence[str], rng: random.Random) -> None:
    place = _any(tree, rng)
    place.value = rng.choice([[place.value], [place.value, place.value], Mapping([[rng.choice(names), place.value]])])


SLIPS: tuple[Callable[[Mapping, Sequence[str], random.Random], None], ...] = (
    *(_replace, _replace, _replace, _rename, _rename),
    *(_repeat, _delete, _swap, _insert, _wrap),
)


def _any(tree: Mapping, rng: random.Random) -> Place:
    places = list(_places(tree))
    if not places:
        tree.append(["name", "x"])
        return _any(tree, rng)
    return rng.choice(places)


def _misspelled(name: str, rng: random.Random) -> str:
    at, letter = rng.randrange(len(name) + 1), rng.choice(string.ascii_lowercase + "_.")
    before, after = name[:at], name[at + 1 :]
    return rng.choice([before + after, before + letter + name[at:], before + letter + after, name.upper()])


def _with_edited_bytes(text: bytes, rng: random.Random) -> bytes:
    content = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, removed = rng.randrange(len(content) + 1), rng.choice([0, 1, 1, 1, 5, 200])
        words = rng.choice([*ODD_VALUES, *"\t:[]{}&*!|>'\"%@`,#?-\n\x00"])
        content[at : at + removed] = rng.choice([b"", bytes([rng.randrange(256)]), words.encode()])
    return bytes(content)


def written(folder: Path, text: bytes) -> Path:
    path = folder / "mutant.yaml"
    path.write_bytes(text)
    return path
