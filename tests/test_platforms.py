"""Systems other than Linux: what only POSIX has is imported where it is used, and devices are found."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grounded_sam import ConfigError
from grounded_sam.cli.main import peak_mib
from grounded_sam.weights.loading import pick_device

PACKAGE = Path(__file__).parents[1] / "grounded_sam"
#: Modules that Windows does not have.
POSIX = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
#: Members of `os` and `signal` that it does not have.
POSIX_MEMBERS = {
    *("fork", "forkpty", "geteuid", "getgid", "getpgid", "getuid", "killpg", "mkfifo", "nice", "setsid", "sysconf"),
    *("sched_getaffinity", "statvfs", "uname", "wait3", "wait4", "O_NOFOLLOW", "O_NONBLOCK", "chown"),
    *("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2", "alarm", "setitimer", "pthread_sigmask"),
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_on_windows(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:  # not inside functions
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not POSIX & {name.partition(".")[0] for name in names}, f"{path.name}:{node.lineno}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal"):
            assert node.attr not in POSIX_MEMBERS, f"{path.name}:{node.lineno}: {node.attr}"


def test_text_is_read_and_written_as_utf_8(tmp_path):
    """Windows has another default encoding."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr in ("read_text", "write_text"):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"


def test_the_command_runs_without_posix_modules(folder, tmp_path):
    hide = (
        "import sys; sys.modules.update(dict.fromkeys(['resource', 'fcntl', 'termios', 'pwd', 'grp', 'syslog']))\n"
        "from grounded_sam.cli.main import main\n"  # the libraries behind the models have checks of their own
        "sys.argv[1:] = ['detector=clicks', 'detector.prompts=[{class: a, box: [1, 1, 20, 20]}]', 'segmenter=none',"
        " 'tracker=none', 'input=photos/0.png', 'output=\\'名前\\'']\n"
        "main()"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "cp1252:strict"}
    command = [sys.executable, "-c", hide]
    process = subprocess.run(command, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "名前" / "annotations.json").is_file()
    assert '"peak_mib": null' in (tmp_path / "名前" / "run.json").read_text(encoding="utf-8")


def test_peak_memory_is_in_mib_on_every_system(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", "linux")
    linux = peak_mib()
    assert 50 < linux < 100_000
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": 300 * 2**20}))
    assert peak_mib() == 300


def test_apple_gpus_are_used(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="no Apple GPU"):
        pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
