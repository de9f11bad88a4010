"""Sequence parallelism of a diffusers transformer (Ulysses): tokens are divided, and in attention heads are.

The ranks of a step run the same forward, each on its share of the tokens. Before attention they exchange: each gets all
tokens of some heads; after it they exchange back (`models.collectives`).

The only file that touches diffusers' experimental API for it: the models' `_cp_plan`, which says what to divide, and
`parallel_config`, by which a processor says that an attention is over divided tokens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import dispatch_attention_fn

from tetriserve.models import collectives
from tetriserve.models.team import Team, shares

IMAGE, TEXT = "hidden_states", "encoder_hidden_states"


@dataclass
class Attention:
    """The `parallel_config` of attention processors while there is a team.

    over: names of the divided inputs whose tokens it is over.
    counts: each member's tokens in it.
    """

    over: tuple[str, ...]
    counts: tuple[int, ...] = ()


class SequenceParallel:
    """Runs a transformer's forwards with a team, which may change before each of them; without one, the bare model."""

    def __init__(
        self,
        transformer: Any,
        plan: Mapping[str, Any] | None = None,
        over: Callable[[str], tuple[str, ...]] = lambda attention: (IMAGE, TEXT),
    ) -> None:
        """
        Args:
            transformer: a diffusers model.
            plan: what of it to divide, in the form of diffusers' `_cp_plan`; None is that of its class. What belongs to
                the tokens of an input, such as positions, is divided as they are.
            over: of the name of an attention module, the inputs whose tokens it is over, as the plan names them; the
                first of them is what the plan's outputs are gathered by. None at all: it is not divided.
        """
        self._lengths: dict[str, int] = {}
        self._degree, self._index = 1, 0
        self._attentions: dict[tuple[str, ...], Attention] = {}
        self._processors = []
        for name, module in transformer.named_modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config") and (inputs := over(name)):
                attention = self._attentions.setdefault(inputs, Attention(inputs))
                self._processors.append((processor, attention))
                sys.modules[type(processor).__module__].dispatch_attention_fn = _attend  # type: ignore[attr-defined]
        self._tokens = {name for inputs in self._attentions for name in inputs}
        self._gathered = next(iter(self._attentions), (IMAGE,))[0]
        for name, part in (transformer._cp_plan if plan is None else plan).items():
            for module in _modules(transformer, name):
                self._follow(module, part)

    def use(self, team: Team | None) -> None:
        """From the next forward on."""
        collectives.set_team(team)
        self._degree, self._index = (1, 0) if team is None else (team.degree, team.index)
        self._lengths.clear()
        for processor, attention in self._processors:
            processor._parallel_config = attention if self._degree > 1 else None

    def _follow(self, module: torch.nn.Module, plan: Any) -> None:
        if isinstance(plan, Mapping):
            parameters = list(inspect.signature(type(module).forward).parameters)[1:]
            inputs = {name: each for name, each in plan.items() if isinstance(name, str)}
            outputs = {index: each for index, each in plan.items() if isinstance(index, int)}
            if inputs:
                _before(module, self._splitting_inputs(parameters, inputs))
            if outputs:
                _after(module, self._splitting_outputs(outputs))
        else:
            _after(module, self._gathering_outputs([plan] if not isinstance(plan, Sequence) else plan))

    def _splitting_inputs(
        self, parameters: Sequence[str], plan: Mapping[str, ContextParallelInput]
    ) -> Callable[..., Any]:
        def split(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._degree == 1:
                return None
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            for name, part in plan.items():
                if (tensor := given.get(name)) is not None and part.expected_dims in (None, tensor.ndim):
                    if name in self._tokens:
                        self._lengths[name] = tensor.shape[part.split_dim]
                    given[name] = self._share(tensor, part)
            per_input = {name: shares(length, self._degree) for name, length in self._lengths.items()}
            for attention in self._attentions.values():
                parts = [per_input[name] for name in attention.over if name in per_input]
                attention.counts = tuple(map(sum, zip(*parts, strict=True)))
            return (), given

        return split

    def _splitting_outputs(self, plan: Mapping[int, ContextParallelInput]) -> Callable[..., Any]:
        def split(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._degree == 1:
                return None
            outputs = [output] if isinstance(output, torch.Tensor) else [*output]
            for index, part in plan.items():
                outputs[index] = self._share(outputs[index], part)
            return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)

        return split

    def _gathering_outputs(self, plan: Sequence[ContextParallelOutput | None]) -> Callable[..., Any]:
        def gather(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._degree == 1:
                return None
            outputs = [output] if isinstance(output, torch.Tensor) else [*output]
            counts = shares(self._lengths[self._gathered], self._degree)
            for index, part in enumerate(plan):
                if part is not None:
                    outputs[index] = torch.ops.tetriserve.all_gather(outputs[index], part.gather_dim, counts)
            return outputs[0] if isinstance(output, torch.Tensor) else tuple(outputs)

        return gather

    def _share(self, tensor: torch.Tensor, part: ContextParallelInput) -> torch.Tensor:
        """This member's part of the tokens."""
        counts = shares(tensor.shape[part.split_dim], self._degree)
        return tensor.narrow(part.split_dim, sum(counts[: self._index]), counts[self._index])


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *args: Any,
    parallel_config: Attention | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """In place of `dispatch_attention_fn`, which it calls: with all tokens, and this member's heads."""
    if parallel_config is None:
        return dispatch_attention_fn(query, key, value, attn_mask, *args, **kwargs)  # type: ignore[no-any-return]
    counts, num_local = parallel_config.counts, query.shape[1]
    assert attn_mask is None or len(parallel_config.over) == 1, "a mask is of all tokens, in their order"
    local = torch.cat([query, key, value])
    query, key, value = collectives.all_to_all(local, counts, sum(counts), gathers_tokens=True).chunk(3)
    attended = dispatch_attention_fn(query, key, value, attn_mask, *args, **kwargs)
    return collectives.all_to_all(attended, counts, num_local, gathers_tokens=False)


def _before(module: torch.nn.Module, hook: Callable[..., Any]) -> None:
    """Have `hook` called before each forward; outside of the graph of a compiled module, which serves all members."""
    compiled: Any = module._compiled_call_impl
    if compiled is None:
        module.register_forward_pre_hook(hook, with_kwargs=True)
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        return compiled(*args, **kwargs)

    module._compiled_call_impl = call


def _after(module: torch.nn.Module, hook: Callable[..., Any]) -> None:
    """As `_before`, with what the forward returned."""
    compiled: Any = module._compiled_call_impl
    if compiled is None:
        module.register_forward_hook(hook)
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        output = compiled(*args, **kwargs)
        changed = hook(module, args, output)
        return output if changed is None else changed

    module._compiled_call_impl = call


def _modules(transformer: torch.nn.Module, name: str) -> list[torch.nn.Module]:
    """Those that a plan calls `name`, in which one part may be `*`."""
    before, star, after = name.partition("*")
    if not star:
        return [transformer.get_submodule(name)]
    children = transformer.get_submodule(before.rstrip(".")).children()
    return [child.get_submodule(after.lstrip(".")) for child in children]
