"""The steps of a report: programs of this project that run one after the other, each on its own."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from llava.pruning import DEFAULT_METHOD as METHOD

EFFICIENCY = "-m llava.eval.efficiency"
DECODING = "-m llava.eval.efficiency.decode_speed"
THROUGHPUT = "-m llava.eval.efficiency.throughput"
TESTS = "-m pytest -q -p no:cacheprovider tests/gpu"
#: a checkpoint of the repository that takes a CPU seconds, and options that make a run short
SMALL = "--config tests/golden/tiny-llava-v1.5 --layers 3 --dtype fp32 --device cpu"
SHORT = "--repeats 1 --warmup 0 --output-tokens 3"


@dataclass(frozen=True)
class Step:
    """One program.

    what:    one line for the page
    command: its words; FILE is where it writes its result, SECONDS how long it may measure
    small:   the same with tiny models on a CPU
    limit:   seconds after which it is ended
    least:   seconds that must be left for it to be begun
    """

    name: str
    what: str
    command: str
    small: str
    limit: float
    least: float

    def words(self, file: str, seconds: float, small: bool) -> list[str]:
        """The words of the command behind the interpreter."""
        command = self.small if small else self.command
        values = {"FILE": file, "SECONDS": f"{seconds:.0f}"}
        return [values.get(word, word) for word in shlex.split(command)]


#: the first ones matter most: where time runs out, the last ones are left out
STEPS = (
    Step(
        "efficiency",
        "all methods with 64 visual tokens at the sizes of LLaVA-1.5 7B, random weights",
        f"{EFFICIENCY} --config 7b --visual-token-num 64 --output-tokens 5 --repeats 20 --warmup 3"
        " --time-limit SECONDS --json FILE",
        f"{EFFICIENCY} {SMALL} {SHORT} --method {METHOD} --json FILE",
        limit=210,
        least=60,
    ),
    Step(
        "tests",
        "`pytest -m gpu`: equality with the CPU, backends, memory, waits",
        f"{TESTS} -m gpu",
        f"{TESTS} -k cache_falls_with_the_tokens",
        limit=180,
        least=30,
    ),
    Step(
        "compiled",
        "the same with compiled steps of decoding, which a GPU launches as graphs",
        f"{EFFICIENCY} --config 7b --method {METHOD} --visual-token-num 64 --compile"
        " --output-tokens 17 --repeats 10 --warmup 2 --time-limit SECONDS --json FILE",
        f"{EFFICIENCY} {SMALL} {SHORT} --method {METHOD} --compile --json FILE",
        limit=120,
        least=60,
    ),
    Step(
        "kernels",
        "what the card is asked to run at 32 layers, by stage and per further token",
        f"{EFFICIENCY} --config small --layers 32 --visual-token-num 64 --count-kernels --compile"
        " --json FILE",
        f"{EFFICIENCY} {SMALL} --method {METHOD} --count-kernels --json FILE",
        limit=90,
        least=30,
    ),
    Step(
        "guessing",
        "rows and trees of guesses beside their cost model, 7B, chance agreeing with 80 % of them",
        f"{DECODING} --config 7b --acceptance 0.8 --num-speculations 3 --tree-nodes 60"
        " --limit 3 --warmup 1 --max-new-tokens 49 --compile --json FILE",
        f"{DECODING} --config small --device cpu --dtype fp32 --limit 1 --warmup 1"
        " --visual-token-num 96 --num-speculations 2 --max-new-tokens 12 --json FILE",
        limit=120,
        least=60,
    ),
    Step(
        "throughput",
        "questions per second, one by one, in batches, and sharing what their image needs, 7B",
        f"{THROUGHPUT} --config 7b --methods none {METHOD} --visual-token-num 64 --images 2"
        " --per-image 16 --batch-size 16 --max-new-tokens 8 --json FILE",
        f"{THROUGHPUT} --layers 2 --device cpu --dtype fp32 --images 1 --per-image 2"
        " --batch-size 2 --max-new-tokens 2 --json FILE",
        limit=90,
        least=35,
    ),
    Step(
        "batch",
        "a batch of 16 prompts: decoding reads more of the cache",
        f"{EFFICIENCY} --config 7b --method {METHOD},random --visual-token-num 64 --batch-size 16"
        " --output-tokens 9 --repeats 5 --warmup 1 --time-limit SECONDS --json FILE",
        f"{EFFICIENCY} {SMALL} {SHORT} --method {METHOD} --batch-size 2 --json FILE",
        limit=90,
        least=35,
    ),
)
