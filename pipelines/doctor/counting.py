"""A training step's arithmetic and memory, counted while it runs on paper or for real."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Counter(TorchDispatchMode):
    """Counts what is done inside, by PyTorch's own formulas.

    Its `FlopCounterMode` says the same, and which module did it, in one and a half times the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops = 0

    @property
    def gmac(self) -> float:
        """10⁹ multiply-accumulates so far: of convolutions, matrix products and attention."""
        return self._flops / 2e9

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self._flops += formula(*args, **kwargs, out_val=out)
        return out


def count_gmac(call: Callable[[], Any]) -> float:
    """10⁹ multiply-accumulates of a call."""
    # attention as its two products: not every PyTorch knows what its fused kernels cost
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        call()
    return counter.gmac


class Holder(TorchDispatchMode):
    """Watches what the operations inside make, and when it is let go of.

    Attributes:
        worst: bytes of it held at the worst moment between two operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.worst = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                seen = StorageWeakRef(storage)  # keeps its address from being used again
                self._held.setdefault(seen.cdata, (seen, storage.nbytes()))
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.worst = max(self.worst, sum(size for _, size in self._held.values()))
        return out


def count_parameters(module: nn.Module) -> int:
    """Learned values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


class PaperRun:
    """Stands in for a `Run` in a training step: backward passes on paper, and no updates.

    Args:
        modules: whose own tensors are no activations.
    """

    def __init__(self, device: torch.device, precision: str, *modules: nn.Module) -> None:
        self.device, self.precision, self.worst = device, precision, 0
        self._own = {
            tensor.untyped_storage()._cdata
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._kept: dict[int, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the operations inside keep for their backward passes."""

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self._kept[storage._cdata] = storage  # once, however many views are kept of it
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield

    def step(self, loss: Tensor, module: nn.Module, *_: Any) -> None:
        """The backward pass, which lets go of all that was kept."""
        self.worst = max(self.worst, sum(storage.nbytes() for storage in self._kept.values()))
        loss.backward()
        self._kept.clear()
        module.zero_grad(set_to_none=True)

    def accumulate(self, *_: nn.Module) -> AbstractContextManager:
        """Every micro-batch is one of its own."""
        return nullcontext()

    def unwrap(self, module: nn.Module) -> nn.Module:
        """Nothing is wrapped."""
        return module

    def mean(self, tensor: Tensor) -> Tensor:
        """There is one process."""
        return tensor

    def autocast(self) -> AbstractContextManager:
        """As `Run.autocast`."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
