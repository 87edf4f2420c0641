"""What must not come back: full logits in memory, and waiting for the device.

Memory is counted at the true sizes on tensors without data; a wait is caught by running the method
on `meta` tensors, of which nothing can be read. tests/bench.py measures the same things and more.
"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sod_mini as sod
from conftest import json_lines, tiny
from memory import GIB, PeakMemory, V, without_data

N, D_S, D_T = 20_480, 1024, 2560   # the paper's response; 0.6B and 4B
FLOOR = 2 * (N + V) * D_S / GIB    # bf16 gradients of hidden states and head: .33 GiB


# --- Memory -----------------------------------------------------------------------------------


def peak(work, *shapes, dtype=torch.bfloat16):
    """GiB that `work` and its backward take on top of inputs of these shapes."""
    with without_data() as memory:
        inputs = [torch.empty(s, dtype=dtype, requires_grad=True) for s in shapes]
        targets, before = torch.zeros(shapes[0][0], dtype=torch.long), memory.now
        work(*inputs, targets).sum().backward()
    return (memory.peak - before) / GIB


def naive_log_softmax(hidden, weight):
    logits = hidden @ weight.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def naive_logprobs(hidden, weight, targets):
    return naive_log_softmax(hidden, weight).gather(-1, targets[:, None])[:, 0]


def our_reverse_kl(hidden_s, weight_s, hidden_t, weight_t, _):
    return sod.reverse_kl(hidden_s, weight_s, hidden_t.detach(), weight_t.detach())


def naive_reverse_kl(hidden_s, weight_s, hidden_t, weight_t, _):
    log_p = naive_log_softmax(hidden_s, weight_s)
    log_q = naive_log_softmax(hidden_t.detach(), weight_t.detach())
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("ours, most, naive, least, shapes", [
    (sod.token_logprobs, 0.5, naive_logprobs, 34, [(N, D_S), (V, D_S)]),
    (our_reverse_kl, 0.6, naive_reverse_kl, 57, [(N, D_S), (V, D_S), (N, D_T), (V, D_T)])],
    ids=["token_logprobs", "reverse_kl"])
def test_the_head_takes_half_a_gibibyte_where_logits_take_thirty_five_or_more(
        ours, most, naive, least, shapes):
    assert FLOOR < peak(ours, *shapes) < most and peak(naive, *shapes) > least


def head_of(function):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, requires_grad=True) for n in (256, 9000))
    targets = torch.zeros(256, dtype=torch.long)
    return lambda: function(hidden, weight, targets).sum().backward()


def update_of(checkpointing):
    model = tiny(hidden_size=256, num_hidden_layers=4, intermediate_size=768, vocab_size=1000,
                 max_position_embeddings=1024).train()
    if checkpointing:
        sod.enable_checkpointing(model)
    rollouts = [sod.Rollout(None, [5] * 16, [sod.Turn([7] * 240)]) for _ in range(4)]
    agent, batch = sod.Agent(sod.Config(), model, None, None, None), sod.collate(rollouts, "cpu")
    return lambda: sod.backpropagate(agent, batch)


@pytest.mark.parametrize("make, argument", [
    (head_of, sod.token_logprobs), (head_of, naive_logprobs), (update_of, False),
    (update_of, True)], ids=["head", "naive head", "update", "update, checkpointing"])
def test_counted_peak_is_the_allocators_own(make, argument):
    """On real tensors: the count beside what the CPU allocator reports to the profiler."""
    work = make(argument)
    with torch.profiler.profile(profile_memory=True) as profiler, PeakMemory() as memory:
        work()
    now = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    assert memory.peak == pytest.approx(highest, rel=0.05) and highest > 2e6


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
    loss = sod.policy_loss(logp, old, advantages, step_id > 0, num_tokens=B * T)
    kl = sod.reverse_kl(hidden, weight, empty(B, T, D), empty(vocabulary, D))
    (loss + kl.mean()).backward()
    return hidden.grad, weight.grad


def test_nothing_from_hidden_states_to_gradients_waits_for_the_device():
    """A meta tensor has no data: .item(), nonzero, a boolean index or a copy to the host raises."""
    assert all(g.device.type == "meta" for g in method_on("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        method_on("meta", num_steps=None)  # looks K up in step_id


class Waits(TorchDispatchMode):
    """Counts what has to know data, and so would wait for a GPU."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool
        self.total += by_mask or func in (torch.ops.aten._local_scalar_dense.default,
                                          torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_waits_three_times_for_the_device_and_its_loss_is_read_at_the_end(scored):
    """Twice for the number of sampled tokens, and once in the model's own forward pass."""
    agent, batch = scored
    found = {}
    for tokens in (10**6, 1):
        agent.config.micro_batch_tokens = tokens
        with Waits() as waits:
            sod.backpropagate(agent, batch)
        found[tokens] = waits.total
    more = len(batch.rollouts) - 1  # micro-batches
    assert found[1] - found[10**6] == 3 * more and found[10**6] == 3 + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA names every wait itself")
def test_cuda_sees_no_wait_either():
    torch.cuda.set_sync_debug_mode("error")
    try:
        method_on("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_every_line_of_gpu_py_runs_without_a_gpu(tmp_path, monkeypatch):
    import gpu
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--tiny"]) == 0
    assert {line["section"] for line in json_lines(tmp_path / "gpu.jsonl")} == set(gpu.SECTIONS)
