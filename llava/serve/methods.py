"""The pruning methods a worker offers on its one model."""

from __future__ import annotations

import json
import logging
import re
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path

from ..pruning import (
    METHODS,
    DecoderStage,
    Pruner,
    VisionStage,
    build_pruner,
    option_prefixes,
)
from ..pruning.about import how_it_chooses, is_trained, what_budget_counts, where_it_acts
from ..pruning.base import option_names
from ..pruning.option_types import alternatives, fits, in_words, type_of
from ..pruning.registry import Unusable
from .errors import ServeError
from .protocol import PruningRequest

PLAIN = (bool, int, float, str, list, tuple, type(None))
KEPT = 32  # settings that stay built; a method with trained parts keeps one
TRAINED = 4  # settings of one method with trained parts that are alive at a time
BUDGET = "visual_token_num"
REASON_CHARS = 400  # of why a method cannot be used; the names of all methods fit
TYPICAL_PATCHES = 576  # of an image, where every image has its own number
_PATH = re.compile(r"\S*[/\\]\S*")

logger = logging.getLogger(__name__)


class MethodShelf:
    """Builds methods for requests, and remembers the latest.

    Trained parts are large, and each setting of a method loads its own: few may be alive at a time.

    default: what a request without a method gets
    folders: method -> folder of its trained part, beside those that `default` names
    """

    def __init__(self, default: Pruner, folders: dict[str, str] | None = None):
        self.default = default
        self.files = files_of(default)
        for name, folder in (folders or {}).items():
            self.files[name] = {folder_option(name): folder}
        self._built: OrderedDict[str, Pruner] = OrderedDict()
        self._alive: dict[str, weakref.ref[Pruner]] = {}
        self._lock = threading.Lock()

    def get(self, request: PruningRequest | None) -> Pruner:
        """The method a request asks for. Raises ServeError when it or an option is not known, or
        too many settings of trained methods are in use."""
        if request is None:
            return self.default
        options = {name: _listed(value) for name, value in request.options.items()}
        if request.visual_token_num is not None:
            options[BUDGET] = request.visual_token_num
        key = json.dumps([request.method, options], sort_keys=True)
        with self._lock:
            if key in self._built:
                self._built.move_to_end(key)
                return self._built[key]
            pruner = self._build(request.method, options)
            if repr(pruner) == repr(self.default):  # whose trained part is there already
                return self.default
            self._make_room(request.method)
            self._built[key] = pruner
            self._alive[key] = weakref.ref(pruner)
        return pruner

    def _build(self, name: str, options: dict) -> Pruner:
        check_values(name, options)
        try:
            return self.build(name, **options)
        except (ValueError, TypeError, OSError, ArithmeticError) as error:
            raise unavailable(error) from None

    def build(self, name: str, **options) -> Pruner:
        """`build_pruner`, with the files that this server has for the method."""
        own = {}
        for part, prefix in option_prefixes(name):
            own |= {f"{prefix}{key}": value for key, value in self.files.get(part, {}).items()}
        return build_pruner(name, **own, **options)

    def _make_room(self, name: str) -> None:
        """Forgets old settings: those not in use that have trained parts of `name`'s methods.

        Raises ServeError when too many of those are.
        """
        parts = set(name.split("+"))
        for key in [key for key, one in self._built.items() if has_trained(one, parts)]:
            del self._built[key]
        while len(self._built) >= KEPT:
            self._built.popitem(last=False)
        in_use = {key: one for key, reference in self._alive.items() if (one := reference())}
        self._alive = {key: self._alive[key] for key in in_use}
        self._built |= {key: one for key, one in in_use.items() if has_trained(one, parts)}
        if sum(has_trained(one, parts) for one in in_use.values()) >= TRAINED:
            raise ServeError(
                "busy", "Other settings of this method are in use; try again soon, or use those."
            )


def has_trained(pruner: Pruner, names: set[str]) -> bool:
    """Whether one of the methods called `names` is in it, with its trained part."""
    own = pruner.named.items()
    return any(name in names and one.module is not None for name, one in own)


def _listed(value):
    return tuple(value) if isinstance(value, list) else value


def check_values(name: str, options: dict) -> None:
    """Refuses options that name files, and values of another type than a method's own."""
    for part, prefix in option_prefixes(name):
        files = file_options(part)
        for option in all_defaults(part):
            key = f"{prefix}{option}"
            if key in options and option in files:
                raise ServeError("method_unavailable", f"The option {key} is the server's to set.")
            if key in options and not fits(options[key], type_of(METHODS[part], option)):
                raise ServeError(
                    "method_unavailable",
                    f"The option {key} takes {in_words(type_of(METHODS[part], option))}.",
                )


def all_defaults(name: str) -> dict:
    """Options of a method with their defaults; {} for an unknown one."""
    method = METHODS.get(name)
    names = [] if method is None else option_names(method)
    return {key: _default(method.__dataclass_fields__[key]) for key in names}


def defaults(name: str) -> dict:
    """The options that a request may set, as plain values."""
    files = file_options(name)
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in all_defaults(name).items()
        if isinstance(value, PLAIN) and key not in files
    }


def file_options(name: str) -> list[str]:
    """The options by which a method is told of files: paths, and texts that are missing by
    default."""
    kinds = {key: alternatives(type_of(METHODS[name], key)) for key in all_defaults(name)}
    return [
        key
        for key, value in all_defaults(name).items()
        if Path in kinds[key] or (value is None and str in kinds[key])
    ]


def folder_option(name: str) -> str:
    """The option for the folder of a method's trained part. Raises ValueError without one."""
    if len(found := file_options(name)) != 1:
        raise ValueError(f"--trained-part {name}=FOLDER: {name!r} has no trained part")
    return found[0]


def files_of(pruner: Pruner) -> dict[str, dict]:
    """method -> the files that it was given by its options."""
    found = {}
    for name, one in pruner.named.items():
        given = {key: getattr(one, key) for key in file_options(name)}
        found[name] = {key: value for key, value in given.items() if value is not None}
    return found


def _default(field):
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def settings(pruner: Pruner) -> dict:
    """The values that a method's options have, as far as a request could have set them."""
    named = pruner.named
    values = {
        (f"{name}_{key}" if len(named) > 1 else key): getattr(one, key)
        for name, one in named.items()
        for key in defaults(name)
    }
    return {key: value for key, value in values.items() if isinstance(value, PLAIN)}


def unavailable(error: Exception) -> ServeError:
    """Why a method cannot be used, without places on the server's disk."""
    if isinstance(error, FileNotFoundError):
        text = "it needs a trained part or files that this server does not have"
    elif isinstance(error, OSError):
        text = "its files cannot be read on this server"
    else:
        text = _PATH.sub("...", str(error))
        if len(text) > REASON_CHARS:
            text = f"{text[:REASON_CHARS]}.."
    return ServeError("method_unavailable", f"The pruning method cannot be used: {text}.")


def offer(model, shelf: MethodShelf) -> list[dict]:
    """What the status says about every method; tries each on the model, which must be idle."""
    before, listing = model.pruner, []
    for name in METHODS:
        reason = where = None
        try:
            model.pruner = shelf.build(name)
            where = place(model.pruner)
        except Exception as error:
            logger.info("%s is not available: %s", name, error)
            reason = unavailable(error).message
        finally:
            model.pruner = before
        entry = {"name": name, "options": defaults(name), "available": reason is None}
        entry |= {"reason": reason, "place": where, **description(name, model, shelf)}
        listing.append(entry)
    return listing


def description(name: str, model, shelf: MethodShelf) -> dict:
    """What a menu says about a method: "about", how it chooses; "acts", where; "trained"; "counts"
    and "from_layer", what its budget is (`what_budget_counts`), null where it has none."""
    method, counts, layer = METHODS[name], None, None
    if BUDGET in defaults(name):
        tower = model.get_vision_tower()
        patches = TYPICAL_PATCHES if tower.grid is None else tower.num_patches
        with suppress(Exception):  # it cannot run here, which its `reason` says
            own = shelf.build(name, **{BUDGET: max(1, patches // 3)})
            found = what_budget_counts(own, patches, model.config.num_hidden_layers)
            counts, layer = found or (None, None)
    return {
        "about": "" if issubclass(method, Unusable) else how_it_chooses(method),
        "acts": where_it_acts(method),
        "trained": is_trained(method),
        "counts": counts,
        "from_layer": layer,
    }


def place(pruner: Pruner) -> str | None:
    """Where a method may stand in a combination of two: "first", "second" or None."""
    if pruner.wraps:  # what follows it is the method in it
        return None
    acts = isinstance(pruner, VisionStage), type(pruner.decoder) is not DecoderStage
    return {(True, False): "first", (False, True): "second"}.get(acts)
