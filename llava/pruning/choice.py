"""Which method a set of options belongs to, where nobody named one; published names of options.

Programs and loaders of the published repositories know one method each and never name it:
`--visual_token_num 64 --important_ratio 0.5`, `twig=FOLDER`, `twigvlm_config={...}`. An option that
one method alone has names it as well. What the methods are called, and what their releases call
their options, stands in the methods' own files (`Pruner.published`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..spelling import did_you_mean
from .base import Pruner, option_names

Methods = Mapping[str, type[Pruner]]
#: options that say how many tokens stay, of which one can be given
BUDGETS = ("visual_token_num", "visual_token_ratio")


def names_of(method: type[Pruner]) -> dict[str, str]:
    """Every name an option of the method goes by -> its name here."""
    own = {name: name for name in option_names(method)}
    return {**method.published.options, **own}  # our meaning wins where both use a name


def all_names(methods: Methods) -> list[str]:
    """Every name that an option of any method goes by, without repetition."""
    return list(dict.fromkeys(name for method in methods.values() for name in names_of(method)))


def choose(methods: Methods, options: Mapping[str, object], default: str) -> str:
    """The one method that has all these options; `default` for a budget alone, which any may mean.

    Raises ValueError, naming the owners, when several methods or none have them all.
    """
    if set(options) <= set(BUDGETS):
        return default
    owners = {key: [n for n, cls in methods.items() if key in names_of(cls)] for key in options}
    if unknown := [key for key, names in owners.items() if not names]:
        meant = did_you_mean(unknown[0], all_names(methods))
        raise ValueError(f"no pruning method has an option {', '.join(map(repr, unknown))}{meant}")
    able = [name for name in methods if all(name in names for names in owners.values())]
    if (one := the_one_of(able, methods, options)) is not None:
        return one
    special = {key: names for key, names in owners.items() if key not in BUDGETS}
    said = "; ".join(f"{key!r} belongs to {', '.join(names)}" for key, names in special.items())
    raise ValueError(
        f"{said}: name one method (--pruning-method, in Python pruner=, for scripts METHOD=)"
        if able
        else f"no pruning method has all of these options: {said}"
    )


def the_one_of(names: Sequence[str], methods: Methods, options: Mapping[str, object]) -> str | None:
    """Which of the methods called `names`, each of which has these options, is meant: the only one,
    or the only one that their values can mean. None: it could be several, or there is none."""
    if len(names) > 1:
        known = ((name, methods[name]) for name in names)
        names = [name for name, m in known if m.published.can_mean(translate(m, options))]
    return names[0] if len(names) == 1 else None


def as_published(method: type[Pruner], options: Mapping[str, object]) -> dict:
    """The options by the names they have here, when the caller means what the release means."""
    meaning = method.published.meaning
    if any(ours in options for ours in meaning.values()):  # our names: our meaning
        return dict(options)
    return {meaning.get(key, key): value for key, value in options.items()}


def translate(method: type[Pruner], options: Mapping[str, object]) -> dict:
    """The options under the names they have here; unknown ones stay for `build_pruner` to refuse.

    Raises ValueError when two names of one option have different values.
    """
    names = names_of(method)
    found: dict[str, tuple[str, object]] = {}
    for key, value in options.items():
        ours = names.get(key, key)
        if ours in found and found[ours][1] != value:
            raise ValueError(
                f"{found[ours][0]} ({found[ours][1]!r}) and {key} ({value!r}) are two names of one "
                f"option of {method.name}: give one of them"
            )
        found.setdefault(ours, (key, value))
    return {ours: value for ours, (_, value) in found.items()}


def open_group(method: type[Pruner], entries: object, others: tuple[str, ...] = ()) -> dict:
    """The options in the dict that `method.published.group` holds, under their names here.

    others: entries that are no options and stay as they are
    """
    group = method.published.group
    if not isinstance(entries, Mapping):
        raise ValueError(f"{group} must be a dict, got {entries!r}")
    names = names_of(method)
    if unknown := [key for key in entries if key not in names and key not in others]:
        raise ValueError(
            f"unknown entry {', '.join(map(repr, unknown))} of {group}, choose from "
            f"{', '.join([*names, *others])}"
        )
    return translate(method, entries)
