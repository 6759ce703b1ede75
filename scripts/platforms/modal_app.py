"""tpengine serve on Modal: `modal deploy scripts/platforms/modal_app.py` from the repository's root.

Checkpoints and shards live on a Volume: the first start cuts the model, later ones only read their shards. Needs the package modal.
"""
import os
import subprocess

import modal

MODEL = os.environ.get("MODEL_NAME", "Qwen/Qwen3-8B")
GPUS = int(os.environ.get("TENSOR_PARALLEL_SIZE", "2"))
PORT = 8000

app = modal.App("tpengine")
volume = modal.Volume.from_name("tpengine-models", create_if_missing=True)
image = modal.Image.from_dockerfile("scripts/platforms/Dockerfile", context_dir=".", add_python="3.11").entrypoint([]).pip_install("huggingface_hub")


@app.function(image=image, volumes={"/models": volume}, timeout=4 * 3600)
def download(name: str = MODEL):
    """modal run scripts/platforms/modal_app.py::download"""
    from huggingface_hub import snapshot_download

    snapshot_download(name, cache_dir="/models/hub")
    volume.commit()


@app.function(image=image, volumes={"/models": volume}, gpu=f"H100:{GPUS}", timeout=24 * 3600, scaledown_window=300,
              secrets=[modal.Secret.from_name("tpengine-api-key", required_keys=["TPENGINE_API_KEY"])])
@modal.concurrent(max_inputs=300, target_inputs=64)
@modal.web_server(PORT, startup_timeout=1800)
def serve():
    subprocess.Popen(["entrypoint", "--host", "0.0.0.0", "--port", str(PORT)],
                     env={**os.environ, "MODEL_NAME": MODEL, "HF_CACHE": "/models/hub", "SHARD_DIR": "/models/shards",
                          "TENSOR_PARALLEL_SIZE": str(GPUS)})
