"""LongBench, its 21 tasks (arXiv 2308.14508): prompts, lengths and metrics as THUDM/LongBench defines them.

Sources: config/dataset2prompt.json, config/dataset2maxlen.json, pred.py, eval.py, metrics.py and task.md of
https://github.com/THUDM/LongBench. The prompts are its words, slips included ("asconcisely"): they define the benchmark, and
published scores were made with them.
"""

from dataclasses import dataclass

from lt_train.benchmarks.declaration import Benchmark, Grader

SOURCE = "THUDM/LongBench"


@dataclass(frozen=True)
class Task:
    """`chat`: the prompt goes into the chat template; LongBench continues few-shot examples and code without one."""

    name: str
    grader: Grader
    max_new_tokens: int
    template: str
    count: int = 200
    chat: bool = True


PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
CONCISELY = "Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation."
SCIENTIFIC = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the "
    'information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
    '"unanswerable". Do not provide any explanation.'
)

TASKS = (
    Task(
        "narrativeqa",
        "qa_f1",
        128,
        f"You are given a story, which can be either a novel or a movie script, and a question. {CONCISELY}\n\n"
        "Story: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. "
        "Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    Task(
        "qasper",
        "qa_f1",
        128,
        f"You are given a scientific article and a question. Answer the question {SCIENTIFIC}\n\n"
        "Article: {context}\n\n"
        f" Answer the question based on the above article {SCIENTIFIC}\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    Task(
        "multifieldqa_en",
        "qa_f1",
        64,
        "Read the following text and answer briefly.\n\n{context}\n\n"
        "Now, answer the following question based on the above text, only give me the answer and do not output any other words.\n\n"
        "Question: {input}\nAnswer:",
        count=150,
    ),
    Task(
        "multifieldqa_zh",
        "qa_f1_zh",
        64,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
        "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    ),
    Task("hotpotqa", "qa_f1", 32, PASSAGES),
    Task("2wikimqa", "qa_f1", 32, PASSAGES),
    Task("musique", "qa_f1", 32, PASSAGES),
    Task(
        "dureader",
        "rouge_zh",
        128,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    Task(
        "gov_report",
        "rouge",
        512,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    Task(
        "qmsum",
        "rouge",
        512,
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    Task(
        "multi_news",
        "rouge",
        512,
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    ),
    Task(
        "vcsum",
        "rouge_zh",
        512,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    Task(
        "trec",
        "classification",
        64,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        chat=False,
    ),
    Task(
        "triviaqa",
        "qa_f1",
        32,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        chat=False,
    ),
    Task(
        "samsum",
        "rouge",
        128,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        chat=False,
    ),
    Task("lsht", "classification", 64, "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", chat=False),
    Task(
        "passage_count",
        "count",
        32,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these "
        "paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many "
        "non-repeating paragraphs are there in total?\n\n{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should only contain the "
        "number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    ),
    Task(
        "passage_retrieval_en",
        "retrieval",
        32,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n"
        "{context}\n\nThe following is an abstract.\n\n{input}\n\n"
        "Please enter the number of the paragraph that the abstract is from. "
        'The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    ),
    Task(
        "passage_retrieval_zh",
        "retrieval",
        32,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n"
        '请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
    ),
    Task("lcc", "code_similarity", 64, "Please complete the code given below. \n{context}Next line of code:\n", 500, chat=False),
    Task(
        "repobench-p",
        "code_similarity",
        64,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        500,
        chat=False,
    ),
)

LONGBENCH = tuple(
    Benchmark(
        f"longbench_{task.name}",
        task.grader,
        source=SOURCE,
        subset=task.name,
        archive=("data.zip", f"data/{task.name}.jsonl"),
        count=task.count,
        id_fields=(),
        rows="longbench",
        fields=("context", "input", "answers", "all_classes"),
        template=task.template,
        prompt_style="as_is" if task.chat else "without_chat",
        truncate_middle=True,
        max_new_tokens=task.max_new_tokens,
    )
    for task in TASKS
)

FIRST_LINE_ONLY = frozenset(f"longbench_{task}" for task in ("trec", "triviaqa", "samsum", "lsht"))
"""Tasks where what follows the answer's first line does not count (eval.py): it would be a further example."""
