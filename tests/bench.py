"""Memory and rollouts beside a plain way to do the same: medians, ratios, what these must reach.

    python tests/bench.py             both sections
    python tests/bench.py memory      one of them: memory, rollouts

The two ways take turns, so that the machine is the same for both; a ratio is the median of the
ratios of neighbours. Torch has one thread. Peaks of memory are counted on tensors without data, see
tests/memory.py. What needs a GPU is measured by tests/gpu.py.
"""
import argparse
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from memory import V, random_qwen3, sod
import tools  # noqa: E402  (memory.py has put its folder on the path)
from test_guards import D_S, D_T, N, naive_logprobs, naive_reverse_kl, our_reverse_kl, peak


# --- Measuring --------------------------------------------------------------------------------


def take_turns(works, rounds, clock):
    """{name: (rounds,) seconds} of functions that run one after the other, again and again."""
    seconds = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = clock()
            work()
            seconds[name].append(clock() - started)
    return {name: np.array(times[1:]) for name, times in seconds.items()}  # the first warms up


def ratio(a, b):
    return float(np.median(a / b))


# --- Memory of token_logprobs and reverse_kl -----------------------------------------------------


def memory():
    """Memory of forward and backward at full size, on top of the inputs."""
    heads = [("token_logprobs", sod.token_logprobs, naive_logprobs, ((N, D_S), (V, D_S))),
             ("reverse_kl", our_reverse_kl, naive_reverse_kl,
              ((N, D_S), (V, D_S), (N, D_T), (V, D_T)))]
    for name, ours, naive, shapes in heads:
        mine, plain = peak(ours, *shapes), peak(naive, *shapes)
        yield (f"{name}, extra memory, {N:,} x {V:,} x {D_S}, bf16", f"{mine:.2f} GiB",
               f"{plain:.1f} GiB, naive", plain / mine, ">= 50")


# --- Rollouts ---------------------------------------------------------------------------------

ANSWER, PICK = "1 2 3 4 5 6 7 8 9 10", sod.sample_next_token


class SlowTool:
    """Says the same to every program: to one in sixteen after a second, to the others in 20 ms."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(64)

    def submit(self, call, place=()):
        return self.pool.submit(self.answer, call.code)

    def answer(self, code):
        time.sleep(1.0 if zlib.crc32(code.encode()) % 16 == 0 else 0.02)
        return tools.Observation(ANSWER, "ok", 0.0)


class Script:
    """Rollouts that are known beforehand, so that any model takes as many turns as we like.

    The engines do all their work, but the next token is not left to the model: each uniform number
    by which they would pick it says here which one it is.
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
        self.uniforms = np.zeros((len(rows), max(map(len, rows)) + 1))
        for uniforms, ids in zip(self.uniforms, rows):
            uniforms[:len(ids)] = (np.array(ids) + 0.5) / vocabulary

    def play(self, model, engine):
        """All rollouts by one of the engines."""
        config = sod.Config(rollout_engine=engine, rollout_batch=64, silent_rate=0.0,
                            overlong_buffer=0, max_response=self.uniforms.shape[1],
                            tool_poll_timeout=0.0)
        agent = sod.Agent(config, model, None, self.tokenizer, SlowTool())

        def pick(logits, uniforms, temperature, top_p):
            PICK(logits, uniforms, temperature, top_p)  # takes the time it takes
            return (uniforms * self.vocabulary).long()
        numbers = lambda *place: SimpleNamespace(random=lambda n: self.uniforms[place[-1]])
        with mock.patch.multiple(sod, sample_next_token=pick, random_numbers=numbers):
            return sod.sample_rollouts(agent, model, self.prompts, (0, "script", 0))


def rollouts():
    """64 rollouts of several turns: continuous batching beside HF's generate for each turn."""
    agent = sod.load_agent(sod.Config(device="cpu", rollout_batch=64, tool_poll_timeout=0.0,
                                      silent_rate=0.0))
    prompts = [p for p in agent.train_set[:16] for _ in range(4)]

    def sample(engine):
        agent.config.rollout_engine = engine
        return sod.sample_rollouts(agent, agent.student, prompts, (0, "bench", 0))
    yield engines("64 rollouts in the embedded world, its own tool", sample)
    rng = np.random.default_rng(0)
    turns = [rng.integers(2, 13, rng.integers(1, 7)).tolist() for _ in range(64)]
    script = Script(agent.tokenizer, turns, 512)
    model = random_qwen3((512, 10, 8, 1536), torch.float32, vocab_size=len(agent.tokenizer),
                         head_dim=64)
    yield engines("64 rollouts of 1 to 6 turns, a random Qwen3 of 31M, slow tools",
                  lambda engine: script.play(model, engine))


def engines(what, sample):
    """Sampled tokens a second of both engines."""
    found = {}

    def work(engine):
        found[engine] = sum(k > 0 for r in sample(engine) for k in r.step_id)
    names = ("continuous", "generate")
    seconds = take_turns({name: lambda name=name: work(name) for name in names}, 3,
                         time.perf_counter)
    ours, generate = (found[name] / seconds[name] for name in names)
    return (what, f"{np.median(ours):,.0f} tok/s", f"{np.median(generate):,.0f} tok/s, generate",
            ratio(ours, generate), ">= 1.3")


SECTIONS = {f.__name__: f for f in (memory, rollouts)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=", ".join(f"{n}: {f.__doc__.splitlines()[0]}"
                                       for n, f in SECTIONS.items()))
    names = parser.parse_args().sections or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"there is no section {unknown[0]}; choose from {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    print("| what | ours | beside it | ratio | must be |\n|---|---|---|---|---|")
    for name in names:
        for what, ours, beside, times, bound in SECTIONS[name]():
            print(f"| {what} | {ours} | {beside} | {times:.3g} | {bound} |", flush=True)


if __name__ == "__main__":
    main()
