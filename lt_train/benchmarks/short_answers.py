"""Problems with a short answer, in the recipe's own prompt."""

from lt_train.benchmarks.declaration import GSM8K_MARKER, Benchmark

GPQA_FIELDS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

BOX_THE_ANSWER = r"Please reason step by step, and put your final answer within \boxed{}."
"""As DeepSeek-R1, QwQ and Qwen3 recommend for mathematics, and as their scores were made."""

SHORT_ANSWERS = (
    Benchmark("aime24", "math", source="HuggingFaceH4/aime_2024", split="train", count=30, instruction=BOX_THE_ANSWER),
    Benchmark("aime25", "math", source="math-ai/aime25", count=30, instruction=BOX_THE_ANSWER),
    Benchmark("amc23", "math", source="math-ai/amc23", count=40, fields=("question", "answer"), instruction=BOX_THE_ANSWER),
    Benchmark("math500", "math", source="HuggingFaceH4/MATH-500", count=500, instruction=BOX_THE_ANSWER),
    Benchmark(
        "gsm8k",
        "math",
        source="openai/gsm8k",
        subset="main",
        count=1319,
        fields=("question", "answer"),
        answer_after=GSM8K_MARKER,
        instruction=BOX_THE_ANSWER,
    ),
    # arXiv 2311.12022. Gated: its authors request that no question be shown where it could be trained on
    Benchmark(
        "gpqa_diamond",
        "choice",
        source="Idavidrein/gpqa",
        subset="gpqa_diamond",
        split="train",
        count=198,
        id_fields=("Record ID",),
        rows="choice",
        fields=GPQA_FIELDS,
    ),
    Benchmark("ledger", "math", source="data/ledger/test.jsonl"),
    Benchmark("custom", "math"),
)
