"""What a report is about: the card, and the versions of what computes on it.

    python -m llava.eval.gpu_report.machine FILE

A program of its own, so that the report's process never holds memory of the card.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from llava.errors import errors_as_messages

#: what decides about results; None in the report where it is missing
PACKAGES = ("torch", "transformers", "triton", "flash-attn", "bitsandbytes", "accelerate", "numpy")
TRANSFORMERS = "4.37.2"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check(packages: dict[str, str | None]) -> None:
    """Raises ImportError where the packages are not those that the project runs with."""
    if packages["torch"] is None:
        raise ImportError("torch is not installed: install a build for this card first")
    if packages["transformers"] != TRANSFORMERS:
        found = packages["transformers"] or "none"
        raise ImportError(
            f"this project runs with transformers {TRANSFORMERS}, and {found} is installed: "
            f"install it (pip install transformers=={TRANSFORMERS}), or name a folder of wheels "
            "for scripts/gpu_report.sh to use beside what is installed (WHEELS=FOLDER)"
        )


def facts() -> dict:
    """The machine: `device`, its `memory` in bytes and `capability` (None on a CPU), versions."""
    packages = {name: installed(name) for name in PACKAGES}
    check(packages)
    import torch

    found = {"packages": packages, "python": platform.python_version(), "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        name = platform.processor() or platform.machine()
        return {**found, "device": name, "memory": None, "capability": None, "count": 0}
    card = torch.cuda.get_device_properties(0)
    return {
        **found,
        "device": card.name,
        "memory": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "count": torch.cuda.device_count(),
    }


@errors_as_messages()
def main() -> None:
    found = facts()
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
