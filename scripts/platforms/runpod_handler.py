"""RunPod queue endpoint: a handler that hands each job to tpengine serve over a Unix socket.

    python3 runpod_handler.py                              # as a worker
    python3 runpod_handler.py --test_input '{"input": {"prompt": "In the", "sampling_params": {"max_tokens": 8}}}'

Needs the packages runpod and aiohttp. The server is what the entrypoint beside this file starts, by its environment (MODEL_NAME,
TENSOR_PARALLEL_SIZE, MAX_MODEL_LEN ...); MAX_CONCURRENCY jobs, by default 300, are taken at once.
A job's input is worker-vllm's: {"prompt" or "messages", "sampling_params", "stream"}, or {"openai_route", "openai_input"} with a request of
OpenAI's API as it is. Streams yield as they come: chunks as objects, or as server-sent events for openai_route.
"""
import asyncio
import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import aiohttp
import runpod

SOCKET = os.path.join(tempfile.mkdtemp(), "tpengine.sock")
MAX_CONCURRENCY = int(os.environ.get("MAX_CONCURRENCY", "300"))


def start_server():
    """A worker without its server is of no use: it ends, and the platform starts another."""
    process = subprocess.Popen([Path(__file__).with_name("entrypoint"), "--unix", SOCKET, "--no-page"],
                               env={k: v for k, v in os.environ.items() if k not in ("PORT", "PORT_HEALTH")})
    ending = threading.Event()

    def watch():
        status = process.wait()
        if not ending.is_set():
            os._exit(status or 1)

    def stop():
        ending.set()
        process.terminate()
        process.wait()

    threading.Thread(target=watch, daemon=True).start()
    atexit.register(stop)


async def wait_ready(session):
    while True:
        try:
            async with session.get("http://tpengine/ping") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientConnectorError:
            pass  # it has not opened its socket yet
        await asyncio.sleep(0.1)


def request_of(job_input):
    """Path, body (None: GET) and whether answers are passed on as they are."""
    if route := job_input.get("openai_route"):
        return "/" + route.lstrip("/"), job_input.get("openai_input"), True
    body = {**job_input.get("sampling_params", {}), "stream": bool(job_input.get("stream"))}
    if "messages" in job_input:
        return "/v1/chat/completions", {**body, "messages": job_input["messages"]}, False
    if "prompt" in job_input:
        return "/v1/completions", {**body, "prompt": job_input["prompt"]}, False
    raise ValueError('the input holds neither "messages" nor "prompt" nor "openai_route"')


async def handler(job):
    try:
        path, body, as_it_is = request_of(job["input"])
        timeout = aiohttp.ClientTimeout(total=None)
        headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("TPENGINE_API_KEY")) else {}
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(SOCKET), timeout=timeout, headers=headers) as session:
            await wait_ready(session)
            async with session.request("GET" if body is None else "POST", "http://tpengine" + path, json=body) as answer:
                if answer.content_type != "text/event-stream":
                    data = await answer.json()
                    yield {"error": data["error"]["message"]} if answer.status != 200 and not as_it_is else data
                    return
                async for line in answer.content:
                    if not line.startswith(b"data: "):
                        continue
                    if as_it_is:
                        yield line.decode() + "\n"
                    elif line.strip() != b"data: [DONE]":
                        yield json.loads(line[6:])
    # A cancelled job is not caught here: it leaves the blocks above, the connection closes, and the engine stops computing for it.
    except (aiohttp.ClientError, ValueError) as error:
        yield {"error": str(error)}


async def handler_at_once(job):
    """For --test_input, where the SDK takes no generator."""
    return [piece async for piece in handler(job)]


if __name__ == "__main__":
    start_server()
    local = any(word.startswith("--test_input") for word in sys.argv)
    runpod.serverless.start({"handler": handler_at_once if local else handler, "concurrency_modifier": lambda _: MAX_CONCURRENCY, "return_aggregate_stream": True})
