"""A real vLLM on the CPU that serves the playground's language model, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import requests

from tests.ports import free_port

#: the interpreter of an environment with vLLM; scripts/test_vllm.sh makes one and says it here
VARIABLE = "VLLM_PYTHON"
START_SECONDS = 600
STOP_SECONDS = 30
POSITIONS = 4096
NAME = "playground"  # the same after a restart, wherever the folder is
FLAGS = ["--enable-prompt-embeds", "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager"]
FLAGS += ["--served-model-name", NAME]
#: one thread, and a cache as small as vLLM takes: 1 GiB
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class RealServer:
    """
    folder: of the language model, as `llava.model.export --to llama` writes it
    log:    file for what the server says
    """

    def __init__(self, folder: Path, log: Path):
        self.folder, self.log, self.port = folder, log, free_port()
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, unless it runs, and returns once it answers."""
        if self.process is not None and self.process.poll() is None:
            return
        # `vllm serve` is refused by the package for CPUs, which has another name than it looks for.
        command = [os.environ[VARIABLE], "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self.folder, *FLAGS, "--max-model-len", POSITIONS]
        command += ["--host", "127.0.0.1", "--port", self.port]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**without_project(os.environ), **ENVIRONMENT},
                cwd=self.log.parent,
                start_new_session=True,
            )
        end = time.monotonic() + START_SECONDS
        while not self.answers():
            ended = self.process.poll()
            assert ended is None and time.monotonic() < end, (
                f"vLLM did not start (exit code {ended}):\n{self.log.read_text()[-3000:]}"
            )
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def running(self) -> int:
        """Requests that the server works on now, by its own count."""
        text = requests.get(f"{self.url}/metrics", timeout=30).text
        name = "vllm:num_requests_running"
        (line,) = (line for line in text.splitlines() if line.startswith(name))
        return int(float(line.rsplit(" ", 1)[1]))

    def kill(self) -> None:
        """Ends it and its processes at once, as a machine that fails does."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        for one in (number, signal.SIGKILL):  # whoever is left after a while is killed
            try:
                os.killpg(self.process.pid, one)  # its session is its own
                self.process.wait(STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process = None


def without_project(environment) -> dict[str, str]:
    """The environment without what points Python to this project."""
    return {key: value for key, value in environment.items() if not key.startswith("PYTHON")}
