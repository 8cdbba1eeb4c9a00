"""A server that answers at known times and goes wrong in known ways, with no model behind it.

Run by test_serve.py as a program; its last word is JSON that says how it behaves. At /sent it tells
what it was asked for.
"""

import asyncio
import json
import os
import socket
import sys
import time
from typing import Any

import uvicorn

HOW: dict[str, Any] = {
    "first": 0.05,  # seconds until the first event of an answer
    "every": 0.01,  # seconds between events
    "per_event": 1,  # tokens
    "refused": [],  # which of every ten requests are answered 429
    "retry_after": None,  # seconds; who comes back earlier is answered 400
    "key": None,
    "end": "done",  # how answers end, else: "silent", "cut", "no usage", "error" or "strange"
    "dies_at": None,  # the request in whose answer the process ends
    "start": "",  # "die": ends with a complaint
} | json.loads(sys.argv[-1])


WRONG = {"error": {"error": {"message": "it broke"}}, "strange": {"choices": 5}}
ASKED: list[dict[str, Any]] = []
NOT_BEFORE = [0.0]


def data(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    return data({"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None})


async def app(scope: Any, receive: Any, send: Any) -> None:
    """ASGI."""
    if scope["type"] != "http":  # no lifespan
        raise NotImplementedError
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)

    async def answer(status: int, value: Any, **headers: Any) -> None:
        named = [(name.encode(), str(each).encode()) for name, each in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": named})
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})

    def error(kind: str, message: str) -> Any:
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}

    key = dict(scope["headers"]).get(b"authorization", b"").decode()
    if HOW["key"] is not None and key != f"Bearer {HOW['key']}" and scope["path"][:3] == "/v1":
        await answer(401, error("invalid_api_key", "that is no key"))
    elif scope["path"] == "/v1/models":
        await answer(200, {"data": [{"id": "toy"}]})
    elif scope["path"] == "/v1/completions":
        asked = json.loads(body)
        number = len(ASKED) % 10
        ASKED.append(asked)
        if time.monotonic() < NOT_BEFORE[0]:
            await answer(400, error("too_early", "it is too early"))
        elif number in HOW["refused"]:
            NOT_BEFORE[0] = time.monotonic() + (HOW["retry_after"] or 0)
            again = {} if HOW["retry_after"] is None else {"retry-after": HOW["retry_after"]}
            await answer(429, error("rate_limit_error", "the queue is full"), **again)
        else:
            await stream(asked, send)
    else:
        known = {"/health": {}, "/sent": ASKED}
        await answer(200 if scope["path"] in known else 404, known.get(scope["path"]))


async def stream(asked: dict[str, Any], send: Any) -> None:
    """Events at their times, by a clock that does not drift."""
    kind = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": kind})
    began = time.monotonic()

    async def write(body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})

    wanted, per_event = asked["max_tokens"], HOW["per_event"]
    for number, done in enumerate(range(0, wanted, per_event)):
        due = began + HOW["first"] + HOW["every"] * number
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await write(piece(" a" * min(per_event, wanted - done)))
        if len(ASKED) == HOW["dies_at"]:
            print("the lights went out", file=sys.stderr, flush=True)
            os._exit(3)
        if HOW["end"] == "cut":
            raise RuntimeError("broken off")
        if HOW["end"] in WRONG:
            await write(data(WRONG[HOW["end"]]), more=False)
            return
    await write(b": a comment\n\n" + piece("", "length"))  # brings no token
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": wanted}
    if HOW["end"] != "no usage":
        await write(data({"choices": [], "usage": usage}))
    await write(b"" if HOW["end"] == "silent" else b"data: [DONE]\n\n", more=False)


if HOW["start"] == "die":
    sys.exit("gptsmith: there is no such model: train one")
with socket.socket() as bound:
    bound.bind(("127.0.0.1", 0))
    bound.listen(128)  # so that who comes before uvicorn is up waits
    print(f"serving at http://127.0.0.1:{bound.getsockname()[1]} at once", flush=True)
    how = {"log_level": "critical", "timeout_graceful_shutdown": 1}
    uvicorn.Server(uvicorn.Config(app, **how)).run(sockets=[bound])
