"""What only a GPU can tell: whether every hot path is right there, how fast it is, what it takes.

    python tests/gpu.py                   all sections, the most valuable one first
    python tests/gpu.py head rollouts     some of them, in this order; --help lists them
    python tests/gpu.py --tiny            toy sizes on the CPU: does every line of this file work?

Each result is one line of JSON, on the screen and at the end of gpu.jsonl (in the folder $OUT, else
in runs), written as soon as it is known: a call that is cut off loses nothing. Units end the names:
_s, _GiB (2^30 bytes), _GB (10^9 bytes). `targets` are what values should reach, `met` whether they
do. A measurement that fails becomes a line with its error, and the next one goes on; such a line,
and a missed target in `suite`, make the exit status 1.

Models have the shapes of Qwen3 and random weights, so nothing is downloaded, and a random model
ends no turn: it samples to its budget. What is compared takes turns, as in bench.py.
"""
import argparse
import contextlib
import copy
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench import Script, ratio, take_turns
from conftest import QWEN, ROOT, WORLD, Echo, gradient, scored_batch, small
from memory import GIB, QWEN3, V, random_qwen3, sod
from test_guards import (D_S, D_T, N, method_on, naive_logprobs, naive_reverse_kl, our_reverse_kl,
                         test_cuda_sees_no_wait_either)
from test_memory import failing
import tools  # noqa: E402  (memory.py has put its folder on the path)


@dataclass
class Sizes:
    """How large everything is: true sizes, unless `--tiny` is given."""
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    shape: dict = field(default_factory=lambda: QWEN3)  # name: hidden, layers, heads, MLP
    rows: int = V                         # of the vocabulary
    widths: tuple = (D_S, D_T)            # of student and teacher in the section head
    tokens: int = N                       # in the section head
    exact: tuple = (4096, 8200, 256)      # tokens, rows, width compared with fp64: three tiles
    middle: tuple = (512, 8, 8, 1536)     # shape of the model that runs out of memory in suite
    prompt: int = 1024                    # tokens of a rollout, as in the preset gpu
    response: int = 4096                  # tokens of a rollout, as in the preset gpu
    held: int = 3648                      # tokens before the sampled ones: their cache has room for
    sampled: int = 128                    #   5,472, which is what a whole rollout comes to
    rollouts: int = 64                    # sampled side by side
    group: int = 8                        # rollouts of one problem
    few: int = 24                         # rollouts to learn from: two micro-batches of 12
    words: tuple = (8, 65)                # filler words of a scripted turn: least, first too many
    lengths: tuple = (1024, 4096)         # tokens held before a decode pass
    copied: int = 2 ** 31                 # bytes copied to measure the bandwidth
    rounds: int = 5                       # measurements whose median counts


TOY = Sizes("cpu", torch.float32, dict.fromkeys(QWEN3, (64, 2, 2, 128)), rows=1024, widths=(32, 48),
            tokens=1280, exact=(300, 700, 16), middle=(64, 2, 2, 128), prompt=24, response=40,
            held=48, sampled=8, rollouts=8, group=2, few=4, words=(1, 4), lengths=(32,),
            copied=2 ** 20, rounds=1)

HEADS = {"token_logprobs": (sod.token_logprobs, naive_logprobs),
         "reverse_kl": (our_reverse_kl, naive_reverse_kl)}

# --- What the sections share --------------------------------------------------------------------


def clock():
    """Seconds of arithmetic: of the GPU where there is one, else of the CPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def let_go():
    """Give back the memory that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def extra_memory(sizes, work):
    """What work() returns, and the bytes it took at most on top of what there was (CPU: None)."""
    if sizes.device == "cpu":
        return work(), None
    let_go()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    return result, torch.cuda.max_memory_allocated() - before


def judged(values, targets):
    """The values, with what they should reach beside them, and whether they do.

    targets  {name of a value: ("<=" or ">=", bound)}; a value of None is not judged
    """
    met = {name: bool(values[name] <= bound if side == "<=" else values[name] >= bound)
           for name, (side, bound) in targets.items() if values[name] is not None}
    return {**values, "targets": {name: f"{side} {bound}"
                                  for name, (side, bound) in targets.items()}, "met": met}


def make_model(sizes, name):
    """A random Qwen3 of a shape in `sizes`, made where it computes."""
    with torch.device(sizes.device):
        return random_qwen3(sizes.shape[name], sizes.dtype, vocab_size=sizes.rows)


def load_tokenizer(sizes):
    """Qwen3's own tokenizer where it is at hand and fits the vocabulary, else the world's."""
    places = [QWEN, ROOT / "shared" / QWEN.name] if sizes.rows == V else []
    return sod.load_tokenizer(str(next((p for p in places if p.exists()), WORLD / "student")))


def random_ids(sizes, count, seed=0):
    return np.random.default_rng(seed).integers(0, sizes.rows, count).tolist()


def make_agent(sizes, student, offload="none"):
    """An Agent with a random student, a teacher of 4B and the settings of the preset gpu, in the
    middle of a run: AdamW has its moments."""
    config = sod.Config(**dict(sod.PRESETS["gpu"], offload=offload, overlong_buffer=0,
                               max_response=sizes.sampled, group_size=sizes.group,
                               prompts=sizes.rollouts // sizes.group))
    agent = sod.Agent(config, make_model(sizes, student).train(), None, load_tokenizer(sizes),
                      Echo())
    sod.enable_checkpointing(agent.student)
    agent.optimizer = sod.make_optimizer(agent)
    for master in agent.optimizer.masters:
        master.grad = torch.zeros_like(master)
    agent.optimizer.step(0.0)
    agent.teacher = make_model(sizes, "4B").requires_grad_(False)
    agent.teacher.to(sizes.device if offload == "none" else "cpu")
    agent.train_set = [(tools.Problem(f"question {i}", "42"), random_ids(sizes, sizes.held, i))
                      for i in range(config.prompts)]
    return agent


def made_rollouts(sizes, count):
    """Rollouts of the whole budget, half of them right: a turn, an answer of the tool, a turn."""
    half, answer, rows = sizes.response // 2, sizes.response // 16, []
    for i in range(count):
        ids = random_ids(sizes, sizes.prompt + sizes.response, i)
        first, second = ids[sizes.prompt:][:half], ids[sizes.prompt:][half:]
        turns = [sod.Turn(first[answer:], "", "ok", "42", first[:answer]), sod.Turn(second)]
        rows.append(sod.Rollout(tools.Problem("question", "42"), ids[:sizes.prompt], turns,
                                finish_reason="answer", correct=i % 2 == 0, reward=(-1.0) ** i))
    return rows


# --- suite: is it right on this device? -----------------------------------------------------------


def suite(sizes):
    """The parts of the tests that need a GPU: each target is a demand."""
    for dtype in (torch.float32, torch.bfloat16):
        yield f"ops in {str(dtype)[6:]} against fp64 on the CPU", partial(ops, sizes, dtype)
    yield "nothing from hidden states to gradients waits for the device", partial(waits, sizes)
    yield "both engines sample the same rollouts, fp32", partial(same_rollouts, sizes)
    yield "micro-batches and dtype, on one batch of the world", partial(same_gradient, sizes)
    yield "a resumed run beside one left alone", partial(resumed, sizes)
    yield "out of memory in back-propagation", partial(halved_gradient, sizes)
    yield "out of memory in sampling", partial(halved_sampling, sizes)


def ops(sizes, dtype):
    """Largest error of a value, in nats, and the relative errors of the student's gradients."""
    n, v, D = sizes.exact
    torch.manual_seed(0)
    inputs = [torch.randn(count, D).div_(D ** 0.25).to(dtype) for count in (n, v, n, v)]
    targets, g = torch.randint(0, v, (n,)), torch.randn(n, dtype=torch.float64)
    values = {}
    for name, (ours, naive) in HEADS.items():
        given = inputs[:2] if name == "token_logprobs" else inputs
        found, true = (value_and_gradients(function, given, kind, targets, g, device)
                       for function, kind, device in ((ours, dtype, sizes.device),
                                                      (naive, torch.float64, "cpu")))
        values[f"{name}_nats"] = float((found[0] - true[0]).abs().max())
        values[f"{name}_gradient"] = max(apart(a, b) for a, b in zip(found[1:], true[1:]))
    bounds = {"nats": 1e-4 if dtype == torch.float32 else 1e-3,
              "gradient": 1e-4 if dtype == torch.float32 else 1e-2}
    return judged(values, {name: ("<=", bounds[name.rpartition("_")[2]]) for name in values})


def value_and_gradients(function, inputs, dtype, targets, g, device):
    """[values, gradient of hidden states, gradient of the head], all in fp64 on the CPU."""
    inputs = [x.to(device, dtype).detach().requires_grad_() for x in inputs]
    out = function(*inputs, targets.to(device))
    (out * g.to(out)).sum().backward()
    return [x.detach().double().cpu() for x in (out, inputs[0].grad, inputs[1].grad)]


def apart(a, b):
    """How far two vectors are apart, relative to the second."""
    return float((a - b).norm() / b.norm())


def waits(sizes):
    """CUDA names every wait itself; without it, a meta tensor cannot be waited for."""
    method_on("meta") if sizes.device == "cpu" else test_cuda_sees_no_wait_either()
    return {"waits": 0}


def on_device(sizes, **changes):
    """Settings of the embedded world on this device. Its student writes sums and nothing else, so
    its programs may run where they cannot be contained."""
    return dict(device=sizes.device, tool_unsafe=True, **changes)


def same_rollouts(sizes):
    agent = sod.load_agent(small(**on_device(sizes, dtype="float32")))
    prompts = [p for p in agent.train_set[:sizes.rollouts // 4] for _ in range(4)]
    found, on_gpu = [], sizes.device == "cuda"
    with mock.patch.object(sod, "record", wraps=sod.record) as record:
        for agent.config.rollout_engine in sod.ENGINES:
            found.append(sod.sample_rollouts(agent, agent.student, prompts, (0, "gpu", 0)))
    equal = sum(a.ids == b.ids for a, b in zip(*found))
    return judged({"rollouts": len(prompts), "turns": sum(len(r.turns) for r in found[0]),
                   "share_equal": equal / len(prompts),
                   "graphs": record.call_count if on_gpu else None},
                  {"share_equal": (">=", 1), "graphs": (">=", 1)})


def same_gradient(sizes):
    """The gradient of all rollouts at once and of one by one, and the scores in bf16 and fp32."""
    agent, batch = scored_batch(**on_device(sizes, dtype="float32"))
    whole, one_by_one = (gradient(agent, batch, tokens) for tokens in (10 ** 6, 1))
    rounded = copy.deepcopy(agent.student).bfloat16()
    gap = (sod.score(agent, rounded, batch)[0] - batch.logp_s)[batch.step_id > 0].abs()
    return judged({"gradient_apart": apart(one_by_one, whole), "bf16_mean_nats": float(gap.mean()),
                   "bf16_most_nats": float(gap.max())},
                  {"gradient_apart": ("<=", 1e-4), "bf16_mean_nats": ("<=", 0.03)})


def resumed(sizes):
    """The second iteration after a save, and after a restore of it, in the default dtype."""
    agents = [sod.load_agent(small(**on_device(sizes, iterations=2))) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        next(sod.train(agents[0]))
        before = torch.cat([w.detach().flatten().clone() for w in agents[0].optimizer.masters])
        sod.save_run(agents[0], Path(folder))
        sod.restore(agents[1], Path(folder))
        batches = [next(sod.train(agent))[1] for agent in agents]
    plain, again = (torch.cat([w.detach().flatten() for w in agent.optimizer.masters])
                    for agent in agents)
    equal = np.mean([a.ids == b.ids for a, b in zip(*(batch.rollouts for batch in batches))])
    return judged({"share_equal": float(equal), "weights_apart": apart(again - before,
                                                                       plain - before)},
                  {"share_equal": (">=", 1), "weights_apart": ("<=", 0.05)})


def middle_agent(sizes, **changes):
    """A model of middle size in fp32 that learns nothing and samples greedily."""
    tokenizer = sod.load_tokenizer(str(WORLD / "student"))
    with torch.device(sizes.device):
        model = random_qwen3(sizes.middle, torch.float32, vocab_size=len(tokenizer))
    config = sod.Config(max_response=32, overlong_buffer=0, **changes)
    agent = sod.Agent(config, model, None, tokenizer, Echo())
    agent.optimizer = sod.make_optimizer(agent)
    return agent, replace(sizes, rows=len(tokenizer))


def halved_gradient(sizes):
    agent, sizes = middle_agent(sizes)
    rows = [sod.Rollout(None, ids[:16], [sod.Turn(ids[16:])])
            for ids in (random_ids(sizes, sizes.tokens // 40, i) for i in range(16))]
    batch = sod.collate(rows, sizes.device)
    work = lambda: gradient(agent, batch, batch.ids.numel())
    plain, extra = extra_memory(sizes, work)
    agent.optimizer.adamw.zero_grad()
    with little_memory(sizes, extra):
        found = work()
    return judged({"halvings": agent.halvings, "gradient_apart": apart(found, plain),
                   "micro_batch_tokens": sod.current_size(agent, "micro_batch_tokens")},
                  {"halvings": (">=", 1), "gradient_apart": ("<=", 1e-4)})


def halved_sampling(sizes):
    agent, sizes = middle_agent(sizes, rollout_batch=0)
    prompts = [(tools.Problem("question", "42"), random_ids(sizes, sizes.tokens // 40, i))
               for i in range(sizes.rollouts)]
    work = lambda: [r.ids for r in sod.sample_rollouts(agent, agent.student, prompts,
                                                       (0, "gpu", 0), 0, sod.TINY)]
    plain, extra = extra_memory(sizes, work)
    with little_memory(sizes, extra):
        found = work()
    equal = np.mean([a == b for a, b in zip(found, plain)])
    return judged({"halvings": agent.halvings, "share_equal": float(equal),
                   "rollout_batch": sod.current_size(agent, "rollout_batch")},
                  {"halvings": (">=", 1), "share_equal": (">=", 1)})


@contextlib.contextmanager
def little_memory(sizes, extra):
    """Leave work that took `extra` bytes 60% of them, so that it must halve its size. A CPU swaps
    before it refuses, so there the first attempt is told that memory has run out."""
    if sizes.device == "cpu":
        fail = {name: failing(getattr(sod, name), lambda n, *_: n == 1)
                for name in ("hidden_states", "decode_chunk")}
        with mock.patch.multiple(sod, **fail):
            yield
    else:
        let_go()
        left = torch.cuda.mem_get_info()[0] - int(0.6 * extra)
        block = torch.empty(left, dtype=torch.uint8, device="cuda")
        yield
        del block


# --- head: time and memory of token_logprobs and reverse_kl ---------------------------------------


def head(sizes):
    """token_logprobs and reverse_kl, forward and backward, beside the naive way."""
    for name in HEADS:
        yield (f"{name}, {sizes.tokens:,} x {sizes.rows:,}, {str(sizes.dtype)[6:]}, beside the "
               "naive way and the matrix products", partial(beside_naive, sizes, name))


def head_inputs(sizes, name, tokens):
    """[hidden states, head, of the student, and for reverse_kl of the teacher; targets]."""
    torch.manual_seed(0)
    shapes = [(n, D) for D in sizes.widths for n in (tokens, sizes.rows)]
    chosen = shapes if name == "reverse_kl" else shapes[:2]
    inputs = [torch.randn(shape, device=sizes.device, dtype=sizes.dtype).div_(shape[1] ** 0.25)
              .requires_grad_() for shape in chosen]
    return [*inputs, torch.randint(0, sizes.rows, (tokens,), device=sizes.device)]


def both_ways(function, inputs):
    """Forward and backward."""
    for x in inputs[:-1]:
        x.grad = None
    function(*inputs).sum().backward()


@torch.no_grad()
def products(*inputs):
    """The matrix products of forward and backward, where tiles are computed twice, and no more."""
    hidden, weight = inputs[:2]
    for start in range(0, len(weight), 8192):
        tile = slice(start, start + 8192)
        for h, w in zip(inputs[:-1:2], inputs[1:-1:2]):
            for _ in ("forward", "backward"):
                dz = h @ w[tile].T
        torch.mm(dz, weight[tile])
        torch.mm(dz.T, hidden)


def peak_gb(sizes, function, inputs):
    """Memory of forward and backward on top of the inputs, gradients included (CPU: None)."""
    for x in inputs[:-1]:
        x.grad = None
    _, extra = extra_memory(sizes, lambda: both_ways(function, inputs))
    return extra and extra / 1e9


def beside_naive(sizes, name):
    """The naive way takes fewer tokens where all do not fit; its time is then scaled to them."""
    ours, naive = HEADS[name]
    inputs = head_inputs(sizes, name, sizes.tokens)
    found = {"peak_GB": peak_gb(sizes, ours, inputs)}
    tokens, naive_inputs, found["naive_peak_GB"] = largest_naive(sizes, name)
    seconds = take_turns({"ours": lambda: both_ways(ours, inputs),
                          "naive": lambda: both_ways(naive, naive_inputs),
                          "products": lambda: products(*inputs)}, sizes.rounds, clock)
    found |= {f"{side}_s": float(np.median(times)) for side, times in seconds.items()}
    found |= {"naive_tokens": tokens, "over_products": ratio(seconds["ours"], seconds["products"]),
              "over_naive": ratio(seconds["ours"], seconds["naive"]) * tokens / sizes.tokens}
    return judged(found, {"over_naive": ("<=", 0.75), "over_products": ("<=", 1.4),
                          "peak_GB": ("<=", 0.6)})


def largest_naive(sizes, name):
    """(tokens, inputs, peak in GB) of the naive way: all tokens, or half of them again and again
    until they fit."""
    tokens = sizes.tokens
    while True:
        let_go()
        inputs = head_inputs(sizes, name, tokens)
        try:
            return tokens, inputs, peak_gb(sizes, HEADS[name][1], inputs)
        except RuntimeError as error:
            if not sod.out_of_memory(error):
                raise
        tokens //= 2


# --- rollouts: engines, and a decode pass beside its bytes ----------------------------------------


def rollouts(sizes):
    """Both engines, and a decode pass beside the bytes that it must read."""
    for name in ("0.6B", "1.7B"):
        yield f"{name}: {sizes.rollouts} rollouts of 1 to 6 turns", partial(engines, sizes, name)
        for length in sizes.lengths:
            yield (f"{name}: a decode pass of {sizes.rollouts} rollouts that hold {length:,} "
                   "tokens each", partial(decode_pass, sizes, name, length))


def engines(sizes, name):
    """Sampled tokens a second, by the clock on the wall, of rollouts that are known beforehand."""
    model, tokenizer, rng = make_model(sizes, name), load_tokenizer(sizes), np.random.default_rng(0)
    turns = [rng.integers(*sizes.words, rng.integers(1, 7)).tolist() for _ in range(sizes.rollouts)]
    script, first = (Script(tokenizer, t, sizes.rows) for t in (turns, [[1, 1]] * sizes.rollouts))
    speed = {}
    for engine in ("continuous", "generate"):
        first.play(model, engine)  # warms up
        started = time.perf_counter()
        found = script.play(model, engine)
        speed[engine] = script.tokens / (time.perf_counter() - started)
        assert sum(k > 0 for r in found for k in r.step_id) == script.tokens, "not as scripted"
    values = {f"{engine}_tokens_per_s": each for engine, each in speed.items()}
    over = speed["continuous"] / speed["generate"]
    return judged({"tokens": script.tokens, "over_generate": over, **values},
                  {"over_generate": (">=", 10)})


@torch.inference_mode()
def decode_pass(sizes, name, length):
    """Seconds of a pass, beside those in which its bytes can be read: weights, keys and values."""
    model, tokens = make_model(sizes, name), sod.Config.decode_chunk
    batch, n = sod.ContinuousBatch(model, sizes.rollouts), sizes.rollouts
    batch.rollouts = [sod.Rollout(None, random_ids(sizes, length, i), [sod.Turn()],
                                  uniforms=np.full(tokens, 0.5)) for i in range(n)]
    batch.prefill(n, 0)
    chunk = lambda: batch.decode(n, tokens, sod.sample_next_token)
    pass_s = lambda: float(np.median(take_turns({"": chunk}, sizes.rounds, clock)[""])) / tokens
    found = {"pass_s": pass_s()}
    batch.graphs = None  # as on a CPU: kernel by kernel
    found["without_graphs_s"] = pass_s()
    cells = sum(x.shape[1] * x.shape[3] for layer in batch.cache.layers
                for x in (layer.keys, layer.values))  # numbers for one token of one rollout
    read = (sod.count_parameters(model) + cells * n * length) * sizes.dtype.itemsize
    found |= {"read_GB": read / 1e9, "bandwidth_GB_per_s": bandwidth(sizes) / 1e9}
    floor = found["read_GB"] / found["bandwidth_GB_per_s"]
    return judged({**found, "floor_s": floor, "over_floor": found["pass_s"] / floor},
                  {"over_floor": ("<=", 1.4)})


def bandwidth(sizes):
    """Bytes a second, read and written, of a large copy."""
    a, b = (torch.zeros(sizes.copied, dtype=torch.uint8, device=sizes.device) for _ in range(2))
    seconds = take_turns({"copy": lambda: [b.copy_(a) for _ in range(10)]}, sizes.rounds, clock)
    return 20 * sizes.copied / float(np.median(seconds["copy"]))


# --- iteration, methods, fits: all of SOD at the budget of the preset gpu -------------------------


@contextlib.contextmanager
def watching(sizes, agent, learnt):
    """Yields {part_s, part_GiB}: seconds and memory of each part of an iteration, filled while it
    goes on. It learns from the rollouts `learnt`, and not from those that it samples."""
    costs = {}

    def watched(work, name, result=lambda out: out):
        def run(*args):
            part = "teacher" if agent.teacher in args[1:] else name
            out, spent, peak = with_costs(sizes, partial(work, *args))
            costs[f"{part}_s"] = costs.get(f"{part}_s", 0) + spent
            costs[f"{part}_GiB"] = max(costs.get(f"{part}_GiB") or 0, peak) or None
            return result(out)
        return run
    step = watched(sod.Optimizer.step, "adamw")
    with mock.patch.multiple(
            sod, score=watched(sod.score, "score"),
            backpropagate=watched(sod.backpropagate, "backpropagate"),
            sample_rollouts=watched(sod.sample_rollouts, "sampling", lambda _: learnt)), \
            mock.patch.object(sod.Optimizer, "step", step):
        yield costs


def with_costs(sizes, work):
    """What work() returns, its seconds, and the most memory there was meanwhile in GiB (CPU: 0)."""
    if sizes.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    out = work()
    if sizes.device == "cpu":
        return out, time.perf_counter() - started, 0
    torch.cuda.synchronize()
    return out, time.perf_counter() - started, torch.cuda.max_memory_allocated() / GIB


def one_iteration(sizes, student, offload, count):
    """Seconds and memory of an iteration that learns from `count` rollouts of the whole budget.

    Sampling is measured on `sampled` tokens after the `held` ones, for all rollouts side by side.
    """
    agent = make_agent(sizes, student, offload)
    let_go()
    rest = torch.cuda.memory_allocated() / GIB if sizes.device == "cuda" else None
    with watching(sizes, agent, made_rollouts(sizes, count)) as costs:
        (m, _), whole, _ = with_costs(sizes, lambda: sod.train_step(agent, 1))
    return {**costs, "whole_s": whole, "at_rest_GiB": rest, "rollouts_learnt": count,
            "tokens_each": sizes.prompt + sizes.response, "sampled_each": sizes.sampled,
            "sampled_of": sizes.response, "held_each": sizes.held, "halvings": agent.halvings,
            "rollout_batch": min(sod.current_size(agent, "rollout_batch"), sizes.rollouts),
            "micro_batch_tokens": sod.current_size(agent, "micro_batch_tokens"),
            "updates_not_taken": m["skipped_updates"]}


def iteration(sizes):
    """A whole iteration of SOD with a 4B teacher: seconds and memory of each part."""
    for name in ("0.6B", "1.7B"):
        yield (f"{name}, {sizes.rollouts} rollouts of the budget, "
               f"{sizes.sampled / sizes.response:.3g} of its sampling",
               partial(one_iteration, sizes, name, "none", sizes.rollouts))


def offload(sizes):
    """The same with fewer rollouts, and the idle model or optimiser on the CPU."""
    short = replace(sizes, sampled=max(sizes.sampled // 4, 1))
    for where in ("all", "teacher"):
        for name in ("1.7B", "0.6B"):
            yield (f"{name}, --offload {where}, {sizes.few} rollouts of the budget",
                   partial(one_iteration, short, name, where, sizes.few))


def methods(sizes):
    """Scoring and updates of SOD over those of OPD, on the same rollouts."""
    yield "scoring and updates, 0.6B with a 4B teacher", partial(sod_over_opd, sizes)


def sod_over_opd(sizes):
    agent, found = make_agent(sizes, "0.6B"), made_rollouts(sizes, sizes.group)

    def learn(method):
        agent.config.method = method
        with mock.patch.object(sod, "sample_rollouts", lambda *_: found):
            sod.train_step(agent, 1)
    seconds = take_turns({m: partial(learn, m) for m in ("sod", "opd")}, 3, clock)
    return judged({"rollouts": len(found), "over_opd": ratio(seconds["sod"], seconds["opd"]),
                   **{f"{m}_s": float(np.median(times)) for m, times in seconds.items()}},
                  {"over_opd": ("<=", 1.01)})


def fits(sizes):
    """What a card of 24, 40 or 80 GB holds: offload, rollout_batch, micro_batch_tokens."""
    short = replace(sizes, sampled=max(sizes.sampled // 8, 1))
    for card, name in ((24, "0.6B"), (40, "1.7B"), (80, "1.7B"), (24, "1.7B"), (40, "0.6B")):
        yield f"{name} in {card} GB", partial(largest_that_fits, short, name, card)


def largest_that_fits(sizes, name, card):
    """The first --offload that fits, and the sizes to which the run has halved itself there."""
    refused = {}
    with card_of(sizes, card):
        for offload in ("none", "teacher", "all"):
            try:
                return {"offload": offload, "refused": refused,
                        **one_iteration(sizes, name, offload, sizes.few)}
            except (RuntimeError, ValueError) as error:
                if not sod.out_of_memory(error):
                    raise
                refused[offload] = f"{error}".partition(".")[0]
            let_go()
    raise ValueError(f"out of memory with every --offload: {refused}")


@contextlib.contextmanager
def card_of(sizes, size):
    """Memory as on a card of so many GiB, one of which CUDA itself takes."""
    if sizes.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min((size - 1) * GIB / total, 1.0))
    try:
        yield
    finally:
        if sizes.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


# --- The command ----------------------------------------------------------------------------------

SECTIONS = {f.__name__: f for f in (head, suite, rollouts, iteration, methods, fits, offload)}


def measured(work):
    """The values of a measurement, or the first line of its error. It prints to stderr."""
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            values = work()
    except Exception as error:
        traceback.print_exc()
        values = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    let_go()  # after the except, whose traceback held every tensor
    return {**values, "measured_in_s": time.perf_counter() - started}


def write_line(file, values):
    """A line of JSON, to the file and to the screen, at once; four digits of each number."""
    line = json.dumps(rounded(values))
    print(line, flush=True)
    file.write(line + "\n")
    file.flush()


def rounded(values):
    return {name: rounded(value) if isinstance(value, dict) else
            float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in values.items()}


def measure_all(names, sizes, budget, file):
    """The exit status: 1 where a measurement failed. None begins after `budget` seconds."""
    machine = {"card": torch.cuda.get_device_name() if sizes.device == "cuda" else "cpu",
               "torch": torch.__version__, "transformers": sod.VERSIONS["transformers"]}
    started, threads, failed, left_out = time.monotonic(), torch.get_num_threads(), False, []
    for name in names:
        for what, work in SECTIONS[name](sizes):
            if time.monotonic() - started > budget:
                left_out.append(f"{name}: {what}")
                continue
            torch.set_num_threads(threads)  # the embedded world turns them down
            line = measured(work)
            failed |= "error" in line or name == "suite" and not all(line.get("met", {}).values())
            write_line(file, {"section": name, "what": what, **line, **machine})
    if left_out:
        write_line(file, {"section": "length", "what": f"left out after {budget:g} s",
                          "left_out": left_out, **machine})
    return int(failed)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=", ".join(f"{n}: {f.__doc__}" for n, f in SECTIONS.items()))
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--budget", type=float, default=520, metavar="SECONDS",
                        help="begin no measurement after so many seconds [520]")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.sections if name not in SECTIONS]:
        parser.error(f"there is no section {unknown[0]}; choose from {', '.join(SECTIONS)}")
    if not given.tiny and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU; --tiny tries every line on the CPU", file=sys.stderr)
        return 1
    folder = Path(os.environ.get("OUT") or "runs")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gpu.jsonl", "a") as file:
        return measure_all(given.sections or list(SECTIONS), TOY if given.tiny else Sizes(),
                           given.budget, file)


if __name__ == "__main__":
    sys.exit(main())
