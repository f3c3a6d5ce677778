"""LongBench's metrics: functions of an answer and one reference answer, from 0 to 1.

The formulas, oddities included, are those of metrics.py in https://github.com/THUDM/LongBench; scores are comparable with
published ones only so. ROUGE-L is that of the package `rouge` 1.0.1, whose own code is recursive and fails on long texts.
"""

import difflib
import logging
import re
import string
from collections import Counter
from collections.abc import Sequence

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
    "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
ARTICLES = re.compile(r"\b(a|an|the)\b")
COMMENT_SIGNS = ("`", "#", "//")


def qa_f1(answer: str, reference: str) -> float:
    """F1 over words, without case, punctuation and articles (as SQuAD, arXiv 1606.05250)."""
    return f1(english_words(answer), english_words(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 over the words that jieba finds, without punctuation."""
    return f1(chinese_words(answer), chinese_words(reference))


def rouge(answer: str, reference: str) -> float:
    """ROUGE-L F over words; 0 where either has none."""
    return rouge_l(answer, reference)


def rouge_zh(answer: str, reference: str) -> float:
    """ROUGE-L F over the words that jieba finds."""
    return rouge_l(" ".join(jieba_words(answer)), " ".join(jieba_words(reference)))


def count(answer: str, reference: str) -> float:
    """Fraction of the numbers in the answer that equal the reference."""
    numbers = re.findall(r"\d+", answer)
    return sum(number == reference for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str) -> float:
    """Fraction of the numbers in the answer that are the reference paragraph's ("Paragraph 3", "段落3")."""
    number = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    if number is None:
        raise ValueError(f"a reference must name a paragraph, not {reference[:50]!r}")
    return count(answer, number[1])


def code_similarity(answer: str, reference: str) -> float:
    """Similarity of the first line that is no comment, in whole percent.

    fuzzywuzzy's `ratio` as LongBench installs it, without python-Levenshtein, is difflib's; with it (and in rapidfuzz) it is
    another formula.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in COMMENT_SIGNS)), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (number of labels named) where the reference is among them.

    A label that is a part of the reference's name does not count as named; as upstream removes such labels from the list that it
    iterates over, it skips the one behind each.
    """
    named = [label for label in classes if label in answer]
    for label in named:
        if label in reference and label != reference:
            named.remove(label)
    return 1.0 / len(named) if reference in named else 0.0


def f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    common = (Counter(answer) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def english_words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def chinese_words(text: str) -> list[str]:
    cleaned = ("".join(word.lower().translate(NO_CHINESE_PUNCTUATION).split()) for word in jieba_words(text))
    return [word for word in cleaned if word]


def jieba_words(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it reports its dictionary on stderr
    return jieba.lcut(text)


def rouge_l(answer: str, reference: str) -> float:
    """Summary-level ROUGE-L F (Lin 2004, 3.2) as the package `rouge` computes it.

    Sentences end at full stops. For each reference sentence the union of its longest common subsequences with every sentence of the
    answer is taken; each word of a text counts once.
    """
    answer_sentences, reference_sentences = sentences(answer), sentences(reference)
    if not answer_sentences or not reference_sentences:
        return 0.0
    common = {word for one in reference_sentences for other in answer_sentences for word in common_subsequence(one, other)}
    precision = len(common) / len({word for sentence in answer_sentences for word in sentence})
    recall = len(common) / len({word for sentence in reference_sentences for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def sentences(text: str) -> list[list[str]]:
    # A sentence of blanks is one empty word, as there.
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that the package `rouge` takes."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above, row = lengths[-1], [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
