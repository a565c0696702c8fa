"""`accelerate launch` for scripts/eval_common.sh. Where a process of the run fails, or the run is
stopped, it ends with one line, and not with a traceback of the launcher below what was said.

python -m llava.eval.answering.launch [options of accelerate launch] --module MODULE [its options]
"""

import sys

from accelerate.commands.launch import main as launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    try:
        launch()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(
            f"error: process {rank} of the run ended with exit code {failure.exitcode}, and with "
            "it the others; what it printed stands above"
        )
    except SignalException as stopped:
        print(f"stopped ({stopped.sigval.name}): the same command goes on", file=sys.stderr)
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
