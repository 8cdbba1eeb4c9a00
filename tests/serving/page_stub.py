"""A server that speaks the formats of `gptsmith serve`, and whose texts a page's tests know.

Words of the prompt choose what goes wrong: "busy", "forbidden", "vanish", "stumble", "slow". A
conversation of more than 6 messages is too long.
"""

import asyncio
import base64
import hashlib
import json
import math
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from gptsmith.machine.pages import read_page
from gptsmith.serving.pages import WRITING

KEY = "open-sesame"
STORY = """ The keeper of the light had counted the ships each evening for thirty years — and \
wrote them down, one line for each, in a ledger that nobody had asked him to keep.

“Eleven,” he said, and was wrong: the twelfth lay dark under the cliff, her lamps put out, \
and she was waiting for him to sleep. 🚢

What he did next he did slowly. He trimmed the wick. He turned the glass to the wall, as his \
father had done in the year of the great ice, and in the sudden night the whole bay could hear \
her anchor chain begin to run.
"""
OTHERS = " the| a| of| and| it|,| light| he| was| ship| dark| in|\n| sea| then| no|.|<|endoftext|>"
POOL = [*OTHERS.split("|")[:17], "<|endoftext|>", r"bytes: \xe2\x80"]
FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "seed"}


@dataclass
class Stub:
    """Where it is, and what it was asked."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)


def pieces_of(text: str) -> list[tuple[str, list[str]]]:
    """Pieces of text, each with the names of its tokens: a character beyond ASCII has two."""
    pieces = []
    for word in re.findall(r" ?[a-zA-Z]+|\n+| ?[^\sa-zA-Z]", text):
        data = word.encode()
        if len(data) == len(word):
            pieces.append((word, [word]))
            continue
        cut = ["".join(chr(b) if b < 128 else rf"\x{b:02x}" for b in data[s]) for s in HALVES]
        pieces.append((word, [f"bytes:{half}" for half in cut]))
    return pieces


HALVES = (slice(None, -1), slice(-1, None))
PIECES = pieces_of(STORY)
SHARES = (0.99, 0.97, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01, 0.001)


def logprobs_of(names: list[str], draw: random.Random) -> dict[str, Any]:
    """What a model might have thought of each token: the five likeliest and the token itself."""
    scored, tops = [], []
    for name in names:
        chosen = draw.choice(SHARES)
        shares = sorted((draw.random() ** 3 for _ in range(5)), reverse=True)
        rest = [share / sum(shares) * (1 - chosen) * 0.9 for share in shares]
        others = draw.sample([other for other in POOL if other != name], 5)
        top = sorted([(chosen, name), *zip(rest, others, strict=True)], reverse=True)
        kept = top[:5] + [pair for pair in top[5:] if pair[1] == name]
        scored.append(math.log(chosen))
        tops.append({name: math.log(share) for share, name in kept})
    offsets = [0] * len(names)
    return {
        "tokens": names,
        "token_logprobs": scored,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


async def written(body: dict[str, Any]) -> AsyncIterator[str]:
    """The events of a stream; sample j of seed S is the story from a place that S + j names."""
    prompt, most, n = body["prompt"], body["max_tokens"], body["n"]
    counts = [0] * n
    for step in range(most):
        for j in range(n):
            at = (body["seed"] + j) * 7 + step
            if counts[j] >= most:
                continue
            text, names = PIECES[at % len(PIECES)]
            draw = random.Random(f"{body['seed'] + j} {step}")
            names = names[: most - counts[j]]
            counts[j] += len(names)
            finish = "length" if counts[j] >= most else None
            logprobs = logprobs_of(names, draw)
            choice = {"index": j, "text": text, "logprobs": logprobs, "finish_reason": finish}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        await asyncio.sleep(0.02 if "slow" in prompt else 0.001)
        if step == 5 and "vanish" in prompt:
            raise ConnectionError
        if step == 5 and "stumble" in prompt:
            yield f"data: {json.dumps(error('the model stumbled'))}\n\n"
            return
    yield "data: [DONE]\n\n"


async def said(body: dict[str, Any]) -> AsyncIterator[str]:
    """The events of an answer: the last message and the story, up to where it is to be long."""
    text = f"You said: {body['messages'][-1]['content']}\n" + STORY
    words = re.findall(r"\s*\S+", text)[: body["max_tokens"]]
    for delta in [{"role": "assistant", "content": ""}, *({"content": word} for word in words), {}]:
        finish = None if delta else "length" if len(words) == body["max_tokens"] else "stop"
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        await asyncio.sleep(0.05 if "slow" in text else 0.001)
        if "vanish" in text and delta.get("content", "").endswith("the"):
            raise ConnectionError
    yield "data: [DONE]\n\n"


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "a_type", "param": None, "code": code}}


def policy(page: str) -> str:
    """Everything refused but this script, this style, and the server itself."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, flags=re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        assert len(sums) == 1, f"{len(sums)} elements <{tag}>: one is wanted"
        return f"{tag}-src 'sha256-{sums[0]}'"

    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; {hashes('script')}; {hashes('style')}; {rest}"


def application(stub: Stub, key: str | None, chat: bool) -> FastAPI:
    app = FastAPI(docs_url=None, openapi_url=None)

    @app.get("/")
    async def page() -> HTMLResponse:
        text = read_page(WRITING)
        return HTMLResponse(text, headers={"Content-Security-Policy": policy(text)})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": "harbour", "running": 1, "waiting": 0, "slots": 8}

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization")
        if key and request.url.path.startswith("/v1/") and given != f"Bearer {key}":
            return JSONResponse(error("the API key is missing or wrong"), 401)
        response: Response = await call_next(request)
        return response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model: dict[str, Any] = {
            "id": "harbour",
            "object": "model",
            "owned_by": "you",
            "context_length": 1024,
        }
        model["chat"] = chat
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> Response:
        stub.asked.append(body)
        if unknown := set(body) - FIELDS - {"stream", "logprobs"}:
            return JSONResponse(error(f"unknown {unknown}"), 400)
        if "forbidden" in body["prompt"]:
            return JSONResponse(error("the prompt has 1,200 tokens: shorten it"), 400)
        if "busy" in body["prompt"] and len(stub.asked) < 2:
            return JSONResponse(error("the queue is full"), 429, {"Retry-After": "3"})
        return StreamingResponse(written(body), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def conversation(body: dict[str, Any]) -> Response:
        stub.asked.append(body)
        if unknown := set(body) - (FIELDS | {"stream", "messages"}) | {*body} & {"n", "prompt"}:
            return JSONResponse(error(f"unknown {unknown}"), 400)
        if len(body["messages"]) > 6:
            return JSONResponse(error("too many tokens", "context_length_exceeded"), 400)
        if "forbidden" in body["messages"][-1]["content"]:
            return JSONResponse(error("the chat template refuses these messages"), 400)
        return StreamingResponse(said(body), media_type="text/event-stream")

    return app


@contextmanager
def serving(key: str | None = None, *, chat: bool = False) -> Iterator[Stub]:
    """The stub on a free port of this machine, in a thread."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        stub = Stub(f"http://127.0.0.1:{door.getsockname()[1]}/")
        config = uvicorn.Config(application(stub, key, chat), log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the stub did not start"
            yield stub
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
