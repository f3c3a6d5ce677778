"""Whether the reasoning of an answer is enclosed as the base encloses it, and how it comes to be."""

from dataclasses import dataclass

from lt_train.dataset.faults import RowFault
from lt_train.recipe.reasoning_tags import REASONING_TAGS, STILL, THINK, ReasoningTags

SETTING = "data.reasoning_tags"

_CONVERT = f"{SETTING}: convert rewrites the tags of the data into the base's; {SETTING}: keep trains on them as they are"
_KEEP = f"correct these rows, leave them out with data.faulty: drop, or train on them as they are with {SETTING}: keep"


@dataclass(frozen=True)
class BaseReasoning:
    """How the base writes reasoning.

    Attributes:
        tags: None where neither its chat template nor its tokenizer shows any.
        opened: the generation prompt ends inside the reasoning.
        key: of a message, from which the chat template reads its reasoning; None where it reads none.
        kept: the chat template writes the reasoning of a last answer.
    """

    tags: ReasoningTags | None
    opened: bool = False
    key: str | None = None
    kept: bool = True


def known_tags(pair: list[str] | None) -> tuple[ReasoningTags, ...]:
    """The recipe's own pair (data.reasoning_tag_pair) and all usual ones."""
    if pair is None:
        return REASONING_TAGS
    opening, closing = pair
    own = next((tags for tags in REASONING_TAGS if tags.opening == opening and tags.closing == closing), None)
    return (own or ReasoningTags(opening, closing), *REASONING_TAGS)


def tags_of_answer(answer: str, base: BaseReasoning, known: tuple[ReasoningTags, ...]) -> ReasoningTags | None:
    """The tags that enclose the reasoning of an answer: the base's where they are there, else those that come first.

    Others than the base's, STILL's and <think> count only where the answer begins with them or inside them: an answer may mention
     an XML tag.
    """
    if base.tags is not None and (base.tags.opening in answer or base.tags.closing in answer):
        return base.tags
    found = []
    for tags in known:
        usual = tags in (THINK, STILL, known[0])
        begins = answer.lstrip().startswith(tags.opening)
        inside = tags.opening not in answer and tags.closing in answer
        if begins or inside or (usual and tags.opening in answer):
            places = [answer.find(tag) for tag in (tags.opening, tags.closing) if tag in answer]
            found.append((min(places), known.index(tags), tags))
    return min(found)[2] if found else None


def answer_alone(answer: str, reasoning: str, tags: ReasoningTags) -> str:
    """An answer to a prompt that has closed the reasoning already, as Qwen3's does without thinking: without empty tags before it.

    Raises:
        RowFault: the answer has reasoning, or nothing else.
    """
    inside, closing, content = answer.partition(tags.closing)
    if reasoning.strip() or (closing and inside.replace(tags.opening, "").strip()):
        raise RowFault(
            f"{SETTING}: null: the answer has reasoning, and the prompt has closed it with {tags.closing} already",
            kind="reasoning after a prompt that closes it",
            fix="set a prompt that lets the base reason (prompt.system, prompt.chat_template), or give answers without reasoning; "
            f"{SETTING}: keep trains on them as they are",
        )
    if closing and not content.strip():
        raise RowFault("the answer is empty; take the row out, or fill it in")
    return content.lstrip() if closing else answer


def check_reasoning(answer: str, base: BaseReasoning, known: tuple[ReasoningTags, ...]) -> None:
    """
    Raises:
        RowFault: a model that is trained on this answer would not close its reasoning, or not as the base does.
    """
    tags = tags_of_answer(answer, base, known)
    prompt = f", and the base's prompt opens {base.tags.opening}" if base.opened and base.tags else ""
    never = ": the trained model would never close its reasoning" if prompt else ""
    if tags is None:
        if base.opened and base.tags is not None:
            raise RowFault(
                f"{SETTING}: null: the answer has no {base.tags.closing}{prompt}{never}",
                kind="no reasoning",
                fix=f"give answers with reasoning, or train on these as they are with {SETTING}: keep",
            )
        return
    if base.tags is not None and tags != base.tags:
        raise RowFault(
            f"{SETTING}: null: the reasoning is between {tags.opening} and {tags.closing}, the base's between "
            f"{base.tags.opening} and {base.tags.closing}{prompt}{never}",
            kind=f"tags {tags.opening}",
            fix=_CONVERT,
        )
    body = answer.lstrip().removeprefix(tags.opening) if base.opened else answer
    openings, closings = body.count(tags.opening), body.count(tags.closing)
    if openings > (0 if base.opened else 1):
        raise RowFault(f"{SETTING}: null: several {tags.opening} in one answer{never}", kind="several openings", fix=_KEEP)
    if closings > 1:
        raise RowFault(f"{SETTING}: null: several {tags.closing} in one answer", kind="several closings", fix=_KEEP)
    if closings == 0:
        raise RowFault(
            f"{SETTING}: null: the reasoning is opened with {tags.opening} and never closed", kind="never closed", fix=_KEEP
        )
    if not base.opened and openings == 0:
        raise RowFault(
            f"{SETTING}: null: the answer begins inside the reasoning ({tags.closing} without {tags.opening}), "
            "and the base's prompt does not open it",
            kind="begins inside the reasoning",
            fix=_CONVERT,
        )
    if not base.opened and body.index(tags.opening) > body.index(tags.closing):
        raise RowFault(f"{SETTING}: null: {tags.closing} before {tags.opening}", kind="closing before opening", fix=_KEEP)


def split_reasoning(answer: str, tags: ReasoningTags) -> tuple[str, str] | None:
    """Reasoning and content of an answer, without `tags`; None where it is not one reasoning and what follows it."""
    before, _, rest = answer.rpartition(tags.opening)
    reasoning, closing, content = rest.partition(tags.closing)
    several = tags.opening in before or tags.closing in content
    if before.strip() or several or not closing or not reasoning.strip():
        return None
    for tag in (tags.answer_opening, tags.answer_closing):
        content = content.replace(tag, "", 1) if tag else content
    return reasoning.strip(), content.strip()
