"""Peak memory of a computation, counted tensor by tensor, on any machine and at any size.

    with FakeTensorMode(), PeakMemory() as memory:
        ...                     # 20,480 x 151,936 logits cost nothing here
    memory.peak                 # bytes

PeakMemory adds up the storages of the tensors that operators hand out inside it, from the moment
they are made until nobody holds them any more. A view or an in-place result is no new storage.
What exists before is not counted, unless `hold` names it.

Counted: what a GPU's allocator calls "allocated", activations kept for backward and gradients
included. Not counted: scratch space inside one operator (logsumexp makes two copies of its input
on the way), the allocator's rounding and fragmentation, a GPU's context and its libraries'
workspace. The functions measured here therefore use in-place operators without such scratch space;
test_guards.py holds the count against the CPU allocator's own record.

Under FakeTensorMode tensors have shapes and no data, so the peak at full size takes seconds.
`as_on_a_gpu` makes such tensors take the branches that a GPU takes. Attention is the flash kernel
there as on a GPU, with no (T, T) scores: `PeakMemory.operators` lists what ran.
"""
import contextlib
import weakref
from collections import Counter
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Bytes alive now, the most there ever were, and how often each operator ran."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.operators = Counter()
        self._bytes = weakref.WeakKeyDictionary()  # storage: [its size, or 0 where not counted]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[func.overloadpacket.__name__] += 1
        for tensor in tensors_in((args, kwargs)):  # not seen before, so made outside
            self._bytes.setdefault(tensor.untyped_storage(), [0])
        out = func(*args, **(kwargs or {}))
        self.hold(out)
        return out

    def hold(self, tree):
        """Count every tensor in `tree` from now until it is gone."""
        for tensor in tensors_in(tree):
            storage = tensor.untyped_storage()
            if storage not in self._bytes:
                self._bytes[storage] = size = [storage.nbytes()]
                weakref.finalize(storage, self._forget, size).atexit = False
                self.now += size[0]
        self.peak = max(self.peak, self.now)

    def elsewhere(self, tree):
        """Count the tensors in `tree` no longer: they stand for some in another memory."""
        for tensor in tensors_in(tree):
            self._forget(self._bytes[tensor.untyped_storage()])

    def _forget(self, size):
        self.now -= size[0]
        size[0] = 0


def tensors_in(tree):
    return (x for x in tree_iter(tree) if isinstance(x, torch.Tensor))


@contextlib.contextmanager
def as_on_a_gpu():
    """Fake tensors say that they are on a GPU, so code that asks takes its GPU branch."""
    with mock.patch.object(FakeTensor, "is_cuda", True, create=True):
        yield


class AskedFor(TorchDispatchMode):
    """Answers for tensors without data: each number is 1, and `found` places are true."""

    def __init__(self, found):
        super().__init__()
        self.found, self.times = found, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.times += 1
            return 1.0
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self.found, args[0].dim()), dtype=torch.long)
        return func(*args, **(kwargs or {}))
