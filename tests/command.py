"""Run commands of the package in new processes, without importing PyTorch and Hydra anew in each of them.

A server process imports the large libraries once, and nothing of this package. For each command it forks a child, which
has the arguments, the working folder, the environment and the output files of a process of its own. A few tests start
the installed commands without it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: Libraries that most commands import. None of them reads the environment at import in a way that tests change, apart
#: from the Hub's offline mode, which is on in all tests that use this server.
LIBRARIES = (
    "cv2",
    "hydra",
    "omegaconf",
    "PIL.Image",
    "supervision",
    "torch",
    "torchvision",
    "transformers.models.grounding_dino.modeling_grounding_dino",
)


def run_command(
    module: str, arguments: list[str], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `main()` of a module as a command.

    Args:
        module: Module with a function `main`, such as `grounded_sam.cli.main`.
        arguments: Arguments of the command.
        cwd: Working folder.
        env: Environment variables in addition to those of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "module": module,
            "argv": [module, *arguments],
            "cwd": str(cwd),
            "env": {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
            "output": [f"{folder}/stdout", f"{folder}/stderr"],
        }
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        stdout, stderr = (Path(path).read_text(encoding="utf-8") for path in request["output"])
    return subprocess.CompletedProcess(request["argv"], code, stdout, stderr)


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve())]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, text=True, env=env, **pipes)
    atexit.register(server.terminate)
    return server


def serve() -> None:
    """Fork a child for each request on stdin, and answer with its exit code."""
    sys.path.pop(0)  # the folder of this file, which commands do not see
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            return _run(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(request: dict) -> None:
    """Become the command of a request, in the child."""
    for path, descriptor in zip(request["output"], (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    importlib.import_module(request["module"]).main()


if __name__ == "__main__":
    serve()
