"""How many bytes of tensors are alive, operation by operation: of tensors with values, and of those without."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class KnownShapes(TorchDispatchMode):
    """Runs operations by `run_by_shapes`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return run_by_shapes(function, args, kwargs or {})


class LivingBytes(TorchDispatchMode):
    """Counts the living among the storages that operations of torch make; blind to what kernels take inside.

    `device` is the type of the device that they are to lie on, such as "meta" of what stands for a GPU; None is any.
    """

    def __init__(self, *, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.peak_bytes = 0
        self._living_bytes = 0
        self._known: dict[int, weakref.finalize] = {}

    def restart(self) -> int:
        """Return the peak, and look for another from now on."""
        peak, self.peak_bytes = self.peak_bytes, self._living_bytes
        return peak

    def watching(self, *, ignored: Iterable[Tensor]) -> "LivingBytes":
        """Watch inside."""
        for tensor in ignored:
            self._count(tensor, is_ignored=True)
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it has made."""
        result = run_by_shapes(function, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, is_ignored=False)
        return result

    def _count(self, tensor: Tensor, *, is_ignored: bool) -> None:
        if self._device not in (None, tensor.device.type):
            return
        for part in plain_parts(tensor):
            self._count_storage(part.untyped_storage(), is_ignored=is_ignored)

    def _count_storage(self, storage: torch.UntypedStorage, *, is_ignored: bool) -> None:
        # torch keeps one object of Python for a storage as long as the storage lives.
        if id(storage) not in self._known:
            num_bytes = 0 if is_ignored else storage.nbytes()
            self._known[id(storage)] = weakref.finalize(storage, self._forget, id(storage), num_bytes)
            self._living_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._living_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        del self._known[key]
        self._living_bytes -= num_bytes


# What operations on the meta device gave, by all that it depends on: shapes, strides and kinds of what they were given.
_given: dict[Any, list[Any]] = {}
MOST_GIVEN = 20_000


def run_by_shapes(function: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation; on the meta device the second time for the same shapes, only make what the first has given.

    torch finds shapes there in Python, most in half a millisecond, and the blocks of a network are alike.
    """
    if not _makes_storages(function):
        return function(*args, **kwargs)
    try:
        key = (function, _described(args), _described(tuple(kwargs.items())))
        given = _given.get(key)
    except TypeError:  # of a tensor that has values, or of something that is no key
        return function(*args, **kwargs)
    if given is not None:
        made = [None if each is None else _blank(*each) for each in given]
        return made[0] if len(made) == 1 else tuple(made)
    result = function(*args, **kwargs)
    results = result if isinstance(result, tuple) else (result,)
    if all(each is None or _is_shape_alone(each) for each in results):
        if len(_given) >= MOST_GIVEN:
            _given.clear()
        _given[key] = [None if each is None else _described(each) for each in results]
    return result


@cache
def _makes_storages(function: Any) -> bool:
    """Whether all that an operation gives is new, as its schema says: no view, nothing that it was given."""
    if not isinstance(function, torch._ops.OpOverload):
        return False
    schema = function._schema
    return not any(part.alias_info for part in (*schema.arguments, *schema.returns))


def _described(value: Any) -> Any:
    """Return what the shapes of an operation's results depend on; TypeError where there is more to them."""
    if isinstance(value, Tensor):
        if not _is_shape_alone(value):
            raise TypeError("a tensor with values")
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_described(each) for each in value)
    return type(value), value  # 1 is not 1.0, nor True


def _is_shape_alone(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.device.type == "meta" and value.layout == torch.strided


def _blank(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold a tensor's values: of 8-bit weights these and their scales, else itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    storages = [part.untyped_storage() for tensor in tensors for part in plain_parts(tensor)]
    return sum(storage.nbytes() for storage in {id(storage): storage for storage in storages}.values())


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention on the meta device be a CPU's fused kernel: torch's choice there keeps all scores, as no other.

    In place of a mode for functions, which is not in force where the backward pass computes blocks again.
    """

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    former = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = former
