"""All decoder layers on the prompts of a batch, with a pruning method called between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...devices import moved
from ...pruning.prefill import Prefill
from ...pruning.required import required
from ...pruning.stages import DecoderStage, Probe
from ...pruning.trace import PruningTrace
from ..kv_cache import KVCache, RowState
from ..reuse import Prefix
from .hook_calls import Call, call
from .layers import Step, is_watched


@dataclass
class PrefillLoop:
    """One prefill; caches and trace follow what the method does to the tokens.

    decoder: a `LlamaModel`
    stage:   of the method; None where there is no image, so that no hook is called
    collect: takes the input of every layer; None: nobody wants them
    asked:   gives how many tokens at the end are asked for; called before the last layer. None: all
    dropped: whether tokens were dropped, known when the loop has run
    """

    decoder: Any
    stage: DecoderStage | None
    cache: KVCache | None = None
    trace: PruningTrace | None = None
    collect: list[Tensor] | None = None
    asked: Callable[[], int] | None = None
    dropped: bool = False
    #: per layer that ran, `held_places` of what its cache holds; None where nobody will ask
    held: list[Tensor | None] = field(default_factory=list)

    def run(self, prefill: Prefill, prefix: Prefix | None = None) -> Prefill:
        """The prompts behind the last layer; what `prefix` knows of them is not computed again.

        With `asked` the hidden states may be those of so many tokens alone.
        """
        layers, stage, first = self.decoder.layers, self.stage, 0
        probe = Probe() if stage is None else stage.probe(len(layers))
        visual, places, step = prefill.visual_index, self._places(prefill), None
        begun = None  # a layer whose tokens have attended, and did not finish
        if prefix is not None:
            first, self.held = prefix.depth, [places] * prefix.depth
            prefill = self._resume(prefill, prefix)
        for number, layer in enumerate(layers[first:], start=first):
            if layer.device != prefill.hidden_states.device:
                prefill, step, places = moved((prefill, step, places), layer.device)
            prefill.layer = number
            if stage is not None:
                hook = call(partial(stage.before_layer, number), prefill, stage.name)
                prefill = hook.prefill
                if hook.changed:
                    step, places = None, self._places(prefill)
                    self._follow(hook)
            if begun is not None:
                prefill.hidden_states = begun.finish(prefill.hidden_states)
            step = self.decoder.prefill_step(prefill) if step is None else step
            self._record(prefill)
            own = step
            if number in probe.layers:
                rows = None if probe.form == "keys" else probe.rows(prefill)
                own = replace(step, rows=rows, form=probe.form)
            begun = layer if self._may_wait(number, own) else None
            if self.asked is not None and self._may_end(number, own):
                own = own.of_last(self.asked())
            run = partial(self.decoder.run_layer, layer) if begun is None else begun.attend
            prefill.hidden_states, recorded = run(prefill.hidden_states, own, self.cache)
            keys = own.form == "keys"
            prefill.attention, prefill.keys = (None, recorded) if keys else (recorded, None)
            if self.cache is not None:
                self.cache.rows[number] = step.state
                self.held.append(places)
        if stage is not None and self._acts_behind:
            prefill = self._finish(prefill)
        if self.trace is not None:
            self.trace.finish_prefill(self.cache, visual, prefill.importance)
        return prefill

    @property
    def _acting(self) -> DecoderStage:
        """`stage`, where hooks are called."""
        return required(self.stage, "the prompts hold no image, so that no hook is called")

    @cached_property
    def _blind_cuts(self) -> tuple[int, ...]:
        layers = self.decoder.layers
        return () if self.stage is None else self.stage.blind_cuts(len(layers))

    def _may_wait(self, number: int, step: Step) -> bool:
        """Whether what follows attention in a layer may run behind the next hook, on what that
        leaves: the hook does not look at it, and the layer need not run as a whole."""
        if number + 1 not in self._blind_cuts or torch.is_grad_enabled():
            return False
        if self.decoder.compile_layers and step.rows is None:
            return False
        layer, *after = self.decoder.layers[number : number + 2]
        return bool(after) and layer.device == after[0].device and not is_watched(layer)

    @cached_property
    def _acts_behind(self) -> bool:
        return self.stage is not None and self.stage.acts_behind(len(self.decoder.layers))

    def _may_end(self, number: int, step: Step) -> bool:
        """Whether tokens that are not `asked` for may end with their keys and values in layer
        `number`: it is the last one, nobody looks at what else would come out, and it need not run
        as a whole."""
        if number + 1 < len(self.decoder.layers) or self._acts_behind or self.collect is not None:
            return False
        if step.rows is not None or step.packed is not None or torch.is_grad_enabled():
            return False
        layer = self.decoder.layers[number]
        parts = (layer, getattr(layer, "self_attn", layer))
        return not self.decoder.compile_layers and not any(map(is_watched, parts))

    def _places(self, prefill: Prefill) -> Tensor | None:
        return held_places(prefill) if self._drops_from_caches else None

    @cached_property
    def _drops_from_caches(self) -> bool:
        return self.stage is not None and self.stage.drops_from_caches(len(self.decoder.layers))

    def _follow(self, hook: Call) -> None:
        """Makes caches and trace follow what a hook between layers changed."""
        prefill = hook.prefill
        if hook.dropped:
            self._drop(prefill, prefill.layer)
        elif self.trace is not None and prefill.layer == 0:
            self.trace.position_ids = prefill.position_ids.detach().cpu()

    def _drop(self, prefill: Prefill, number: int) -> None:
        """Makes caches and trace follow a change of the tokens before layer `number`."""
        self.dropped = True
        if self.cache is not None:
            layers = self._acting.pruned_caches(number, len(self.decoder.layers))
            drop_from_caches(self.cache, layers, self.held, prefill)
            if self.trace is not None:
                self.trace.hold(layers, prefill.index, prefill.valid)
        if self.trace is not None:
            self.trace.add_change(number, prefill.index, prefill.valid)

    def _record(self, prefill: Prefill) -> None:
        """Notes for trace and caller the tokens as they enter layer `prefill.layer`."""
        number, trace = prefill.layer, self.trace
        if trace is not None:
            trace.add_layer(prefill.visual_index, prefill.valid, prefill.index)
            if number in trace.attention_layers:
                row = prefill.attention_rows(number, prefill.last[:, None])[:, :, 0]
                trace.add_attention(number, row, prefill.index)
                trace.hold([number], prefill.index, prefill.valid)
        if self.collect is not None:
            self.collect.append(prefill.hidden_states)

    def _resume(self, prefill: Prefill, prefix: Prefix) -> Prefill:
        """The layers that `prefix` went through, on what follows it; returns the prompt as it
        enters the next layer (what follows alone where there is none)."""
        decoder, before, stage = self.decoder, prefill.hidden_states, self._acting
        cache = required(self.cache, "what prompts begin with alike is read into a cache: give one")
        hook = call(partial(stage.before_layer, 0), prefill, stage.name)
        prefill = hook.prefill
        if hook.changed or prefill.hidden_states is not before:
            raise ValueError(
                f"{stage.name} changes tokens before layer 0, but its reusable_layers says that it "
                f"leaves {prefix.depth} layers alone"
            )
        tail = decoder.first_layers(prefill, prefix.depth, cache, prefix)
        state = decoder.row_state(prefill, decoder.directions(prefill))
        if prefix.shared:
            state.size -= prefix.size
            state.valid = prefix.valid_in_cache(state.valid)
            state.bias = prefix.bias_in_cache(state.bias)
        for number in range(prefix.depth):
            device = decoder.layers[number].device
            if device != state.next_position.device:
                state = moved(state, device)
            cache.rows[number] = state
            if self.trace is not None:
                self.trace.add_layer(prefill.visual_index, prefill.valid, prefill.index)
        whole = prefix.depth < len(decoder.layers)
        prefill.hidden_states = prefix.followed_by(tail) if whole else tail
        if prefill.index.device != tail.device:
            prefill = moved(prefill, tail.device)
        return prefill

    def _finish(self, prefill: Prefill) -> Prefill:
        """The hook behind the last layer."""
        stage = self._acting
        hook = call(stage.after_layers, prefill, stage.name)
        prefill = hook.prefill
        if "index" in hook.changed:
            self._drop(prefill, len(self.decoder.layers))
        elif late := hook.changed - {"next_position"}:
            raise ValueError(
                f"{stage.name} changes {' and '.join(sorted(late))} in after_layers, when "
                "all layers have run: change them in before_layer"
            )
        if "next_position" in hook.changed and self.cache is not None:
            for state in self.cache.states():
                state.next_position = prefill.follows.to(state.next_position.device)
        return prefill


def held_places(prefill: Prefill) -> Tensor:
    """(B, S) place of each token in the prompt that entered layer 0, ascending in every row:
    padding and tokens that were not in the prompt repeat the last token before them."""
    index = prefill.index
    if prefill.valid is not None:
        index = index.masked_fill(~prefill.valid, -1)
    return index.cummax(dim=1).values


def drop_from_caches(
    cache: KVCache, layers: Iterable[int], held: list[Tensor | None], after: Prefill
) -> None:
    """Takes from layers that already ran what a method dropped later; positions and the bias that
    those layers had stay.

    held: per layer `held_places` of what its cache holds; layers with the same tokens share it
    """
    orders: dict[tuple, Tensor] = {}
    states: dict[int, RowState] = {}  # layers that shared a state still do
    for layer in layers:
        before = cache.state_of(layer)
        own = required(held[layer], f"drops_from_caches says that layer {layer} keeps its tokens")
        there = before.next_position.device
        key = id(own), there
        if key not in orders:
            # Both lists ascend in every row, so a search finds where the survivors were.
            index = after.index.to(there).contiguous()
            order = torch.searchsorted(own.to(there).contiguous(), index)
            orders[key] = order.clamp(max=own.shape[1] - 1)
        if id(before) not in states:
            follows = after.next_position
            follows = before.next_position if follows is None else follows
            bias = None if before.bias is None else before.bias.gather(1, orders[key])
            size, where = after.index.shape[1], before.directions
            where = None if where is None else where.at(orders[key])
            state = RowState(follows, size, after.valid, bias, where)
            states[id(before)] = moved(state, there)
        cache.keep(layer, orders[key], states[id(before)])
