"""The pruning methods a worker offers on its one model."""

from __future__ import annotations

import json
import logging
import re
import threading
import weakref
from collections import OrderedDict
from dataclasses import MISSING

from ..pruning import METHODS, Pruner, build_pruner
from ..pruning.base import option_names
from .errors import ServeError
from .protocol import PruningRequest

PLAIN = (bool, int, float, str, list, tuple, type(None))
KEPT = 32  # settings that stay built; a method with trained parts keeps one
TRAINED = 4  # settings of one method with trained parts that are alive at a time
BUDGET = "visual_token_num"
_PATH = re.compile(r"\S*[/\\]\S*")

logger = logging.getLogger(__name__)


class MethodShelf:
    """Builds methods for requests, and remembers the latest.

    Trained parts are large, and each setting of a method loads its own: few may be alive at a time.

    default: what a request without a method gets
    """

    def __init__(self, default: Pruner):
        self.default = default
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
            self._make_room(request.method)
            self._built[key] = pruner
            self._alive[key] = weakref.ref(pruner)
        return pruner

    def _build(self, name: str, options: dict) -> Pruner:
        check_texts(name, options)
        try:
            return build_pruner(name, **options)
        except (ValueError, TypeError, OSError, ArithmeticError) as error:
            raise unavailable(error) from None

    def _make_room(self, name: str) -> None:
        """Forgets old settings, of `name` all that have trained parts and are not in use.

        Raises ServeError when too many of those are.
        """
        for key in [key for key, one in self._built.items() if is_trained(one, name)]:
            del self._built[key]
        while len(self._built) >= KEPT:
            self._built.popitem(last=False)
        in_use = {key: one for key, reference in self._alive.items() if (one := reference())}
        self._alive = {key: self._alive[key] for key in in_use}
        self._built |= {key: one for key, one in in_use.items() if is_trained(one, name)}
        if sum(is_trained(one, name) for one in in_use.values()) >= TRAINED:
            raise ServeError(
                "busy", "Other settings of this method are in use; try again soon, or use those."
            )


def is_trained(pruner: Pruner, name: str) -> bool:
    return pruner.name == name and pruner.module is not None


def _listed(value):
    return tuple(value) if isinstance(value, list) else value


def check_texts(name: str, options: dict) -> None:
    """Refuses text where a method has none by default: it could name a file of the server."""
    known = {}
    for method in name.split("+"):
        prefix = f"{method}_" if "+" in name else ""
        known |= {f"{prefix}{key}": value for key, value in all_defaults(method).items()}
    for key, value in options.items():
        if isinstance(value, str) and key in known and not isinstance(known[key], str):
            raise ServeError("method_unavailable", f"The option {key} takes no text in a request.")


def all_defaults(name: str) -> dict:
    """Options of a method with their defaults; {} for an unknown one."""
    method = METHODS.get(name)
    names = [] if method is None else option_names(method)
    return {key: _default(method.__dataclass_fields__[key]) for key in names}


def defaults(name: str) -> dict:
    """The options that a request may set, as plain values: those that name files are left out."""
    found = {}
    for key, value in all_defaults(name).items():
        names_file = value is None and "str" in str(METHODS[name].__dataclass_fields__[key].type)
        if not names_file and isinstance(value, PLAIN):
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def _default(field):
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def settings(pruner: Pruner) -> dict:
    """The values that a method's options have, as far as a request could have set them."""
    if parts := getattr(pruner, "methods", None):
        return {
            f"{part.name}_{key}": value for part in parts for key, value in settings(part).items()
        }
    values = {key: getattr(pruner, key) for key in defaults(pruner.name)}
    return {key: value for key, value in values.items() if isinstance(value, PLAIN)}


def unavailable(error: Exception) -> ServeError:
    """Why a method cannot be used, without places on the server's disk."""
    if isinstance(error, FileNotFoundError):
        text = "it needs a trained part or files that this server does not have"
    elif isinstance(error, OSError):
        text = "its files cannot be read on this server"
    else:
        text = _PATH.sub("...", str(error))[:300]
    return ServeError("method_unavailable", f"The pruning method cannot be used: {text}.")


def offer(model) -> list[dict]:
    """What the status says about every method; tries each on the model, which must be idle."""
    before, listing = model.pruner, []
    for name in METHODS:
        reason = None
        try:
            model.pruner = build_pruner(name)
        except Exception as error:
            logger.info("%s is not available: %s", name, error)
            reason = unavailable(error).message
        finally:
            model.pruner = before
        listing.append(
            {
                "name": name,
                "options": defaults(name),
                "available": reason is None,
                "reason": reason,
            }
        )
    return listing
