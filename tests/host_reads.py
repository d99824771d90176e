"""Counts what would make the host wait for an accelerator, on whatever device the tensors are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# operators whose result, or the shape of it, the host must know before it goes on
READS = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "is_nonzero", "item", "equal",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "_linalg_check_errors",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
UPLOADS = {"lift_fresh", "lift_fresh_copy"}  # torch.tensor(Python numbers, device=...): the copy waits as well


@dataclass
class HostTraffic:
    """reads: of values by the host. uploads: tensors made of Python numbers. Both by operator."""

    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)


class _Operators(TorchDispatchMode):
    def __init__(self, traffic: HostTraffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS or (name in INDEXED and any(_is_mask(i) for i in args[1])):
            self.traffic.reads[name] += 1
        if name == "repeat_interleave" and func._overloadname == "Tensor" and not (kwargs or {}).get("output_size"):
            self.traffic.reads[name] += 1
        if name in UPLOADS:
            self.traffic.uploads[name] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class _Methods(TorchFunctionMode):
    def __init__(self, traffic: HostTraffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS and args and isinstance(args[0], Tensor):
            self.traffic.reads[f"Tensor.{name}"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_traffic() -> Iterator[HostTraffic]:
    """Counts while it is open. A read by a method may count twice, by its name and by its operator."""
    traffic = HostTraffic()
    with _Operators(traffic), _Methods(traffic):
        yield traffic
