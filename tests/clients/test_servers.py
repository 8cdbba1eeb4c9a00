"""The server, asked by clients that others wrote, each as its users type it.

Each client is in an environment of its own, so that it has the versions that it wants.
docs/compatibility.md lists what was found.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptsmith import GPT, complete, save
from gptsmith.config.settings import GREEDY
from gptsmith.tokenizers import Tokenizer
from gptsmith.tokenizers.build import learn_bpe
from tests.cli.test_serve import started
from tests.serving.test_lm_eval import TEXT, taught

CLIENTS = Path(os.environ.get("CLIENTS") or Path(sys.prefix) / "clients")  # `make clients`
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
PROMPT = "The harbour froze in the"
COUNT = 8  # tokens that are written
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Served:
    """A server that runs, and what it should write."""

    def __init__(self, folder: Path, address: str, model: GPT, tokenizer: Tokenizer) -> None:
        self.folder, self.address = folder, address
        self.model, self.tokenizer = model, tokenizer

    def text(self, prompt: str = PROMPT) -> str:
        """What the library writes, taking the likeliest token."""
        (text,) = complete(self.model, self.tokenizer, prompt, max_tokens=COUNT, sampling=GREEDY)
        return text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models") / "toy"
    tokenizer = learn_bpe([TEXT], 420)
    model = taught(tokenizer)
    save(model, tokenizer, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with started(folder, "--no-log-requests") as (_, ready):
        yield Served(folder, ready.split(" at ")[1].split()[0], model, tokenizer)


def run(name: str, *words: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a client's program; what it prints."""
    place = CLIENTS / name
    assert place.is_dir(), f"{name} is missing: `make clients` installs it"
    programs = f"{place / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd or place,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | OFFLINE | environment | {"PATH": programs},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(name: str, *words: str | Path) -> dict[str, Any]:
    """What a program prints in its last line, which is JSON."""
    return json.loads(run(name, *words).splitlines()[-1])


LANGCHAIN = """
import asyncio, json, sys
from langchain_openai import ChatOpenAI, OpenAI

address, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
how = dict(base_url=f"{address}/v1", api_key="none", model="toy", max_tokens=count, temperature=0)
chat, plain = ChatOpenAI(**how, logprobs=True), OpenAI(**how)

async def streamed():
    return "".join([piece.content async for piece in chat.astream(prompt)])

answer = chat.invoke([("human", prompt)])
found = {
    "chat": answer.content,
    "chat streamed": asyncio.run(streamed()),
    "chat after an answer": chat.invoke([("human", ""), ("ai", ""), ("human", prompt)]).content,
    "chat of two": chat.batch([prompt, prompt])[1].content,
    "text": plain.invoke(prompt),
    "text streamed": "".join(plain.stream(prompt)),
}
tokens = answer.response_metadata["logprobs"]["content"]
try:
    chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("x")
except Exception as error:
    refused = str(error)
print(json.dumps({"texts": found, "tokens": len(tokens), "refused": refused}))
"""


@pytest.mark.slow
def test_langchain(server: Served) -> None:
    found = told("langchain-openai", "python", "-c", LANGCHAIN, server.address, PROMPT, str(COUNT))
    assert len(found["texts"]) == 6
    assert set(found["texts"].values()) == {server.text()}
    assert found["tokens"] == COUNT
    assert "tools is not supported: this model only writes text" in found["refused"]


@pytest.mark.slow
def test_llm(server: Served, tmp_path: Path) -> None:
    """Its models are in a file of the user's; a conversation goes on with -c."""
    entry = f"\n  model_name: toy\n  api_base: {server.address}/v1\n"
    models = f"- model_id: toy{entry}- model_id: text{entry}  completion: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)

    def typed(*words: str) -> str:
        options = ("-o", "max_tokens", str(COUNT), "-o", "temperature", "0")
        home = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
        return run("llm", "llm", *words, *options, **home).strip()

    expected = server.text().strip()
    assert typed("-m", "toy", PROMPT) == expected
    assert typed("-m", "toy", PROMPT[12:], "-s", PROMPT[:12], "--no-stream") == expected
    assert typed("-m", "text", PROMPT) == expected
    typed("-m", "toy", "The")
    assert typed("-c", PROMPT) == server.text(f"The{server.text('The')}{PROMPT}").strip()


LITELLM = """
import asyncio, json, sys
import litellm

address, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
how = dict(api_base=f"{address}/v1", api_key="none", max_tokens=count, temperature=0)
messages = [{"role": "user", "content": prompt}]
usage = {"include_usage": True}
chat = litellm.completion(model="openai/toy", messages=messages, **how)
pieces = litellm.completion(
    model="openai/toy", messages=messages, stream=True, stream_options=usage, **how
)
back = [*messages, chat.choices[0].message.model_dump()]
text = litellm.text_completion(model="text-completion-openai/toy", prompt=prompt, **how)
vllm = litellm.completion(model="hosted_vllm/toy", messages=messages, top_k=-1, min_p=0, **how)
later = asyncio.run(litellm.acompletion(model="openai/toy", messages=messages, **how))
found = {
    "chat": chat.choices[0].message.content,
    "chat streamed": "".join(p.choices[0].delta.content or "" for p in pieces if p.choices),
    "text": text.choices[0].text,
    "as vLLM": vllm.choices[0].message.content,
    "later": later.choices[0].message.content,
}
litellm.completion(model="openai/toy", messages=back, **how)
kinds = []
for more in ({"response_format": {"type": "json_object"}}, {"model": "openai/none"}):
    try:
        litellm.completion(**({"model": "openai/toy", "messages": messages} | how | more))
    except Exception as error:
        kinds.append(type(error).__name__)
print(json.dumps({"texts": found, "kinds": kinds, "usage": chat.usage.completion_tokens}))
"""


@pytest.mark.clients
def test_litellm(server: Served) -> None:
    found = told("litellm", "python", "-c", LITELLM, server.address, PROMPT, str(COUNT))
    assert len(found["texts"]) == 5
    assert set(found["texts"].values()) == {server.text()}
    assert found["kinds"] == ["BadRequestError", "NotFoundError"]
    assert found["usage"] == COUNT


NODE = """
import OpenAI from "openai";

const [address, prompt, count] = process.argv.slice(1);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const how = { model: "toy", max_tokens: Number(count), temperature: 0 };
const messages = [{ role: "user", content: prompt }];
const unasked = { store: false, tools: [], tool_choice: "none", modalities: ["text"], n: 1 };
const chat = await client.chat.completions.create({ messages, ...how, ...unasked });
const runner = client.chat.completions.stream({ messages, ...how });
const completion = await client.completions.create({ prompt, ...how, logprobs: 1 });
let streamed = "";
for await (const event of await client.completions.create({ prompt, ...how, stream: true }))
  streamed += event.choices[0].text;
const back = [...messages, chat.choices[0].message, ...messages];
await client.chat.completions.create({ messages: back, ...how });
let refused;
try {
  const response_format = { type: "json_object" };
  await client.chat.completions.create({ messages, ...how, response_format });
} catch (error) {
  refused = [error.constructor.name, error.param, error.requestID];
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const texts = {
  chat: chat.choices[0].message.content,
  "chat streamed": (await runner.finalChatCompletion()).choices[0].message.content,
  text: completion.choices[0].text,
  "text streamed": streamed,
};
console.log(JSON.stringify({ texts, refused, models, id: chat._request_id }));
"""


@pytest.mark.clients
def test_openai_in_node(server: Served) -> None:
    words = ("node", "--input-type=module", "-e", NODE, server.address, PROMPT, str(COUNT))
    found = told("openai-node", *words)
    assert len(found["texts"]) == 4
    assert set(found["texts"].values()) == {server.text()}
    assert found["refused"][:2] == ["BadRequestError", "response_format"]
    assert found["refused"][2].startswith("req_")
    assert found["id"].startswith("req_")
    assert found["models"] == ["toy"]


@pytest.mark.clients
@pytest.mark.parametrize("kind", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(server: Served, tmp_path: Path, kind: str) -> None:
    """Synthetic data: each request gets exactly as many tokens as it asks for."""
    run(
        "guidellm",
        *("guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={server.address},request_format={kind}"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        *("--tokenizer", f"kind=huggingface_auto,model={server.folder}"),
        cwd=tmp_path,
    )
    (benchmark,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (16, 0)
    counts = {each["output_metrics"]["text_tokens"] for each in requests["successful"]}
    assert counts == {16}


@pytest.mark.clients
@pytest.mark.parametrize("kind", ["openai", "openai-chat"])
def test_vllm_bench(server: Served, tmp_path: Path, kind: str) -> None:
    """Random data, with every sampling flag at the value that switches it off."""
    path = "/v1/chat/completions" if kind == "openai-chat" else "/v1/completions"
    said = run(
        "vllm",
        *("vllm", "bench", "serve", "--backend", kind, "--base-url", server.address),
        *("--endpoint", path, "--model", "toy", "--tokenizer", server.folder, "--ignore-eos"),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "16"),
        *("--num-prompts", "16", "--max-concurrency", "4"),
        *("--top-k", "-1", "--top-p", "1", "--min-p", "0", "--temperature", "1"),
        *("--repetition-penalty", "1", "--presence-penalty", "0", "--frequency-penalty", "0"),
        cwd=tmp_path,
    )
    for name, value in (("Successful requests", 16), ("Failed requests", 0)):
        assert re.search(rf"{name}: +{value}\b", said), said
    assert re.search(rf"Total generated tokens: +{16 * 16}\b", said), said
