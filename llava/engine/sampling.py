"""How tokens are chosen: keywords of `generate`, and the same in the words of vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..mm_utils import KeywordsStoppingCriteria
from .support import NOT_TAKEN, check_options

#: keywords of `generate` that are followed
TAKEN = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "eos_token_id", "seed")
TAKEN += ("stop", "stopping_criteria", "generation_config")
#: those that say nothing to a server
IDLE = ("pad_token_id", "bos_token_id")
#: values of a `generation_config` that `generate` obeys, though no call names them
FROM_CONFIG = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
FROM_CONFIG += ("no_repeat_ngram_size", "num_beams")


@dataclass(frozen=True)
class Sampling:
    """
    temperature:    0 takes the likeliest token
    top_k:          0: of all tokens
    max_new_tokens: at which an answer is cut
    ends:           tokens that end an answer and belong to it
    seed:           of one answer; None: drawn by the server
    stop:           texts that end an answer and belong to it
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 16
    ends: tuple[int, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def body(self) -> dict:
        """The fields of a request. Everything is said, so that no default of the server counts."""
        found = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": list(self.ends),
            "ignore_eos": True,  # it may know other ends than the checkpoint here
            "return_token_ids": True,
        }
        return found if self.seed is None else found | {"seed": self.seed}


def sampling_of(config, options: dict) -> Sampling:
    """What `generate` would do with these keywords and this `generation_config`.

    Raises ValueError for what a server cannot follow, TypeError for an unknown keyword.
    """
    if unknown := options.keys() - {*TAKEN, *NOT_TAKEN, *IDLE}:
        raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
    config = options.get("generation_config") or config
    asked = {name: getattr(config, name, None) for name in FROM_CONFIG}
    # None in place of a value of the settings says that there is none, as in `generate`.
    asked |= {n: value for n, value in options.items() if value is not None or n in FROM_CONFIG}
    check_options(asked)
    ends = asked.get("eos_token_id", config.eos_token_id)
    length = asked.get("max_new_tokens") or config.max_new_tokens
    if not length:
        length = max(1, config.max_length - 1)  # that counts the start mark as well
    return Sampling(
        **(choice_of(asked) if asked.get("do_sample") else {}),
        max_new_tokens=length,
        ends=(ends,) if isinstance(ends, int) else tuple(ends or ()),
        seed=asked.get("seed"),
        stop=stop_texts(asked.get("stop"), asked.get("stopping_criteria")),
    )


def choice_of(asked: dict) -> dict:
    """The fields of `Sampling` that say from which tokens one is drawn."""
    found = {"temperature": asked.get("temperature"), "top_p": asked.get("top_p")}
    found = {name: 1.0 if value is None else float(value) for name, value in found.items()}
    if not found["temperature"] > 0:
        raise ValueError(f"temperature ({found['temperature']:g}) must be above 0 to sample")
    if found["top_p"] == 0:  # the likeliest token alone, which a server knows by temperature 0
        return {}
    return found | {"top_k": asked.get("top_k") or 0}


def stop_texts(stop: str | Iterable[str] | None, criteria: Iterable | None) -> tuple[str, ...]:
    """The texts in `stop`, and those that stopping criteria of LLaVA look for."""
    found = [stop] if isinstance(stop, str) else list(stop or ())
    for rule in criteria or ():
        if not isinstance(rule, KeywordsStoppingCriteria):
            raise ValueError(
                f"{type(rule).__name__} is not possible with a server, which does not ask after "
                "every token: give it texts to stop at (stop=[...])"
            )
        found += rule.keywords
    return tuple(found)
