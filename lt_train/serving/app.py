"""The OpenAI-compatible HTTP API over the built-in engine."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from lt_train.inference.requests import Request, Sampling, sample_seed
from lt_train.inference.streamed_text import StreamedText
from lt_train.runtime.errors import UserError
from lt_train.serving.checkpoint import Checkpoint
from lt_train.serving.engine_thread import EngineStopped, EngineThread, Submission
from lt_train.serving.protocol import AnswerRequest, ApiError, ChatRequest, CompletionRequest, refused_body
from lt_train.serving.replies import Choice, Kind, Reply

RETRY_AFTER = 2
"""Seconds after which a client that met a full queue is to retry."""

CLIENT_CLOSED = 499
"""The status, nginx's, of a reply whose client has disconnected."""


def make_app(name: str, checkpoint: Checkpoint, engine: EngineThread) -> FastAPI:
    """
    Args:
        name: of the model, as clients see it. engine: started and stopped with the app.
    """
    app = FastAPI(title="lt_train", lifespan=_lifespan(engine))
    answering = Answering(name, checkpoint, engine)
    listed = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "lt_train"}
    listed |= {"root": str(checkpoint.folder.absolute()), "max_model_len": engine.longest}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HTTPRequest) -> Response:
        return await answering.reply("completion", body, [answering.prompt_ids(prompt) for prompt in body.prompts], http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: HTTPRequest) -> Response:
        return await answering.reply("chat", body, [answering.conversation_ids(body)], http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        answering.check_model(model)
        return listed

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "stopping" if engine.stopped else "ok"}, 503 if engine.stopped else 200)

    @app.exception_handler(ApiError)
    async def api_error(http: HTTPRequest, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, {"Retry-After": str(RETRY_AFTER)} if error.status == 429 else None)

    @app.exception_handler(EngineStopped)
    async def stopped(http: HTTPRequest, error: EngineStopped) -> Response:
        return await api_error(http, ApiError(503, str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HTTPRequest, error: RequestValidationError) -> Response:
        return await api_error(http, refused_body(error.errors()))

    @app.exception_handler(HTTPException)
    async def other(http: HTTPRequest, error: HTTPException) -> Response:
        return await api_error(http, ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))

    return app


def _lifespan(engine: EngineThread) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        engine.join()

    return lifespan


class Answering:
    """Requests of the API become requests to the engine, and its tokens become replies."""

    def __init__(self, name: str, checkpoint: Checkpoint, engine: EngineThread) -> None:
        self.name = name
        self.engine = engine
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        self.defaults = checkpoint.sampling

    def check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            raise ApiError(404, f"model: {model}: not served here. Fix: {self.name}", param="model", code="model_not_found")

    def prompt_ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        try:
            if isinstance(prompt, str):
                return self.checkpoint.prompt_ids(prompt, add_special_tokens=True)
            return self.checkpoint.checked(prompt)
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from error

    def conversation_ids(self, body: ChatRequest) -> tuple[int, ...]:
        try:
            text = self.checkpoint.conversation([message.turn for message in body.messages])
        except (TemplateError, ValueError, TypeError, UserError) as error:
            raise ApiError(400, f"messages: the chat template refuses them: {error}", param="messages") from error
        try:
            return self.checkpoint.prompt_ids(text)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error

    async def reply(self, kind: Kind, body: AnswerRequest, prompts: Sequence[tuple[int, ...]], http: HTTPRequest) -> Response:
        self.check_model(body.model)
        sampling = body.sampling(self.defaults, self.engine.longest)
        submission = self._submit(body, prompts, sampling)
        choices = [
            Choice(
                kind,
                index,
                self.tokenizer,
                StreamedText(self.tokenizer, sampling.stop, self.engine.stop_ids),
                body.return_token_ids,
            )
            for index in range(len(prompts) * body.n)
        ]
        reply = Reply(kind, self.name, sum(map(len, prompts)))
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(reply, choices, submission, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        if not await _collect(choices, submission, http):
            return Response(status_code=CLIENT_CLOSED)
        return JSONResponse(reply.complete(choices))

    def _submit(self, body: AnswerRequest, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> Submission:
        wanted, engine = len(prompts) * body.n, self.engine
        if unknown := set(body.stop_token_ids or ()) - set(engine.stop_ids):
            listed = ", ".join(map(str, sorted(engine.stop_ids)))
            raise ApiError(
                400,
                f"stop_token_ids: {min(unknown)}: not supported: answers end at {listed}. Fix: leave it out",
                param="stop_token_ids",
            )
        for prompt in prompts:
            self._check_length(body, len(prompt))
        if wanted > engine.capacity:
            raise ApiError(400, f"n: {wanted} answers: more than the {engine.capacity} that may run and wait. Fix: request fewer")
        if engine.requests + wanted > engine.capacity:
            raise ApiError(429, f"{engine.requests} requests run or wait, and {engine.capacity} may. Fix: retry later")
        seed = secrets.randbits(63) if body.seed is None else body.seed
        made = []
        for prompt in prompts:
            limit = body.limit or self.checkpoint.room(len(prompt), engine.longest)
            for sample in range(body.n):
                own = seed if sample == 0 else sample_seed(seed, "", sample)
                made.append(Request("", sample, own, prompt, limit, body.alternatives))
        return engine.submit(made, sampling)

    def _check_length(self, body: AnswerRequest, prompt_tokens: int) -> None:
        if not prompt_tokens:
            raise ApiError(400, "the prompt is empty: it has no token", param="prompt")
        tokens = prompt_tokens + (body.limit or 1)
        if tokens > self.engine.longest:
            answer = f" and {body.limit:,} of the answer" if body.limit else ""
            raise ApiError(
                400,
                f"{prompt_tokens:,} tokens of the prompt{answer}: the model's context and the KV budget hold "
                f"{self.engine.longest:,}. Fix: shorten the prompt, lower max_tokens, or start the server with more --kv-budget",
                code="context_length_exceeded",
            )


async def _events(reply: Reply, choices: Sequence[Choice], submission: Submission, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each piece of text, and an error in their place where the engine ends."""
    try:
        if reply.kind == "chat":
            for choice in choices:
                role = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield _event(reply.chunk(role))
        async for index, token in submission.tokens():
            text = choices[index].add(token)
            if text or token.answer is not None:
                yield _event(reply.chunk(choices[index].chunk(text)))
        if with_usage:
            yield _event(reply.chunk() | {"usage": reply.usage(choices)})
        yield "data: [DONE]\n\n"
    except EngineStopped as error:
        yield _event(ApiError(503, str(error)).body)
    finally:
        submission.cancel()


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _collect(choices: Sequence[Choice], submission: Submission, http: HTTPRequest) -> bool:
    """Read all tokens, unless the client hangs up first; returns whether they were read."""

    async def read() -> None:
        async for index, token in submission.tokens():
            choices[index].add(token)

    async def hang_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(read()), asyncio.create_task(hang_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        submission.cancel()
