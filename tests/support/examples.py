"""Examples in token ids, made up."""

import random

from lt_train.dataset.examples import Example


def examples_of_many_lengths() -> list[Example]:
    """Shorter and longer than w_sink and than the window; one with a prompt of a single token, one with a single answer token."""
    draw = random.Random(0)
    lengths = [(1, 2), (3, 1), (5, 20), (30, 40), (2, 7), (12, 3), (40, 5)]
    return [
        Example(
            id=f"e{number}",
            where=f"own.jsonl:{number + 1}",
            prompt_ids=tuple(draw.randrange(2, 36) for _ in range(prompt)),
            answer_ids=(*(draw.randrange(2, 36) for _ in range(answer - 1)), 1),
        )
        for number, (prompt, answer) in enumerate(lengths)
    ]
