"""What tests may not inherit: settings that users export for the programs and scripts."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from tests.paths import ROOT

#: read by scripts, and needed by tests as well
KEPT = {
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
    "VLLM_PYTHON",
}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
#: of the launchers of processes
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("JUDGE_", "LLAVA_", "OPENAI_", "SLURM_")


def read_by_scripts() -> set[str]:
    """Names of variables that any script takes from the environment."""
    files = [*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch")]
    texts = (path.read_text(encoding="utf-8") for path in files)
    return {name for text in texts for name in re.findall(r"\$\{(\w+):[-+?]", text)} - {"1"}


def forget(environment: MutableMapping[str, str]) -> None:
    """Removes settings of users, and gives a terminal a width."""
    own = (read_by_scripts() - KEPT) | {*LAUNCHERS, *PROXIES, *map(str.upper, PROXIES), "CDPATH"}
    for name in [*environment]:
        if name in own or name.startswith(PREFIXES):
            del environment[name]
    environment["COLUMNS"] = "80"
