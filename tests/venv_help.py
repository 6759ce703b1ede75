"""A Python with packages that the tests do not ship: $TPSHARD_VENV where it has them, else a virtual environment that pip fills under $BUILD. What takes
pip minutes is fetched only where TEST_PACKAGES is set."""
import os
import subprocess
import sys
from pathlib import Path

PIP_LIMIT_S = 150


def imports(python, modules):
    return python.exists() and subprocess.run([python, "-c", "import " + ", ".join(modules)], capture_output=True).returncode == 0


def python_with(packages, modules, large=False):
    """(interpreter, None), or (None, why there is none). What failed once is not tried again in this $BUILD."""
    if os.environ.get("TEST_QUICK"):
        return None, "slow builds leave this out"
    given = os.environ.get("TPSHARD_VENV")
    if given and imports(Path(given) / "bin" / "python", modules):
        return str(Path(given) / "bin" / "python"), None
    folder = Path(os.environ.get("BUILD", "build")) / "venv" / "-".join(modules)
    python, failed = folder / "bin" / "python", folder / "failed"
    if failed.exists():
        return None, failed.read_text()
    if (folder / "whole").exists():  # a fetch that was cut off leaves parts that import
        return str(python), None
    if large and not os.environ.get("TEST_PACKAGES"):
        return None, f"{packages[0]} is not installed; TEST_PACKAGES=1 fetches it"
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "0", "--timeout", "10", *packages],
                       check=True, capture_output=True, timeout=PIP_LIMIT_S)
        if imports(python, modules):
            (folder / "whole").touch()
            return str(python), None
        why = "what pip installed does not import"
    except subprocess.TimeoutExpired:
        why = f"pip needs more than {PIP_LIMIT_S} s here"
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error).encode()).decode().strip().splitlines()
        why = "pip cannot run here: " + (said[-1] if said else "no word")
    folder.mkdir(parents=True, exist_ok=True)
    failed.write_text(why)
    return None, why
