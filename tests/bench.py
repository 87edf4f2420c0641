"""Every hot path beside its peers in one run: medians, ratios, and the ratio each must reach.

    python tests/bench.py                 all sections
    python tests/bench.py memory head     some of them; --help lists them

Where a CUDA GPU is at hand each section measures it too. Peers from TRL appear where TRL can be
imported (pip install trl==1.16.0); the project does not need it.

How it is measured. What is compared takes turns, so that both sides meet the same machine; ratios
are medians of the ratios of neighbours. Torch has one thread. Arithmetic on the CPU is timed by the
CPU seconds of the process, which other programs change less than the clock on the wall; rollouts
and whole iterations, where tools are waited for, by the wall. Peaks of memory are counted on
tensors without data, see tests/memory.py.
"""
import argparse
import contextlib
import gc
import math
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from memory import GIB, QWEN3, V, peak_of_iteration, random_qwen3, sod, without_data
import tools  # noqa: E402  (memory.py has put its folder on the path)

CUDA = torch.cuda.is_available()
N = 20_480  # tokens of the paper's longest response


@dataclass
class Row:
    """A line of the table."""
    what: str
    ours: str
    against: str
    ratio: float = math.nan  # how much better or worse we are, in the sense that `target` says
    target: str = ""         # such as ">= 50"; "" where nothing was promised

    def __str__(self):
        ratio = "" if math.isnan(self.ratio) else f"{self.ratio:.3g}"
        met = ""
        if self.target and not math.isnan(self.ratio):
            sign, bound = self.target.split()
            holds = self.ratio >= float(bound) if sign == ">=" else self.ratio <= float(bound)
            met = "yes" if holds else "NO"
        return f"| {self.what} | {self.ours} | {self.against} | {ratio} | {self.target} | {met} |"


def no_gpu(what):
    return Row(f"{what}, GPU", "no GPU: not measured", "")


# --- Measuring --------------------------------------------------------------------------------


def take_turns(works, rounds, clock=time.process_time):
    """{name: (rounds,) seconds} of functions that run one after the other, again and again."""
    seconds = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = clock()
            work()
            seconds[name].append(clock() - started)
    return {name: np.array(times[1:]) for name, times in seconds.items()}  # the first warms up


def gpu_clock():
    torch.cuda.synchronize()
    return time.perf_counter()


def ratio(a, b):
    return float(np.median(a / b))


def show(seconds):
    middle = float(np.median(seconds))
    return f"{middle:.2f} s" if middle >= 1 else f"{1000 * middle:.3g} ms"


def fake_peak(work, *shapes, dtype=torch.bfloat16, gpu=True):
    """GiB that `work` and its backward take at their peak, inputs not counted."""
    with without_data(gpu=gpu) as memory:
        inputs = [torch.empty(s, dtype=dtype, requires_grad=True) for s in shapes]
        targets, before = torch.zeros(shapes[0][0], dtype=torch.long), memory.now
        work(*inputs, targets).sum().backward()
    return (memory.peak - before) / GIB


def real_peak(work, *shapes):
    """The same from CUDA's allocator."""
    inputs = [(torch.randn(s, device="cuda", dtype=torch.bfloat16) / 32).requires_grad_()
              for s in shapes]
    targets = torch.zeros(shapes[0][0], dtype=torch.long, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work(*inputs, targets).sum().backward()
    return (torch.cuda.max_memory_allocated() - before) / GIB


# --- Head: memory and time of token_logprobs and reverse_kl ------------------------------------


def naive_logprobs(hidden, weight, targets):
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def naive_reverse_kl(hidden_s, weight_s, hidden_t, weight_t, _=None):
    log_p, log_q = ((h @ w.T).float().log_softmax(-1)
                    for h, w in ((hidden_s, weight_s), (hidden_t.detach(), weight_t.detach())))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def our_reverse_kl(hidden_s, weight_s, hidden_t, weight_t, _=None):
    return sod.reverse_kl(hidden_s, weight_s, hidden_t.detach(), weight_t.detach())


def trl_kernels():
    """TRL's counterparts of both functions, or None: (logprobs, reverse KL, modules)."""
    try:
        from trl.kernels import chunked_divergence, chunked_logprob
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width
    except ImportError:
        return None

    def logprobs(hidden, weight, targets):
        return chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, width, None, 1.0, ())[0]

    def kl(hidden_s, weight_s, hidden_t, weight_t, _=None):
        return chunked_divergence.ChunkedDivergenceFunction.apply(
            hidden_s, weight_s, None, hidden_t.detach(), weight_t.detach(), None, 1.0)[0]
    return logprobs, kl, (chunked_logprob, chunked_divergence)


@contextlib.contextmanager
def with_triton(modules):
    """TRL's memory as on a GPU: its Triton kernels and its products take no memory at all there."""
    nothing, nothing_new = (lambda *a, **k: None), (lambda total, a, b: total.add_(0))
    names = ("_forward_tile", "_backward_tile", "_stats_tile", "_project")
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name in names:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, nothing))
            stack.enter_context(mock.patch.object(module, "_addmm_fp32", nothing_new))
        yield


def memory():
    """Extra memory of forward and backward at full size, inputs not counted."""
    kernels, D, D_t = trl_kernels(), QWEN3["0.6B"][0], QWEN3["4B"][0]
    for name, ours, naive, trl, shapes, bound in (
            ("token_logprobs", sod.token_logprobs, naive_logprobs, 0, ((N, D), (V, D)), 2.4),
            ("reverse_kl", our_reverse_kl, naive_reverse_kl, 1,
             ((N, D), (V, D), (N, D_t), (V, D_t)), 3)):
        what = f"{name}, extra memory, {N:,} x {V:,} x {D}, bf16"
        mine, plain = fake_peak(ours, *shapes), fake_peak(naive, *shapes)
        floor = 2 * (N + V) * D / GIB
        yield Row(what, f"{mine:.2f} GiB (gradients alone {floor:.2f})", f"{plain:.1f} GiB, naive",
                  plain / mine, ">= 50")
        if kernels:
            with with_triton(kernels[2]):
                theirs = fake_peak(kernels[trl], *shapes)
            yield Row(what, f"{mine:.2f} GiB", f"{theirs:.2f} GiB, TRL with its GPU kernels",
                      theirs / mine, f">= {bound}")
            theirs = fake_peak(kernels[trl], *shapes, gpu=False)
            yield Row(what, f"{mine:.2f} GiB", f"{theirs:.2f} GiB, TRL without them", theirs / mine)
        if CUDA:
            seen = real_peak(ours, *shapes)
            yield Row(f"{what}, measured by CUDA over counted", f"{seen:.2f} GiB",
                      f"{mine:.2f} GiB", seen / mine, "<= 1.1")  # cuBLAS has its workspace
        else:
            yield no_gpu(what)


def products(hidden, weight):
    """The matrix products that are left without the softmax: logits, twice, and both gradients."""
    p = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)

    def work():
        with torch.no_grad():
            for _ in range(2):
                torch.mm(hidden, weight.T, out=p)
            return p @ weight, p.T @ hidden
    return work


def head_times(n, v, d, dtype, device, clock, rounds):
    """Rows of the time of token_logprobs, forward and backward, beside its peers."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(s, device=device, dtype=dtype).div_(d ** 0.25).requires_grad_()
                      for s in ((n, d), (v, d)))
    targets, g = torch.randint(0, v, (n,), device=device), torch.randn(n, device=device)

    def both_ways(function):
        def work():
            hidden.grad = weight.grad = None
            (function(hidden, weight, targets) * g).sum().backward()
        return work
    kernels = trl_kernels()
    peers = {"ours": sod.token_logprobs, "naive": naive_logprobs}
    peers |= {"TRL": kernels[0]} if kernels else {}
    seconds = take_turns({name: both_ways(f) for name, f in peers.items()}
                         | {"floor": products(hidden, weight)}, rounds, clock)
    what = f"token_logprobs, time, {n:,} x {v:,} x {d}, {str(dtype)[6:]}, {device}"
    ours = seconds["ours"]
    yield Row(what, show(ours), f"{show(seconds['naive'])}, naive", ratio(ours, seconds["naive"]),
              "<= 1.2" if device == "cpu" else "<= 1.0")
    yield Row(f"{what}, share of the floor", show(ours),
              f"{show(seconds['floor'])}, its 4 products alone",
              ratio(seconds["floor"], ours), ">= 0.75")
    if kernels:
        yield Row(what, show(ours), f"{show(seconds['TRL'])}, TRL", ratio(ours, seconds["TRL"]))


def head():
    """Time of token_logprobs, forward and backward."""
    yield from head_times(512, V // 4, 1024, torch.float32, "cpu", time.process_time, 5)
    if CUDA:
        yield from head_times(8192, V, 1024, torch.bfloat16, "cuda", gpu_clock, 9)
    else:
        yield no_gpu("token_logprobs, time")


# --- Rollouts ---------------------------------------------------------------------------------


class LateTool:
    """A tool whose answers take at least `seconds(code)`; with text it runs nothing and says it."""

    def __init__(self, tool, seconds, text=""):
        self.tool, self.seconds, self.text = tool, seconds, text
        self.pool = ThreadPoolExecutor(64)

    def submit(self, call, place=()):
        until = time.perf_counter() + self.seconds(call.code)
        run = (tools.finished(tools.Observation(self.text, "ok", 0.0)) if self.text else
               self.tool.submit(call, place))
        return self.pool.submit(self.late, run, until) if until > time.perf_counter() else run

    def late(self, run, until):
        seen = run.result()
        time.sleep(max(until - time.perf_counter(), 0))
        return seen


def one_in_sixteen(code):
    """Seconds of a call: 1 for one program in sixteen, 20 ms for the others."""
    return 1.0 if zlib.crc32(code.encode()) % 16 == 0 else 0.02


class Script:
    """Rollouts that are known beforehand, so that any model takes as many turns as we like.

    The engines do all their work; only which token comes next is not left to the model. Noise is
    what they pick tokens by, and here it is the number of the token.
    """

    def __init__(self, tokenizer, turns, vocabulary):
        """turns: for each rollout the number of filler words of each of its turns."""
        self.tokenizer, self.vocabulary, self.tokens = tokenizer, vocabulary, 0
        problem = tools.Problem("What is 6 * 7?", "42")
        self.prompts = [(problem, sod.encode_prompt(tokenizer, problem))] * len(turns)
        answer, rows = sod.encode_tool_turn(tokenizer, ANSWER), []
        for i, words in enumerate(turns):
            rows.append([])
            for k, n in enumerate(words):
                call = tools.render_tool_call(f"{i} + {k}")
                text = "7 " * n + (call if k < len(words) - 1 else "\\boxed{42}")
                ids = sod.encode(tokenizer, text + tokenizer.eos_token)
                self.tokens += len(ids)
                rows[-1] += ids + answer
        self.noise = np.zeros((len(rows), max(map(len, rows)) + 1))
        for noise, ids in zip(self.noise, rows):
            noise[:len(ids)] = (np.array(ids) + 0.5) / vocabulary

    def play(self, model, engine, seconds=lambda code: 0.0, **changes):
        """Seconds on the wall of all rollouts by one of the engines."""
        config = sod.Config(rollout_engine=engine, rollout_batch=64, silent_rate=0.0, overlong=0,
                            max_response=self.noise.shape[1], tool_wait=0.0, **changes)
        agent = sod.Agent(config, model, None, self.tokenizer, LateTool(None, seconds, ANSWER))

        def pick(logits, noise, temperature, top_p):
            PICK(logits, noise, temperature, top_p)  # takes the time it takes
            return (noise * self.vocabulary).long()
        numbers = lambda *place: SimpleNamespace(random=lambda n: self.noise[place[-1]])
        with mock.patch.multiple(sod, pick_tokens=pick, random_numbers=numbers):
            started = time.perf_counter()
            rollouts = sod.sample_rollouts(agent, model, self.prompts, (0, "script", 0))
        taken = time.perf_counter() - started
        assert all(r.right for r in rollouts) and self.tokens == sum(
            k >= 0 for r in rollouts for k in r.step_id), "not what the script says"
        return taken


ANSWER, PICK = "1 2 3 4 5 6 7 8 9 10", sod.pick_tokens


def ragged(rollouts, longest, seed=0):
    """1 to 6 turns each, of 2 to `longest` words each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, longest + 1, rng.integers(1, 7)).tolist() for _ in range(rollouts)]


def rollouts():
    """64 ragged trajectories of several turns: the slots engine beside per-turn generate."""
    agent = sod.load_agent(sod.Config(device="cpu", rollout_batch=64, tool_wait=0.0,
                                      silent_rate=0.0))
    prompts = [p for p in agent.practice[:16] for _ in range(4)]
    own, late = agent.tool, LateTool(agent.tool, one_in_sixteen)

    def tokens_per_second(engine, tool):
        agent.config.rollout_engine, agent.tool = engine, tool
        started = time.perf_counter()
        found = sod.sample_rollouts(agent, agent.student, prompts, (0, "bench", 0))
        taken = time.perf_counter() - started
        return sum(k >= 0 for r in found for k in r.step_id) / taken
    for tool, of, target in ((late, "slow tools", ">= 1.6"), (own, "its own tool", "")):
        yield engines(f"64 rollouts, embedded student, {of}", target,
                      lambda engine: tokens_per_second(engine, tool))
    tokenizer = agent.tokenizer
    model = random_qwen3((512, 10, 8, 1536), len(tokenizer), "cpu", torch.float32, head_dim=64)
    yield scripted("a random Qwen3 of 31M", Script(tokenizer, ragged(64, 12), 512), model, ">= 1.3")
    if not CUDA:
        yield no_gpu("64 rollouts, 0.6B, and its decode step")
        return
    model = random_qwen3("0.6B", V, "cuda", torch.bfloat16)
    yield scripted("0.6B, GPU", Script(tokenizer, ragged(64, 300), V), model, ">= 6")
    yield decode_step(tokenizer, model)


def engines(what, target, tokens_per_second, rounds=3):
    speed = {"slots": [], "generate": []}
    for _ in range(rounds + 1):
        for engine in speed:
            speed[engine].append(tokens_per_second(engine))
    slots, generate = (np.array(found[1:]) for found in speed.values())
    return Row(what, f"{np.median(slots):,.0f} tok/s, slots",
               f"{np.median(generate):,.0f} tok/s, generate", ratio(slots, generate), target)


def scripted(name, script, model, target):
    return engines(f"64 rollouts of 1-6 turns, {name}, slow tools", target, lambda engine:
                   script.tokens / script.play(model, engine, one_in_sixteen), rounds=2)


def decode_step(tokenizer, model, rows=64, words=256):
    """Time of one step of 64 rows beside the time to read the weights and the filled cache once."""
    script = Script(tokenizer, [[words]] * rows, V)
    steps = script.tokens // rows
    seconds = np.median([script.play(model, "slots") for _ in range(4)][1:]) / steps
    block = torch.empty(GIB, dtype=torch.uint8, device=model.device)
    other = torch.empty_like(block)
    copy = take_turns({"copy": lambda: other.copy_(block)}, 9, gpu_clock)["copy"]
    c = model.config
    cache = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * rows * steps / 2
    floor = (2 * sum(p.numel() for p in model.parameters()) + cache) / (2 * GIB / np.median(copy))
    return Row(f"decode step, 0.6B, {rows} slots, GPU", f"{1000 * seconds:.2f} ms",
               f"{1000 * floor:.2f} ms, its bytes at the speed of a copy", seconds / floor, "<= 2")


def overlap():
    """A tool that takes 2 s in one of 16 rows: when are the other 15 done?"""
    for device in ["cpu"] + ["cuda"] * CUDA:
        yield from overlap_on(device)
    if not CUDA:
        yield no_gpu("a 2 s tool in one of 16 rows")


def overlap_on(device):
    agent = sod.load_agent(sod.Config(device=device))
    script = Script(agent.tokenizer, [[20, 20, 20]] * 16, len(agent.tokenizer))

    def others_done(engine, seconds):
        """Seconds until the last of the other rows has finished."""
        done, end_turn = {}, sod.end_turn

        def watched(agent, r, ends):
            call = end_turn(agent, r, ends)
            done[id(r)] = time.perf_counter() if "0 + " not in r.turns[0].text else 0.0
            return call
        with mock.patch.object(sod, "end_turn", watched):
            started = time.perf_counter()
            script.play(agent.student, engine, seconds, look=4)
            return max(done.values()) - started
    slow = lambda code: 2.0 if code == "0 + 0" else 0.0
    for engine, target in (("slots", "<= 1.05"), ("generate", "")):
        found = np.array([[others_done(engine, s) for s in (slow, lambda code: 0.0)]
                          for _ in range(6)])[1:]
        yield Row(f"a 2 s tool in one of 16 rows, {engine}, {device}: the others are done after",
                  show(found[:, 0]), f"{show(found[:, 1])}, without it",
                  ratio(found[:, 0], found[:, 1]), target)


# --- Whole iterations -------------------------------------------------------------------------


def methods():
    """SOD over OPD: an iteration on the same rollouts, which cost the same."""
    for device in ["cpu"] + ["cuda"] * CUDA:
        agent = sod.load_agent(sod.Config(device=device, iterations=1))
        prompts = [p for p in agent.practice[:16] for _ in range(8)]
        found = sod.sample_rollouts(agent, agent.student, prompts, (0, "bench", 0))

        def learn(method):
            agent.config.method, agent.iteration = method, 0
            with mock.patch.object(sod, "sample_rollouts", lambda *_: found):
                list(sod.distil(agent))
        clock = time.process_time if device == "cpu" else gpu_clock
        seconds = take_turns({m: lambda m=m: learn(m) for m in ("sod", "opd")}, 11, clock)
        yield Row(f"scoring and updates, 128 rollouts of the world, {device}",
                  f"{show(seconds['sod'])}, sod", f"{show(seconds['opd'])}, opd",
                  ratio(seconds["sod"], seconds["opd"]), "<= 1.01")
    if not CUDA:
        yield no_gpu("SOD over OPD")


# --- Peak memory of an iteration --------------------------------------------------------------

PROMPT, BUDGETS = 2560, {"0.6B": 12.5, "1.7B": 30.0}  # tokens; GiB
LONG = sod.Config(max_response=N)


def peak():
    """Peak memory of an update, 0.6B and 1.7B with a 4B teacher, one 23,040-token sequence."""
    for size, offload in (("0.6B", "teacher"), ("1.7B", "teacher"), ("1.7B", "all")):
        seen = peak_of_iteration(replace(LONG, offload=offload), size, "4B", PROMPT, N)
        what = f"peak of an update, {size}, {PROMPT + N:,} tokens, offload {offload}"
        target = 24.0 if offload == "all" else BUDGETS[size]
        most = max(seen["gradient"], seen["step"])
        yield Row(what, f"{seen['gradient']:.1f} GiB, AdamW {seen['step']:.1f} (scoring with the "
                  f"4B teacher {seen['scoring']:.1f}, at rest {seen['resident']:.1f})",
                  f"{target} GiB", most / target, "<= 1")
        yield real_update(size, offload, most) if CUDA else no_gpu(what)


def real_update(size, offload, counted):
    """The same update on the GPU, beside what was counted."""
    gc.collect()
    torch.cuda.empty_cache()
    config = replace(LONG, offload=offload, method="grpo")
    student = random_qwen3(size, V, "cuda").train()
    sod.enable_checkpointing(student)
    agent = sod.Agent(config, student, None, None, None)
    agent.optimizer = sod.Optimizer(student, lambda n: 1e-6, config)
    rollout = sod.Rollout(None, [7] * PROMPT, [sod.Turn([7] * N)])
    batch = sod.collate([rollout], student.device)
    batch.logp_s, _ = sod.score(agent, student, batch)
    batch.advantages = torch.ones_like(batch.logp_s)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        agent.optimizer.step(sod.backpropagate(agent, batch)[0])
    seen = torch.cuda.max_memory_allocated() / GIB
    agent.optimizer.detach()
    return Row(f"peak of an update, {size}, offload {offload}, CUDA's over counted",
               f"{seen:.1f} GiB", f"{counted:.1f} GiB", seen / counted, "<= 1.05")


# --- Growth -----------------------------------------------------------------------------------


def growth():
    """What more turns, trajectories and tokens cost: the exponent of the best power law."""
    agent = sod.load_agent(sod.Config(device="cpu"))
    tokenizer, model = agent.tokenizer, agent.student
    curves = {
        "turns of 16 trajectories": ([2, 4, 8, 12], lambda n: [[12] * n] * 16),
        "trajectories of 3 turns": ([32, 64, 128, 256], lambda n: [[12] * 3] * n),
        "words in each of 2 turns, 64 trajectories": ([24, 48, 96, 192], lambda n: [[n] * 2] * 64)}
    for what, (sizes, turns) in curves.items():
        for engine, target in (("slots", "<= 1.1"), ("generate", "")):
            scripts = {n: Script(tokenizer, turns(n), len(tokenizer)) for n in sizes}
            works = {n: lambda s=s: s.play(model, engine) for n, s in scripts.items()}
            yield curve(f"seconds by {what}, {engine}", take_turns(works, 3), show, target)
    lengths = [5760, 11_520, 23_040]
    extra = {}
    for length in lengths:
        seen = peak_of_iteration(replace(LONG, offload="teacher"), "0.6B", "0.6B", PROMPT,
                                 length - PROMPT)
        extra[length] = np.array([seen["gradient"] - seen["resident"]])
    yield curve("memory of a gradient on top of weights and optimiser by tokens, 0.6B", extra,
                lambda x: f"{x[0]:.2f} GiB", "<= 1.1")


def curve(what, found, show, target):
    """found: {size: measurements}"""
    sizes, middle = list(found), [float(np.median(x)) for x in found.values()]
    exponent = np.polyfit(np.log(sizes), np.log(middle), 1)[0]
    return Row(what, ", ".join(f"{n:,}: {show(x)}" for n, x in found.items()), "linear is 1",
               float(exponent), target)


SECTIONS = {f.__name__: f for f in (memory, head, rollouts, overlap, methods, peak, growth)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=", ".join(f"{n}: {f.__doc__.splitlines()[0]}"
                                       for n, f in SECTIONS.items()))
    names = parser.parse_args().sections or list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            parser.error(f"there is no section {name}; choose from {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    print("| what | ours | against | ratio | target | met |\n|---|---|---|---|---|---|")
    for name in names:
        for row in SECTIONS[name]():
            print(row, flush=True)


if __name__ == "__main__":
    main()
