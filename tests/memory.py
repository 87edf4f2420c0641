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
`without_data` makes such tensors take the branches that a GPU takes. Attention is the flash kernel
there as on a GPU, with no (T, T) scores: `PeakMemory.operators` lists what ran.
"""
import contextlib
import sys
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sod_mini as sod  # noqa: E402

GIB, V = 2 ** 30, 151_936  # rows of Qwen3's vocabulary
QWEN3 = {  # hidden size, layers, heads, intermediate size; 8 key heads of 128
    "0.6B": (1024, 28, 16, 3072), "1.7B": (2048, 28, 16, 6144), "4B": (2560, 36, 32, 9728)}


class PeakMemory(TorchDispatchMode):
    """Bytes alive now, the most there ever were, and how often each operator ran."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.operators = Counter()
        self.counting = True
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
                self._bytes[storage] = size = [storage.nbytes() * self.counting]
                weakref.finalize(storage, self._forget, size).atexit = False
                self.now += size[0]
        self.peak = max(self.peak, self.now)

    @contextlib.contextmanager
    def elsewhere(self, yes=True):
        """What is made in here stands for tensors in another memory."""
        self.counting = not yes
        try:
            yield
        finally:
            self.counting = True

    def _forget(self, size):
        self.now -= size[0]
        size[0] = 0


def tensors_in(tree):
    return (x for x in tree_iter(tree) if isinstance(x, torch.Tensor))


class AskedFor(TorchDispatchMode):
    """Answers for tensors without data: each number is 1, and a share of each mask is true."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self.true_places(args[0]), args[0].dim()), dtype=torch.long)
        if func is torch.ops.aten.addmm.dtype_out:  # torch 2.11 cannot do it without data
            return kwargs["out"]
        if func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            return args[0].new_empty(self.true_places(args[1][0]))
        return func(*args, **(kwargs or {}))

    def true_places(self, mask):
        return round(mask.numel() * self.share)


@contextlib.contextmanager
def without_data(share=1.0):
    """Tensors without data, as a GPU would hold them; yields the PeakMemory that counts them."""
    many = mock.patch.object(sys.modules["torch.optim.adam"], "_default_to_fused_or_foreach",
                             lambda *a, **k: (False, True))  # AdamW's kernel for many tensors
    says_so = mock.patch.object(FakeTensor, "is_cuda", True, create=True)
    with FakeTensorMode(), many, says_so, PeakMemory() as memory, AskedFor(share):
        yield memory


def random_qwen3(size, dtype=torch.bfloat16, **changes):
    """A Qwen3 model of random weights: a name of QWEN3 or (hidden, layers, heads, MLP)."""
    hidden, layers, heads, inner = QWEN3.get(size, size)
    shape = dict(vocab_size=V, hidden_size=hidden, num_hidden_layers=layers,
                 num_attention_heads=heads, num_key_value_heads=min(8, heads // 2), head_dim=128,
                 intermediate_size=inner, tie_word_embeddings=True, max_position_embeddings=40_960)
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**{**shape, **changes}), dtype=dtype)
    model.generation_config = GenerationConfig()
    return model.eval()


def peak_of_iteration(config, student, teacher, prompt, response, rollouts=1):
    """GiB on the GPU in an iteration of the real loop that has its rollouts, in bf16.

    student, teacher  sizes: names of QWEN3
    prompt, response  tokens of each rollout; all response tokens count as sampled, the most there
                      can be
    returns           {"resident", "scoring", "gradient", "step": the most in each}

    With --offload teacher or all a teacher is there only while it scores.
    """
    settings = dict(vars(config), method="sod_only", prompts=rollouts, group_size=1,
                    num_minibatches=1, iterations=1, gradient_checkpointing=True)
    with without_data(response / (prompt + response)) as memory:
        agent = agent_without_data(memory, sod.Config(**settings), student, teacher)
        found = {"resident": memory.now}

        def learn(*args):
            found["scoring"], memory.peak = memory.peak, 0
            loss = backpropagate(*args)
            found["gradient"], memory.peak = memory.peak, 0
            return loss

        @contextlib.contextmanager
        def on_device(model, device):
            agent.teacher = model or random_qwen3(teacher).requires_grad_(False)
            yield
            agent.teacher = model
        memory.peak, backpropagate = 0, sod.backpropagate
        rows = [sod.Rollout(None, [0] * prompt, [sod.Turn([0] * response)])] * rollouts
        instead = dict(sample_rollouts=lambda *_: rows, draw=lambda *_: [], on_device=on_device,
                       outcome_reward=lambda *_: 0.0,
                       backpropagate=learn, batch_metrics=lambda *_: {})
        with mock.patch.multiple(sod, **instead):
            list(sod.train(agent))
        found["step"] = memory.peak
    assert memory.operators["_scaled_dot_product_flash_attention_for_cpu"], "no flash kernel"
    return {part: size / GIB for part, size in found.items()}


def agent_without_data(memory, config, student, teacher):
    """An Agent in the middle of a run: AdamW has its moments. What --offload all keeps in the
    CPU's memory is not counted."""
    away = config.offload == "all"
    model = random_qwen3(student).train()
    sod.enable_checkpointing(model)
    agent = sod.Agent(config, model, None, None, None)

    class Optimizer(sod.Optimizer):
        @staticmethod
        def _collect(master, p):
            with memory.elsewhere(away):
                sod.Optimizer._collect(master, p)

        def step(self, loss):
            with memory.elsewhere(away):
                return super().step(loss)
    with memory.elsewhere(away):
        agent.optimizer = Optimizer(model, lambda n: 1e-6, config)
        for master in agent.optimizer.masters:
            master.grad = torch.zeros_like(master)
    agent.optimizer.step(1.0)
    if config.offload == "none" and sod.METHODS[config.method].scorer:
        agent.teacher = random_qwen3(teacher).requires_grad_(False)
    return agent
