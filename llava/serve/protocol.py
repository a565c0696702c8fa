"""The JSON bodies that controller and workers accept. Types are strict and every value is bounded.

Keys that the published protocol does not know are ignored, as it did; those of a request for an
answer are named in the answer.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from .errors import ServeError
from .limits import (
    ADDRESS_CHARS,
    LIMITS,
    LIST_ITEMS,
    MODEL_CHARS,
    MODELS_PER_WORKER,
    OPTION_CHARS,
    OPTIONS,
    STOP_CHARS,
)

LARGEST_NUMBER = 1_000_000
#: of a request's keys without a meaning, so many are named, with so many characters each
IGNORED, IGNORED_CHARS = 16, 64

Name = Annotated[str, Field(min_length=1, max_length=MODEL_CHARS)]
Address = Annotated[str, Field(min_length=1, max_length=ADDRESS_CHARS)]
Count = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)]
Number = (
    bool
    | Annotated[int, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
    | Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER, allow_inf_nan=False)]
)
OptionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]


def _one_sentence(value, check):
    """What may stand in an option, in place of the first of the kinds that it is not."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError(
            "option",
            f"Input should be a number up to {LARGEST_NUMBER}, true, false, null, a text of at "
            f"most {OPTION_CHARS} characters, or a list of at most {LIST_ITEMS} such numbers",
        ) from None


OptionValue = Annotated[
    Number
    | Annotated[str, Field(max_length=OPTION_CHARS)]
    | Annotated[list[Number], Field(max_length=LIST_ITEMS)]
    | None,
    WrapValidator(_one_sentence),
]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class PruningRequest(Body):
    """How visual tokens are pruned for one request; see `llava.pruning`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    method: Annotated[str, Field(pattern=r"^[a-z0-9_+-]{1,64}$")]
    visual_token_num: Annotated[int, Field(ge=1, le=LARGEST_NUMBER)] | None = None
    options: Annotated[dict[OptionName, OptionValue], Field(max_length=OPTIONS)] = {}


class GenerateRequest(Body):
    """`/worker_generate_stream`. prompt: in the model's template, with `<image>` marks.

    images:   base64 text of image files, one per mark
    question: the user's question alone, for methods that read it (default: found in the prompt)
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: Name | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=LIMITS.prompt_chars)]
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=0, le=LARGEST_NUMBER)] = 256
    stop: Annotated[str, Field(max_length=STOP_CHARS)] | None = None
    images: Annotated[list[str], Field(max_length=LIMITS.images)] | None = None
    pruning: PruningRequest | None = None
    question: Annotated[str, Field(max_length=LIMITS.prompt_chars)] | None = None

    def chunk(self, answer: str) -> dict:
        """A chunk of the stream: the prompt with the answer so far, and the keys that had no
        effect, such as a `repetition_penalty`."""
        chunk = {"text": self.prompt + answer, "error_code": 0}
        if self.model_extra:
            names = sorted(self.model_extra)[:IGNORED]
            chunk["ignored"] = [name[:IGNORED_CHARS] for name in names]
        return chunk


class WorkerStatus(Body):
    """What a worker says about itself. speed: relative to other workers of the same model."""

    model_names: Annotated[list[Name], Field(max_length=MODELS_PER_WORKER)]
    speed: Annotated[float, Field(ge=0, le=LARGEST_NUMBER, allow_inf_nan=False)]
    queue_length: Count


class RegisterRequest(Body):
    worker_name: Address
    check_heart_beat: bool
    worker_status: WorkerStatus | None = None


class HeartBeat(Body):
    worker_name: Address
    queue_length: Count


class ModelRequest(Body):
    model: Name


class WorkerName(Body):
    worker_name: Address


def parse(kind: type[Body], data: bytes) -> Body:
    """`data`, JSON text, as an object of `kind`.

    Raises ServeError, which names the places that are wrong but repeats no value from the request.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80] or "body"
        too_long = first["type"] in ("string_too_long", "too_long")
        raise ServeError(
            "too_large" if too_long else "bad_request", f"{place}: {first['msg']}."
        ) from None
