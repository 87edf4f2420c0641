"""The memory plan against what torch's CPU allocator hands out."""
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import sod_mini as sod


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def bytes_at_peak(function):
    """The most bytes alive at once above those at the start, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def make(dtype, D=64, layers=4, heads=4, kv=2, F=192, V=1000):
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=32, intermediate_size=F,
        tie_word_embeddings=True)).to(dtype)


def batch(rows, length, V, prompt=16):
    """Rollouts of random ids that fill their budget, scored by nobody."""
    generator = random.Random(0)
    rollouts = [sod.Rollout(None, [generator.randrange(3, V) for _ in range(length)],
                            [-1] * prompt + [0] * (length - prompt), prompt, turns=[""],
                            outcomes=[""]) for _ in range(rows)]
    return rollouts


def settings(rows, length, **changes):
    return sod.Config(**{**dict(
        max_prompt=16, max_response=length - 16, prompts_per_step=rows, group_size=1,
        updates_per_step=2, eval_data="", micro_batch_tokens=rows * length), **changes})


def working(plan, phases):
    """Bytes of the plan that come and go within these phases."""
    return max(sum(plan[part][phase] for part in ("KV cache", "activations", "logits"))
               for phase in phases)


SHAPES = [dict(), dict(layers=8), dict(D=256, F=768, heads=8, kv=4, layers=6), dict(V=8000),
          dict(D=128, F=512, V=8000, length=1024), dict(F=768, heads=8),
          dict(D=32, F=64, heads=2, kv=1, layers=2, V=20_000, length=512, rows=8)]


def scored(rollouts, fresh=False):
    B, T = len(rollouts), len(rollouts[0].ids)
    zeros = torch.zeros(B, T)
    return sod.Scored(rollouts, sod.pad([r.step_id for r in rollouts], -1, "cpu"),
                      torch.zeros(B, 1, dtype=torch.bool), torch.zeros(B), zeros - 5, zeros,
                      zeros - 5, zeros, torch.zeros(B, 1), torch.ones(B, 1), torch.randn(B, T),
                      fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_scoring_and_update_take_what_the_plan_says(shape, again, dtype):
    shape = dict(shape)
    rows, length = shape.pop("rows", 4), shape.pop("length", 256)
    c = settings(rows, length, gradient_checkpointing=again)
    model = make(dtype, **shape).train()
    rollouts = batch(rows, length, shape.get("V", 1000))
    plan = sod.memory_plan(c, sod.Shape.of(model), None, dtype.itemsize)
    assert working(plan, (1, 2)) == pytest.approx(
        bytes_at_peak(lambda: sod.score(model, rollouts, c)), rel=0.12)
    if again:
        sod.enable_checkpointing(model)
    agent = sod.Agent(c, model, None, None, None, optimizer=sod.Optimizer(model, 1e-4, c))
    agent.optimizer.grads = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    agent.optimizer.step = lambda scale: 0.0
    taken = bytes_at_peak(lambda: sod.update(agent, scored(rollouts), list(range(rows)), c))
    heads = sum(plan["gradient"][3:]) // 2 - 4 * sod.Shape.of(model).weights
    assert working(plan, (3, 4)) + heads == pytest.approx(taken, rel=0.12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradient_and_state_take_what_the_plan_says(dtype):
    kept, c = [], settings(4, 256)

    def build():
        model = make(dtype)
        optimizer = sod.Optimizer(model, 1e-4, c)
        optimizer.grads = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
        kept.append((model, optimizer))
    build()  # warm
    shape = sod.Shape.of(kept[0][0])
    plan = sod.memory_plan(c, shape, None, dtype.itemsize)
    model, optimizer = kept[0]
    tensors = [*model.parameters(), *optimizer.grads, *optimizer.m, *optimizer.v,
               *filter(lambda x: x is not None, optimizer.low)]
    held = sum(x.numel() * x.element_size() for x in tensors)
    assert held == shape.weights * 16
    assert plan["student"][0] + plan["AdamW"][0] + 4 * shape.weights == held


def sample_to_the_budget(engine, model, rollouts, c):
    """What an engine does with rollouts that never end their turn, from half the budget on."""
    pick, n = partial(sod.pick_tokens, top_p=0.9), len(rollouts)
    if engine == "generate":
        tokens = c.max_response - rollouts[0].response_len
        return sod.sample_tokens(model, NoEnd, rollouts, tokens, pick)
    slots = sod.Slots(model, n)
    slots.seats = rollouts
    while rollouts[0].response_len + c.look <= c.max_response:
        slots.catch_up(n, c.micro_batch_tokens)
        for r, ids in zip(rollouts, slots.sample(n, c.look, pick)):
            r.extend(ids, 0)
        slots.fed = [len(r.ids) - 1 for r in rollouts]


class NoEnd:
    eos_token_id, pad_token_id = 10**9, 0


@pytest.mark.parametrize("engine", ["generate", "slots"])
@pytest.mark.parametrize("rows, length, shape", [
    (4, 1024, {}), (16, 256, {}), (16, 256, dict(D=256, F=768)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (8, 512, dict(layers=16)), (32, 128, dict(V=20_000)), (8, 512, dict(heads=8))))])
def test_sampling_takes_no_more_than_the_plan_says(engine, rows, length, shape):
    model = make(torch.float32, **shape).eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    c = settings(rows, length, rollout_engine=engine, micro_batch_tokens=length, chunk=8)
    planned = working(sod.memory_plan(c, sod.Shape.of(model), None, 4), (0,))
    rollouts = batch(rows, length - 64, shape.get("V", 1000))
    for i, r in enumerate(rollouts[1:], start=1):
        del r.ids[-i:], r.step_id[-i:]
    for r in rollouts:
        r.noise = torch.rand(length, dtype=torch.float64).numpy()
    taken = bytes_at_peak(lambda: sample_to_the_budget(engine, model, rollouts, c))
    assert taken <= planned <= 2 * taken
