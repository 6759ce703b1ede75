#!/usr/bin/env python3
"""Programs that others wrote against a real tpengine serve: the official openai package, the load generators locust and ApacheBench. Skipped, with a
word, where there is none and pip cannot fetch it."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]
import case_help  # noqa: E402
import venv_help  # noqa: E402
from case_help import expect, failures, report, skip  # noqa: E402
from serve_client import Server  # noqa: E402

BUILD = Path(os.environ.get("BUILD", "build"))
KEY = "a-key-of-the-test"
# A template of the Hermes family, so that the server knows how tools are called; the bundled model continues what it reads.
TEMPLATE = """{%- if tools %}{{- '<tools>' }}{% for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{% endfor %}{{- '\\n</tools>\\n<tool_call>\\n{"name": <function-name>, \
"arguments": <args-json-object>}\\n</tool_call>\\n' }}{% endif %}
{%- for message in messages %}{%- if message.tool_calls %}{% for call in message.tool_calls %}{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' \
~ (call.function.arguments | tojson) ~ '}\\n</tool_call>\\n' }}{% endfor %}{% elif message.role == 'tool' %}{{- '<tool_response>\\n' ~ message.content ~ \
'\\n</tool_response>\\n' }}{% else %}{{- message.content ~ '\\n' }}{% endif %}{% endfor %}"""
TOOLS = [{"type": "function", "function": {"name": name, "description": "looks it up", "parameters": {
    "type": "object", "properties": {"place": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["place", "days"], "additionalProperties": False}}} for name in ("weather", "tides")]
LOCUST = '''
from locust import HttpUser, between, task

class Client(HttpUser):
    wait_time = between(0, 0.02)

    @task(3)
    def whole(self):
        with self.client.post("/v1/completions", json={"prompt": "In the beginning", "max_tokens": 6, "temperature": 0}, catch_response=True) as answer:
            if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] != 6:
                answer.failure("fewer tokens than asked for")

    @task(2)
    def streamed(self):
        body = {"messages": [{"role": "user", "content": "And the king"}], "max_tokens": 6, "stream": True}
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as answer:
            lines = [line for line in answer.iter_lines() if line]
            if not lines or lines[-1] != b"data: [DONE]":
                answer.failure("no [DONE]")

    @task(1)
    def models(self):
        self.client.get("/v1/models")
'''


# ---- the openai package; this part runs in an interpreter that has it --------------------------------------------------


def raised(call):
    """What a call raises, by name, and the exception."""
    try:
        call()
    except Exception as error:  # pylint: disable=broad-except
        return type(error).__name__, error
    return None, None


def use_openai(port):
    import asyncio
    import time

    import openai
    import pydantic

    print(f"# openai {openai.__version__}")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=120)
    models = client.models.list().data
    expect("models.list", [model.id for model in models], ["bundled"])
    expect("models.retrieve", client.models.retrieve("bundled").id, "bundled")
    ask = {"model": "bundled", "messages": [{"role": "user", "content": "And the LORD said unto Moses,"}], "temperature": 0, "max_tokens": 24}

    answer = client.chat.completions.create(**ask)
    whole = answer.choices[0].message.content
    report("chat: text, reason, usage", None if whole and answer.choices[0].finish_reason in ("stop", "length") and
           answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens and answer.choices[0].message.role == "assistant"
           else answer)
    report("chat: a request id", None if answer._request_id else answer)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    expect("chat, streamed: the same text", "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), whole)
    expect("chat, streamed: usage in the last chunk alone", ([bool(c.usage) for c in chunks], chunks[-1].choices), ([False] * (len(chunks) - 1) + [True], []))
    expect("chat, streamed: the same usage", chunks[-1].usage.completion_tokens, answer.usage.completion_tokens)
    expect("chat, streamed: one role, one reason", (sum(bool(c.choices and c.choices[0].delta.role) for c in chunks),
                                                    [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]),
           (1, [answer.choices[0].finish_reason]))
    # That helper takes an answer that was cut at max_tokens for an error.
    with client.chat.completions.stream(**{**ask, "stop": [whole[5:9]]}) as stream:
        types = {event.type for event in stream}
        expect("chat.completions.stream puts it together", stream.get_final_completion().choices[0].message.content, whole[:whole.index(whole[5:9])])
        report("and tells its events", None if {"chunk", "content.delta", "content.done"} <= types else types)

    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    report("chat logprobs", None if "".join(token.token for token in tokens) == whole and all(
        len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob <= 0 and bytes(token.bytes).decode(errors="replace") == token.token
        for token in tokens) else tokens)
    answer = client.completions.create(model="bundled", prompt=["In the beginning", "The king"], max_tokens=8, temperature=0, logprobs=2, n=2)
    report("completions: prompts, n and logprobs", None if [choice.index for choice in answer.choices] == [0, 1, 2, 3] and
           answer.choices[0].text == answer.choices[1].text != answer.choices[2].text and len(answer.choices[3].logprobs.tokens) == 8 else answer)
    text = client.completions.create(model="bundled", prompt="In the beginning", max_tokens=8, temperature=0).choices[0].text
    stream = client.completions.create(model="bundled", prompt="In the beginning", max_tokens=8, temperature=0, stream=True)
    expect("completions, streamed", "".join(chunk.choices[0].text for chunk in stream), text)
    stopped = client.chat.completions.create(**{**ask, "stop": [whole[5:9]]}).choices[0]
    expect("stop", (stopped.message.content, stopped.finish_reason), (whole[:whole.index(whole[5:9])], "stop"))
    seeds = [client.chat.completions.create(**{**ask, "temperature": 1, "seed": seed}).choices[0].message.content for seed in (1, 1, 2)]
    report("seed", None if seeds[0] == seeds[1] != seeds[2] else seeds)

    # tools
    for choice, names in (("required", {"weather", "tides"}), ({"type": "function", "function": {"name": "tides"}}, {"tides"})):
        answer = client.chat.completions.create(**{**ask, "max_tokens": 150}, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        calls = answer.choices[0].message.tool_calls or []
        good = len(calls) == 1 and calls[0].function.name in names and calls[0].id and set(json.loads(calls[0].function.arguments)) == {"place", "days"}
        report(f"tools: {choice}", None if good and answer.choices[0].finish_reason in ("tool_calls", "stop") else answer)
        for _ in range(10):  # on a busy machine several tokens may go into one piece
            chunks = list(client.chat.completions.create(**{**ask, "max_tokens": 150}, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, stream=True))
            deltas = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or []]
            if sum(bool(d.function.arguments) for d in deltas) > 2:
                break
        expect(f"tools, streamed: {choice}", (("".join(d.function.name or "" for d in deltas)), "".join(d.function.arguments or "" for d in deltas)),
               (calls[0].function.name, calls[0].function.arguments))
        report("tools, streamed: arguments come in pieces", None if sum(bool(d.function.arguments) for d in deltas) > 2 else deltas)
    turn = [*ask["messages"], answer.choices[0].message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": calls[0].id, "content": "fair"}]
    report("tools: the next turn", None if client.chat.completions.create(**{**ask, "messages": turn}, tools=TOOLS).choices else "no choice")
    expect("tools: none", client.chat.completions.create(**ask, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls, None)

    # constrained decoding
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=10)
        age: int = pydantic.Field(ge=0, le=120)
        married: bool

    parsed = client.chat.completions.parse(**{**ask, "max_tokens": 200}, response_format=Person).choices[0].message
    report("parse: json_schema from a pydantic model", None if isinstance(parsed.parsed, Person) else parsed)
    answer = client.chat.completions.create(**{**ask, "max_tokens": 12}, response_format={"type": "json_object"}).choices[0]
    report("json_object", None if answer.message.content.lstrip().startswith("{") else answer)

    # errors, as the package sorts them
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0)
    expect("401", raised(stranger.models.list)[0], "AuthenticationError")
    name, error = raised(lambda: client.chat.completions.create(**{**ask, "temperature": 99}))
    report("400, with its field", None if name == "BadRequestError" and error.param == "temperature" and error.type == "invalid_request_error" else (name, error))
    name, error = raised(lambda: client.completions.create(model="bundled", prompt=[5] * 9000, max_tokens=1))
    report("400: a prompt beyond the context", None if name == "BadRequestError" and error.code == "context_length_exceeded" else (name, error, error and error.code))
    expect("404: another model", raised(lambda: client.models.retrieve("nobody"))[0], "NotFoundError")
    expect("404: another route", raised(lambda: client.embeddings.create(model="bundled", input="x"))[0], "NotFoundError")
    expect("400: no message", raised(lambda: client.chat.completions.create(model="bundled", messages=[]))[0], "BadRequestError")

    # company, leaving
    async def company():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=120) as many:
            return await asyncio.gather(*(many.chat.completions.create(**ask) for _ in range(24)))

    texts = {answer.choices[0].message.content for answer in asyncio.run(company())}
    expect("24 at once: the same text", texts, {whole})
    long = {"model": "bundled", "prompt": "In the", "max_tokens": 900, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**long)
    next(iter(stream))
    stream.close()
    stats = client.get("/stats", cast_to=object)
    end = time.monotonic() + 10
    while stats["scheduler"]["running"] and time.monotonic() < end:
        stats = client.get("/stats", cast_to=object)
    expect("a stream that is closed is computed no further", stats["scheduler"]["running"], 0)

    # The server was started with room for 4 and a queue of 28.
    async def crowd():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, timeout=120, max_retries=0) as many:
            asked = (many.completions.create(**{**long, "max_tokens": 100, "stream": False}) for _ in range(60))
            return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(crowd())
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    report("429 when the queue is full, and when to come again", None if 0 < len(refused) <= 28 and all(
        isinstance(error, openai.RateLimitError) and int(error.response.headers["retry-after"]) >= 1 for error in refused) else (len(refused), refused[:2]))
    return failures


# ---- the others ------------------------------------------------------------------------------------------------------


def test_openai(server):
    python, why = venv_help.python_with(["openai", "pydantic"], ["openai", "pydantic"])
    if not python:
        skip("the openai package", why)
        return
    done = subprocess.run([python, __file__, "--port", str(server.port)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200)
    print(done.stdout, end="", flush=True)
    failures.extend(line for line in done.stdout.splitlines() if line.startswith("not ok"))
    report("the openai package: ran to its end", None if done.returncode == 0 or "not ok" in done.stdout else f"status {done.returncode}")


def test_locust(server):
    python, why = venv_help.python_with(["locust"], ["locust"], large=True)
    if not python:
        skip("locust", why)
        return
    path = Path(WORK) / "locustfile.py"
    path.write_text(LOCUST)
    done = subprocess.run([python, "-m", "locust", "-f", path, "--headless", "--users", "8", "--spawn-rate", "8", "--run-time", "6s", "--stop-timeout", "30",
                           "--host", f"http://127.0.0.1:{server.port}", "--json", "--loglevel", "ERROR"], text=True, capture_output=True, timeout=120)
    try:
        rows = json.loads(done.stdout[done.stdout.index("["):])
    except ValueError:
        report("locust", (done.stdout + done.stderr)[-1500:])
        return
    counts = {row["name"]: (row["num_requests"], row["num_failures"]) for row in rows}
    report("locust: 8 users, no failure", None if done.returncode == 0 and len(counts) == 3 and all(
        made > 0 and not failed for made, failed in counts.values()) else f"{counts} {done.stderr[-1500:]}")
    print(f"# locust: {sum(made for made, _ in counts.values())} requests in 6 s")


def test_ab(server):
    if not shutil.which("ab"):
        skip("ApacheBench", "ab is not installed (apache2-utils)")
        return
    body = Path(WORK) / "body.json"
    body.write_text(json.dumps({"prompt": "In the beginning", "max_tokens": 2, "temperature": 0}))
    url = f"http://127.0.0.1:{server.port}"
    for name, words in (("keep-alive", ["-k", "-n", "2000", "-c", "16", url + "/health"]),
                        ("completions", ["-k", "-n", "200", "-c", "8", "-l", "-T", "application/json", "-p", body, url + "/v1/completions"])):
        done = subprocess.run(["ab", "-q", "-s", "60", *words], text=True, capture_output=True, timeout=120)
        wanted, counts = words[2], dict(re.findall(r"^(Complete|Failed|Non-2xx) re[a-z]+: +(\d+)", done.stdout, re.MULTILINE))
        report(f"ApacheBench, {name}", None if done.returncode == 0 and counts == {"Complete": wanted, "Failed": "0"} else done.stdout + done.stderr)
        print("# " + (re.search(r"Requests per second.*", done.stdout) or [""])[0])


def main():
    if sys.argv[1:2] == ["--port"]:
        return 1 if use_openai(int(sys.argv[2])) else 0
    global WORK
    with tempfile.TemporaryDirectory() as WORK:
        model = Path(WORK) / "bundled"
        checkpoint = Path(WORK) / "checkpoint"
        shutil.copytree("tests/model", checkpoint)
        config = json.loads((checkpoint / "tokenizer_config.json").read_text())
        (checkpoint / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
        subprocess.run([BUILD / "tpshard", "--tp", "2", "--quant", "int4", checkpoint, model], check=True, capture_output=True)
        with Server(model, "--api-key", KEY, "--max-batch", 4, "--max-queue", 28) as server:
            test_openai(server)
        with Server(model) as server:
            test_locust(server)
            test_ab(server)
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())
