"""`lt-train chat`: a conversation with a hybrid in the terminal."""

import secrets
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from jinja2 import TemplateError
from rich.console import Console

from lt_train.hybrid.kv_size import kv_bytes
from lt_train.inference.requests import Answer, Request
from lt_train.inference.streamed_text import StreamedText
from lt_train.runtime.errors import UserError
from lt_train.runtime.interruption import Interrupted
from lt_train.runtime.units import format_bytes
from lt_train.serving.checkpoint import Checkpoint, load_checkpoint
from lt_train.serving.draft_options import DraftOptions
from lt_train.serving.reasoning_stream import ReasoningStream

COMMANDS = {"/fold": "hide or show the reasoning", "/new": "begin a new conversation", "/exit": "leave, as Ctrl-D does"}


def chat(folder: Path, console: Console, *, folded: bool, kv_budget: int | None, draft: DraftOptions | None = None) -> None:
    """Answer questions, a line each, until the input ends. A line that ends in a backslash continues in the next one.

    Raises:
        UserError: nothing to talk to in the folder, a model without a chat template, or no such draft.
    """
    conversation = Conversation(load_checkpoint(folder), console, folded, kv_budget, draft)
    typed = sys.stdin.isatty()
    if typed:
        conversation.introduce(folder)
    for question in _questions(_typed_lines(console) if typed else sys.stdin):
        if question == "/exit":
            return
        if question == "/fold":
            conversation.fold()
        elif question == "/new":
            conversation.forget()
        elif question:
            conversation.ask(question)


def _questions(lines: Iterable[str]) -> Iterator[str]:
    begun: list[str] = []
    for line in lines:
        begun.append(line.rstrip("\r\n"))
        if begun[-1].endswith("\\"):
            begun[-1] = begun[-1][:-1]
        else:
            yield "\n".join(begun).strip()
            begun = []
    yield "\n".join(begun).strip()


def _typed_lines(console: Console) -> Iterator[str]:
    """Lines of the terminal, edited as in a shell. Ctrl-C drops a line, Ctrl-D ends them."""
    import readline  # noqa: F401  importing it lets input() edit lines and remember them

    while True:
        try:
            yield input("> ")
        except EOFError:
            console.print()
            return
        except Interrupted as stop:
            if stop.number != signal.SIGINT:
                raise
            console.print("\n[dim]Ctrl-D leaves[/dim]")


@dataclass
class Conversation:
    """The turns so far, and the engine that takes the next one.

    Attributes:
        folded: whether the reasoning is hidden.
    """

    checkpoint: Checkpoint
    console: Console
    folded: bool
    kv_budget: int | None
    draft: DraftOptions | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokenizer = self.checkpoint.tokenizer
        if not tokenizer.chat_template:
            raise UserError(
                f"{self.checkpoint.folder}: its tokenizer has no chat template, so there are no turns. Fix: give the recipe one "
                "(prompt.chat_template), and export again"
            )
        engine = self.checkpoint.engine(self.kv_budget, max_slots=1, draft=self.draft)
        self.longest = engine.longest()
        if self.longest < 2:
            raise UserError(f"--kv-budget: {engine.budget:,} bytes do not hold one sequence. Fix: raise it")
        self.stop_ids = engine.stop_ids
        self.batch = engine.batch(engine.lay_out(1, self.longest))
        self.forget()

    def introduce(self, folder: Path) -> None:
        checkpoint, commands = self.checkpoint, ", ".join(f"{name}: {what}" for name, what in COMMANDS.items())
        lines = [
            f"{folder}: {checkpoint.source}, {checkpoint.streaming}; {self.longest:,} tokens of context",
            *([] if self.draft is None else [f"draft: {self.draft}"]),
            f"{commands}; Ctrl-C stops an answer",
        ]
        for line in lines:
            self.console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def fold(self) -> None:
        self.folded = not self.folded
        self.console.print(f"the reasoning is {'hidden' if self.folded else 'shown'}", style="dim")

    def forget(self) -> None:
        prompt = self.checkpoint.prompt
        system = None if prompt is None else prompt.system
        self.turns = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, question: str) -> None:
        """Print the answer as it comes, and what it took. A question without room, or that the template refuses, is dropped."""
        turns = [*self.turns, {"role": "user", "content": question}]
        try:
            prompt = self.checkpoint.conversation(turns)
        except (TemplateError, ValueError, TypeError, UserError) as error:
            self._complain(f"the chat template refuses this turn: {error}")
            return
        try:
            ids = self.checkpoint.prompt_ids(prompt)
        except ValueError as error:
            self._complain(f"this turn cannot be read: {error}")
            return
        if len(ids) >= self.longest:
            self._complain(f"{len(ids):,} tokens so far, and there is room for {self.longest:,}. Fix: /new")
            return
        text = self._answer(prompt, ids)
        self.turns = [*turns, {"role": "assistant", "content": text}]

    def _answer(self, prompt: str, ids: tuple[int, ...]) -> str:
        sampling = replace(self.checkpoint.sampling, max_new_tokens=self.checkpoint.room(len(ids), self.longest))
        sequence = self.batch.add(Request("", 0, secrets.randbits(63), ids), sampling)
        streamed = StreamedText(self.checkpoint.tokenizer, (), self.stop_ids)
        shown = _Shown(self.console, ReasoningStream(prompt), self.folded)
        answer: Answer | None = None
        started = time.perf_counter()
        with _ctrl_c() as pressed, shown:
            while not (answer or pressed):
                for token in self.batch.step():
                    shown.add(streamed.add(token.token_id))
                    if token.answer is not None:
                        answer = token.answer
                        shown.add(streamed.finish(answer.text))
        seconds = time.perf_counter() - started
        self.batch.cancel(sequence)
        end = " (stopped)" if answer is None else " (truncated)" if answer.finish_reason == "length" else ""
        self._report(len(ids), sequence.new, seconds, end)
        return streamed.sent

    def _report(self, prompt_tokens: int, tokens: int, seconds: float, end: str) -> None:
        model = self.checkpoint.model
        config, size, cached = model.config.to_dict(), model.dtype.itemsize, prompt_tokens + tokens
        kv, full = (kv_bytes(config, spec, cached, size) for spec in (model.spec, model.spec.all_full))
        rate = f"{tokens:,} tokens, {tokens / seconds:.1f} tokens/s{end}"
        kept = f"KV {format_bytes(kv)} of {cached:,} tokens (full attention: {format_bytes(full)})"
        self.console.print(f"{rate}; {kept}", style="dim", markup=False, highlight=False, soft_wrap=True)

    def _complain(self, line: str) -> None:
        self.console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


class _Shown:
    """An answer on the terminal: the reasoning dimmed, or a spinner in its place."""

    def __init__(self, console: Console, parts: ReasoningStream, folded: bool) -> None:
        self.console = console
        self.parts = parts
        self.folded = folded
        self.spinner = console.status("reasoning")
        self.last = "\n"

    def __enter__(self) -> "_Shown":
        self._spin()
        return self

    def __exit__(self, *error: object) -> None:
        self.spinner.stop()
        self._print(*self.parts.finish())
        if self.last != "\n":
            self.console.print()

    def add(self, text: str) -> None:
        for part, is_reasoning in self.parts.add(text):
            self._print(part, is_reasoning)
        self._spin()

    def _spin(self) -> None:
        if self.folded and self.parts.is_reasoning:
            self.spinner.start()
        else:
            self.spinner.stop()

    def _print(self, part: str, is_reasoning: bool) -> None:
        if not is_reasoning:
            self.spinner.stop()
        elif self.folded:
            return
        if self.folded and self.last == "\n":
            part = part.lstrip("\n")  # between the reasoning, which is hidden, and the answer
        if part:
            shown = part.replace("\x1b", "␛")  # a model's text does not steer the terminal
            style = "dim" if is_reasoning else None
            self.console.print(shown, style=style, end="", markup=False, highlight=False, soft_wrap=True)
            self.last = part[-1]


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """While the block runs, a first Ctrl-C is put into the list; a second one ends the command."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
