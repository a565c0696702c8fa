"""Runs a function in several processes that form a group, without paying for the imports each time.

    python -m tests.train.rank_farm     reads one JSON object per line, answers with one line each

A request is {"program": "llava.train.train", "words": [...], "ranks": 2, "port": N, "timeout": S}:
the processes are forked from this one, which has imported everything, and run
PROGRAM.train(WORDS). The answer is {"ok": true} or {"ok": false, "why": the tracebacks}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the programs print must not mix with the answers
    import_everything()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers, flush=True)


def import_everything() -> None:
    import peft  # noqa: F401

    if importlib.util.find_spec("deepspeed"):
        import deepspeed

        # No operator is compiled: that takes minutes, and needs a compiler.
        for name in deepspeed.ops.__compatible_ops__:
            deepspeed.ops.__compatible_ops__[name] = False
    for program in ("train", "train_twigvlm", "train_twigvlm_plus", "train_glimpseprune"):
        importlib.import_module(f"llava.train.{program}")


def serve(request: dict) -> dict:
    ranks = request["ranks"]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(ranks)]
        running = {fork(request, rank, logs[rank]): rank for rank in range(ranks)}
        end, failed, late = time.monotonic() + request["timeout"], [], False
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                rank = running.pop(pid)
                failed += [rank] if status else []
            elif time.monotonic() > end:
                late = True
            else:
                time.sleep(0.05)
            if (failed or late) and running:  # the others would wait for ever
                for other in running:
                    os.kill(other, 9)
        if not failed and not late:
            return {"ok": True}
        reason = f"not done after {request['timeout']} s\n" if late else ""
        texts = [f"rank {rank}:\n{logs[rank].read_text()[-6000:]}" for rank in range(ranks)]
        return {"ok": False, "why": reason + "\n".join(texts)}


def fork(request: dict, rank: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(request["ranks"]),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(request["port"]),
        }
        program = importlib.import_module(request["program"])
        program.train(request["words"])
        importlib.import_module("llava.train.processes").leave_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
