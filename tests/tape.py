"""What a CUDA graph does, on a CPU: it runs a step's operators again, and no Python.

Of tensors that were made outside the step it knows the places alone. One that has died since is
read as sevens, as a graph would read whatever lies in its place by then.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


class Place(NamedTuple):
    """Where a tensor from outside lies: its memory is not kept alive."""

    memory: Any  # a weak reference
    dtype: torch.dtype
    layout: tuple[Any, ...]  # offset, size, stride

    def tensor(self) -> Tensor:
        """What is there now."""
        memory, (_, size, _) = self.memory(), self.layout
        if memory is None:
            return torch.full(size, 7, dtype=self.dtype)
        return torch.empty(0, dtype=self.dtype).set_(memory, *self.layout)


class Tape(TorchDispatchMode):
    """Writes down the operators that run, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()  # storages of what the operators made themselves
        self.given: set[int] = set()
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.given |= {*map(storage, tensors([args, kwargs]))} - self.made
        self.made |= {*map(storage, tensors(result))} - self.given
        self.operators.append((func, args, kwargs or {}, result))
        return result


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a tree of arguments."""
    return [x for x in tree_iter(tree) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    """The address of a tensor's memory."""
    return x.untyped_storage().data_ptr()


def record(step: Callable[[], None]) -> Callable[[], None]:
    """`model.record_graph` on a CPU."""
    with Tape() as tape:
        step()

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or storage(x) not in tape.given:
            return x
        layout = x.storage_offset(), x.shape, x.stride()
        return Place(weakref.ref(x.untyped_storage()), x.dtype, layout)

    def here(tree: Any) -> Any:
        is_place = lambda x: isinstance(x, Place)  # noqa: E731
        return tree_map(lambda x: x.tensor() if is_place(x) else x, tree, is_leaf=is_place)

    operators = [(f, *(tree_map(placed, part) for part in rest)) for f, *rest in tape.operators]
    tape.operators.clear()

    def replay() -> None:
        for func, args, kwargs, held in operators:
            found = func(*here(args), **here(kwargs))
            for old, new in zip(tensors(held), tensors(found), strict=False):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay
