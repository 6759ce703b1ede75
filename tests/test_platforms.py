#!/usr/bin/env python3
"""scripts/platforms: each sample as far as this machine carries it. The entrypoint and the RunPod handler run on the bundled model; manifests are held
against schemas; what needs a platform's own packages is skipped, with a word, where pip cannot fetch them."""
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]
import case_help  # noqa: E402
import venv_help  # noqa: E402
from case_help import expect, free_port, report, skip  # noqa: E402
from serve_help import Started  # noqa: E402
from serve_client import ask, status_of  # noqa: E402

BUILD = Path(os.environ.get("BUILD", "build")).resolve()
SAMPLES = ROOT / "scripts" / "platforms"


def environment(**more):
    """As a container has it: the programs on PATH, and nothing of ours or of other servers."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TPENGINE_", "TPSHARD_TP", "TPSHARD_QUANT", "SM_")) and k not in ("PORT", "PORT_HEALTH")}
    return {**kept, "PATH": f"{BUILD}:{SAMPLES}:{os.environ['PATH']}", "SHARD_DIR": str(WORK / "shards"), **more}


class Entrypoint(Started):
    def __init__(self, *words, **variables):
        super().__init__([SAMPLES / "entrypoint", *words], environment(**variables))

    def statuses(self, port, wanted=200, seconds=60):
        """Those of /ping until the wanted one, without repetitions."""
        seen, end = [], time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None and seen[-1:] != [wanted]:
            status = asyncio.run(status_of(port, "/ping"))
            if seen[-1:] != [status]:
                seen.append(status)
            time.sleep(0.002)
        return seen if seen[-1:] == [wanted] else f"{seen} {self.text()}"


# ---- the entrypoint --------------------------------------------------------------------------------------------------


def test_entrypoint():
    port, health = free_port(), free_port()
    # RunPod's load balancer: ports by name, worker-vllm's variables, a checkpoint that is cut at the first start.
    cache = WORK / "hub" / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123")
    (cache / "snapshots" / "abc123").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in Path("tests/model").iterdir():  # the cache holds links to blobs
        shutil.copy(file, cache / "blobs" / file.name)
        (cache / "snapshots" / "abc123" / file.name).symlink_to(f"../../blobs/{file.name}")
    variables = {"MODEL_NAME": "some/model", "HF_CACHE": str(WORK / "hub"), "PORT": str(port), "PORT_HEALTH": str(health), "TENSOR_PARALLEL_SIZE": "2",
                 "TPSHARD_QUANT": "int4", "MAX_MODEL_LEN": "256", "MAX_CONCURRENCY": "17", "MAX_NUM_SEQS": "256"}
    with Entrypoint(**variables) as server:
        seen = server.statuses(health)
        report("a checkpoint of the Hugging Face cache is cut and served; health on PORT_HEALTH", seen if isinstance(seen, str) else None)
        print(f"# /ping on PORT_HEALTH: {seen}")
        models = asyncio.run(ask(port, "/v1/models")).json()["data"]
        expect("its name and context", [(model["id"], model["max_model_len"]) for model in models], [("some/model", 256)])
        stats = asyncio.run(ask(port, "/v1/stats")).json()
        expect("two ranks", len(stats["ranks"]), 2)
        answer = asyncio.run(ask(port, "/v1/completions", {"model": "some/model", "prompt": "In the", "max_tokens": 4})).json()
        expect("it answers", answer["usage"]["completion_tokens"], 4)
        server.process.terminate()
        expect("SIGTERM reaches it: exit 0", server.process.wait(30), 0)
    with Entrypoint(**{**variables, "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "other"}) as server:
        seen = server.statuses(health)
        report("the next start cuts nothing", server.text() if isinstance(seen, str) or "tpshard:" in server.text() else None)
        expect("a name of one's own", asyncio.run(ask(port, "/v1/models")).json()["data"][0]["id"], "other")
    # SageMaker: the word serve, the model where it is mounted, /ping and /invocations.
    port = free_port()
    with Entrypoint("serve", "--host", "127.0.0.1", MODEL_NAME=str(next((WORK / "shards").iterdir())), TPENGINE_PORT=str(port), SM_NUM_GPUS="2") as server:
        seen = server.statuses(port)
        report("SageMaker's start with shards", seen if isinstance(seen, str) else None)
        answer = asyncio.run(ask(port, "/invocations", {"prompt": "In the", "max_tokens": 3})).json()
        expect("/invocations", answer["usage"]["completion_tokens"], 3)
    for name, variables, word in (("no model", {}, "MODEL_NAME is not set"), ("a model that is nowhere", {"MODEL_NAME": "a/b"}, "neither a directory a/b")):
        with Entrypoint(**variables) as server:
            status = server.process.wait(20)
            report(f"{name}: exit 2, and why", None if status == 2 and word in server.text() else f"{status} {server.text()}")


def test_names():
    """Every TPENGINE_ and TPSHARD_ name in the samples is an option."""
    options = set()
    for program, commands in (("tpengine", ["serve"]), ("tpshard", ["convert"])):
        for command in commands:
            said = subprocess.run([BUILD / program, command, "--help"], capture_output=True, text=True, check=True).stdout
            options |= {program.upper() + "_" + name.upper().replace("-", "_") for name in re.findall(r"^  --([a-z0-9-]+)", said, re.MULTILINE)}
    unknown = {name for path in SAMPLES.iterdir() if path.is_file() and path.suffix != ".md" for name in re.findall(r"\bTP(?:ENGINE|SHARD)_[A-Z_]*[A-Z]\b", path.read_text())} - options
    report("every variable in the samples is an option", sorted(unknown))


# ---- RunPod, Modal, SageMaker ----------------------------------------------------------------------------------------

DRIVE = """
import asyncio, json, runpod_handler as r
r.start_server()
async def collect(job):
    return [piece async for piece in r.handler({"id": "1", "input": job})]
async def leave():
    jobs = r.handler({"id": "2", "input": {"prompt": "In the", "stream": True, "sampling_params": {"max_tokens": 900, "ignore_eos": True}}})
    await anext(jobs)
    try:
        while True:  # pieces that wait already come without a pause
            task = asyncio.ensure_future(anext(jobs))
            await asyncio.sleep(0)
            task.cancel()
            await task
    except asyncio.CancelledError:
        cancelled = True
    await jobs.aclose()
    for _ in range(200):
        stats = (await collect({"openai_route": "/v1/stats"}))[0]
        if not stats["scheduler"]["running"]:
            return cancelled
        await asyncio.sleep(0.05)
inputs = [
    {"prompt": "In the", "sampling_params": {"max_tokens": 4, "temperature": 0}},
    {"prompt": "In the", "stream": True, "sampling_params": {"max_tokens": 4, "temperature": 0}},
    {"openai_route": "/v1/completions", "openai_input": {"prompt": "In the", "max_tokens": 4, "temperature": 0, "stream": True}},
    {"openai_route": "/v1/models"},
    {"prompt": "In the", "sampling_params": {"max_tokens": -4}},
    {"nothing": 1},
]
async def all_of_them():
    return [await collect(job) for job in inputs] + [await leave()]
print("RESULT " + json.dumps(asyncio.run(all_of_them())))
"""


def test_runpod():
    python, why = venv_help.python_with(["runpod", "aiohttp"], ["runpod", "aiohttp"], large=True)
    if not python:
        skip("RunPod's SDK", why)
        return
    variables = environment(MODEL_NAME=str(next((WORK / "shards").iterdir())), PYTHONPATH=str(SAMPLES), RUNPOD_LOG_LEVEL="INFO")
    job = json.dumps({"input": {"prompt": "In the", "sampling_params": {"max_tokens": 6, "temperature": 0}}})
    done = subprocess.run([python, SAMPLES / "runpod_handler.py", "--test_input", job], env=variables, text=True, capture_output=True, timeout=120)
    report("RunPod's SDK runs a job in its local mode", None if done.returncode == 0 and "completed successfully" in done.stdout and
           "'completion_tokens': 6" in done.stdout else (done.stdout + done.stderr)[-2500:])
    port = free_port()
    with subprocess.Popen([python, SAMPLES / "runpod_handler.py", "--rp_serve_api", "--rp_api_port", str(port), "--rp_api_host", "127.0.0.1"], env=variables,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        end, answer = time.monotonic() + 60, None
        while answer is None and time.monotonic() < end and worker.poll() is None:
            try:
                answer = asyncio.run(ask(port, "/runsync", json.loads(job))).json()
            except OSError:
                time.sleep(0.1)
        report("and as a local API, with a generator", None if answer and answer.get("status") == "COMPLETED" and
               answer["output"][0]["usage"]["completion_tokens"] == 6 else answer)
        worker.send_signal(signal.SIGINT)
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            worker.kill()
            report("the worker ends", "it does not")
    done = subprocess.run([python, "-c", DRIVE], env=variables, text=True, capture_output=True, timeout=120)
    if "RESULT " not in done.stdout:
        report("the handler's inputs", (done.stdout + done.stderr)[-2500:])
        return
    whole, streamed, events, models, bad, nothing, cancelled = json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0])
    text = whole[0]["choices"][0]["text"]
    expect("a prompt, streamed", "".join(piece["choices"][0]["text"] for piece in streamed if piece["choices"]), text)
    expect("an OpenAI request, streamed as it is", "".join(json.loads(piece[6:])["choices"][0]["text"] for piece in events if piece != "data: [DONE]\n\n"), text)
    expect("its end", events[-1], "data: [DONE]\n\n")
    expect("models", models[0]["object"], "list")
    report("a bad request is an error that tells why", None if "max_tokens" in bad[0]["error"] else bad)
    report("an input without a prompt", None if "messages" in nothing[0]["error"] else nothing)
    expect("a job that is cancelled is computed no further", cancelled, True)


def test_modal():
    python, why = venv_help.python_with(["modal"], ["modal"], large=True)
    if not python:
        skip("Modal's SDK", why)
        return
    code = ("import modal_app as m; f = m.app.registered_functions; print(sorted(f)); print(sorted(m.app.registered_web_endpoints))")
    done = subprocess.run([python, "-W", "ignore", "-c", code], cwd=ROOT, env=environment(PYTHONPATH=str(SAMPLES)), text=True, capture_output=True, timeout=100)
    expect("Modal's SDK takes the app", (done.stdout.splitlines(), done.stderr[-1500:]), (["['download', 'serve']", "['serve']"], ""))


SAGEMAKER = """
import sagemaker, boto3
from botocore.stub import Stubber
client = boto3.client("sagemaker", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
args = sagemaker.arguments(["--name", "m", "--image", "1.dkr.ecr.us-east-1.amazonaws.com/t:1", "--role", "arn:aws:iam::123456789012:role/sage", "--model", "s3://b/m/"])
answers = {"create_model": {"ModelArn": "arn:aws:sagemaker:us-east-1:123456789012:model/m"},
           "create_endpoint_config": {"EndpointConfigArn": "arn:aws:sagemaker:us-east-1:123456789012:endpoint-config/m"},
           "create_endpoint": {"EndpointArn": "arn:aws:sagemaker:us-east-1:123456789012:endpoint/m"}}
for call, request in sagemaker.requests(args):
    with Stubber(client) as stub:
        stub.add_response(call, answers[call], request)
        getattr(client, call)(**request)
print("fine")
"""


def test_sagemaker():
    python, why = venv_help.python_with(["boto3"], ["boto3"], large=True)
    if not python:
        skip("boto3", why)
        return
    done = subprocess.run([python, "-c", SAGEMAKER], env=environment(PYTHONPATH=str(SAMPLES)), text=True, capture_output=True, timeout=100)
    expect("boto3's model of SageMaker takes the calls", (done.stdout, done.stderr[-1500:]), ("fine\n", ""))


# ---- manifests -------------------------------------------------------------------------------------------------------

# The part of LeaderWorkerSet's schema (leaderworkerset.x-k8s.io/v1) that a manifest like ours touches; pod templates are checked as pods.
INTEGER, TEMPLATE = {"type": "integer", "minimum": 0}, {"type": "object", "required": ["spec"]}
LWS = {
    "type": "object", "required": ["apiVersion", "kind", "metadata", "spec"], "additionalProperties": False, "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"}, "kind": {"const": "LeaderWorkerSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {"type": "object", "required": ["leaderWorkerTemplate"], "additionalProperties": False, "properties": {
            "replicas": INTEGER,
            "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
            "networkConfig": {"type": "object", "required": ["subdomainPolicy"], "properties": {"subdomainPolicy": {"enum": ["Shared", "UniquePerReplica"]}}},
            "rolloutStrategy": {"type": "object", "required": ["type"], "additionalProperties": False, "properties": {
                "type": {"const": "RollingUpdate"},
                "rollingUpdateConfiguration": {"type": "object", "additionalProperties": False, "properties": {
                    name: {"type": ["integer", "string"]} for name in ("maxUnavailable", "maxSurge", "partition")}}}},
            "leaderWorkerTemplate": {"type": "object", "required": ["workerTemplate"], "additionalProperties": False, "properties": {
                "size": {"type": "integer", "minimum": 1}, "leaderTemplate": TEMPLATE, "workerTemplate": TEMPLATE,
                "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None", "Default"]},
                "subGroupPolicy": {"type": "object"}}}}}}}

VALIDATE = """
import json, sys, yaml, jsonschema, kubernetes_validate as k
samples, schema = sys.argv[1], json.loads(sys.argv[2])
version, wrong, kinds = k.latest_version(), [], []
def check(thing):
    try:
        k.validate(thing, version, strict=True)
        kinds.append(thing["kind"])
    except Exception as error:
        wrong.append(f"{thing['kind']}: {error.message if hasattr(error, 'message') else error}")
for thing in yaml.safe_load_all(open(samples + "/kubernetes.yaml")):
    check(thing)
lws = yaml.safe_load(open(samples + "/leaderworkerset.yaml"))
jsonschema.validate(lws, schema)
template = lws["spec"]["leaderWorkerTemplate"]["workerTemplate"]
check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, "spec": template["spec"]})
# and it does see a fault
template["spec"]["containers"][0]["imagee"] = "x"
seen = len(wrong)
check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]})
print(json.dumps([wrong[:seen], kinds, len(wrong) - seen, version]))
"""


def test_kubernetes():
    python, why = venv_help.python_with(["kubernetes-validate", "pyyaml", "jsonschema"], ["kubernetes_validate", "yaml", "jsonschema"], large=True)
    if not python:
        skip("Kubernetes' schemas", why)
        return
    done = subprocess.run([python, "-c", VALIDATE, SAMPLES, json.dumps(LWS)], text=True, capture_output=True, timeout=100)
    if done.returncode != 0:
        report("Kubernetes' schemas", done.stderr[-1500:])
        return
    wrong, kinds, faults, version = json.loads(done.stdout.splitlines()[-1])
    report(f"manifests against Kubernetes {version}, strictly; LeaderWorkerSet against its schema", wrong)
    expect("all of them", kinds, ["Secret", "Deployment", "Service", "PodDisruptionBudget", "Pod"])
    expect("a misspelt field is seen", faults, 1)
    text = (SAMPLES / "kubernetes.yaml").read_text()
    grace, drain = int(re.search(r"terminationGracePeriodSeconds: (\d+)", text)[1]), int(re.search(r'DRAIN_TIMEOUT\n +value: "(\d+)"', text)[1])
    report("the grace period is longer than the drain", None if grace > drain + 5 else f"{grace} {drain}")


def test_systemd():
    if not shutil.which("systemd-analyze"):
        skip("systemd-analyze", "not installed")
        return
    unit = WORK / "tpengine.service"
    unit.write_text((SAMPLES / "tpengine.service").read_text().replace("/usr/local/bin/tpengine", str(BUILD / "tpengine")).replace("man:tpengine(1)", "file:/x"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], text=True, capture_output=True, timeout=60)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "tpengine.service" in line]
    report("systemd-analyze verify", said or (None if done.returncode == 0 else done.stderr))
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", unit], text=True, capture_output=True, timeout=60)
    level = re.search(r"exposure level for .*: ([\d.]+)", done.stdout)
    report("systemd-analyze security: below 3", None if level and float(level[1]) < 3 else done.stdout[-300:] + done.stderr[-300:])
    print(f"# exposure level {level and level[1]}")


def test_docker():
    text = (SAMPLES / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    report("the Dockerfile copies what is there", [path for path in copied if not (ROOT / path).exists()])
    report("what was built stays out of the image's context", None if "build" in (SAMPLES / "Dockerfile.dockerignore").read_text().split() else "it does not")
    needed = {"libjansson4", "libpcre2-8-0", "libutf8proc2", "libevent-core-2.1-7", "libssl3", "libzstd1"}
    report("it installs the libraries that are linked", needed - set(text.split()))
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode if shutil.which("docker") else True:
        skip("docker compose config", "no docker compose here")
    else:
        done = subprocess.run(["docker", "compose", "-f", SAMPLES / "compose.yaml", "config", "--quiet"], text=True, capture_output=True, timeout=60,
                              env={**os.environ, "TPENGINE_API_KEY": "x"})
        report("docker compose config", done.stderr if done.returncode else None)
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, timeout=30).returncode:
        skip("docker build", "no docker daemon here")


def main():
    global WORK
    with tempfile.TemporaryDirectory() as folder:
        WORK = Path(folder)
        test_entrypoint()
        test_names()
        test_runpod()
        test_modal()
        test_sagemaker()
        test_kubernetes()
        test_systemd()
        test_docker()
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())
