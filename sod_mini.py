"""Step-wise on-policy distillation (SOD, arXiv 2605.07725) for small tool-using language models.

    python sod_mini.py                          the whole method on the embedded world, on a CPU
    python sod_mini.py --method grpo --lr 1e-4  every line of Config below is an option
    python sod_mini.py --preset gpu --student Qwen/Qwen3-0.6B \\
                       --teacher youngzhong/SOD-GRPO_teacher-4B --train_data gsm8k.jsonl

A student solves problems in several turns with a Python tool. A teacher scores every token that
the student sampled. Where the student has drifted from the teacher, the teacher is trusted less.

Notation (code: paper)
    logp_s, logp_t   log pi_theta, log pi_teacher of the sampled token      nats
    A, A_it          advantage of a rollout in its group; of a token: Eq. 8 no unit
    d, w             (B, K) divergence (Eq. 6) and weight (Eq. 7) of steps  nats/token, no unit
    step k           one assistant turn, its end token included: k = 1..K
    step_id          k for a token that the student sampled in step k, 0 for every other token
    iteration        one batch of rollouts and its updates; an update moves the weights once
    B, T, K, V, D    rollouts, tokens, steps, vocabulary, width             sizes
"""
import argparse
import contextlib
import copy
import difflib
import errno
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import weakref
import zlib
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import tools

if __name__ == "__main__":  # the imports that follow take seconds
    tools.end_quietly_at_ctrl_c()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache,
                          GenerationConfig, LogitsProcessor)
from transformers.cache_utils import DynamicLayer
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import (DocstringParsingException,
                                                    TypeHintParsingException)

from tools import UserError

WORLD = "data/world"  # beside this file, wherever a command is given: see tools.locate

# --- Settings --------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How a model is put to problems: the options that training shares with evaluate.py."""
    system: str = ""                        # system message of problems that bring none
    examples: str = ""                      # file of worked conversations to read before a question
    calls: str = "hermes"                   # how a tool is called: hermes (JSON), python (blocks)
    tools: str = tools.TOOL_NAME            # what can be called: this, files of functions, or x,y
    thinking: bool = False                  # thinking mode, in templates that have one (Qwen3)
    max_turns: int = 12                     # assistant turns in a rollout
    max_prompt: int = 128                   # tokens; longer prompts are skipped, and counted
    max_response: int = 384                 # tokens after the prompt, tool answers included
    tool_timeout: float = 5.0               # CPU seconds for a program, thrice as much on the clock
    tool_chars: int = 4096                  # longest tool answer; the cut is marked
    tool_modules: str = ""                  # imported once for all programs, as in numpy,sympy
    tool_unsafe: bool = False               # run programs even where they cannot be contained
    silent_rate: float = 0.1                # chance that a tool that answers falls silent
    silent_persist: float = 0.5             # chance that a silent tool stays so at the next call
    rollout_engine: str = "continuous"      # continuous: our batching; generate: Hugging Face's
    rollout_batch: int = 256                # rollouts sampled side by side; 0: all of them
    micro_batch_tokens: int = 2048          # tokens read side by side, with padding; 0: 65,536
    decode_chunk: int = 8                   # continuous: tokens sampled between checks for ends
    tool_poll_timeout: float = 60.0         # continuous: seconds that a check waits for slow tools
    device: str = "auto"                    # auto: cuda where there is one, else cpu
    dtype: str = "auto"                     # auto: bfloat16 on cuda, float32 on cpu
    threads: int = 1                        # CPU threads of torch; 0: as many as it likes
    seed: int = 0                           # of sampling, data order, tool silence, random init


@dataclass
class Config(Sampling):
    """Every knob: name, value, reason. Defaults train the embedded student on a CPU in minutes.

    A field that is added here is an option, and its comment is the option's help.
    """
    method: str = "sod"                     # vanilla only measures, sft imitates; see METHODS
    weights: str = "sod"                    # step weights of sod and sod_only: see WEIGHTS
    kl: str = "sampled"                     # sampled, or full: the exact KL, not in the paper
    student: str = f"{WORLD}/student"       # the model we train: a folder or a Hub id
    teacher: str = f"{WORLD}/teacher"       # the model that scores: a folder or a Hub id
    teacher_system: str = ""                # what it reads in place of --system, "" for the same
    teacher_examples: str = ""              # and in place of --examples, "" for the same
    init: str = "pretrained"                # or random: the student's shape without its weights
    train_data: str = f"{WORLD}/train.jsonl"             # problems to learn from
    eval_data: str = f"{WORLD}/heldout.jsonl"            # problems to measure on, "" for none
    demonstrations: str = f"{WORLD}/demonstrations.jsonl"  # conversations to imitate (method sft)
    iterations: int = 30                    # batches of rollouts to sample and learn from
    prompts: int = 16                       # P: problems in a batch
    group_size: int = 8                     # G: rollouts of each problem
    num_minibatches: int = 2                # parts of a batch; each moves the weights once
    temperature: float = 1.0                # of rollouts, and of both models when they score
    epsilon: float = 1e-6                   # Eq. 7 does not divide by 0
    delta: float = 0.2                      # w_k <= 1 + delta (Eq. 7)
    floor: float = 0.2                      # least d of the weight scheme "floor", nats/token
    opd_coef: float = 1.0                   # distillation against outcome (Eq. 8)
    clip_low: float = 0.2                   # ratio >= 1 - clip_low
    clip_high: float = 0.28                 # ratio <= 1 + clip_high
    dual_clip: float = 3.0                  # where A_it < 0 the loss is at most dual_clip * |A_it|
    tool_shaping: bool = True               # wrong answers cost .1 less for each of up to 4 calls
    overlong_buffer: int = 64               # over the last so many tokens reward falls by up to 1
    lr: float = 3e-4                        # learning rate of AdamW
    warmup: int = 0                         # updates from 0 to lr; constant afterwards
    beta1: float = 0.9                      # AdamW: decay of the mean gradient
    beta2: float = 0.999                    # AdamW: decay of the mean squared gradient
    weight_decay: float = 0.01              # AdamW: share of a weight taken away, times lr
    grad_clip: float = 1.0                  # largest norm of the gradient
    sft_epochs: int = 3                     # passes over the demonstrations
    sft_batch: int = 32                     # demonstrations an update
    sft_lr: float = 2e-3                    # peak; 10% warm-up, then a cosine towards 0
    eval_problems: int = 200                # held-out problems to measure on: the first ones
    eval_samples: int = 4                   # samples a problem: average@k
    eval_temperature: float = 1.0           # as the paper
    eval_top_p: float = 1.0                 # the paper's .6 would hide this student's unreliability
    offload: str = "none"                   # kept on the CPU: teacher (while idle); all: AdamW too
    gradient_checkpointing: bool = False    # recompute activations in backward: less memory
    preflight: bool = True                  # false: go on though memory or a model look wrong
    out: str = "runs"                       # folder of all outputs
    name: str = ""                          # folder of this run; default: method and time
    show_every: int = 10                    # iterations between two rollouts shown, 0 for never
    store_tokens: int = 128                 # rollouts an iteration stored with their tokens
    save_every: int = 5                     # iterations between two saves, 0: only at a stop
    resume: str = ""                        # go on with an earlier run: its folder or name

    def __post_init__(self):
        check_values(self, BOUNDS)
        method, explores = METHODS[self.method], self.method not in ("sft", "vanilla")
        for wrong, sentence in [
            (Path(self.name).name != self.name or not self.name.isprintable(),
             f"name is {self.name!r}; needed the name of one folder (--out says where it is made)"),
            (not method.weighted and self.weights != "sod",
             f"method {self.method} fixes its own weights; use --weights with sod or sod_only"),
            (self.kl == "full" and not method.scorer,
             f"method {self.method} has no teacher to compare with; use --kl sampled"),
            (self.kl == "full" and self.offload != "none",
             "kl full needs the teacher in every update; use --offload none or --kl sampled"),
            (method.outcome and self.group_size == 1,
             f"group_size is 1, and {self.method} compares the rollouts of a group: use 2 or more"),
            (self.method == "vanilla" and not self.eval_data,
             "method vanilla only measures: name problems with --eval_data"),
            (self.prompts % self.num_minibatches and explores,
             f"prompts {self.prompts} does not divide into {self.num_minibatches} minibatches"),
            (self.method == "sft" and not self.demonstrations.strip(),
             "method sft imitates demonstrations, and none are named: use --demonstrations FILE"),
            (explores and not self.train_data.strip(),
             f"method {self.method} needs problems to learn from: use --train_data FILE"),
            (explores and self.overlong_buffer > self.max_response,
             f"overlong_buffer {self.overlong_buffer} is more than max_response "
             f"{self.max_response}: lower it"),
        ]:
            if wrong:
                raise UserError(sentence)


def check_values(config, bounds):
    """Each option alone: one of its words, or of its kind and within its bounds."""
    for f in fields(config):
        value, (low, high) = getattr(config, f.name), bounds.get(f.name, (0, math.inf))
        words = choices().get(f.name, [value])
        if value not in words:
            raise UserError(f"{f.name} is {value!r}; choose from {', '.join(words)}")
        if type(value) not in ((int, float) if f.type is float else (f.type,)):  # True is an int
            raise UserError(f"{f.name} is {value!r}; needed {f.type.__name__}")
        if f.type in (int, float) and not low <= value < high:
            raise UserError(f"{f.name} is {value}; it must be at least {low} and below {high}")


def choices():
    """Options that take one of a few words."""
    return {"method": list(METHODS), "weights": list(WEIGHTS), "kl": ["sampled", "full"],
            "init": ["pretrained", "random"], "calls": list(tools.CALLS),
            "rollout_engine": list(ENGINES),
            "offload": ["none", "teacher", "all"], "dtype": ["auto", "float32", "bfloat16"]}


# What is not "at least 0 and finite": name -> (lowest, first value that is too high).
TINY = 1e-12
BOUNDS = {
    **dict.fromkeys(["iterations", "prompts", "group_size", "num_minibatches", "max_turns",
                     "max_prompt", "max_response", "sft_epochs", "sft_batch", "eval_problems",
                     "eval_samples", "decode_chunk"], (1, math.inf)),
    **dict.fromkeys(["temperature", "eval_temperature", "epsilon", "lr", "sft_lr", "grad_clip",
                     "tool_timeout"], (TINY, math.inf)),
    **dict.fromkeys(["beta1", "beta2", "clip_low", "silent_rate", "silent_persist"], (0, 1)),
    "eval_top_p": (TINY, 1 + TINY), "dual_clip": (1, math.inf), "tool_chars": (64, math.inf),
    "seed": (0, 2**32), "threads": (0, 1025),
}

SYSTEM = ("Solve the problem. Use the code_interpreter tool for every calculation. "
          "Put the final answer in \\boxed{}.")
GPU = dict(train_data="", demonstrations="", eval_data="", system=SYSTEM, iterations=120,
           prompts=8, max_turns=8, max_prompt=1024, max_response=4096, overlong_buffer=512,
           lr=1e-6, sft_lr=1e-5, silent_rate=0.0, tool_modules="numpy,sympy", eval_top_p=0.6,
           threads=0, rollout_batch=0, micro_batch_tokens=0,
           gradient_checkpointing=True, show_every=1, store_tokens=16)
BLOCKS = ("Solve the problem with a short Python program in a ```python block that prints the "
          "answer. Its output is shown to you. Then give the final answer in \\boxed{}.")
# Named sets of values that replace those above; "world" replaces none of them. "cpu" is for a
# small pretrained pair and short problems. The paper's run took its authors eight GPUs and two to
# three days.
PRESETS = {
    "world": {},
    "cpu": dict(train_data="", demonstrations="", eval_data="", system=BLOCKS, calls="python",
                dtype="bfloat16", threads=0, iterations=8, prompts=6, group_size=4,
                num_minibatches=1, temperature=0.7, max_turns=3, max_prompt=320, max_response=144,
                overlong_buffer=0, lr=1e-5, silent_rate=0.0, eval_problems=100, eval_samples=1,
                eval_temperature=0.7, rollout_batch=64, show_every=1, save_every=4),
    "gpu": GPU,
    "paper": dict(GPU, prompts=64, group_size=16, num_minibatches=4, max_turns=16,
                  max_prompt=2560, max_response=20_480, overlong_buffer=1024, sft_epochs=5,
                  sft_batch=128, eval_samples=32),
}

# --- What the method works on ------------------------------------------------------------------

OK_OUTCOMES = ("", "ok", "output_truncated", "not_run")  # every other one is a failed call


@dataclass
class Turn:
    """A step of a rollout: what the student wrote, and what the tool answered."""
    ids: list[int] = field(default_factory=list)       # as sampled, the end token included
    text: str = ""                                     # the same, without special tokens
    outcome: str = ""                                  # of its call (tools.py); "" without one
    tool_text: str = ""                                # the tool's answer
    tool_ids: list[int] = field(default_factory=list)  # the tool turn as the model saw it
    tool: str = ""                                     # the name of the tool; "" without a call

    @property
    def failed(self):
        return self.outcome not in OK_OUTCOMES


@dataclass(eq=False)
class Rollout:
    """One attempt at one problem, recorded while it is sampled."""
    problem: tools.Problem
    prompt: list[int]
    turns: list[Turn]        # the last one is under way until finish_reason is set
    key: tuple = ()          # names its random numbers: seed, purpose, iteration, number
    uniforms: np.ndarray | None = None  # (max_response,): uniforms[n] picks response token n
    finish_reason: str = ""  # answer, turns (turn limit), length (token budget), infrastructure
    correct: bool = False    # the grader's verdict on the last turn
    reason: str = ""         # and its reason
    score: float = 0.0       # 1 correct, 0 wrong; of a program see tools.Verdict
    reward: float = 0.0      # see outcome_reward; the trainer's alone

    @property
    def ids(self):
        """Prompt, turns and tool answers, as the model saw them."""
        return self.prompt + [i for turn in self.turns for i in turn.ids + turn.tool_ids]

    @property
    def step_id(self):
        """k for a token sampled in step k, 0 for every other token."""
        steps = [0] * len(self.prompt)
        for k, turn in enumerate(self.turns, start=1):
            steps += [k] * len(turn.ids) + [0] * len(turn.tool_ids)
        return steps

    @property
    def lost(self):
        """Did the machine fail it? Then it is no attempt of the student's, and is left out."""
        return self.finish_reason == "infrastructure"

    @property
    def response_len(self):
        return sum(len(turn.ids) + len(turn.tool_ids) for turn in self.turns)

    def next_uniforms(self, n):
        """(n,) numbers of the next n response tokens; 0 beyond the token budget."""
        uniforms = self.uniforms[self.response_len:self.response_len + n]
        return np.pad(uniforms, (0, n - len(uniforms)))


@dataclass
class Batch:
    """Rollouts as tensors on the training device, padded on the right: (B, T) unless said."""
    rollouts: list[Rollout]
    lengths: list[int]    # tokens of each
    shared: int           # ids that all rows begin with and that are read once; see shared_prefix
    ids: torch.Tensor
    step_id: torch.Tensor      # k for a token sampled in step k, else 0
    failed: torch.Tensor       # (B, K) bool: the call of step k failed
    reward: torch.Tensor       # (B,) nan where the machine failed the rollout
    logp_s: torch.Tensor = None      # the old policy, nats
    entropy_s: torch.Tensor = None   # nats
    logp_t: torch.Tensor = None      # the teacher, nats; None in methods without one
    entropy_t: torch.Tensor = None   # nats
    d: torch.Tensor = None           # (B, K) Eq. 6, nats/token
    w: torch.Tensor = None           # (B, K) of WEIGHTS: Eq. 7, or ones
    A: torch.Tensor = None           # (B,) within its group
    advantages: torch.Tensor = None  # A_it; None for demonstrations

    @property
    def sampled(self):
        """(B, T) bool: the tokens that the student sampled."""
        return self.step_id > 0

    def select(self, rows):
        """The Batch of some rows, cut to the longest of them: (n, t)."""
        lengths, T = [self.lengths[i] for i in rows], self.ids.shape[1]

        def cut(x):
            per_token = x is not None and x.dim() == 2 and x.shape[1] == T  # K is less than T
            return x if x is None else x[rows, :max(lengths)] if per_token else x[rows]
        tensors = {f.name: cut(getattr(self, f.name)) for f in fields(self)[3:]}
        return Batch([self.rollouts[i] for i in rows], lengths, self.shared, **tensors)

    def split(self, parts):
        """As many Batches of neighbouring rollouts."""
        return [self.select(rows) for rows in
                np.arange(len(self.rollouts)).reshape(parts, -1).tolist()]


def collate(rollouts, device, prompts=None):
    """Rollouts as a Batch, with other prompts than their own where these are given. The tokens of a
    rollout that the machine failed are of no step: nothing is learnt from it."""
    ids, step_ids, prompts = [], [], prompts or [r.prompt for r in rollouts]
    for r, prompt in zip(rollouts, prompts):
        steps = [0] * r.response_len if r.lost else r.step_id[len(r.prompt):]
        ids.append(prompt + r.ids[len(r.prompt):])
        step_ids.append([0] * len(prompt) + steps)
    assert all(r.lost or math.isfinite(r.reward) for r in rollouts), (
        "a reward is nan or infinite, and nan is for rollouts that the machine failed")
    rewards = [math.nan if r.lost else float(r.reward) for r in rollouts]
    failed = [[turn.failed for turn in r.turns] for r in rollouts]
    lengths, shared = [len(row) for row in ids], shared_prefix(prompts)
    # A start read apart costs a second pass with a mask: worth it from a third of all tokens on.
    shared = shared if 3 * shared * len(ids) > sum(lengths) else 0
    return Batch(rollouts, lengths, shared, pad(ids, 0, device), pad(step_ids, 0, device),
                 pad(failed, False, device), torch.tensor(rewards).to(device))


def shared_prefix(prompts):
    """How many ids all prompts begin with: system text, tools and worked examples, which need to be
    read only once. The last id of a prompt never counts: from there the rows go apart."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)


def pad(rows, value, device):
    """Lists of unequal length -> (B, T), padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, True, value).to(device)


@dataclass
class Agent:
    """A run in memory: models, tool, data, and how far it has come."""
    config: Config
    student: torch.nn.Module | None
    teacher: torch.nn.Module | None  # frozen; None where the method has none
    tokenizer: object
    tool: object                     # submit(call, place) -> Future of an Observation; run
    train_set: list = field(default_factory=list)  # (Problem, prompt ids), or sft's Rollouts
    eval_set: list = field(default_factory=list)   # Problems to measure on
    optimizer: object = None         # Optimizer
    iteration: int = 0               # iterations that are done: a resumed run goes on after them
    sizes: dict = field(default_factory=dict)  # what retry_on_oom has halved
    halvings: int = 0                # how often memory ran out
    digests: dict = field(default_factory=dict)  # of scripts, data and teacher at the start
    seconds: Counter = field(default_factory=Counter)  # of each kind of work, since last read
    # What a study may replace by functions of its own:
    grade: object = field(default_factory=lambda: grade_rollout)
    score_teacher: object = field(default_factory=lambda: score_by_teacher)

# --- The method, step by step (Sec. 4) ---------------------------------------------------------


def outcome_reward(rollout, config):
    """+1 for a correct answer, -1 for a wrong one; for a program the share of its tests that pass,
    -1 without a program. Two things change it: -1 becomes -.9, -.8, -.7, -.6 with up to four tool
    calls, whether these work or not, so that a student that never succeeds still learns to call;
    and over the last tokens of the budget the reward falls by up to 1.

    Differs from the authors' code: there the calls have no effect, and every wrong answer gets
    -1.1.
    """
    is_program = rollout.problem.kind == "program"
    reward = rollout.score if is_program else 1.0 if rollout.correct else -1.0
    worthless = rollout.score < 0 if is_program else not rollout.correct
    if config.tool_shaping and worthless:
        reward += 0.1 * min(sum(turn.outcome != "" for turn in rollout.turns), 4)
    over = rollout.response_len - (config.max_response - config.overlong_buffer)
    penalty = min(max(over / config.overlong_buffer, 0.0), 1.0) if config.overlong_buffer else 0.0
    return reward - penalty


def group_advantages(rewards, group_size):
    """How much better a rollout did than the others of its problem: (r - mean) / std (GRPO).

    rewards     (B,) with the rollouts of one problem side by side; nan for a rollout that the
                machine failed, which is not counted in its group
    group_size  G, a divisor of B
    returns     (B,) (r - mean) / (std + 1e-6) within the group, std with ddof 1; 0 for nan

    >>> group_advantages(torch.tensor([1.0, -1.0, float("nan"), 0.6, 0.6, 0.6]), 3)
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    r = rewards.view(-1, group_size)                             # (P, G)
    # Minus the maximum: equal rewards become exactly 0, and not a rounding error over 1e-6.
    r = r - r.nan_to_num(-math.inf).amax(1, keepdim=True)
    centred = r - r.nanmean(1, keepdim=True)
    count = (~r.isnan()).sum(1, keepdim=True)                    # (P, 1)
    std = (centred.square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (centred / (std + 1e-6)).nan_to_num(0.0).flatten()


def step_divergence(logp_s, logp_t, step_id, K=None):
    """How far student and teacher differ at each step (Eq. 6).

    The absolute value is taken here, and not in the signal logp_t - logp_s: a step in which half
    of the tokens are likelier to the teacher and half to the student has drifted, though the two
    halves cancel in the mean.

    logp_s, logp_t  (B, T) log-probabilities of the sampled tokens, nats
    step_id         (B, T) k = 1..K, or 0
    K               where it is known; looking it up in step_id waits for the device
    returns         (B, K) d_k = mean over step k of |logp_s - logp_t|, nats/token; 0 for no step
    """
    K = K or max(int(step_id.max()), 1)
    gap = torch.where(step_id > 0, (logp_s - logp_t).abs(), 0.0)
    return step_sums(gap, step_id, K) / step_tokens(step_id, K).clamp(min=1)


def step_sums(values, step_id, K):
    """(B, T) values -> (B, K) their sum over the tokens of each step."""
    sums = values.new_zeros(len(values), K + 1).scatter_add_(1, step_id, values)
    return sums[:, 1:]  # column 0 has what belongs to no step


def step_tokens(step_id, K):
    """(B, T) step ids -> (B, K) how many tokens each step has, 0 for no step."""
    return step_sums(torch.ones_like(step_id, dtype=torch.float32), step_id, K)


def step_weights(d, epsilon=1e-6, delta=0.2):
    """Trust in the teacher at each step of a rollout (Eq. 7).

    The first step is the reference because nothing has gone wrong before it: d_1 is how far these
    two models differ on this problem anyway. With a constant as reference, a problem on which they
    always differ would get low weights at every step. The price: where d_1 is near 0, later steps
    with a larger d get hardly any weight (see the scheme "floor"). Weights above 1 let a step
    at which the two agree better than at the first one count a little more.

    d        (B, K) divergence of each step, nats/token
    returns  (B, K) w_k = min(prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1 + delta), w_1 = 1

    >>> step_weights(torch.tensor([[0.3, 0.6, 0.2]]))
    tensor([[1.0000, 0.5000, 1.2000]])
    """
    # Neighbours cancel in the product, so only the first and the k-th step remain. The cap is on
    # the weight, not on the running product: a step after a capped one does not suffer from it.
    return ((d[:, :1] + epsilon) / (d + epsilon)).clamp(max=1 + delta)


def steps_since_failure(failed):
    """How many steps after its first failed call each step comes; 0 up to and at that call.

    failed   (B, K) bool: the tool call of step k failed

    >>> steps_since_failure(torch.tensor([[False, True, False, False]]))
    tensor([[0, 0, 1, 2]])
    """
    return ((failed.cumsum(1) > 0).cumsum(1) - 1).clamp(min=0)


# The paper's ablation, and one scheme of ours: functions of a Batch and Config to (B, K) weights.
WEIGHTS = {
    "sod": lambda batch, c: step_weights(batch.d, c.epsilon, c.delta),
    "uniform": lambda batch, c: torch.ones_like(batch.d),
    # .9^(k - k_err) after the first failed call k_err, 1 up to it
    "decay": lambda batch, c: 0.9 ** steps_since_failure(batch.failed).float(),
    # 0 after the first failed call, 1 up to it
    "mask_after_error": lambda batch, c: (steps_since_failure(batch.failed) == 0).float(),
    "unclipped": lambda batch, c: step_weights(batch.d, c.epsilon, math.inf),
    # Not in the paper: a first step on which the two agree (d_1 near 0) cannot switch off the rest.
    "floor": lambda batch, c: step_weights(batch.d.clamp(min=c.floor), c.epsilon, c.delta),
}


# --- The method, as a family: who scores, and what a token is worth ----------------------------


@dataclass(frozen=True)
class Method:
    """What distinguishes one method from another."""
    scorer: str     # who scores the sampled tokens: "" nobody; "teacher" the teacher model;
    #                 "answer", "hint" the student's frozen start, which is told this besides
    outcome: bool   # does the token advantage hold the outcome advantage A?
    weighted: bool  # is logp_t - logp_s multiplied by w of Config.weights? else by 1


METHODS = {
    "vanilla":   Method("",        False, False),  # no training: the student is measured
    "sft":       Method("",        False, False),  # cross-entropy on demonstrations
    "grpo":      Method("",        True,  False),  # A
    "opd":       Method("teacher", True,  False),  # A +     (logp_t - logp_s)
    "opd_only":  Method("teacher", False, False),  #          logp_t - logp_s
    "opsd_gt":   Method("answer",  True,  False),  # A +     (logp_t - logp_s), our reading
    "opsd_hint": Method("hint",    True,  False),  # A +     (logp_t - logp_s), our reading
    "sod":       Method("teacher", True,  True),   # A + w_k (logp_t - logp_s)
    "sod_only":  Method("teacher", False, True),   #     w_k (logp_t - logp_s)
}


def token_advantages(method, A, logp_s, logp_t, step_id, w, opd_coef=1.0):
    """What each sampled token is worth (Eq. 8-10): outcome plus weighted distillation.

    Why logp_t - logp_s is an advantage: after a fixed prefix, the gradient of
    KL(student || teacher) is E[grad log pi (logp_s - logp_t)] over the student's own samples, so to
    go down it is a policy gradient with the advantage logp_t - logp_s. The effect of a token on the
    KL of later ones is left out: that is less exact, and far less noisy. A is about 1 in size and
    the gap has no bound; only w and opd_coef scale it.

    method           a key of METHODS
    A                outcome advantage of each rollout, (B,), or of each token, (B, T)
    logp_s, logp_t   (B, T) log-probabilities of the sampled tokens, nats; grpo takes None
    step_id          (B, T) k, or 0 for tokens that get no advantage
    w                (B, K) weight of each step, ones for opd and opsd; grpo takes None
    returns          (B, T) A_it, 0 outside the steps, detached
    """
    B, T = step_id.shape
    A_it = torch.zeros(B, T, device=step_id.device)
    if METHODS[method].outcome:
        assert A.shape in [(B,), (B, T)], (
            f"advantages are of rollouts {(B,)} or of tokens {(B, T)}, not {tuple(A.shape)}")
        A_it = A_it + A.view(B, -1)
    if METHODS[method].scorer and opd_coef:  # 0 * inf is not 0
        A_it = A_it + opd_coef * per_token(w, step_id) * (logp_t - logp_s)
    # where, not a product: tool tokens may hold any value.
    return torch.where(step_id > 0, A_it, 0.0).detach()


def per_token(w, step_id):
    """(B, K) weights of steps -> (B, T): a token has the weight of its step."""
    assert w.dim() == 2 and len(w) == len(step_id), (
        f"weights are of steps ({len(step_id)}, K), not {tuple(w.shape)}")
    return w.gather(1, (step_id - 1).clamp(min=0))


def policy_loss(logp, logp_old, advantages, mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0,
                num_tokens=None):
    """Clipped surrogate on token advantages, with the dual clip where they are negative.

    In the first update after sampling every ratio is 1 and nothing is clipped. The later updates
    meet parameters that have moved; logp_old and the advantages stay as they were when the batch
    was sampled, since the ratio corrects for just that. The distillation part is clipped together
    with the outcome part, for it is a part of the advantage; the exact KL is not, being a loss of
    its own. The mean is over all tokens of the update; a mean for each rollout would give each
    token of a long rollout a smaller weight.

    logp, logp_old  (B, T) log-probabilities now (with gradient) and when sampled, nats
    advantages      (B, T) A_it
    mask            (B, T) bool: tokens the student sampled
    num_tokens      tokens of the whole update; default: those of this mask
    returns         scalar, the sum over `mask` divided by `num_tokens`

    Differs from the authors' code, which takes a token mean in each micro-batch: here is one over
    the update, so the gradient does not depend on how the update was cut into micro-batches.
    """
    assert logp.shape == logp_old.shape == advantages.shape == mask.shape, "all four are (B, T)"
    log_ratio = torch.where(mask, logp - logp_old, 0.0).clamp(-20, 20)  # exp stays finite
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    # A very unlikely old token makes the ratio, and so the loss of a bad token, unbounded.
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss.sum() / max(mask.sum() if num_tokens is None else num_tokens, 1)


# --- Log-probabilities of given tokens ----------------------------------------------------------
# At 20,480 tokens and 151,936 vocabulary entries the logits alone take 11.6 GiB in fp32. So they
# are computed tile by tile, by _TokenLogProbs and _ReverseKL, which stand after the method.


def token_logprobs(hidden, weight, targets, temperature=1.0, entropy=False):
    """Log-probability of each target token, straight from the hidden states:

        logits = hidden @ weight.T / temperature                  # (..., V), never in memory
        logp = logits.log_softmax(-1)
        entropies = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[..., None])[..., 0]

    hidden   (..., D) last hidden states; position t predicts token t+1
    weight   (V, D) of the output layer (lm_head)
    targets  (...) ids
    returns  (...) nats, fp32 or better; with entropy=True also the entropy of each position, nats,
             without gradient
    """
    shape = targets.shape
    logp, h = _TokenLogProbs.apply(hidden.reshape(-1, hidden.shape[-1]), weight,
                                   targets.reshape(-1), temperature, entropy)
    return (logp.view(shape), h.view(shape)) if entropy else logp.view(shape)


def reverse_kl(hidden_s, weight_s, hidden_t, weight_t, temperature=1.0):
    """Exact KL(student || teacher) at each position, over the whole vocabulary, for kl="full".
    Beyond the paper, whose term is a one-sample estimate of this one's gradient.

        log_p, log_q = [(h @ w.T / temperature).log_softmax(-1)   # (..., V), never in memory
                        for h, w in ((hidden_s, weight_s), (hidden_t, weight_t))]
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    hidden_s, hidden_t  (..., D_s), (..., D_t) last hidden states
    weight_s, weight_t  (V, D_s), (V, D_t) of the two output layers; the same V
    returns             (...) nats, fp32 or better, differentiable in the student's two arguments
    """
    kl = _ReverseKL.apply(hidden_s.reshape(-1, hidden_s.shape[-1]), weight_s,
                          hidden_t.reshape(-1, hidden_t.shape[-1]), weight_t, temperature)
    return kl.view(hidden_s.shape[:-1])


# --- Conversation: text to ids, once ----------------------------------------------------------

CUT = "\ufdd0"  # a code point no text may hold: marks where a control string is cut in two


def escape_special_tokens(tokenizer, text):
    """Mark `text` so that encode() treats control strings in it as ordinary text: a tool that
    prints "<|im_end|>" must not end the turn."""
    text = text.replace(CUT, "\ufffd")
    control = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
    return re.sub(f"(?=(?:{control}))(.)", rf"\1{CUT}", text, flags=re.S) if control else text


def encode(tokenizer, text):
    """Ids of `text`. Control strings become control tokens, except where escape_special_tokens()
    has cut them."""
    return [i for piece in text.split(CUT)
            for i in tokenizer.encode(piece, add_special_tokens=False)]


@dataclass(frozen=True)
class Context:
    """What a model reads before and besides the question: tools, system text, worked examples."""
    calls: object = tools.HERMES  # how tools are called and answered
    system: str = ""
    examples: tuple = ()          # messages of worked conversations
    privileged: str = ""          # what a self-teacher is told after the question: answer, hint


def student_context(config):
    """What the student reads: in training, evaluation and its demonstrations."""
    calls = call_form(config.calls, config.tools)
    return Context(calls, config.system, worked_examples(config.examples, calls))


def teacher_context(config):
    """The student's context, with what only the teacher reads in its place or in addition."""
    scorer = METHODS[config.method].scorer
    calls = call_form(config.calls, config.tools)
    return Context(calls, config.teacher_system or config.system,
                   worked_examples(config.teacher_examples or config.examples, calls),
                   scorer if scorer in ("answer", "hint") else "")


def privileged_context(problem, privileged):
    """What a self-teacher reads after the question (methods opsd_gt and opsd_hint)."""
    return {"answer": f"\nThe answer is {problem.answer}.",
            "hint": f"\nHint: {problem.hint}"}.get(privileged, "")


def encode_prompt(tokenizer, problem, context=Context()):
    """Ids up to and including the header of the first assistant turn. Differs from the authors'
    code: there row 0 decides for a whole file how prompts are made."""
    *before, last = problem.messages or [{"role": "user", "content": problem.question}]
    last = {**last, "content": last["content"] + privileged_context(problem, context.privileged)}
    own_system = [m for m in before if m["role"] == "system"]
    messages = [*own_system, *context.examples, *before[len(own_system):], last]
    messages = [context.calls.answer(m["content"]) if m["role"] == "tool" else m for m in messages]
    # The assistant's turns of worked examples keep their control tokens, for a model writes them;
    # so does the system text, which is the user's own.
    messages = [m if m["role"] == "assistant" else
                {**m, "content": escape_special_tokens(tokenizer, m["content"])} for m in messages]
    if context.system and not own_system:
        messages = [{"role": "system", "content": context.system}, *messages]
    return encode(tokenizer, tokenizer.apply_chat_template(
        messages, tools=context.calls.schemas, add_generation_prompt=True, tokenize=False))


def render_tool_turn(tokenizer, text, calls=tools.HERMES):
    """What the template writes after the text of an assistant turn, its end token first. Only this
    is rendered: in a whole conversation Qwen3's template drops earlier thoughts."""
    anchor, message = "ANCHOR", calls.answer(text)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": anchor},
         {**message, "content": escape_special_tokens(tokenizer, message["content"])}],
        add_generation_prompt=True, tokenize=False)
    return rendered.split(anchor, 1)[1]


def encode_tool_turn(tokenizer, text, calls=tools.HERMES):
    """Ids of everything between the student's end-of-turn token and its next turn. Differs from the
    authors' code: there each tool turn loses two tokens."""
    rendered = render_tool_turn(tokenizer, text, calls)
    return encode(tokenizer, rendered.removeprefix(tokenizer.eos_token))


def encode_demonstration(tokenizer, problem, messages, context=Context()):
    """A finished conversation as a Rollout, put together exactly as a rollout grows. Differs from
    the authors' code: there the loss mask is off by one token.

    messages  the turns after the question: assistant, tool, assistant, ...
    """
    turns = []
    for message in messages:
        if message["role"] == "assistant":
            turns.append(Turn(encode(tokenizer, message["content"] + tokenizer.eos_token),
                              message["content"]))
        else:
            turns[-1].tool_ids = encode_tool_turn(tokenizer, message["content"], context.calls)
    return Rollout(problem, encode_prompt(tokenizer, problem, context), turns)


# --- Rollouts ---------------------------------------------------------------------------------


def random_numbers(seed, purpose, *place):
    """The generator for one place in a run, such as (0, "rollouts", 17, 3): rollout 3 of iteration
    17 of seed 0. No generator is carried from one place to the next, so a run can be continued
    anywhere, and a rollout does not depend on those beside it."""
    return np.random.default_rng([seed, *place, *purpose.encode()])


def sample_rollouts(agent, model, prompts, key, numbers=None, temperature=None, top_p=1.0):
    """Let a model solve problems in several turns with the tool.

    prompts  [(Problem, prompt ids), ...], one for each rollout
    key      (seed, purpose, iteration), which with a rollout's number names its random numbers
    numbers  that of each rollout; by default 0, 1, 2 and so on
    returns  [Rollout, ...] in the same order, graded
    """
    config = agent.config
    numbers = numbers or range(len(prompts))
    next_token = partial(sample_next_token, temperature=temperature or config.temperature,
                         top_p=top_p)

    def attempt(size):
        rollouts = [Rollout(*prompts[i], [Turn()], (*key, numbers[i]),
                            random_numbers(*key, numbers[i]).random(config.max_response))
                    for i in my_share(range(len(prompts)))]
        # generate() on a model in train() with checkpointing drops its cache, without a word.
        ENGINES[config.rollout_engine](agent, model.eval(), rollouts, next_token, size)
        return rollouts
    rollouts = retry_on_oom(agent, "rollout_batch", attempt, least=1, most=len(prompts))
    for r in rollouts:
        agent.grade(r, agent.tool, final_text(r, config.calls))
        r.uniforms = None  # used up
    return from_all_ranks(rollouts)


def sample_by_generate(agent, model, rollouts, next_token, size):
    """The plain engine: turn by turn, all rollouts wait for the slowest, then for their tools."""
    ends, config = end_ids(model, agent.tokenizer), agent.config
    while active := [r for r in rollouts if not r.finish_reason]:
        for start in range(0, len(active), size):
            rows = active[start:start + size]
            tokens = max(config.max_response - r.response_len for r in rows)
            for r, ids in zip(rows, generate(model, agent.tokenizer, rows, tokens, next_token)):
                r.turns[-1].ids += ids[:config.max_response - r.response_len]
        calls = [(r, call) for r in active if (call := end_turn(agent, r, ends))]
        runs = [agent.tool.submit(call, (*r.key, len(r.turns) - 1)) for r, call in calls]
        for (r, _), run in zip(calls, runs):
            take_answer(agent, r, run.result())


@torch.no_grad()
def generate(model, tokenizer, rollouts, tokens, next_token):
    """At most `tokens` new ids of each rollout, up to an end id, from HF generate."""
    assert not model.training, "call model.eval() before sampling"
    ends, rows = end_ids(model, tokenizer), [r.ids for r in rollouts]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])  # (B, width)
    # The mask is not optional: the pad id may be an end id, and so cannot be told from text.
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    uniforms = torch.tensor(np.stack([r.next_uniforms(tokens) for r in rollouts]),
                            device=model.device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=ends,
                                pad_token_id=pad_id)
    processor = InverseCDFProcessor(uniforms, next_token)
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                         generation_config=settings, logits_processor=[processor])
    return [up_to_end(new, ends) for new in out[:, width:].tolist()]


class InverseCDFProcessor(LogitsProcessor):
    """Makes HF generate sample the tokens of each row by the row's own numbers."""

    def __init__(self, uniforms, next_token):
        self.uniforms, self.next_token, self.t = uniforms, next_token, 0  # (B, tokens)

    def __call__(self, ids, logits):
        chosen = self.next_token(logits, self.uniforms[:, self.t])
        self.t += 1
        return torch.full_like(logits, -math.inf).scatter_(1, chosen[:, None], 0.0)


def sample_next_token(logits, uniforms, temperature=1.0, top_p=1.0):
    """The token at which the cumulated distribution passes a uniform number (inverse CDF).

    logits    (B, V)
    uniforms  (B,) in [0, 1), fp64
    top_p     keep the likeliest tokens whose share before them is below top_p
    returns   (B,) ids
    """
    p = (logits.float() / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
        # Back in the order of the vocabulary: rounding may exchange neighbours in the ranking.
        p = torch.zeros_like(p).scatter_(1, order, ranked)
    edges = p.cumsum(-1, dtype=torch.float64)  # fp32 would lose the rare tokens of a large V
    chosen = torch.searchsorted(edges, uniforms[:, None] * edges[:, -1:], right=True)
    return chosen.clamp(max=p.shape[1] - 1)[:, 0]


def end_ids(model, tokenizer):
    """Every id that ends a turn: the tokenizer's and those of the model's shipped settings."""
    shipped = getattr(model, "shipped_generation", model.generation_config).eos_token_id
    shipped = shipped if isinstance(shipped, list) else [shipped]
    return sorted({i for i in [tokenizer.eos_token_id, *shipped] if i is not None})


def up_to_end(ids, ends):
    """The ids up to and including the first end id."""
    return ids[:next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))]


def end_turn(agent, r, ends):
    """Record the turn that r has just sampled. Returns its tool call, or None where r ends here."""
    turn = r.turns[-1]
    turn.text = agent.tokenizer.decode(turn.ids, skip_special_tokens=True)
    call = student_context(agent.config).calls.parse(turn.text)
    if turn.ids[-1] not in ends:
        r.finish_reason = "length"
    elif call is None:
        r.finish_reason = "answer"
    elif len(r.turns) == agent.config.max_turns:
        r.finish_reason = "turns"
    if call:
        turn.tool, turn.outcome = call.tool, "not_run" if r.finish_reason else ""
    return None if r.finish_reason else call


def take_answer(agent, r, observation):
    """Append the tool's answer; a rollout whose budget it does not fit is cut off here."""
    turn, calls = r.turns[-1], student_context(agent.config).calls
    ids = encode_tool_turn(agent.tokenizer, observation.text, calls)
    turn.outcome, turn.tool_text = observation.outcome, observation.text
    if observation.outcome == "sandbox_error":  # tried again and again: the machine's fault
        r.finish_reason = "infrastructure"
    elif r.response_len + len(ids) >= agent.config.max_response:
        r.finish_reason = "length"
    else:
        turn.tool_ids = ids
        r.turns.append(Turn())


def final_text(r, calls):
    """What is graded: the last turn, where the rollout has ended with an answer. With python blocks
    each program is a call; so the one that a problem asks for is the last of the conversation."""
    if r.finish_reason != "answer":
        return ""
    all_turns = calls == "python" and r.problem.kind == "program"
    return "\n".join(turn.text for turn in (r.turns if all_turns else r.turns[-1:]))


def grade_rollout(r, tool, text):
    """Set the verdict on the text of a rollout (final_text)."""
    if r.lost:
        return
    verdict = tools.grade(r.problem, text, tool)
    r.correct, r.reason, r.score = verdict.correct, verdict.reason, verdict.score
    if "sandbox_error" in verdict.reason:
        r.finish_reason = "infrastructure"


# --- Scoring: log-probabilities of exactly the ids that were sampled ---------------------------


def micro_batches(lengths, max_tokens, rows=None, shared=0):
    """Cut rows into batches of at most max_tokens tokens, padding included, rows of like length
    together. A longer row is a batch of its own.

    rows    which of them; default: all
    shared  tokens at the start of every row that count once a batch
    """
    order = sorted(range(len(lengths)) if rows is None else rows, key=lambda i: lengths[i])
    batch = []
    for i in order:
        if batch and shared + (len(batch) + 1) * (lengths[i] - shared) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def hidden_states(model, ids, shared=0):
    """(B, T) ids -> (B, T, D). The first `shared` ids, the same in each row, are read once: the
    later ones attend to their keys and values, through which the gradient flows back. Right
    padding needs no mask: a causal model never looks at it."""
    recomputed = model.training and any(getattr(m, "gradient_checkpointing", False)
                                        for m in model.modules())  # which goes without a cache
    if not shared or recomputed:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    cache = DynamicCache(config=model.config)
    read = partial(model.base_model, past_key_values=cache, use_cache=True)
    start = read(input_ids=ids[:1, :shared]).last_hidden_state  # (1, shared, D)
    cache.batch_repeat_interleave(len(ids))
    rest = read(input_ids=ids[:, shared:]).last_hidden_state    # (B, T - shared, D)
    return torch.cat([start.expand(len(ids), -1, -1), rest], 1)


def sampled_hidden(model, batch):
    """(N, D): the states from which a Batch's N sampled tokens were predicted, row by row. Other
    tokens are never multiplied with the vocabulary."""
    hidden = hidden_states(model, batch.ids, batch.shared).flatten(0, 1)  # (B * T, D)
    predicts = F.pad(batch.sampled[:, 1:], (0, 1))  # (B, T): position t predicts token t+1
    return hidden.index_select(0, predicts.flatten().nonzero()[:, 0])


def lm_head_weight(model):
    """(V, D) weight of the output layer."""
    return model.get_output_embeddings().weight


def scatter_to_mask(values, mask):
    """(N,) values at the N places of a (B, T) mask, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sampled_logprobs(model, batch, temperature):
    """(B, T) log-probability of each sampled token, with gradient, and (B, T) entropy of what it
    was drawn from, without; nats, 0 for every other token."""
    logp, entropy = token_logprobs(sampled_hidden(model, batch), lm_head_weight(model),
                                   batch.ids[batch.sampled], temperature, entropy=True)
    return scatter_to_mask(logp, batch.sampled), scatter_to_mask(entropy, batch.sampled)


@torch.no_grad()
def score(agent, model, batch):
    """sampled_logprobs of a whole batch, without gradient: (B, T) and (B, T)."""
    def attempt(max_tokens):
        logp, entropy = (torch.zeros(batch.ids.shape, device=batch.ids.device) for _ in range(2))
        for rows in my_micro_batches(batch, max_tokens):
            part = batch.select(rows)
            width = part.ids.shape[1]
            logp[rows, :width], entropy[rows, :width] = sampled_logprobs(
                model, part, agent.config.temperature)
        return logp, entropy
    scores = retry_on_oom(agent, "micro_batch_tokens", attempt,
                          least=batch.ids.shape[1], most=batch.ids.numel())
    return sum_over_ranks(*scores)


def score_by_teacher(agent, batch):
    """The teacher's log-probabilities and entropies: (B, T) and (B, T), where the student's are."""
    theirs = teacher_batch(agent, batch)
    with on_device(agent.teacher, batch.ids.device):
        scores = score(agent, agent.teacher, theirs)
    # Sampled tokens come in the same order in both, whatever prompt stands before them.
    return [scatter_to_mask(x[theirs.sampled], batch.sampled) for x in scores]


def teacher_batch(agent, batch):
    """The same rollouts in the teacher's context: after the student's prompt, or one of its own."""
    context = teacher_context(agent.config)
    if context == student_context(agent.config):
        return batch
    prompts = [encode_prompt(agent.tokenizer, r.problem, context) for r in batch.rollouts]
    return collate(batch.rollouts, batch.ids.device, prompts)


@contextlib.contextmanager
def on_device(model, device):
    """The model on `device` for a while, and then back where it was (option offload)."""
    home = model.device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


# --- Update -----------------------------------------------------------------------------------


class Optimizer:
    """AdamW on fp32 copies of the weights (masters), whatever the model computes in: at lr 1e-6 an
    update is far below the spacing of bf16 numbers, so a weight that is updated in place never
    moves. The gradients of micro-batches add up in fp32, too. With offload "all" all of this lies
    in the CPU's memory."""

    def __init__(self, model, learning_rate, config):
        self.learning_rate = learning_rate  # function of the number of the update, 1 and up
        self.updates, self.grad_clip = 0, config.grad_clip
        home = torch.device("cpu") if config.offload == "all" else model.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 and p.device == home else
                        p.detach().to(home, torch.float32) for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, betas=(config.beta1, config.beta2),
                                       weight_decay=config.weight_decay)
        # A hook moves each gradient to its master as soon as backward() has finished it.
        self.hooks = [p.register_post_accumulate_grad_hook(partial(self._collect, master))
                      for p, master in self.apart()]

    def apart(self):
        """(weight, master) where these are two tensors; an fp32 weight is its own master."""
        return [(p, master) for p, master in zip(self.parameters, self.masters) if p is not master]

    def detach(self):
        """Come off the model, which then may have another optimiser."""
        for hook in self.hooks:
            hook.remove()

    @staticmethod
    def _collect(master, p):
        """Add the gradient of a micro-batch to the master's, in fp32, and free it."""
        grad = p.grad.to(master.device, torch.float32)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None

    @torch.no_grad()
    def step(self, loss):
        """Move the weights once; returns the norm of the gradient before clipping. Where this or
        the loss is not finite the weights stay."""
        add_up_gradients(self.masters)
        norm = math.nan
        if math.isfinite(loss):
            norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.grad_clip))
        if math.isfinite(norm):
            self.updates += 1
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate(self.updates)
            self.adamw.step()
            for p, master in self.apart():
                p.copy_(master)
        self.adamw.zero_grad()
        return norm

    def state_dict(self):
        """What to keep beside the model's own weights."""
        return {"updates": self.updates, "adamw": self.adamw.state_dict(),
                "masters": [master for _, master in self.apart()]}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.updates = state["updates"]
        (stored,), (options,) = state["adamw"]["param_groups"], self.adamw.param_groups
        options = {**options, "params": stored["params"]}  # this run's, which may be new ones
        self.adamw.load_state_dict({**state["adamw"], "param_groups": [options]})
        for (_, mine), theirs in zip(self.apart(), state["masters"], strict=True):
            mine.copy_(theirs)


def make_optimizer(agent):
    """The optimiser of a run, with its learning rate: constant, or sft's cosine."""
    config, total = agent.config, num_iterations(agent)
    constant = lambda n: config.lr * min(1.0, n / max(config.warmup, 1))
    cosine = lambda n: config.sft_lr * cosine_scale(n, total)
    return Optimizer(agent.student, cosine if config.method == "sft" else constant, config)


def num_iterations(agent):
    """Iterations of the whole run: an option, but for sft, which passes over its data."""
    config = agent.config
    if config.method != "sft":
        return config.iterations
    return math.ceil(config.sft_epochs * len(agent.train_set) / config.sft_batch)


def cosine_scale(n, total):
    """Share of the learning rate in update n of `total`: 10% warm-up, then down, never to 0."""
    warm = max(0.1 * total, 1)
    return min(n / warm, 0.5 + 0.5 * math.cos(math.pi * max(n - warm, 0) / (total - warm + 1)))


def backpropagate(agent, batch):
    """Leave the gradient of some rollouts in the parameters (or in the optimiser's masters);
    returns their loss and the share of tokens whose ratio left the clip range."""
    student = agent.student.train()  # checkpointing works in train() alone
    num_tokens = int(batch.sampled.sum())
    if not num_tokens:  # the machine failed all of them
        return 0.0, 0.0

    def attempt(max_tokens):
        totals = torch.zeros(2, device=student.device)  # read once: each read waits for the GPU
        for rows in my_micro_batches(batch, max_tokens):
            loss, clipped = loss_of(agent, student, batch.select(rows), num_tokens)
            loss.backward()
            totals += torch.stack([loss.detach(), clipped / num_tokens])
        return totals
    totals = retry_on_oom(agent, "micro_batch_tokens", attempt,
                          least=batch.ids.shape[1], most=batch.ids.numel())
    return sum_over_ranks(totals)[0].tolist()


def loss_of(agent, student, part, num_tokens):
    """What a micro-batch contributes to the mean loss of its update, and how many of its tokens
    have a ratio outside the clip range."""
    config, mask = agent.config, part.sampled  # (B, T), with N tokens
    hidden = sampled_hidden(student, part)  # (N, D)
    of_targets = partial(token_logprobs, hidden, lm_head_weight(student), part.ids[mask])
    if part.advantages is None:  # demonstrations: cross-entropy
        return -of_targets().sum() / num_tokens, torch.zeros((), device=mask.device)
    logp = scatter_to_mask(of_targets(config.temperature), mask)  # (B, T), as when sampled
    loss = policy_loss(logp, part.logp_s, part.advantages, mask, config.clip_low,
                       config.clip_high, config.dual_clip, num_tokens)
    if config.kl == "full":
        w = per_token(part.w, part.step_id)[mask]  # (N,)
        loss = loss + config.opd_coef * (w * full_kl(agent, part, hidden)).sum() / num_tokens
    ratio = torch.where(mask, logp.detach() - part.logp_s, 0.0).exp()
    clipped = ratio != ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return loss, clipped.sum()


def full_kl(agent, batch, hidden):
    """Exact KL(student || teacher) where each sampled token was drawn: (N,) nats (kl="full")."""
    theirs = teacher_batch(agent, batch)
    with torch.no_grad():
        hidden_t = sampled_hidden(agent.teacher, theirs)
    return reverse_kl(hidden, lm_head_weight(agent.student), hidden_t,
                      lm_head_weight(agent.teacher), agent.config.temperature)


# --- Training ---------------------------------------------------------------------------------


def train(agent):
    """Train the student with any method of METHODS, from where it stands: yields (numbers, Batch)
    of each iteration, for sft (numbers, None). Printing, files and evaluation live outside."""
    config = agent.config
    if config.method == "vanilla":
        return
    agent.optimizer = agent.optimizer or make_optimizer(agent)
    for iteration in range(agent.iteration + 1, num_iterations(agent) + 1):
        yield (sft_step if config.method == "sft" else train_step)(agent, iteration)


def train_step(agent, iteration):
    """An iteration of Algorithm 1; its numbers and its Batch."""
    config, student, method = agent.config, agent.student, METHODS[agent.config.method]
    # 1. Sample G rollouts of each of P problems.
    prompts = draw(agent.train_set, config, iteration, config.prompts, config.group_size)
    rollouts = sample_rollouts(agent, student, prompts, (config.seed, "rollouts", iteration))
    check_sandbox(rollouts)
    # 2. Reward each for its outcome.
    for r in rollouts:
        r.reward = outcome_reward(r, config)
    batch = collate(rollouts, student.device)
    # 3. Score the sampled ids with student (the old policy) and teacher.
    batch.logp_s, batch.entropy_s = score(agent, student, batch)
    if method.scorer:
        batch.logp_t, batch.entropy_t = agent.score_teacher(agent, batch)
    # 4. Compare each reward with those of its group.
    batch.A = group_advantages(batch.reward, config.group_size)
    # 5. Measure drift at each step (Eq. 6), and from it trust in the teacher (Eq. 7).
    if method.scorer:
        K = batch.failed.shape[1]
        batch.d = step_divergence(batch.logp_s, batch.logp_t, batch.step_id, K)
        batch.w = WEIGHTS[config.weights if method.weighted else "uniform"](batch, config).float()
        assert batch.w.shape == batch.d.shape, (
            f"weights are of steps {tuple(batch.d.shape)}, not {tuple(batch.w.shape)}")
    # 6. Add both signals on each token (Eq. 8-10). kl="full" adds the KL in the loss instead.
    coef = config.opd_coef if config.kl == "sampled" else 0.0
    batch.advantages = token_advantages(config.method, batch.A, batch.logp_s, batch.logp_t,
                                        batch.step_id, batch.w, coef)
    # 7. Take clipped policy-gradient updates, one for each minibatch of neighbouring groups.
    updates = []
    for minibatch in batch.split(config.num_minibatches):
        loss, clip_frac = backpropagate(agent, minibatch)
        updates.append((loss, agent.optimizer.step(loss), clip_frac))
    return batch_metrics(agent, iteration, batch, updates), batch


def check_sandbox(rollouts):
    """Stop, before anything moves, where the machine has failed every rollout."""
    if all(r.lost for r in rollouts):
        raise UserError("the sandbox failed a program of every rollout: see `python tools.py`, "
                        "and whether the machine has memory and disk left")


def sft_step(agent, iteration):
    """An update of supervised fine-tuning on demonstrations (sft): the cold start before SOD."""
    rows = draw(agent.train_set, agent.config, iteration, agent.config.sft_batch)
    loss, _ = backpropagate(agent, collate(rows, agent.student.device))
    return {"iteration": iteration, "iterations": num_iterations(agent),
            **update_metrics([(loss, agent.optimizer.step(loss), 0.0)]),
            **machine_metrics(agent)}, None


def draw(items, config, iteration, count, times=1):
    """The `count` items of an iteration, each `times` in a row, from an endless list: all items,
    shuffled anew each epoch."""
    N, start, drawn = len(items), (iteration - 1) * count, []
    for n in range(start, start + count):
        order = shuffled(config.seed, n // N, N)
        drawn += [items[order[n % N]]] * times
    return drawn


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, N):
    """The order of N items in one epoch."""
    return random_numbers(seed, "order", epoch).permutation(N)


# ==============================================================================================
# The method ends here. What follows is plumbing: the sum over tiles, the fast engine, lack of
# memory, several processes, the numbers of an iteration, health, evaluation, loading with its
# checks, files, the command.
# ==============================================================================================

# --- Log-probabilities without the (B, T, V) logits: some tokens by some entries at a time ------
# Each tile of logits is computed a second time in backward. Every operation is a pass over the
# tile, so there are few of them, and they work in place.

TILE_ELEMENTS, TILE_TOKENS = 2 ** 24, 4096  # of one fp32 tile (64 MiB); its tokens at most


def _tiles(tokens, vocabulary):
    """Slices of the tokens and of the vocabulary; one of each is a tile."""
    rows = max(min(tokens, TILE_TOKENS), 1)
    width = max(TILE_ELEMENTS // rows // 256 * 256, 256)  # aligned for tensor cores
    return _slices(tokens, rows), _slices(vocabulary, width)


def _slices(total, size):
    return [slice(n, min(n + size, total)) for n in range(0, max(total, 1), size)]


def _logits(a, b, temperature, term=None):
    """a @ b.T / temperature, at least fp32: the softmax is never taken in 16 bits.

    a, b     (n, D) and (m, D): hidden states and rows of the output layer, or the other way round
    term     from _term, to add to each column
    returns  (n, m)
    """
    if term is not None and a.element_size() == 2:
        a = torch.cat([a, a.new_ones(len(a), term.shape[1])], 1)
        b = torch.cat([b, term], 1)
    if a.dtype in (torch.float32, torch.float64):
        z = a @ b.T if term is None else (a @ b.T).add_(term.T)
    elif a.is_cuda:  # the GEMM adds up in fp32 anyway; do not round its result
        z = torch.mm(a, b.T, out_dtype=torch.float32)
    else:
        z = a.float() @ b.float().T
    return z if temperature == 1 else z.div_(temperature)


def _term(values, dtype):
    """Columns (N, k) of `dtype` that add up to values, (N,).

    With 16-bit hidden states, to add a number to each row of logits would take two more passes
    over the tile. So the number joins the hidden states as columns, ones join the output layer,
    and the matrix product adds it. A 16-bit number holds a third of the digits of an fp32 one, so
    three columns would do; eight keep the rows aligned.
    """
    columns = []
    for _ in range(8 if dtype.itemsize == 2 else 1):
        columns.append(values.to(dtype))
        values = values - columns[-1]
    return torch.stack(columns, 1)


def _add_product(total, a, b):
    """total += a @ b; 16-bit factors give an fp32 product, not rounded before it is added."""
    if total.dtype != a.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _sums(z, at, x=None):
    """(N,) log of the sum of exp(z), and (N,) mean of x under the softmax of z, of a tile (N, n).

    log_softmax has summed the exponentials already, so their log is z - log_softmax(z), the same
    in each column. It is read in column `at`, (N, 1): the target's, which is likely, so that the
    two numbers are of a size and little is lost in their difference.
    """
    logp = z.log_softmax(1)
    lse = (z.gather(1, at) - logp.gather(1, at))[:, 0]
    return lse, lse if x is None else torch.linalg.vecdot(logp.exp_(), x)


def _joined(lse, mean):
    """(N,) lse and (N,) mean of whole rows, from those of their tiles."""
    lse, mean = torch.stack(lse), torch.stack(mean)
    total = lse.logsumexp(0)
    return total, ((lse - total).exp() * mean).sum(0)


def _head_gradients(d_logits, scale, hidden, weight):
    """Gradients (N, D) and (V, D) of hidden states and output layer, from those of the logits.

    d_logits  function: slices of tokens and vocabulary -> (n, N), but for each token's factor
    scale     (N,) that factor: it joins the (N, D) matrices, not the far larger tiles
    """
    d_weight, d_hidden = torch.zeros_like(weight), torch.zeros_like(hidden, dtype=scale.dtype)
    blocks, tiles = _tiles(*map(len, (hidden, weight)))
    for tile in tiles:
        total = d_weight[tile].to(scale.dtype)
        for rows in blocks:
            dz = d_logits(rows, tile)
            _add_product(total, dz, (hidden[rows] * scale[rows, None]).to(hidden.dtype))
            _add_product(d_hidden[rows], dz.T, weight[tile])
            del dz  # before the next tile takes its place
        d_weight[tile] = total
    return d_hidden.mul_(scale[:, None]).to(hidden.dtype), d_weight


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        blocks, tiles = _tiles(*map(len, (hidden, weight)))
        width = tiles[0].stop
        at = (targets % width)[:, None]  # the target's column in its own tile; any in the others

        def sums(rows, tile):
            z = _logits(hidden[rows], weight[tile], temperature)  # (N, n)
            column = at[rows].clamp(max=z.shape[1] - 1)
            return *_sums(z, column, z if want_entropy else None), z.gather(1, column)[:, 0]
        whole = []
        for rows in blocks:
            lse, mean, found = zip(*(sums(rows, tile) for tile in tiles))
            chosen = torch.stack(found, 1).gather(1, targets[rows, None] // width)[:, 0]
            whole.append((*_joined(lse, mean), chosen))
        lse, mean, chosen = map(torch.cat, zip(*whole))
        logp, entropy = chosen - lse, lse - mean
        ctx.save_for_backward(hidden, weight, targets, lse, logp)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)  # a metric, not a loss
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse, logp = ctx.saved_tensors
        # Where p is near 1, p - 1 does not survive 16 bits: it comes from logp, in fp32.
        less_one = logp.expm1().to(hidden.dtype)
        minus_lse = _term(lse * -ctx.temperature, hidden.dtype)

        def d_logits(rows, tile):
            """p - one-hot; the minus of d logp / dz is in the scale below."""
            z = _logits(weight[tile], hidden[rows], ctx.temperature, minus_lse[rows])  # log p
            p = hidden.new_empty(len(z) + 1, z.shape[1])
            torch.exp(z, out=p[:-1])
            # Targets in other tiles write to one more row, which is then dropped.
            place = (targets[rows] - tile.start) % len(weight)
            p.scatter_(0, place.clamp(max=len(z))[None], less_one[None, rows])
            return p[:-1]

        return *_head_gradients(d_logits, grad / -ctx.temperature, hidden, weight), None, None, None


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_s, weight_s, hidden_t, weight_t, temperature):
        def sums(rows, tile):
            z_s = _logits(hidden_s[rows], weight_s[tile], temperature)  # (N, n)
            z_t = _logits(hidden_t[rows], weight_t[tile], temperature)
            at = torch.zeros_like(z_s[:, :1], dtype=torch.long)
            lse_t, _ = _sums(z_t, at)
            return *_sums(z_s, at, torch.sub(z_s, z_t, out=z_t)), lse_t
        blocks, tiles = _tiles(*map(len, (hidden_s, weight_s)))
        whole = []
        for rows in blocks:
            lse_s, gap, lse_t = zip(*(sums(rows, tile) for tile in tiles))
            whole.append((*_joined(lse_s, gap), torch.stack(lse_t).logsumexp(0)))
        lse_s, gap, lse_t = map(torch.cat, zip(*whole))
        kl = gap - lse_s + lse_t  # E_p[log p - log q] = E_p[z_s - z_t] - lse_s + lse_t
        ctx.save_for_backward(hidden_s, weight_s, hidden_t, weight_t, lse_s, lse_t, kl)
        ctx.temperature = temperature
        return kl

    @staticmethod
    def backward(ctx, grad):
        hidden_s, weight_s, hidden_t, weight_t, lse_s, lse_t, kl = ctx.saved_tensors
        term_s = _term(lse_s * -ctx.temperature, hidden_s.dtype)
        term_t = _term((kl - lse_t) * ctx.temperature, hidden_t.dtype)

        def d_logits(rows, tile):
            """p_v (log p_v - log q_v - KL)."""
            log_p = _logits(weight_s[tile], hidden_s[rows], ctx.temperature, term_s[rows])
            gap = _logits(weight_t[tile], hidden_t[rows], ctx.temperature, term_t[rows])
            gap = torch.sub(log_p, gap, out=gap)
            return torch.mul(log_p.exp_(), gap, out=torch.empty_like(gap, dtype=hidden_s.dtype))

        return (*_head_gradients(d_logits, grad / ctx.temperature, hidden_s, weight_s),
                None, None, None)


# --- The fast engine: continuous batching with a kept KV cache ----------------------------------


class RaggedLayer(DynamicLayer):
    """The cache of one layer: a row for each slot, and each row is written where it ends."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def update(self, keys, values, *args, **kwargs):
        """Write new keys and values, (R, heads, n, head_dim); returns all that these rows hold."""
        if not self.is_initialized:  # (slots, heads, positions, head_dim)
            self.keys, self.values = (x.new_zeros(
                len(self.batch.rollouts), x.shape[1], 0, x.shape[3]) for x in (keys, values))
            self.is_initialized = True
        room, length = self.keys.shape[2], self.batch.length
        if length > room:  # grow by half, so that this is seldom
            more = max(length, room * 3 // 2) - room
            if self.batch.graphs:
                self.batch.graphs.clear()  # they write to the old place
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        rows, positions, held = self.batch.places
        self.keys[rows, :, positions] = keys.transpose(1, 2)
        self.values[rows, :, positions] = values.transpose(1, 2)
        return self.keys[held], self.values[held]


class ContinuousBatch:
    """Slots for rollouts under way, each with its own row of the model's KV cache: an answer of
    the tool is read where the last turn ended, and a rollout that waits for one takes no part."""

    def __init__(self, model, size, prefix=()):
        check_continuous(model)
        assert not model.training, "call model.eval() before sampling"
        self.model, self.device = model, model.device
        self.window = getattr(model.config, "max_position_embeddings", None) or 2 ** 31
        self.rollouts = [None] * size  # the rollout in each slot
        self.read = [0] * size         # how many of its ids the cache holds
        self.length = 0                # positions to attend to
        self.places = None             # (rows, positions, held) that RaggedLayer.update writes to
        # Through a proxy: in a cycle, gigabytes would outlive the last turn until the next gc.
        self.cache = Cache(layer_class_to_replicate=partial(RaggedLayer, weakref.proxy(self)))
        # What a decode pass reads and writes, always at the same address: (slots,)
        self.last = torch.zeros(size, dtype=torch.long, device=self.device)  # ids not read yet
        self.start = torch.zeros_like(self.last)                             # their positions
        self.uniforms = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.graphs = {} if self.device.type == "cuda" else None  # {(rows, length): a pass}
        self.read_prefix(list(prefix))

    def read_prefix(self, prefix):
        """Read once, for all slots, the ids that every rollout begins with."""
        self.prefix, self.read = len(prefix), [len(prefix)] * len(self.read)
        if prefix:
            self.reserve(len(prefix))
            first = torch.zeros(1, dtype=torch.long, device=self.device)
            self.forward(torch.tensor([prefix], device=self.device), first, first)
            for layer in self.cache.layers:
                for x in (layer.keys, layer.values):
                    x[1:] = x[:1]

    def reserve(self, length):
        """Attend to `length` positions from now on, rounded up so that there are few shapes."""
        step = 64 if self.graphs is None else 256
        self.length = -(-length // step) * step

    def admit(self, queue):
        """Give free slots to the next rollouts of the queue."""
        for i, r in enumerate(self.rollouts):
            if queue and (r is None or r.finish_reason):
                self.rollouts[i], self.read[i] = queue.popleft(), self.prefix

    def compact(self, ready):
        """Exchange slots until those of `ready` come first, so that a batch is a plain slice."""
        front, n = [r in ready for r in self.rollouts], len(ready)
        holes = [i for i in range(n) if not front[i]]
        strays = [i for i in range(n, len(front)) if front[i]]
        for i, j in zip(holes, strays):
            for column in (self.rollouts, self.read):
                column[i], column[j] = column[j], column[i]
        for layer in self.cache.layers:
            for x in (layer.keys, layer.values):
                x[holes + strays] = x[strays + holes]

    def prefill(self, n, max_tokens):
        """Read what is unread in the first n slots, all but the last id: prompts, tool answers."""
        unread = [r.ids[self.read[i]:-1] for i, r in enumerate(self.rollouts[:n])]
        lacking = [i for i, ids in enumerate(unread) if ids]
        for batch in micro_batches([len(unread[i]) for i in lacking], max_tokens):
            rows = [lacking[b] for b in batch]
            ids = pad([unread[i] for i in rows], 0, self.device)
            start = [self.read[i] for i in rows]
            self.reserve(max(start) + ids.shape[1])
            self.forward(ids, torch.tensor(start, device=self.device),
                         torch.tensor(rows, device=self.device))

    def decode(self, n, tokens, next_token):
        """(n, tokens) new ids of the first n slots; what follows an end id has no meaning."""
        # Graphs take 16, 32, ... rows. What the rows after the first n write is overwritten before
        # it is read: they have an unread last id, too, and go on from there.
        rows = n if self.graphs is None else min(-(-n // 16) * 16, len(self.rollouts))
        ids = [r.ids for r in self.rollouts[:rows]]
        self.last[:rows] = torch.tensor([row[-1] for row in ids], device=self.device)
        self.start[:rows] = torch.tensor([len(row) - 1 for row in ids], device=self.device)
        uniforms = torch.tensor(np.stack([r.next_uniforms(tokens) for r in self.rollouts[:rows]]),
                                device=self.device)
        self.reserve(max(map(len, ids)) + tokens)
        sampled = []
        for t in range(tokens):  # without waiting for the device
            self.uniforms[:rows] = uniforms[:, t]
            run = self.decode_pass if self.graphs is None else self.decode_by_graph
            run(rows, next_token)
            sampled.append(self.last[:rows].clone())
        return torch.stack(sampled, 1)[:n].tolist()

    def decode_pass(self, rows, next_token):
        """Read the last id of the first slots and put the next one in its place."""
        hidden = self.forward(self.last[:rows, None], self.start[:rows])[:, 0]
        logits = F.linear(hidden, lm_head_weight(self.model))  # (rows, V)
        self.last[:rows] = next_token(logits, self.uniforms[:rows])
        self.start[:rows] += 1

    def decode_by_graph(self, rows, next_token):
        """decode_pass as a CUDA graph, one launch in place of a thousand: the first pass of a shape
        warms up, the second is recorded, and from then on it is replayed."""
        work, shape = partial(self.decode_pass, rows, next_token), (rows, self.length)
        if shape not in self.graphs:
            work()
            self.graphs[shape] = None
            return
        try:
            self.graphs[shape] = self.graphs[shape] or record(work, self.graphs.values())
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            tqdm.write(f"no CUDA graph of a decode pass ({str(error).splitlines()[0]}): sampling "
                       "goes on, and is slower")
            self.graphs = None
            return work()
        self.graphs[shape].replay()

    def forward(self, ids, start, rows=None):
        """Feed ids to slots; each attends to all that its slot holds before it.

        ids      (R, n), for positions start[r] .. start[r] + n - 1
        rows     (R,) slots, or None for the first R
        returns  (R, n, D) states, which only decoding multiplies with the vocabulary
        """
        R, n = ids.shape
        # Padding comes after a row's last id: later ids overwrite what it writes, unseen. It must
        # only stay in the window, whose last place no id needs: the last id is never read.
        positions = (start[:, None] + torch.arange(n, device=ids.device)).clamp(max=self.window - 1)
        written = (torch.arange(R, device=ids.device) if rows is None else rows)[:, None]
        held = slice(R) if rows is None else rows
        self.places = written, positions, (held, slice(None), slice(self.length))
        mask = torch.arange(self.length, device=ids.device) <= positions[:, :, None]  # (R, n, L)
        return self.model.base_model(
            input_ids=ids, attention_mask=mask[:, None], position_ids=positions, use_cache=True,
            past_key_values=self.cache).last_hidden_state


def record(work, graphs):
    """A CUDA graph that does what work() does, at the same addresses, when it is replayed."""
    graph, others = torch.cuda.CUDAGraph(), [g.pool() for g in graphs if g]
    with torch.cuda.graph(graph, pool=others[0] if others else None):  # they share their scratch
        work()
    return graph


def check_continuous(model):
    """Refuse a model that is not known to read rows of different length side by side: every layer
    must obey the positions and the mask, and nothing may depend on the longest row of the batch."""
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "")
    if (config.model_type not in ("qwen3", "qwen2", "llama", "gpt2")
            or any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)
            or rope in ("dynamic", "longrope") or config._attn_implementation != "sdpa"):
        raise UserError("rollout_engine continuous serves Qwen3, Qwen2, Llama and GPT-2 with full "
                        "attention and fixed rotary frequencies, not this "
                        f"{config.model_type} model; use --rollout_engine generate")


@torch.inference_mode()  # 6% faster than no_grad with 64 rollouts of the world
def sample_by_continuous_batching(agent, model, rollouts, next_token, size):
    """The fast engine: a kept KV cache, and nobody waits for another one's tool.

    A call runs while the others sample `decode_chunk` tokens; then its answer is read. Where it
    takes more than `tool_poll_timeout` seconds longer, the others go on without it. The rollouts
    are those of sample_by_generate, but for the rounding of sums, which depends on who is sampled
    beside whom; the clock has a say in that only where a program takes longer than
    `tool_poll_timeout`.
    """
    config, ends, queue = agent.config, end_ids(model, agent.tokenizer), deque(rollouts)
    prefix = rollouts[0].prompt[:shared_prefix([r.prompt for r in rollouts])]
    batch = ContinuousBatch(model, min(size, len(rollouts)), prefix)
    running, started = {}, []  # Rollout -> Future of its call's answer; those started last
    while not all(r.finish_reason for r in rollouts):
        # 1. Fill free slots, and bring the rollouts that do not wait for a tool to the front.
        batch.admit(queue)
        ready = {r for r in batch.rollouts if r and not r.finish_reason} - running.keys()
        batch.compact(ready)
        # 2. Sample a few tokens while the tools run.
        ended = decode_chunk(batch, len(ready), ends, agent, next_token)
        # 3. Wait a while for the calls of the last round, and append the answers that are there.
        if started:
            wait(started, config.tool_poll_timeout)
        elif not ready:
            wait(running.values(), return_when=FIRST_COMPLETED)
        for r in [r for r, run in running.items() if run.done()]:
            take_answer(agent, r, running.pop(r).result())
        # 4. Start the calls of the turns that have just ended.
        calls = [(r, call) for r in ended if (call := end_turn(agent, r, ends))]
        started = [agent.tool.submit(call, (*r.key, len(r.turns) - 1)) for r, call in calls]
        running.update(zip([r for r, _ in calls], started))


def decode_chunk(batch, n, ends, agent, next_token):
    """Sample a few tokens in the first n slots; returns the rollouts whose turn is over."""
    if not n:
        return []
    config = agent.config
    batch.prefill(n, current_size(agent, "micro_batch_tokens"))
    for i, (r, ids) in enumerate(zip(batch.rollouts,
                                     batch.decode(n, config.decode_chunk, next_token))):
        r.turns[-1].ids += up_to_end(ids, ends)[:config.max_response - r.response_len]
        batch.read[i] = len(r.ids) - 1
    return [r for r in batch.rollouts[:n]
            if r.turns[-1].ids[-1] in ends or r.response_len >= config.max_response]


def watched(engine):
    """The engine, with a bar of the rollouts that are finished."""
    def sample(agent, model, rollouts, *more):
        with bar_of("sampling", len(rollouts), "rollout") as bar:
            engine(agent, model, Watched(rollouts, bar), *more)
    return sample


class Watched(list):
    """Rollouts under way. An engine looks through them now and then, to see which are finished; so
    it need not know of the bar, which is brought up to date at each such look."""

    def __init__(self, rollouts, bar):
        super().__init__(rollouts)
        self.bar = bar

    def __iter__(self):
        self.bar.update(sum(bool(self[i].finish_reason) for i in range(len(self))) - self.bar.n)
        return super().__iter__()


ENGINES = {"continuous": watched(sample_by_continuous_batching),
           "generate": watched(sample_by_generate)}


# --- Lack of memory -----------------------------------------------------------------------------


def current_size(agent, name):
    """rollout_batch or micro_batch_tokens: what the run has found to fit, else the option."""
    return agent.sizes.get(name) or getattr(agent.config, name) or 2**16


def retry_on_oom(agent, name, attempt, least, most):
    """attempt(size), timed. Where memory runs out, again with half the size.

    It may simply be done again: no weight has moved, and each rollout has random numbers of its
    own. With other sizes only the rounding of sums differs.

    name         rollout_batch or micro_batch_tokens: what the size is
    least, most  the sizes below and above which nothing changes any more
    """
    started, work = time.perf_counter(), attempt.__qualname__.split(".")[0]
    while True:
        size = max(min(current_size(agent, name), most), 1)
        try:
            return attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        finally:
            agent.seconds[work] += time.perf_counter() - started
            started = time.perf_counter()
        # Only after the except clause has the traceback let go of the attempt's tensors.
        if size <= least:
            raise UserError("out of memory with one rollout at a time; lower --max_response, and "
                            "try --gradient_checkpointing true or --offload all")
        forget_gradient(agent)
        agent.sizes[name] = max(size // 2, least)
        agent.halvings += 1


def forget_gradient(agent):
    """Free what an attempt that failed has left."""
    agent.student.zero_grad()
    if agent.optimizer:
        agent.optimizer.adamw.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error):
    """Is it this error? Every device, and each library on it, says so in its own way."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


# --- Several processes: torchrun --nproc_per_node N sod_mini.py ... ---------------------------
# Every process (rank) holds the same batch. They share the work: each samples, scores and
# back-propagates some of its rollouts, with the random numbers that these have in one process.
# Results and gradients are exchanged, so weights stay the same everywhere; files and the screen
# are rank 0's. If one process ends with an error, torchrun ends the others.

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


@contextlib.contextmanager
def process_group():
    """Find the other ranks, if there are any, and leave together."""
    if RANKS > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    yield
    if RANKS > 1:  # not after an error: the others may never come
        dist.barrier()
        dist.destroy_process_group()


def my_share(items):
    """Every RANKS-th of some items: this process's part of the work."""
    return items[RANK::RANKS]


def my_micro_batches(batch, max_tokens):
    """The rows of a Batch that this process works on, cut by micro_batches."""
    rows = my_share(range(len(batch.lengths)))
    return with_bar(micro_batches(batch.lengths, max_tokens, rows, batch.shared), batch.lengths)


def all_gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    values = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(values, value)
    return values


def from_all_ranks(items):
    """The lists of all ranks, each of which had my_share, as one list in the order of the whole."""
    shares = all_gather(items)
    return [shares[n % RANKS][n // RANKS] for n in range(sum(map(len, shares)))]


def sum_over_ranks(*tensors):
    """The tensors, each summed over all ranks, in place."""
    for tensor in tensors if RANKS > 1 else ():
        dist.all_reduce(tensor)
    return tensors


def add_up_gradients(parameters):
    """Sum the gradient over all ranks; one that had no share in it has none of its own."""
    if any(all_gather(any(p.grad is not None for p in parameters))) and RANKS > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def on_rank_0(write):
    """Decorates a function that writes files or to the screen: the other ranks skip it."""
    return functools.wraps(write)(lambda *args, **kwargs: None if RANK else write(*args, **kwargs))


# --- Metrics: what an iteration looks like in numbers -------------------------------------------


def batch_metrics(agent, iteration, batch, updates):
    """The numbers of an iteration. Rollouts that the machine failed are counted, and left out."""
    config = agent.config
    rollouts = [r for r in batch.rollouts if not r.lost]
    share = lambda reason: float(np.mean([r.finish_reason == reason for r in rollouts]))
    m = {
        "iteration": iteration,
        "reward": float(np.mean([r.reward for r in rollouts])),
        "correct": float(np.mean([r.correct for r in rollouts])),  # share of correct rollouts
        "entropy": float(batch.entropy_s[batch.sampled].mean()),   # of the student, nats a token
        "turns": float(np.mean([len(r.turns) for r in rollouts])),
        **call_metrics([turn for r in rollouts for turn in r.turns], len(rollouts)),
        "cut_length": share("length"), "cut_turns": share("turns"),  # shares cut off
        # Tokens of a response, tool answers included, as a share of max_response
        "length": float(np.mean([r.response_len for r in rollouts])) / config.max_response,
        "repeated": repeated_share([turn.ids for r in rollouts for turn in r.turns]),
        "infrastructure": len(batch.rollouts) - len(rollouts),     # lost to the machine
        "grader_errors": sum("grader error" in r.reason for r in rollouts),  # these count as wrong
        "tokens": int(batch.sampled.sum()),                        # sampled
    }
    if METHODS[config.method].outcome:
        m["frac_zero_std_groups"] = frac_zero_std_groups(batch.reward, config.group_size)
    if batch.d is not None:
        m |= teacher_metrics(batch, config)
    return {**m, **update_metrics(updates), **machine_metrics(agent)}


def frac_zero_std_groups(rewards, group_size):
    """Share of the groups whose rewards are all equal, so that A is 0 in them; of those in which
    the machine has left at least two rollouts."""
    groups = [row[~row.isnan()] for row in rewards.view(-1, group_size)]
    equal = [float(bool((row == row[0]).all())) for row in groups if len(row) > 1]
    return float(np.mean(equal)) if equal else 0.0


def repeated_share(rows, n=8):
    """Share of the runs of n tokens that stood in the same turn before: what a loop is made of.

    >>> repeated_share([[1, 2, 1, 2, 1], [3, 4, 5]], n=2)
    0.3333333333333333
    """
    runs = [list(zip(*(ids[i:] for i in range(n)))) for ids in rows]
    return sum(len(r) - len(set(r)) for r in runs) / max(sum(map(len, runs)), 1)


def call_metrics(turns, num_rollouts):
    """Tool calls: how many a rollout, the share that failed, and how each kind of them ended; those
    of a user's own tool have its name before the outcome."""
    name = lambda turn: f"{turn.tool}: " * (turn.tool not in ("", tools.TOOL_NAME)) + turn.outcome
    outcomes = Counter(name(turn) for turn in turns if turn.outcome)
    calls = sum(outcomes.values())
    return {"tool_calls": calls / num_rollouts, "outcomes": dict(outcomes),
            "tool_fail": sum(turn.failed for turn in turns) / max(calls, 1)}


def teacher_metrics(batch, config):
    """How far student and teacher are apart, and what follows for w."""
    token, K = batch.sampled, batch.d.shape[1]
    step = step_tokens(batch.step_id, K) > 0  # (B, K) there is such a step
    w = batch.w[step]
    m = {
        "kl_estimate": float((batch.logp_s - batch.logp_t)[token].mean()),  # reverse KL, nats
        "teacher_entropy": float(batch.entropy_t[token].mean()),            # nats a token
        "d": float(batch.d[step].mean()), "w": float(w.mean()),             # means over steps
        "w_quantiles": np.quantile(w.tolist(), [0.1, 0.25, 0.5, 0.75, 0.9]).tolist(),
        "d_by_step": (torch.where(step, batch.d, 0.0).sum(0) / step.sum(0)).tolist(),
    }
    if METHODS[config.method].weighted and config.weights == "sod":
        several = step.sum(1) > 1  # (B,) rollouts with later steps, whose w_k depend on d_1
        low = several & (batch.d[:, 0] < NEAR_0)
        m["d1_near_0"] = float(low.sum() / several.sum().clamp(min=1))      # share of those
        capped = (w >= 1 + config.delta - 1e-6) & (config.delta > 0)
        m["w_capped"] = float(capped.float().mean())                        # share of steps
    return m


def update_metrics(updates):
    """Means over the (loss, norm, share of clipped tokens) of an iteration's updates."""
    losses, norms, clipped = np.array(updates).T
    return {"loss": float(losses.mean()), "grad_norm": float(norms.mean()),
            "clip_frac": float(clipped.mean()),
            "skipped_updates": int((~np.isfinite(norms)).sum())}


def machine_metrics(agent):
    """Time, memory and tool retries. They differ from run to run; all other numbers of an
    iteration are the same whenever the seed is."""
    seconds = {f"seconds_{name}": s for name, s in agent.seconds.items()}
    agent.seconds.clear()
    return {**seconds, "out_of_memory": agent.halvings,
            **{name: current_size(agent, name) for name in ("rollout_batch", "micro_batch_tokens")},
            "tool_retries": getattr(agent.tool, "retried", 0)}


MACHINE = ("seconds", "out_of_memory", "rollout_batch", "micro_batch_tokens", "tool_retries")


# --- Health: what the numbers of a run say, in words -------------------------------------------

NEAR_0 = 0.02  # nats/token: a usual d_k of .2 then gets w_k = .1 or less
WINDOW = 10    # iterations that are looked back upon
HEALTH = {  # metric: (lowest, highest value without a word, the sentence)
    # Cut rollouts have no answer, and are all wrong alike.
    "cut_length": (0, 0.3, "{:.0%} of rollouts were cut at the token budget: raise --max_response"),
    "length": (0, 0.7, "responses take {:.0%} of the token budget on average, and longer ones are "
               "soon cut: raise --max_response"),
    # To a loop the teacher agrees, token by token: d is small, and says nothing against it.
    "repeated": (0, 0.1, "{:.0%} of what was sampled repeats its own turn: the student has begun "
                 "to loop; lower --lr, and see in rollouts.jsonl where"),
    "cut_turns": (0, 0.3, "{:.0%} of rollouts ran out of turns: raise --max_turns"),
    # The outcome advantage of a group that agrees is 0.
    "frac_zero_std_groups": (0, 0.9, "{:.0%} of groups agree, so GRPO learns nothing from them: "
                             "raise --group_size, or take problems that are sometimes solved"),
    # A cap that is met so often has become the weight: sod is then nearly opd. Healthy runs met it
    # in up to 47% of the steps.
    "w_capped": (0, 0.6, "w is at its cap in {:.0%} of steps: raise --delta to tell them apart"),
    # Their later w_k are near 0, whatever the student does.
    "d1_near_0": (0, 0.3, "d_1 is near 0 in {:.0%} of rollouts: distillation is off after their "
                  "first step; compare --weights floor"),
    # Where a third of the calls fail, many turns teach little.
    "tool_fail": (0, 0.3, "{:.0%} of tool calls fail: see the outcomes in metrics.jsonl"),
    "tool_calls": (0.1, math.inf, "the tool is called {:.2f} times a rollout: say in --system how, "
                   "or imitate first: --method sft"),
    # The student has left what was sampled.
    "clip_frac": (0, 0.2, "{:.0%} of tokens left the clip range: lower --lr or --num_minibatches"),
    # At .1 nats one token in fifty is open; after three failed calls the paper's teacher has 2.4.
    "entropy": (0.1, math.inf, "entropy fell to {:.2f} nats: the student has stopped exploring; "
                "lower --lr, or raise --temperature"),
    "teacher_entropy": (0, 2.0, "the teacher is unsure, its entropy is {:.1f} nats: does it know "
                        "this system text and tool?"),
    "skipped_updates": (0, 0, "{:.0f} updates were not taken, for a score, the loss or the "
                        "gradient was not finite: lower --lr, or try --dtype float32"),
    "grader_errors": (0, 0, "the grader broke down on {:.0f} answers, which count as wrong: see "
                      "their reason in rollouts.jsonl"),
    "infrastructure": (0, 0, "the sandbox failed in {:.0f} rollouts, which are left out: see "
                       "`python tools.py`, and whether the machine has memory left"),
}


def health(history):
    """{metric: sentence} of what deserves a word, from the numbers of all iterations so far."""
    m = history[-1] if history else {}
    found = {name: sentence.format(m[name]) for name, (low, high, sentence) in HEALTH.items()
            if m.get(name, low) < low or m.get(name, high) > high}
    correct = [m["correct"] for m in history[-WINDOW:] if "correct" in m]
    if len(correct) == WINDOW and max(correct) == 0:
        found["correct"] = (f"no rollout was correct for {WINDOW} iterations: take easier "
                            "problems, imitate first (--method sft), or check the answers in the "
                            "data")
    calls = [m["tool_calls"] for m in history[-WINDOW:] if "tool_calls" in m]
    if calls and calls[-1] < max(calls) / 2:  # others saw success follow, and never come back
        found["calls"] = (f"tool calls a rollout fell from {max(calls):.1f} to {calls[-1]:.1f} in "
                         f"{WINDOW} iterations: stop, and read in rollouts.jsonl what the student "
                         "writes and the tool answers; then lower --lr")
    return found


def news(history):
    """The sentences about the last iteration, but for what was said of the one before, too."""
    before = health(history[:-1])
    return [sentence for name, sentence in health(history).items() if name not in before]


# --- Evaluation -------------------------------------------------------------------------------


def measure(agent, model):
    """Sample every problem of eval_set `eval_samples` times: (problems, samples) of 1 and 0.
    Seeds and silences of the tool are the same for every model."""
    config = agent.config
    prompts, _ = fitting_prompts(agent.eval_set, agent.tokenizer, config)
    repeated = [prompt for prompt in prompts for _ in range(config.eval_samples)]
    rollouts = sample_rollouts(agent, model, repeated, (config.seed, "evaluation", 0), None,
                               config.eval_temperature, config.eval_top_p)
    agent.seconds.clear()  # training has its own clock
    check_sandbox(rollouts)
    if lost := sum(r.lost for r in rollouts):
        print(f"NOTE: the sandbox failed in {lost} of {len(rollouts)} samples, counted as wrong")
    return np.array([int(r.correct) for r in rollouts]).reshape(len(prompts), config.eval_samples)


def mean_ci(correct):
    """average@k in percent with its 95% interval over problems.

    correct  (problems, k) of 0 and 1; the samples of one problem stay together, for they are alike
    returns  mean, low, high: at each end the farthest of three intervals, since each of them is too
             narrow somewhere. Student's t over the P means of problems; Wilson's for a share, which
             serves where few problems are easy among many hard ones; and that of P equal results,
             which a true mean m shows with a chance of at most (1 - m)^P
    """
    scores = np.asarray(correct, float).mean(1)
    P, m = len(scores), scores.mean()
    least = 1 - 0.025 ** (1 / P)
    error = t_975(P - 1) * scores.std(ddof=1) / math.sqrt(P) if P > 1 else float(0 < m < 1)
    q = error ** 2 / (m * (1 - m)) if error else 0.0  # Wilson's z^2 / n
    centre, half = (m + q / 2) / (1 + q), math.sqrt(error ** 2 + q ** 2 / 4) / (1 + q)
    low = max(min(m - error, centre - half, 1 - least), 0.0)
    high = min(max(m + error, centre + half, least), 1.0)
    return 100 * m, 100 * low, 100 * high


@functools.lru_cache
def t_975(freedom):
    """The 97.5% quantile of Student's t: where its density, summed from 0, reaches .475.

    >>> round(t_975(4), 3)
    2.776
    """
    t = np.linspace(0, 13, 130_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = math.exp(log_scale) / math.sqrt(freedom * math.pi) * (
        1 + t * t / freedom) ** (-(freedom + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * t[1]
    return float(np.interp(0.475, area, t[1:]))


def t_interval(values):
    """(mean, low, high): Student's 95% interval of the mean. One value has no interval, only nan.

    >>> mean, low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(mean, 2), round(low, 2), round(high, 2)  # 2 -+ 4.303 / sqrt(3)
    (2.0, -0.48, 4.48)
    """
    mean, n = float(np.mean(values)), len(values)
    half = t_975(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


# --- Loading: what can be known in seconds is known before the weights --------------------------

GIB = 2 ** 30


def load_agent(config):
    """Student, teacher, tool and data, after a preflight."""
    agent, (device, dtype) = preflight(config), choose_device(config)
    agent.digests = file_digests(config)
    torch.manual_seed(config.seed)  # of --init random
    if config.threads:  # the embedded model is too small to share; the tool takes the other cores
        torch.set_num_threads(config.threads)
    agent.student = load_model(config.student, device, dtype, config.init)
    print_model("student", model_folder(config.student), agent.student,
                config.init == "pretrained", agent)
    if config.gradient_checkpointing:
        enable_checkpointing(agent.student)
    scorer = METHODS[config.method].scorer
    if scorer:
        agent.teacher = (load_model(config.teacher, device, dtype) if scorer == "teacher" else
                         copy.deepcopy(agent.student).eval())
        agent.teacher.requires_grad_(False)
        name = (model_folder(config.teacher) if scorer == "teacher" else
                f"the student's start, told the {scorer}")
        print_model("teacher", name, agent.teacher,
                    scorer == "teacher" or config.init == "pretrained", agent)
        if scorer == "teacher":  # which may be a run that is trained further
            agent.digests["the teacher"] = str(weights_crc(agent.teacher))
        agent.teacher.to(device if config.offload == "none" else "cpu")
    return agent


def preflight(config):
    """An Agent without its models' weights, or one sentence that says why this run cannot work."""
    device, dtype = choose_device(config)
    print(f"device  {device}, {str(dtype).removeprefix('torch.')}; seed {config.seed}"
          + note_on_bf16(device, dtype))
    calls = student_context(config).calls
    tokenizer = load_tokenizer(config.student, config.thinking, calls)
    student = skeleton(config.student)
    check_model(config.student, student, tokenizer, config)
    scorer, teacher, notes = METHODS[config.method].scorer, None, []
    if scorer == "teacher":
        other = load_tokenizer(config.teacher, config.thinking, calls)
        teacher = skeleton(config.teacher)
        check_model(config.teacher, teacher, tokenizer, config)
        notes = [check_pair(student, teacher, tokenizer, other, config)]
    elif scorer:  # self-distillation: the frozen start, told more
        teacher = student
    if config.rollout_engine == "continuous":
        for model in [student] + [teacher] * (scorer == "teacher" and bool(config.eval_data)):
            check_continuous(model)
    print("rollouts  " + how_sampled(tokenizer, config, config.temperature, 1.0))
    if config.eval_data:
        print("evaluation  " + how_sampled(tokenizer, config, config.eval_temperature,
                                           config.eval_top_p))
    agent = Agent(config, None, None, tokenizer, None)
    agent.train_set = load_train_set(tokenizer, config, window_of(teacher or student))
    agent.eval_set = load_eval_set(tokenizer, config)
    note_shared_problems(agent)
    agent.tool, milliseconds = load_tool(config)
    notes += [f"{len(agent.train_set):,} rows to learn from",
              f"tool answers in {milliseconds:.0f} ms",
              check_memory(config, student, teacher, device, dtype)]
    print("preflight  " + ", ".join(notes))
    return agent


def choose_device(config):
    """(device, dtype): bf16 takes half the memory, and is fast on GPUs and on some CPUs."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]:.80}); use "
                        "--device cpu, or cuda where torch sees a GPU") from None
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, default if config.dtype == "auto" else getattr(torch, config.dtype)


def note_on_bf16(device, dtype, cpuinfo="/proc/cpuinfo"):
    """What to know of bf16 on this CPU, whose matrix products in it are several times faster than
    fp32's where it has instructions for them, and slower where it has not."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return ""
    if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path(cpuinfo).read_text()):
        return "; this CPU has instructions for bfloat16"
    return ("; this CPU has no instructions for bfloat16: --dtype float32 is faster, and takes "
            "twice the memory")


def load_pretrained(read, path, **options):
    """read(path), such as from_pretrained, with one sentence in place of its traceback."""
    folder = model_folder(path)
    if not path or not os.path.isdir(folder) and not is_hub_id(path):
        raise UserError(f"there is no folder {path!r}; name a folder that holds a model, "
                        "or a Hub id such as Qwen/Qwen3-0.6B")
    try:  # without the last option, transformers asks on the terminal, or runs the folder's code
        return read(folder, **options, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds for files it cannot use
        tools.refuse_pointers(*Path(folder).glob("*"))
        if (Path(folder) / "adapter_config.json").exists():
            raise UserError(f"{path} holds an adapter (PEFT) and no whole model; merge it into its "
                            "base model (merge_and_unload of peft), save that and name its "
                            "folder") from error
        # Where the first line ends with a colon, the second one has the numbers.
        first = re.match(r"(.*:\s*\n)?.*", str(error).strip() or repr(error))[0]
        first = " ".join(first.split()).rstrip(":.")
        raise UserError(f"cannot load {path}: {first}; a folder must hold config, weights and "
                        "tokenizer, and no code of its own; a Hub id needs a machine that can "
                        "reach the Hub") from error


def model_folder(path):
    """The folder of a model, or its Hub id as it is. A run stands for its checkpoint, and as long
    as it has none for its newest save."""
    folder = tools.locate(path)
    if not is_run(folder):
        return str(folder)
    for model in [folder / "checkpoint", *reversed(tools.numbered(folder / "saves"))]:
        if model.is_dir():
            return str(model)
    raise UserError(f"{path} is a run without a checkpoint or a save; name a folder that holds a "
                    "model, or let that run come to its first save")


def is_run(folder):
    """Is it the folder of a run? Models have a config.json, too, but none with our options."""
    file = folder / "config.json"
    return file.is_file() and b'"rollout_engine"' in file.read_bytes()


def is_hub_id(path):
    """Can it be the name of a model on the Hub, and is no folder here?"""
    spelled = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))
    return bool(spelled) and not tools.locate(path).exists()


def is_embedded(path):
    """Does it lie in the embedded world, however it is spelled?"""
    return tools.locate(path).resolve().is_relative_to(tools.locate(WORLD).resolve())


def skeleton(path, dtype=None, device="meta"):
    """A model without its weights: on the meta device at once, whatever its size."""
    def read(path, **options):
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(path, **options), dtype=dtype, **options)
    return load_pretrained(read, path)


def load_model(path, device, dtype, init="pretrained"):
    """A causal language model, without dropout, whose shipped sampling settings cannot reach our
    rollouts."""
    if init == "random":
        model = skeleton(path, dtype, "cpu")  # with random numbers
    else:
        model, read = load_pretrained(AutoModelForCausalLM.from_pretrained, path, dtype=dtype,
                                      output_loading_info=True, ignore_mismatched_sizes=True)
        # transformers fills what a file lacks with random numbers, and only warns.
        other_size = {name for name, *_ in read["mismatched_keys"]}
        if wrong := read["missing_keys"] | read["unexpected_keys"] | other_size:
            raise UserError(f"weights and config of {path} differ in {len(wrong)} tensors, such "
                            f"as {min(wrong)}; mend config.json, or load the folder again")
    # generate() fills what we leave open from model.generation_config: Qwen3 ships temperature .6,
    # top-k 20 and top-p .95. Of these we keep the ids that end a turn.
    model.shipped_generation = model.generation_config
    model.generation_config = GenerationConfig()
    disable_dropout(model)
    return model.to(device).eval()


def disable_dropout(model):
    """Two passes with different dropout masks give a token two probabilities, so the ratio would
    not begin at 1. Some modules hold the rate as a number, others an nn.Dropout."""
    for module in model.modules():
        rates = ["p"] if isinstance(module, torch.nn.Dropout) else [
            name for name, value in vars(module).items()
            if "drop" in name and isinstance(value, float)]
        for name in rates:
            setattr(module, name, 0.0)


def enable_checkpointing(model):
    """Recompute activations in backward; transformers 5.17 knows only the older name."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def print_model(role, name, model, pretrained, agent):
    """Print what was loaded, once it has proved to find a plain tool call in its own template
    likelier than chance."""
    calls = student_context(agent.config).calls
    ids, logp = check_plain_head(name, model, agent.tokenizer, calls)
    mean, chance = float(logp.mean()), -math.log(len(lm_head_weight(model)))
    if pretrained and not mean > 0.9 * chance and agent.config.preflight:  # NaN too
        raise UserError(f"{name} gives a plain tool call in its own template {mean:.2f} nats a "
                        f"token, and chance is {chance:.2f}: its weights are random, damaged or "
                        "for another tokenizer; load them again, or use --init random or "
                        "--preflight false")
    # What closes a call is certain for a model that knows calls, but what opens one is not: words
    # of the model's own may come before it.
    close = len(encode(agent.tokenizer, example(calls)[1][0]["content"])) - 1
    note = "; NOTE: worse than chance" * (pretrained and not mean >= chance)
    if pretrained and logp[close] < chance:
        note += (f"; NOTE: {agent.tokenizer.decode(ids[close])!r}, which closes a call, is out of "
                 f"its reach ({float(logp[close]):.2f} nats), so it cannot call a tool yet")
    print(f"{role} {name}, {count_parameters(model):,} parameters; a token of a plain tool call is "
          f"{math.exp(mean - chance):,.1f} times as likely to it as by chance ({mean:.2f} nats, "
          f"chance {chance:.2f}){note}")


@torch.no_grad()
def check_plain_head(name, model, tokenizer, calls=tools.HERMES):
    """Refuse a model whose logits are not hidden @ weight^T, which is what we compute; the ids of
    an example and our log-probabilities of them. The logits grow in training, and a cap shows only
    where they are large, so a checkpoint is checked again before it is written."""
    batch = collate([encode_demonstration(tokenizer, *example(calls), Context(calls))],
                    model.device)
    logp, _ = sampled_logprobs(model, batch, 1.0)
    own = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    own = own.gather(2, batch.ids[:, 1:, None])[batch.sampled[:, 1:]][:, 0]
    ours = logp[batch.sampled]
    if (own - ours).abs().mean() > (0.002 if model.dtype == torch.float32 else 0.1):
        raise UserError(NOT_PLAIN.format(name))
    return batch.ids[batch.sampled], ours


NOT_PLAIN = ("{} does more to its logits than hidden states times output layer (a cap, a scale or "
             "a bias), so its tokens would be scored wrongly; use Qwen3, Qwen2, Llama or another "
             "model with a plain output layer")


def example(calls=tools.HERMES):
    """A problem and the turns that solve it with a call."""
    return (tools.Problem("Start with 12. Add 30.", "42"), [
        {"role": "assistant", "content": calls.render("print(12 + 30)")},
        {"role": "tool", "content": "42"}, {"role": "assistant", "content": "\\boxed{42}"}])


PROBES = [
    "Solve 12 + 3045 = ?\n\t1,024.50", "naïve 東京 🙂 e\u0301", "  print( 'x' )\r\n\n",
    "\\boxed{\\frac{1}{2}}", "<think>\n\n</think>",
    '<tool_call>\n{"a": 1}\n</tool_call><tool_response></tool_response>',
    "<|im_start|>user<|im_end|><|endoftext|>"]


def load_tokenizer(path, thinking=False, calls=tools.HERMES):
    """The tokenizer, checked for what a conversation with a tool needs. Where its template has a
    thinking mode, which Qwen3's turns on unless it is told, `thinking` becomes its default."""
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, path)
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no chat template or no end-of-turn token; "
                        "use a chat model such as Qwen/Qwen3-0.6B")
    template = tokenizer.get_chat_template(tools=calls.schemas)
    if thinking and "enable_thinking" not in template:
        raise UserError(f"the chat template of {path} has no thinking mode; use --thinking false")
    if "enable_thinking" in template:  # a save of ours has such a line already: take it out
        template = re.sub(r"^{%- set enable_thinking = .*?%}", "", template)
        default = "true" if thinking else "false"
        tokenizer.chat_template = ("{%- set enable_thinking = enable_thinking | default("
                                   f"{default}) %}}{template}")
    check_template(path, tokenizer, calls)
    return tokenizer


def check_template(path, tokenizer, calls):
    """Refuse a template that does not show the tools (where it has to) or their answers, and a
    tokenizer in whose decoded text a tool call cannot be found again."""
    probe, (problem, (turn, *_)) = "the text of a tool", example(calls)
    try:
        shown = tokenizer.decode(encode_prompt(tokenizer, problem, Context(calls))
                                 + encode_tool_turn(tokenizer, probe, calls))
        after = render_tool_turn(tokenizer, probe, calls)
    except Exception as error:  # a template may raise anything; every other error is a bug
        if not any(frame.name == "apply_chat_template"
                   for frame in traceback.extract_tb(error.__traceback__)):
            raise
        shown, after = f"an error ({error})", tokenizer.eos_token
    names = [schema["function"]["name"] for schema in calls.schemas or ()]
    if not all(name in shown for name in [*names, probe]):
        raise UserError(f"the chat template of {path} does not show a tool or its answers: it "
                        f"gave {shown!r}; use a model whose template knows tools, or "
                        "--calls python")
    if not after.startswith(tokenizer.eos_token):
        raise UserError(f"the chat template of {path} ends a turn with {after[:12]!r} and its "
                        f"tokenizer with {tokenizer.eos_token!r}: set eos_token in "
                        "tokenizer_config.json to what the template writes")
    read = tokenizer.decode(encode(tokenizer, turn["content"]), skip_special_tokens=True)
    if calls.parse(read) != calls.parse(turn["content"]):
        raise UserError(f"the tokenizer of {path} reads the tool call {turn['content']!r} as "
                        f"{read!r}, in which no call can be found; mark <tool_call> and "
                        "</tool_call> as not special in tokenizer.json, or use --calls python")


def how_sampled(tokenizer, config, temperature, top_p):
    """What a success depends on besides the model, as a line for the screen."""
    context = student_context(config)
    where = "calls as python blocks, no tool schema"
    if schemas := context.calls.schemas:
        shown = tokenizer.decode(encode_prompt(tokenizer, example()[0], Context(context.calls)))
        marks = "|".join(map(re.escape, tokenizer.get_added_vocab()))
        names = [schema["function"]["name"] for schema in schemas]
        roles = re.findall(f"(?:{marks})(system|developer|user)", shown[:shown.index(names[0])])
        where = f"tool schema in the {(roles or ['first'])[-1]} turn"
        where += f": {', '.join(names)}" * (names != [tools.TOOL_NAME])
    where += f"; worked examples of {config.examples}" * bool(context.examples)
    return (f"temperature {temperature}, top-p {top_p}, no top-k; at most {config.max_turns} turns "
            f"and {config.max_response:,} tokens; thinking {'on' if config.thinking else 'off'}; "
            f"system text {config.system!r}; {where}")


def check_model(path, model, tokenizer, config):
    """Each id that the tokenizer can write needs a row, each position of a rollout a place, and
    logits nothing but a product."""
    rows, largest = len(lm_head_weight(model)), max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(f"the tokenizer writes ids up to {largest} and {path} has {rows} "
                        "vocabulary rows; use the tokenizer that the model was trained with")
    window = window_of(model)
    if config.max_prompt + config.max_response > window:
        raise UserError(f"{path} reads {window} tokens; max_prompt {config.max_prompt} and "
                        f"max_response {config.max_response} are more: lower one of them")
    # Such as final_logit_softcapping (Gemma), logit_scale (Cohere), logits_scaling (Granite).
    factors = [value for name, value in vars(model.config.get_text_config()).items()
               if re.match(r"(final_|output_)?logits?_\w*(cap|scal|mult)|lm_head_mult", name)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None or any(
            value not in (None, False, 1) for value in factors):
        raise UserError(NOT_PLAIN.format(path))


def window_of(model):
    """How many tokens a model can read."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def check_pair(student, teacher, tokenizer_s, tokenizer_t, config):
    """Refuse two sides that write different ids for one text; returns what was found."""
    for text in PROBES:
        if encode(tokenizer_s, text) != encode(tokenizer_t, text):
            raise UserError(f"{config.student} and {config.teacher} give different ids for "
                            f"{text!r}, and SOD compares log-probabilities id by id; use two "
                            "models of one family")
    rows_s, rows_t = len(lm_head_weight(student)), len(lm_head_weight(teacher))
    if config.kl == "full" and rows_s != rows_t:
        raise UserError(f"student and teacher have {rows_s} and {rows_t} vocabulary rows; "
                        "--kl full compares row by row, so use --kl sampled")
    same = f"same ids on {len(PROBES)} probes"
    context = student_context(config)
    shown = [encode_demonstration(t, *example(context.calls), context).ids
             for t in (tokenizer_s, tokenizer_t)]
    if shown[0] != shown[1]:
        return f"{same}, NOTE: the teacher has another template, and scores the student's"
    return f"{same}, same template"


def check_memory(config, student, teacher, device, dtype):
    """Weights, moments, gradient and masters against what is free. Activations and caches come on
    top; they shrink by themselves (see retry_on_oom)."""
    N, M = count_parameters(student), count_parameters(teacher) if teacher is not None else 0
    need, free = dtype.itemsize * (N + M) / GIB, free_memory(device) / GIB
    if config.method != "vanilla" and config.offload != "all":
        need += (12 * N + 4 * N * (dtype != torch.float32)) / GIB  # fp32: its own master
    if need > free and config.preflight:
        raise UserError(f"models, optimiser and gradient take {need:.3f} GiB, and {free:.3f} are "
                        f"free on {device}; choose smaller models, try --offload all, or go on "
                        "all the same: --preflight false")
    return f"{need:.3f} GiB on {device} for weights, AdamW and gradient"


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def free_memory(device):
    """Bytes a run could take: of the GPU, else of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])


def load_train_set(tokenizer, config, window):
    """What the student learns from: [(Problem, prompt ids), ...], or for sft [Rollout, ...]."""
    if config.method == "vanilla":
        return []
    if config.method == "sft":
        rows = [encode_demonstration(tokenizer, problem, turns, student_context(config))
                for problem, turns in tools.load_demonstrations(
                    config.demonstrations, call_form(config.calls, config.tools))]
        pairs, skipped = fitting([(row, row.ids) for row in rows],
                                 config.max_prompt + config.max_response)
        kept = [row for row, _ in pairs]
    else:
        problems = tools.load_problems(config.train_data, call_form(config.calls, config.tools))
        kept, skipped = fitting_prompts(problems, tokenizer, config)
        if METHODS[config.method].scorer and teacher_context(config) != student_context(config):
            kept, more = fitting_contexts(kept, tokenizer, config, window)
            skipped += more
    if skipped:
        print(f"{skipped} problems or demonstrations are too long and skipped: max_prompt "
              f"{config.max_prompt}, max_response {config.max_response}")
    return kept


def fitting_prompts(problems, tokenizer, config):
    """[(Problem, ids)] of the problems whose prompt fits the budget, and how many do not."""
    context = student_context(config)
    return fitting([(p, encode_prompt(tokenizer, p, context)) for p in problems],
                   config.max_prompt)


def fitting_contexts(pairs, tokenizer, config, window):
    """Those of [(Problem, ids), ...] for which the teacher's own prompt leaves room for a response
    in its window, and how many others there are."""
    context = teacher_context(config)
    if context.privileged and not all(getattr(p, context.privileged) for p, _ in pairs):
        raise UserError(f"{config.train_data} has problems without {context.privileged}; method "
                        f"{config.method} needs one in every row")
    longer = [(pair, encode_prompt(tokenizer, pair[0], context)) for pair in pairs]
    kept, skipped = fitting(longer, window - config.max_response)
    return [pair for pair, _ in kept], skipped


def fitting(rows, limit):
    """The rows [(item, ids), ...] of at most `limit` ids, and how many others there are."""
    kept = [(item, ids) for item, ids in rows if len(ids) <= limit]
    if not kept:
        raise UserError(f"all {len(rows)} rows are longer than {limit} tokens (the shortest has "
                        f"{min(len(ids) for _, ids in rows)}); raise --max_prompt")
    return kept, len(rows) - len(kept)


def load_eval_set(tokenizer, config):
    """The held-out problems that fit the prompt budget, at most eval_problems of them."""
    if not config.eval_data:
        return []
    problems = tools.load_problems(config.eval_data, call_form(config.calls, config.tools))
    kept, skipped = fitting_prompts(problems[:config.eval_problems], tokenizer, config)
    if skipped:
        print(f"{skipped} held-out prompts are longer than {config.max_prompt} tokens and skipped")
    return [problem for problem, _ in kept]


@functools.lru_cache
def worked_examples(path, calls=tools.HERMES):
    """The turns of a file of worked conversations, which has the form of demonstrations."""
    if not path:
        return ()
    turns = [turn for problem, solution in tools.load_demonstrations(path, calls)
             for turn in [*problem.messages, *solution]]
    if any(turn["role"] == "system" for turn in turns):
        raise UserError(f"{path} holds a system turn; worked examples are read after the system "
                        "text of --system: delete it there")
    return tuple(turns)


@functools.lru_cache
def call_form(calls, names):
    """How tools are called, and which ones, of the options --calls and --tools."""
    known = []
    for name in names.split(","):
        known += [tools.INTERPRETER] if name == tools.TOOL_NAME else load_functions(name)
    twice = [name for name, n in Counter(tool.name for tool in known).items() if n > 1]
    if twice or not known:
        raise UserError(f"tools is {names!r}, which holds {twice[0] if twice else 'no function'}"
                        f"{' twice' * bool(twice)}; name each tool once")
    return tools.CALLS[calls](known)


def load_functions(path):
    """The functions of a user's file as tools; their schemas come from hints and docstrings."""
    file = tools.locate(path)
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"tools names {path!r}, which is no Python file; name {tools.TOOL_NAME}, a "
                        ".py file of functions, or both with a comma between them")
    spec = importlib.util.spec_from_file_location("tools_of_the_user", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source, found = file.read_text(encoding="utf-8"), []
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == spec.name and not name.startswith("_"):
            try:
                found.append(tools.Tool(name, get_json_schema(function), source))
            except (DocstringParsingException, TypeHintParsingException) as error:
                raise UserError(f"{path}: the function {name} gives no schema ({error}); it needs "
                                "a type hint for each argument, and a docstring with a line for "
                                "each under `Args:`") from None
    return found


def note_shared_problems(agent):
    """Say how many problems to measure on are also among those to learn from."""
    learnt = {(item.problem if isinstance(item, Rollout) else item[0]).question
              for item in agent.train_set}
    if shared := sum(problem.question in learnt for problem in agent.eval_set):
        print(f"NOTE: {shared} of the {len(agent.eval_set)} problems to measure on are also among "
              "those to learn from, so the results say little about others")


def load_tool(config):
    """The sandbox, which refuses to start where it cannot contain a program, and the milliseconds
    that a call takes."""
    modules = tuple(filter(None, config.tool_modules.split(",")))
    for name in modules:
        if not name.isidentifier() or importlib.util.find_spec(name) is None:
            raise UserError(f"tool_modules names {name!r}, which is not installed; pip install "
                            "it, or leave it out of --tool_modules")
    options = dict(timeout=config.tool_timeout, max_chars=config.tool_chars, modules=modules,
                   unsafe=config.tool_unsafe)
    tool = (tools.SilentTool(config.silent_rate, config.silent_persist, **options)
            if config.silent_rate else tools.PythonTool(**options))
    try:
        _, answer = [tool.run(["print(1 + 1)"])[0] for _ in range(2)]  # the first call starts it
    except RuntimeError as error:
        raise UserError(str(error)) from None
    for source in {t.source for t in call_form(config.calls, config.tools).known if t.source}:
        (there,) = tool.run([tools.as_module(source)])
        if there.outcome != "ok":
            raise UserError(f"the file of --tools does not run in the sandbox ({there.outcome}): "
                            f"{there.text.strip()}")
    if answer.text.strip() != "2":
        raise UserError(f"the tool answers {answer.text.strip()!r} ({answer.outcome}) to "
                        "print(1 + 1), not 2; see what `python tools.py` says, or raise "
                        "--tool_timeout")
    return tool, 1000 * answer.seconds


# --- Files ------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "clock.jsonl", "rollouts.jsonl")  # they grow by lines each iteration
VERSIONS = {"sod-mini": "0.3", "torch": torch.__version__, "transformers": transformers.__version__}


@contextlib.contextmanager
def run_folder(config):
    """runs/NAME, new or one to go on with, which is this process's alone. Where loading fails, and
    nothing has been made yet, a new one is removed again."""
    folder = all_gather(None if RANK else open_run_folder(config))[0]
    with contextlib.nullcontext() if RANK else locked_and_logged(folder):
        try:
            yield folder
        except BaseException:
            if not (folder / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def locked_and_logged(folder):
    """The folder of a run for this process alone, with what it prints from now on in log.txt."""
    with (tools.locked(folder), open(folder / "log.txt", "ab", buffering=0) as log,
          contextlib.redirect_stdout(Logged(sys.stdout, log, folder))):
        yield


@dataclass(eq=False)
class Logged:
    """A stream whose words go to a file of the run first, for its screen may be closed."""
    screen: object
    log: object
    folder: Path

    def __getattr__(self, name):
        return getattr(self.screen, name)

    def write(self, text):
        with tools.writing(self.folder):
            self.log.write(text.encode("utf-8", "backslashreplace"))
        return self.screen.write(text)


@contextlib.contextmanager
def how_to_go_on(folder):
    """After an error or a signal, say what is saved and how the run goes on."""
    try:
        yield
    except BaseException:
        if folder.exists() and not RANK:
            for save in tools.numbered(folder / "saves")[-1:]:
                print(f"saved {save}", file=sys.stderr)
            print(f"to go on: python sod_mini.py --resume {folder}", file=sys.stderr)
        raise


def open_run_folder(config):
    """Make the folder of a new run, or find that of an earlier one."""
    name = config.name or f"{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.resume or Path(config.out) / name)
    unnamed = not (config.name or config.resume)
    try:
        folder.mkdir(parents=True, exist_ok=not unnamed)
    except FileExistsError:
        if not (unnamed and folder.is_dir()):
            raise
        time.sleep(1)  # another run began in this second: take the next one
        return open_run_folder(config)
    # A run that was killed while it was loading has left a log, and nothing else.
    if not config.resume and {*os.listdir(folder)} - {"log.txt"}:
        raise UserError(f"{folder} exists already; give this run another --name, or go on with "
                        f"that one: --resume {folder}")
    if (folder / "checkpoint").exists() and not tools.numbered(folder / "saves"):
        raise UserError(f"{folder} is finished, and its last save, from which it could go on, is "
                        f"gone; to train its result further, start a run with --student {folder}")
    return folder


def config_json(config):
    """What a run was made with, as JSON can hold it; whether it was resumed makes no difference."""
    return {**{k: v for k, v in asdict(config).items() if k != "resume"}, "versions": VERSIONS}


@on_rank_0
def write_config(config, folder):
    with tools.writing(folder):
        tools.write_whole(folder / "config.json", json.dumps(config_json(config), indent=1) + "\n")


def find_run(name, out=Config.out):
    """The folder of a run: as given, else that of a run of this name below `out`."""
    folders = [tools.locate(name), tools.locate(Path(out) / name)]
    return next((f for f in folders if (f / "config.json").exists()), folders[0])


def resumed_config(given):
    """The settings of an earlier run, in which `given`, the options of the command line with
    "resume" among them, take the place of what was stored."""
    folder = find_run(given["resume"], given.get("out", Config.out))
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = {name: stored[name] for name in stored.keys() - {"versions"}}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} holds no run that can be resumed ({error}); name its folder, "
                        "such as runs/NAME") from None
    try:
        before = Config(**stored)
    except (UserError, TypeError) as error:  # a scheme, a method or an option has gone since then
        raise UserError(f"{folder / 'config.json'} does not fit this sod_mini.py ({error}); bring "
                        "back what the run was started with, or begin a new run") from None
    return Config(**{**asdict(before), **given, "resume": str(folder)})


@on_rank_0
def write_iteration(agent, m, batch, folder):
    """The numbers and rollouts of an iteration, as lines of the logs. Time and memory go to a file
    of their own, so that the others depend on the seed alone."""
    clock = {k: v for k, v in m.items() if k.startswith(MACHINE)}
    rows = ([{k: plain(v) for k, v in m.items() if k not in clock}],
            [{"iteration": m["iteration"], **clock}],
            list(rollout_rows(batch, m["iteration"], agent.tokenizer, agent.config.store_tokens))
            if batch else [])
    with tools.writing(folder):
        for name, new in zip(LOGS, rows):
            tools.append_rows(folder / name, new)


def plain(value, digits=None):
    """A value or list as JSON can hold it: it knows neither NaN nor infinity, they become null."""
    if isinstance(value, list):
        return [plain(v, digits) for v in value]
    if not isinstance(value, float) or digits is None and math.isfinite(value):
        return value
    return round(value, digits) + 0.0 if math.isfinite(value) else None  # + 0.0: no -0.0


def rollout_rows(batch, iteration, tokenizer, with_tokens):
    """A batch as JSON-ready dicts, one a rollout; d, w and the teacher's entropy (nats a token) of
    a step are null without a teacher, and where the machine failed the rollout, as is its
    advantage. The first `with_tokens` rollouts also have the tokens of each step (token_row)."""
    entropy_t = step_entropy(batch)
    A = torch.where(batch.sampled, batch.A.view(len(batch.A), -1), math.nan).nanmean(1)  # (B,)
    for i, r in enumerate(batch.rollouts):
        d, w, h = ([None] * len(r.turns) if x is None or r.lost else plain(x[i].tolist(), 4)
                   for x in (batch.d, batch.w, entropy_t))
        turns = [turn_row(turn) | {"d": d[k], "w": w[k], "entropy_t": h[k]}
                 | (token_row(batch, i, k + 1, tokenizer)
                    if i < with_tokens and not r.lost else {})
                 for k, turn in enumerate(r.turns)]
        advantage = None if r.lost else plain(float(A[i]), 4)
        yield {"iteration": iteration, "question": r.problem.question, "answer": r.problem.answer,
               "correct": r.correct, "reason": r.reason, "reward": round(r.reward, 4),
               "advantage": advantage, "finish_reason": r.finish_reason, "turns": turns}


def turn_row(turn):
    """What a step wrote, what became of its call, and the tool's answer, null without one; the name
    of the tool where it is a user's own."""
    return {"text": turn.text, "outcome": turn.outcome,
            "tool": turn.tool_text if turn.outcome not in ("", "not_run") else None,
            **({"name": turn.tool} if turn.tool not in ("", tools.TOOL_NAME) else {})}


def step_entropy(batch):
    """(B, K) the teacher's mean entropy at each step, nats a token; None without a teacher."""
    if batch.entropy_t is None:
        return None
    tokens = step_tokens(batch.step_id, batch.d.shape[1])
    return step_sums(batch.entropy_t, batch.step_id, batch.d.shape[1]) / tokens.clamp(min=1)


def token_row(batch, i, k, tokenizer):
    """The tokens of step k of rollout i, log-probabilities and advantages to three decimals."""
    step = batch.step_id[i] == k  # (T,)
    row = {"tokens": [tokenizer.decode([token]) for token in batch.ids[i, step].tolist()]}
    for name, values in (("logp_s", batch.logp_s), ("logp_t", batch.logp_t),
                         ("token_advantages", batch.advantages)):
        if values is not None:
            row[name] = plain(values[i, step].tolist(), 3)
    return row


@on_rank_0
def save_checkpoint(agent, folder, results):
    """The trained student and its card, as folder/checkpoint. The last save stays, so that the
    run can go on if it is given more iterations."""
    check_plain_head(agent.config.student, agent.student, agent.tokenizer,
                     student_context(agent.config).calls)
    with tools.writing(folder), tools.whole_folder(folder / "checkpoint") as aside:
        write_model(agent, aside, results)
    for other in {*(folder / "saves").iterdir()} - {*tools.numbered(folder / "saves")[-1:]}:
        tools.remove(other)
    print(f"checkpoint {folder / 'checkpoint'}")


def write_model(agent, folder, results):
    """Fill a folder that AutoModelForCausalLM.from_pretrained and HF-compatible servers load."""
    agent.student.save_pretrained(folder)
    # A server samples as this file says. The base model's settings are not those the student is
    # measured with: Qwen2.5-Coder's repetition penalty of 1.1 spoils the copying of numbers.
    shipped, config = agent.student.shipped_generation, agent.config
    GenerationConfig(eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id,
                     do_sample=True, temperature=config.eval_temperature, top_p=config.eval_top_p,
                     top_k=0).save_pretrained(folder)
    agent.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(agent.config, results), encoding="utf-8")


@on_rank_0
def save_run(agent, folder):
    """Save all that the rest of the run depends on: a model folder, with the state of the optimiser
    beside the weights. The newest two saves are kept."""
    save = folder / "saves" / f"iteration-{agent.iteration}"
    if save.exists():
        return
    with tools.writing(folder), tools.whole_folder(save) as aside:
        write_model(agent, aside, {})
        torch.save({"iteration": agent.iteration, "optimizer": agent.optimizer.state_dict(),
                    "digests": agent.digests,
                    "lengths": {name: (folder / name).stat().st_size for name in LOGS
                                if (folder / name).exists()}}, aside / "state.pt")
    for old in tools.numbered(folder / "saves")[:-2]:
        tools.remove(old)


def file_digests(config):
    """{file: digest} of what a run is made of besides models and settings: scripts and data."""
    files = {f"{name}.py": Path(__file__).with_name(f"{name}.py")
             for name in ("sod_mini", "tools", "evaluate")}
    files |= {name: tools.locate(name) for name in (
        config.train_data, config.eval_data, config.demonstrations, config.examples,
        config.teacher_examples, *config.tools.split(",")) if name}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()
            if file.is_file()}


def restore(agent, folder):
    """Take over the newest save, and cut the logs back to where they were at the time."""
    saves, state = tools.numbered(folder / "saves"), {}
    try:
        if saves:
            state = torch.load(saves[-1] / "state.pt", map_location="cpu", weights_only=True)
            saved = load_model(saves[-1], "cpu", agent.student.dtype)
            agent.student.load_state_dict(saved.state_dict())
            agent.optimizer = make_optimizer(agent)
            agent.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(f"{saves[-1]} cannot be taken over ({repr(error):.200}); resume with the "
                        "--student, --dtype and --offload that it began with, or remove that "
                        "folder to go on from the save before it") from error
    agent.iteration = state.get("iteration", 0)
    before, now = state.get("digests", {}), agent.digests
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            print(f"NOTE: {name} has changed since this run was last started")
    cut_logs_back(folder, state.get("lengths", {}))
    print(f"resumed {folder} after iteration {agent.iteration}; its settings come from its "
          "config.json and from the options given now, not from the defaults of Config")


@on_rank_0
def cut_logs_back(folder, lengths):
    """Cut the logs to their length when the run was saved; print what is missing from them."""
    for name in LOGS:
        if note := tools.cut_back(folder / name, lengths.get(name, 0)):
            print(note)


def model_card(config, results):
    """What the checkpoint is, how it was trained and measured: Hub metadata and markdown."""
    measured = (f"average@{config.eval_samples} on `{config.eval_data}`, 95% interval over "
                f"problems:\n\n{results_table(results)}{what_changed(results, config)}"
                ) if results else "Not evaluated."
    if results and "student before" not in results:
        measured += "\n\nThe student before training was not measured on this test."
    # The name of a folder means nothing on other machines.
    base = f"base_model: {config.student}\n" * is_hub_id(config.student)
    start = (f"The embedded {Path(config.student).name} of sod-mini" if is_embedded(config.student)
             else config.student if base else f"The model of a folder `{config.student}`")
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [sod, on-policy-distillation, tool-use]
---

{start}, trained with sod-mini, method `{config.method}`, to solve
problems in several turns with tools: `{config.tools}`, called in the form `{config.calls}`.
Its licence is that of the model before training.

{measured}

Settings: {json.dumps(config_json(config))}
"""


# --- Results: what was measured, and on what ----------------------------------------------------

NO_MATTER = ("rollout_batch", "micro_batch_tokens", "decode_chunk", "tool_poll_timeout", "threads")


def measured_with(agent, model):
    """What a result depends on: weights, problems with their prompts, what functions of the user's
    do, sampling, the grader."""
    prompts, _ = fitting_prompts(agent.eval_set, agent.tokenizer, agent.config)
    functions = [tool.source for tool in call_form(agent.config.calls, agent.config.tools).known]
    read = repr((functions, prompts)).encode("utf-8", "surrogatepass")
    names = [f.name for f in fields(Sampling) if f.name not in NO_MATTER]
    names += ["eval_samples", "eval_temperature", "eval_top_p"]
    return {**{name: getattr(agent.config, name) for name in names},
            "prompts": hashlib.sha256(read).hexdigest(),
            "weights": weights_crc(model), "grader": agent.digests.get("tools.py")}


def weights_crc(model):
    """A number that changes with any parameter."""
    crc = 0
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def measure_once(agent, name, model, folder, results):
    """Measure a model and store what came of it as results[name] and in results.json; unless an
    earlier start of this run has, and nothing that the result depends on is another now."""
    file = folder / "results.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    if not agent.eval_set:
        return
    how, before = measured_with(agent, model), stored.get(name, {}).get("measured_with", {})
    if name == "student before" and before.get("weights", how["weights"]) != how["weights"]:
        print(f"NOTE: the run began with another model than this one, so {name!r} is left out")
        return
    if stored.get(name, {}).get("measured_with") != how:
        with on_device(model, agent.student.device):
            correct = measure(agent, model)
        stored[name] = {"measured_with": how, "correct": correct.tolist()}
        write_results(folder, stored)
    results[name] = np.array(stored[name]["correct"])


@on_rank_0
def write_results(folder, stored):
    with tools.writing(folder):
        tools.write_whole(folder / "results.json", json.dumps(stored))


def results_table(results):
    """{name: (problems, k) array} as a markdown table of average@k with its interval."""
    lines = ["| model | average@k | 95% interval |", "|---|---|---|"]
    for name, correct in results.items():
        mean, low, high = mean_ci(correct)
        lines.append(f"| {name} | {mean:.1f}% | {low:.1f} to {high:.1f} |")
    return "\n".join(lines)


# Where two models score alike on all but n problems, one of them wins all n by chance with a
# probability of 2 / 2^n. For n = 5 that is 1 in 16, more than the 1 in 20 of a 95% interval.
FEWEST_DIFFERING = 6


def what_changed(results, config):
    """The sentence on what training has changed, problem by problem; "" where that is not known."""
    if not {"student before", "student after"} <= results.keys():
        return ""
    before, after = (100 * results[f"student {when}"].mean(1) for when in ("before", "after"))
    mean, low, high = t_interval(after - before)
    low, high = max(-100.0, low), min(100.0, high)  # in this order also where they are nan
    mean, low, high = (round(x, 1) + 0.0 for x in (mean, low, high))  # + 0.0: no -0.0
    sentence = (f"\n\nstudent after minus before: {mean:+} points, 95% interval {low} to {high} "
                "over problems, paired")
    differing = np.count_nonzero(after != before)
    if not differing:
        sentence += "; the same on every problem"
    elif differing < FEWEST_DIFFERING and (low > 0 or high < 0):
        sentence += (f"; the two differ on {differing} problems only, and below "
                     f"{FEWEST_DIFFERING} chance alone does that too often")
    elif high < 0:
        name = "sft_lr" if config.method == "sft" else "lr"
        sentence += (f"; this run made the student worse: try a lower --{name} than "
                     f"{getattr(config, name)}")
    return sentence


# --- The screen -------------------------------------------------------------------------------

SHOWN = {"reward": "reward {:+.2f}", "correct": "correct {:.0%}", "kl_estimate": "kl {:.2f}",
         "d": "d {:.2f}", "w": "w {:.2f}", "tool_fail": "tool fail {:.0%}",
         "cut_length": "cut {:.0%}", "tokens": "{:,} tokens", "loss": "loss {:.3f} nats",
         "grad_norm": "grad {:.2f}"}


def bar_of(what, total, unit):
    """A bar with rate and time left: on a terminal, of work that takes more than five seconds, and
    only as long as it lasts."""
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, delay=5, leave=False,
                disable=True if RANK else None)


def with_bar(batches, lengths):
    """The micro-batches, with a bar of the tokens in those that are done."""
    batches, tokens = list(batches), lambda rows: sum(lengths[i] for i in rows)
    what = "gradient" if torch.is_grad_enabled() else "scores"
    with bar_of(what, sum(map(tokens, batches)), "token") as bar:
        for rows in batches:
            yield rows
            bar.update(tokens(rows))


def progress_line(m, config):
    """One dense line an iteration: the numbers that its method has."""
    parts = [f"iteration {m['iteration']}/{m.get('iterations', config.iterations)}"]
    parts += [text.format(m[name]) for name, text in SHOWN.items() if name in m]
    parts.append(f"{sum(v for name, v in m.items() if name.startswith('seconds')):.1f} s")
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB")
    if m["tool_retries"]:
        parts.append(f"{m['tool_retries']} tool calls tried again so far")
    if m["out_of_memory"]:
        parts.append(f"{m['out_of_memory']} times out of memory so far: rollout_batch "
                     f"{m['rollout_batch']}, micro_batch_tokens {m['micro_batch_tokens']}")
    return " | ".join(parts)


def show_rollout(batch, calls=tools.HERMES):
    """A rollout with d and w beside each turn: if there is one, that recovered from a failure."""
    i, r = max(((i, r) for i, r in enumerate(batch.rollouts) if not r.lost), key=lambda pair: (
        any(turn.failed for turn in pair[1].turns), pair[1].correct))
    lines = [f"    {r.problem.question}  [answer {r.problem.answer}, reward {r.reward:+.1f}]"]
    for k, turn in enumerate(r.turns):
        call = calls.parse(turn.text)
        wrote = call.code if call and call.code else turn.text
        came = (turn.tool_text or r.finish_reason).strip().rpartition("\n")[2]
        trust = "" if batch.d is None else f"d {batch.d[i, k]:.2f}  w {batch.w[i, k]:.2f}  "
        lines.append(f"    turn {k + 1}  {trust}{wrote.strip()[:60]!r} -> {came[:50]}")
    return "\n".join(map(tools.printable, lines))


def show_iteration(m, batch, history, config):
    """Write to the screen: the line of an iteration, health, now and then a rollout."""
    if (batch or m["skipped_updates"] or m["iteration"] % 20 == 0
            or m["iteration"] == m["iterations"]):
        tqdm.write(progress_line(m, config))
    for sentence in news(history):
        tqdm.write(f"    health: {sentence}")
    if batch and config.show_every and (m["iteration"] - 1) % config.show_every == 0:
        tqdm.write(show_rollout(batch, student_context(config).calls))


# --- The command ------------------------------------------------------------------------------


def add_options(parser, kind, words):
    """An option for each field of a dataclass; its comment in the source is the help.

    words  {field: [allowed, ...]} for those that take one of a few
    """
    source = "".join(inspect.getsource(cls) for cls in kind.__mro__[:-1])
    comments = dict(re.findall(r"^    (\w+) *:.*# *(.+)$", source, re.M))
    for f in fields(kind):
        if f.type not in (bool, int, float, str):
            raise UserError(f"{kind.__name__}.{f.name} is of the type {f.type}; an option can be "
                            "bool, int, float or str")
        parser.add_argument(f"--{f.name}", type=as_bool if f.type is bool else f.type,
                            default=argparse.SUPPRESS,
                            metavar=" | ".join(words.get(f.name, [f.type.__name__])),
                            help=f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%"))
    parser.add_argument("--version", action="version", version=", ".join(
        f"{name} {number}" for name, number in VERSIONS.items()))


ELSEWHERE = {  # what other trainers call an option, and how it is called here
    "learning_rate": "lr", "batch_size": "prompts", "num_generations": "group_size",
    "model": "student", "dataset": "train_data", "max_steps": "iterations", "output_dir": "out"}


def parse_options(parser, argv):
    """As parser.parse_args, which also says what a mistyped option may have been meant to be."""
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option[2:] for option in parser._option_string_actions if option[:2] == "--"]
        meant = []
        for word in unknown:
            name = word.lstrip("-").partition("=")[0].replace("-", "_") if word[:1] == "-" else ""
            likely = ([ELSEWHERE[name]] if name in ELSEWHERE else
                      [option for option in known if name and option.startswith(name)]
                      or difflib.get_close_matches(name, known))
            meant += [f"--{option}" for option in likely[:1] if option in known]
        hint = f"; did you mean {' and '.join(meant)}?" if meant else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return given


def as_bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_config(argv=None):
    """Config from its defaults, a preset and the command line, in this order; the preset's name."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        usage="python sod_mini.py [--preset NAME] [--OPTION VALUE ...]    (--help lists them)",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100))
    parser.add_argument("--preset", choices=PRESETS, help="set of values that replace the defaults "
                        "below: world (none), cpu (a small pretrained pair), gpu, paper; needed "
                        "with other models or data than the embedded ones")
    add_options(parser, Config, choices())
    given = vars(parse_options(parser, argv))
    preset = given.pop("preset", None)
    try:
        if given.get("resume"):
            config = resumed_config({**PRESETS[preset or "world"], **given})
            return config, preset or "as before"
        config = Config(**{**PRESETS[preset or "world"], **given})
        if not preset:
            check_embedded(config)
        note_unused(config, given)
        return config, preset or "world"
    except UserError as error:
        parser.error(str(error))


def note_unused(config, given):
    """Say which options of the command line make no difference to what this run learns."""
    method, sft = METHODS[config.method], config.method == "sft"
    reads = {"uniform": "", "decay": "", "mask_after_error": "", "unclipped": "epsilon",
             "sod": "epsilon delta"}.get(config.weights, "epsilon delta floor")
    used = {"teacher": method.scorer == "teacher",
            **dict.fromkeys(["teacher_system", "teacher_examples", "opd_coef"], method.scorer),
            **{name: method.weighted and name in reads for name in ("epsilon", "delta", "floor")},
            **dict.fromkeys(["demonstrations", "sft_epochs", "sft_batch", "sft_lr"], sft),
            **dict.fromkeys(["train_data", "iterations", "prompts", "group_size", "lr"],
                            not sft and config.method != "vanilla")}
    if idle := [f"--{name}" for name in given if not used.get(name, True)]:
        weights = f" with --weights {config.weights}" * method.weighted
        print(f"NOTE: method {config.method}{weights} learns nothing from {', '.join(idle)}")


def check_embedded(config):
    """Refuse other models or data than the embedded ones, for which the defaults are made."""
    for name in ("student", "teacher", "train_data", "eval_data", "demonstrations"):
        value = getattr(config, name)
        if value and not is_embedded(value):
            raise UserError(
                f"{name} is {value!r}, and the default settings are made for the small models of "
                "the embedded world; say which settings you want: --preset world (these), cpu (a "
                "small pretrained pair on a CPU), gpu (Qwen3 on one GPU) or paper (the paper's)")


def print_start(preset):
    """The versions, the time, and what the preset has replaced."""
    replaced = [f"{name} {value!r}" for name, value in PRESETS.get(preset, {}).items()]
    print(f"preset  {preset}; " + ", ".join(f"{k} {v}" for k, v in VERSIONS.items())
          + time.strftime("; started %Y-%m-%d %H:%M:%S %z"))
    if replaced:
        print("replaced by the preset, unless an option was given: " + ", ".join(replaced))


def print_changes(config, folder):
    """What a resumed run is made with that is not in its config.json."""
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in config_json(config).items():
        if before.get(name, value) != value:
            print(f"changed: {name} {value!r}, was {before[name]!r}")


def main(argv=None):
    """Load, measure, train, measure again, save, and say what came of it."""
    config, preset = parse_config(argv)
    transformers.utils.logging.disable_progress_bar()
    with process_group(), run_folder(config) as folder:
        print_start(preset)
        if config.resume:
            print_changes(config, folder)
        agent, results = load_agent(config), {}
        # The student is the start model here, in a run that is resumed, too.
        measure_once(agent, "student before", agent.student, folder, results)
        if config.resume:
            restore(agent, folder)
        write_config(config, folder)
        if config.method != "vanilla":
            with how_to_go_on(folder):
                train_to_files(agent, folder)
                measure_once(agent, "student after", agent.student, folder, results)
                if METHODS[config.method].scorer == "teacher":
                    measure_once(agent, "teacher", agent.teacher, folder, results)
                save_checkpoint(agent, folder, results)
            write_page(folder)
        if results:
            print(f"\naverage@{config.eval_samples} on {len(agent.eval_set)} problems of "
                  f"{config.eval_data}\n" + results_table(results) + what_changed(results, config))


def train_to_files(agent, folder):
    """Go through `train`: numbers and rollouts to files, lines to the screen, saves.

    A first Ctrl-C, SIGTERM or SIGHUP ends the run after the iteration under way, a second one at
    once. After an error what was learnt before it is saved, unless weights have moved since.
    """
    config, history = agent.config, stored_metrics(folder)
    begun = len(history)
    moves = lambda: agent.optimizer.updates if agent.optimizer else 0
    written = moves()  # updates of the iterations whose numbers are in the files
    try:
        with tools.stop_requests() as requests:
            for m, batch in tqdm(train(agent), initial=agent.iteration, unit="iteration",
                                 desc=config.method, total=num_iterations(agent),
                                 disable=True if RANK else None):  # no bar where nobody watches
                write_iteration(agent, m, batch, folder)
                agent.iteration, written = m["iteration"], moves()
                history.append(m)
                show_iteration(m, batch, history, config)
                stop_if_skipped(history[begun:])  # a resumed run has a lower lr, perhaps
                stop = any(all_gather(bool(requests)))
                if stop or config.save_every and agent.iteration % config.save_every == 0:
                    save_run(agent, folder)
                    write_page(folder, wait=stop)
                if stop:
                    raise KeyboardInterrupt(*requests[:1])
        save_run(agent, folder)
    except Exception as error:
        if agent.iteration and moves() == written and not isinstance(error, tools.WriteError):
            save_run(agent, folder)
        raise


def stored_metrics(folder):
    """The numbers of the iterations before a resume, which health looks back upon."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [finite(json.loads(line)) for line in lines]


def finite(m):
    """The stored numbers of an iteration without those that were not finite, which are null."""
    return {name: x for name, x in m.items() if x is not None}


def stop_if_skipped(history, most=3):
    """After so many iterations in a row with updates not taken, no better one will follow."""
    if len(history) >= most and all(m["skipped_updates"] for m in history[-most:]):
        raise UserError(f"{most} iterations in a row had updates that could not be taken; resume "
                        "with a lower --lr, or begin anew with --dtype float32")


PAGES = []  # the process that writes a page while its run goes on


@on_rank_0
def write_page(folder, wait=True):
    """Have evaluate.py write the page of a run, in a process of its own: it imports this file, and
    nothing that happens to it ends the run. Without `wait` it works beside the run, with the lowest
    priority; where it is still busy with the page before, this one is left out."""
    command = [sys.executable, Path(__file__).with_name("evaluate.py"), "--page", folder]
    status = 0
    try:
        while PAGES and (wait or PAGES[0].poll() is not None):
            status = PAGES.pop().wait()
        if wait:
            page = subprocess.run(command, stdout=subprocess.PIPE)
            status = page.returncode
            print(page.stdout.decode(errors="replace"), end="")
        elif not PAGES:  # a session of its own: a Ctrl-C that is meant for the run does not end it
            PAGES.append(subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                          start_new_session=True))
            os.setpriority(os.PRIO_PROCESS, PAGES[0].pid, 19)
    except OSError as error:  # no memory for a process
        status = error
    if status:
        print(f"NOTE: the page of {folder} was not written ({status}); to write it: "
              f"python evaluate.py --page {folder}", file=sys.stderr)


def prepare_output():
    """Show each line as it comes, and never die of a character or of a closed screen."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None or RANK and name == "stdout":  # rank 0 speaks for all
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(line_buffering=True, errors="backslashreplace")


# The machine's answers to the name of a file or folder that is not to be had.
NOT_TO_BE_WRITTEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
                     errno.ENAMETOOLONG)


def run_command(work, after_a_signal="files written so far are whole"):
    """Run a command; its exit status: 0 done, 1 error, 128 and more by a signal. What is wrong with
    input or machine ends with a sentence; every other error is a bug and keeps its traceback."""
    prepare_output()
    try:
        with tools.handled_signals(tools.interrupt):
            return work() or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        print("error: the reader of this output has gone, so the command stopped", file=sys.stderr)
    except UserError as error:
        print(f"error: {tools.printable(str(error))}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (*NOT_TO_BE_WRITTEN, *tools.FULL):
            raise
        remedy = "make room there, or " * (error.errno in tools.FULL)
        print(f"error: cannot write {error.filename or 'a file'} ({error.strerror}); {remedy}name "
              "another place with --out", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("error: not enough memory for the models; choose smaller ones, or try --offload all",
              file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(f"interrupted; {after_a_signal}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 1


if __name__ == "__main__":
    sys.exit(run_command(main))
