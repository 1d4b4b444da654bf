"""Forwards that start above the first blocks: where nothing is active below, or where what is there stays as it is."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from heterolora.model import AdaptedModel


def frozen_blocks(model: AdaptedModel) -> int:
    """How many blocks run before anything that is active: no active site reads or changes what they compute.

    0 where the first blocks are not all that comes first: with two streams, and with blocks that share their weights.
    """
    if no_prefix(model) is not None:
        return 0
    blocks = _blocks(model)
    entries = [site.entry for site in model.space.sites if model.active_adapter(site.name) is not None]
    return min(entries, default=len(blocks))


def no_prefix(model: AdaptedModel) -> str | None:
    """Why the backbone can have no prefix, whatever is active; None: it can."""
    blocks = _blocks(model)
    if not blocks:
        return "of two streams, neither comes first"
    return "its blocks share their weights" if len(set(blocks)) < len(blocks) else None


class Prefix:
    """The first blocks of an adapted model: run alone, or skipped.

    Both are done by giving blocks another ``forward`` for a while; hooks, names and parameters stay as they are.

    Args:
        model: the adapted model.
        blocks: how many, at least 1; nothing below is active (``frozen_blocks``).
    """

    def __init__(self, model: AdaptedModel, blocks: int) -> None:
        self.model = model
        self.blocks = blocks
        self._others: int | None = None  # what a block gives beside the hidden state; None: it gives a tensor

    @torch.no_grad()
    def run(self, call: Callable[[], object]) -> torch.Tensor:
        """What the first blocks give, ``[inputs, tokens, width]``, without dropout; later blocks do not run.

        Args:
            call: runs the model on the inputs.
        """
        modules = [self.model.backbone.get_submodule(path) for path in _blocks(self.model)]
        last, found = modules[self.blocks - 1], []
        forward = last.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._others = None if isinstance(output, torch.Tensor) else len(output) - 1
            found.append(output if isinstance(output, torch.Tensor) else output[0])
            return output

        with ExitStack() as exits:
            exits.enter_context(evaluating(self.model.backbone))
            exits.enter_context(self.model.paused())  # what is active comes later, at blocks that do not run
            exits.enter_context(_instead(last, keep))
            for module in modules[self.blocks :]:
                exits.enter_context(_instead(module, lambda *args, **kwargs: self._form(args[0])))
            call()
        hidden: torch.Tensor = found[0]
        return hidden

    @contextmanager
    def entered(self, hidden: torch.Tensor) -> Iterator[None]:
        """Forwards inside skip the first blocks, and go on from what ``run`` gave for the same inputs.

        Args:
            hidden: ``[inputs, tokens, width]``; what stands where there is padding plays no part.
        """
        with ExitStack() as exits:
            for path in _blocks(self.model)[: self.blocks]:
                module = self.model.backbone.get_submodule(path)
                exits.enter_context(_instead(module, lambda *args, **kwargs: self._form(hidden)))
            yield

    def _form(self, hidden: torch.Tensor) -> Any:
        return _formed(hidden, self._others)


T = TypeVar("T")


class Waypoints:
    """What stands where blocks begin: one forward notes it, and later ones on the same inputs start at any of them.

    Below the start, adapters have acted in the forward that noted; from there on, they act as they are then. So a
    change at one site needs the blocks from its own on (``Site.layer``), and no others.

    Args:
        model: the adapted model, in evaluation mode; one that can have a prefix (``no_prefix``).
    """

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self._modules = [model.backbone.get_submodule(path) for path in _blocks(model)]
        self._noted: dict[int, tuple[torch.Tensor, Any]] = {}
        self._others: int | None = None  # what a block gives beside the hidden state; None: it gives a tensor

    def note(self, call: Callable[[], T], blocks: Iterable[int]) -> T:
        """Run the whole model, and keep what these blocks are given, until the next call.

        Args:
            call: runs the model on the inputs.
            blocks: numbers of blocks, from 0.

        Returns:
            What ``call`` returns.
        """
        self._noted.clear()
        with ExitStack() as exits:
            for block in blocks:
                exits.enter_context(_instead(self._modules[block], self._noting(block)))
            return call()

    def can_start(self, block: int) -> bool:
        """Whether the block was given its hidden state as a positional tensor, as blocks usually are."""
        return block in self._noted

    def resumed(self, call: Callable[[], T], block: int) -> T:
        """Run the model from a block on that was noted; those below do nothing.

        Args:
            call: as for ``note``, on the same inputs.
            block: where to start.
        """
        hidden, moment = self._noted[block]
        forward = self._modules[block].forward

        def start(*args: Any, **kwargs: Any) -> Any:
            self.model.go_on(moment)
            return forward(hidden, *args[1:], **kwargs)

        with ExitStack() as exits:
            exits.enter_context(self.model.paused())  # what is active below has acted, and is part of ``hidden``
            for module in self._modules[:block]:
                exits.enter_context(_instead(module, lambda *args, **kwargs: _formed(hidden, self._others)))
            exits.enter_context(_instead(self._modules[block], start))
            return call()

    def _noting(self, block: int) -> Callable[..., Any]:
        forward = self._modules[block].forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], torch.Tensor):
                self._noted[block] = args[0], self.model.moment()
            output = forward(*args, **kwargs)
            self._others = None if isinstance(output, torch.Tensor) else len(output) - 1
            return output

        return keep


def _formed(hidden: torch.Tensor, others: int | None) -> Any:
    """As blocks give it: a tensor, or a tuple whose other elements (attention weights) nobody asked for."""
    return hidden if others is None else (hidden, *[None] * others)


def _blocks(model: AdaptedModel) -> Sequence[str]:
    """Paths of the blocks in the order in which they run; of two stacks, none."""
    stacks = list(model.space.survey.stacks.values())
    return stacks[0].blocks if len(stacks) == 1 else ()


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # some libraries give a module another one, too
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module is in its own mode afterwards."""
    training = [each for each in module.modules() if each.training]
    for each in training:
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True
