"""What must not come back: full logits in memory, waiting for the device, weights that stand still.

Memory is counted at the true sizes on tensors without data; a wait is caught by running the method
on `meta` tensors, of which nothing can be read. tests/bench.py measures the same things and more.
"""
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sod_mini as sod
from memory import PeakMemory, as_on_a_gpu

GIB = 2 ** 30
N, V, D_S, D_T = 20_480, 151_936, 1024, 2560  # the paper's response, Qwen3, 0.6B and 4B
FLOOR = 2 * (N + V) * D_S / GIB               # bf16 gradients of hidden states and head: .33 GiB


# --- Memory -----------------------------------------------------------------------------------


def peak(work, *shapes, dtype=torch.bfloat16):
    """Bytes that `work` and its backward take on top of inputs of these shapes."""
    with FakeTensorMode(), as_on_a_gpu():
        inputs = [torch.empty(s, dtype=dtype, requires_grad=True) for s in shapes]
        with PeakMemory() as memory:
            work(*inputs, torch.zeros(shapes[0][0], dtype=torch.long)).sum().backward()
    return memory.peak


def naive_logprobs(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def naive_reverse_kl(hidden_s, weight_s, hidden_t, weight_t, _):
    log_p, log_q = ((h @ w.T).float().log_softmax(-1)
                    for h, w in ((hidden_s, weight_s), (hidden_t.detach(), weight_t.detach())))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_counted_peak_is_the_allocators_own():
    """On real tensors: the count beside what the CPU allocator reports to the profiler."""
    hidden, weight = (torch.randn(n, 64, requires_grad=True) for n in (256, 9000))
    targets = torch.zeros(256, dtype=torch.long)
    for work in (sod.token_logprobs, naive_logprobs):
        hidden.grad = weight.grad = None
        with torch.profiler.profile(profile_memory=True) as profiler, PeakMemory() as memory:
            work(hidden, weight, targets).sum().backward()
        now, highest = 0, 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                highest = max(highest, now)
        assert memory.peak == pytest.approx(highest, rel=0.02) and highest > 2e6


def test_count_follows_views_in_place_work_and_the_end_of_a_tensor():
    with PeakMemory() as memory:
        a = torch.ones(1000)                # 4000 bytes
        b = a.view(10, 100).add_(1)[2:]     # the same storage
        assert memory.now == 4000
        c = torch.cat([a, a])               # 8000 more
        del a, b
        assert (memory.now, memory.peak) == (8000, 12_000)
        memory.hold([c, torch.empty(5)])    # c is known, the other one is gone at once
    assert (memory.now, memory.peak) == (8000, 12_000)


def test_token_logprobs_take_half_a_gibibyte_where_logits_take_thirty_five():
    shapes = (N, D_S), (V, D_S)
    ours, naive = (peak(f, *shapes) / GIB for f in (sod.token_logprobs, naive_logprobs))
    assert FLOOR < ours < 0.5 and naive > 34


def test_reverse_kl_takes_six_tenths_of_a_gibibyte_where_logits_take_fifty_eight():
    shapes = (N, D_S), (V, D_S), (N, D_T), (V, D_T)
    ours, naive = (peak(f, *shapes) / GIB for f in (
        lambda h, w, h_t, w_t, _: sod.reverse_kl(h, w, h_t.detach(), w_t.detach()),
        naive_reverse_kl))
    assert FLOOR < ours < 0.6 and naive > 57


# --- Waiting for the device -------------------------------------------------------------------


def method_on(device, num_steps=16, B=4, T=50, D=8, vocabulary=600):
    """Everything between the hidden states and the gradients, as an update does it."""
    empty = lambda *shape: torch.empty(shape, device=device)
    hidden, weight = empty(B, T, D).requires_grad_(), empty(vocabulary, D).requires_grad_()
    ids, step_id = empty(B, T).long(), empty(B, T).long()
    logp = sod.token_logprobs(hidden, weight, ids)
    old, other, A = logp.detach(), empty(B, T), empty(B)
    d = sod.step_divergence(old, other, step_id, num_steps)
    w = sod.step_weights(d)
    advantages = sod.token_advantages("sod", A, old, other, step_id, w)
    loss = sod.policy_loss(logp, old, advantages, step_id >= 0, num_tokens=B * T)
    kl = sod.reverse_kl(hidden, weight, empty(B, T, D), empty(vocabulary, D))
    (loss + kl.mean()).backward()
    return hidden.grad, weight.grad


def test_nothing_from_hidden_states_to_gradients_waits_for_the_device():
    """A meta tensor has no data: .item(), nonzero, a boolean index or a copy to the host raises."""
    assert all(g.device.type == "meta" for g in method_on("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        method_on("meta", num_steps=None)  # looks K up in step_id


class Embedder(torch.nn.Module):
    """A student without layers: HF's own forward looks at its position ids, which is one wait."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.embedding = torch.nn.Embedding(600, 16, device=device)

    def base_model(self, input_ids, use_cache):
        return types.SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    def get_output_embeddings(self):
        return self.embedding


def learn_on(device):
    """Loss and gradient of one micro-batch, the old policy's log-probabilities given."""
    student = Embedder(device)
    config = sod.Config(updates_per_step=2, prompts_per_step=2, group_size=1, method="grpo")
    rollouts = [sod.Rollout(None, [5] * n, [-1] * 3 + [0] * (n - 3), 3, outcomes=[""])
                for n in (20, 30)]
    host = types.SimpleNamespace(config=config, student=student)
    with mock.patch.object(sod, "score", lambda *a: (torch.zeros(2, 30), torch.zeros(2, 30))):
        scored = sod.score_batch(host, rollouts, config)
    loss, clipped = sod.batch_loss(host, scored, [0, 1], 44, config)
    loss.backward()
    return [p.grad for p in student.parameters()]


def test_a_micro_batch_is_learnt_from_without_waiting_for_the_device():
    assert all(g.device.type == "meta" for g in learn_on("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA names every wait itself")
def test_cuda_sees_no_wait_either():
    torch.cuda.set_sync_debug_mode("error")
    try:
        method_on("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("look", [
    lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.cpu(),
    lambda x: bool(x.any()), lambda x: x.tolist(), lambda x: torch.equal(x, x.clone())])
def test_every_way_to_look_at_data_fails_on_a_meta_tensor(look):
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(torch.empty(3, device="meta"))


# --- Weights that move ------------------------------------------------------------------------


class OneWeight(torch.nn.Linear):
    device = torch.device("cpu")


class InPlaceAdamW(torch.optim.AdamW):
    """What goes wrong: bf16 weights, updated where they are."""

    def __init__(self, model, lr, config):
        super().__init__(model.parameters(), lr=lr, weight_decay=config.weight_decay,
                         betas=(config.beta1, config.beta2))

    def step(self):
        super().step()
        self.zero_grad()


def exact(model, optimizer):
    """The first weight of a model as its optimizer knows it, in fp32."""
    p, low = next(model.parameters()).detach(), getattr(optimizer, "low", [None])[0]
    return p.float() if low is None else sod.join(p, low)


def share_of_true_way(make, steps=50):
    """How far bf16 weights come along the way of fp32 AdamW, as a share of it: 1 is all of it."""
    torch.manual_seed(0)
    models = [OneWeight(64, 512, bias=False) for _ in range(2)]
    start = models[0].weight.detach().bfloat16().float()
    models[0].weight.data = start.clone()
    models[1].weight.data = start.bfloat16()
    config = sod.Config(grad_clip=1e9)
    pairs = [(m, f(m, 1e-6, config)) for m, f in zip(models, (InPlaceAdamW, make))]
    drift = torch.randn(512, 64)
    for _ in range(steps):
        g = (drift + torch.randn(512, 64)).bfloat16()
        for model, optimizer in pairs:
            (model.weight * g.to(model.weight.dtype)).sum().backward()
            optimizer.step()
    true, moved = (exact(*pair) - start for pair in pairs)
    return float((moved * true).sum() / true.square().sum())


def test_weights_go_the_whole_way_at_lr_1e_6_where_plain_bf16_stands_still():
    assert share_of_true_way(sod.Optimizer) == pytest.approx(1, abs=0.01)
    assert abs(share_of_true_way(InPlaceAdamW)) < 0.1
