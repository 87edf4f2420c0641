"""What the tests share: settings, stand-ins for models and tools, batches of the embedded world."""
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its import: no test waits for a network
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sod_mini as sod
import tools

WORLD = ROOT / "data" / "world"
QWEN = ROOT.parent / "shared" / "qwen3-tokenizer"
SMALL = dict(student=str(WORLD / "student"), teacher=str(WORLD / "teacher"), iterations=2,
             eval_data=str(WORLD / "heldout.jsonl"), prompts=4, group_size=3, max_response=200,
             eval_problems=4, eval_samples=2, sft_batch=16, lr=1e-3)  # and those of few_rows


# Real processes are forked from one that has imported everything, which takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["evaluate"])
os.environ["PYTHONPATH"] = str(ROOT)  # where that one finds it


def pytest_ignore_collect(collection_path, config):
    """The exercises fail until they are solved: they are judged only where they are named."""
    if collection_path.name == "exercises" and not any("exercises" in a for a in config.args):
        return True


def pytest_configure(config):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what holds to the last bit; for a GPU there is gpu.py
    config.addinivalue_line("markers", "slow: minutes, not seconds; leave out by -m 'not slow'")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def usual_signals():
    """Under nohup or in a background job SIGHUP or SIGINT is ignored, also in children."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Rows -> a parquet file; without pyarrow it holds JSON, which a stand-in for pyarrow reads."""
    path = tmp_path / "train-00000-of-00001.parquet"
    try:
        import pyarrow.parquet

        def write(*rows):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
            return path
    except ImportError:
        table = lambda path: SimpleNamespace(to_pylist=lambda: json.loads(path.read_text()))
        stand_in = SimpleNamespace(parquet=SimpleNamespace(read_table=table))
        monkeypatch.setitem(sys.modules, "pyarrow", stand_in)

        def write(*rows):
            path.write_text(json.dumps(rows))
            return path
    return write


@pytest.fixture(params=["world", "qwen3"], scope="module")
def tokenizer(request):
    if request.param == "qwen3" and not QWEN.exists():
        pytest.skip("the real Qwen3 tokenizer is not here")
    return AutoTokenizer.from_pretrained(QWEN if request.param == "qwen3" else WORLD / "student")


def first_rows(count, source, path):
    """A file of the first rows of a file of the world."""
    path.write_text("\n".join((WORLD / source).read_text().splitlines()[:count]))
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def few_rows(tmp_path_factory):
    """It takes a second to read all rows of the world."""
    folder = tmp_path_factory.mktemp("rows")
    for option, name, count in (("train_data", "train.jsonl", 100),
                                ("demonstrations", "demonstrations.jsonl", 40)):
        SMALL[option] = first_rows(count, name, folder / name)


def a_dozen(folder):
    """Twelve problems and twelve demonstrations of the world: few.jsonl and shown.jsonl."""
    first_rows(12, "train.jsonl", folder / "few.jsonl")
    first_rows(12, "demonstrations.jsonl", folder / "shown.jsonl")


@pytest.fixture
def dozen(tmp_path, monkeypatch):
    """The test's folder, with a dozen rows to learn from; runs write no page."""
    a_dozen(tmp_path)
    monkeypatch.setattr(sod, "write_page", lambda run, wait=True: None)
    return tmp_path


def command(options, *more):
    """The exit status of sod_mini.py in this process."""
    words = [str(w) for k, v in {"preset": "world", **options}.items() for w in (f"--{k}", v)]
    try:
        return sod.run_command(partial(sod.main, words + [*more]))
    except SystemExit as stop:
        return stop.code


def json_lines(path):
    """The rows of a log; what JSON does not know fails the test."""
    return [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
            for line in path.read_text().splitlines()]


def small(**changes):
    """The embedded world with a dozen short rollouts an iteration."""
    return sod.Config(**{**SMALL, **changes})


def scored_batch(**changes):
    """An agent of the embedded world, and a scored batch of the real student with the real tool."""
    agent = sod.load_agent(small(**changes))
    agent.optimizer = sod.Optimizer(agent.student, lambda n: 0.0, agent.config)
    _, batch = next(sod.train(agent))  # at a learning rate of 0
    return agent, batch


@pytest.fixture(scope="session")
def first_batch():
    return scored_batch()


@pytest.fixture
def scored(first_batch):
    """The same with default settings, sampled once; the agent is the test's own."""
    agent, batch = first_batch
    agent = replace(agent, config=replace(agent.config), student=deepcopy(agent.student),
                    seconds=Counter(), sizes={})
    agent.optimizer = sod.Optimizer(agent.student, lambda n: 0.0, agent.config)
    return agent, batch


def gradient(agent, batch, micro_batch_tokens=2048):
    """What backpropagate leaves with the optimiser, as one vector."""
    agent.config.micro_batch_tokens = micro_batch_tokens
    agent.optimizer.adamw.zero_grad()
    sod.backpropagate(agent, batch)
    return torch.cat([p.grad.flatten() for p in agent.optimizer.masters])


def tiny(family="Qwen3", dtype=torch.float32, **changes):
    """A model of a family with random weights, small enough to run in a millisecond."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, intermediate_size=64,
                 max_position_embeddings=256, pad_token_id=0, tie_word_embeddings=True)
    kind = next(k for k in (f"{family}TextConfig", f"{family}Config") if hasattr(transformers, k))
    config = getattr(transformers, kind)(**{**shape, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config = GenerationConfig()
    return model.eval()


class Scripted:
    """Says `turns[row][n]` as the n-th turn of a row; records every prefix it was shown."""
    training, device = False, torch.device("cpu")

    def __init__(self, tokenizer, prompts, turns, end):
        self.turns = [[sod.encode(tokenizer, t if t.endswith("CUT OFF") else t + end) for t in row]
                      for row in turns]
        self.shown, self.prompts = [[] for _ in turns], prompts
        self.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)

    def eval(self):
        return self

    def generate(self, ids, attention_mask, generation_config, logits_processor):
        new = []
        for row, mask in zip(ids.tolist(), attention_mask.tolist()):
            prefix = [i for i, m in zip(row, mask) if m]
            n = next(n for n, (_, prompt) in enumerate(self.prompts)
                     if prefix[:len(prompt)] == prompt)
            self.shown[n].append(prefix)
            new.append(self.turns[n].pop(0)[:generation_config.max_new_tokens])
        width, pad = max(map(len, new)), generation_config.pad_token_id
        return torch.cat([ids, torch.tensor([n + [pad] * (width - len(n)) for n in new])], 1)


class Echo(tools.PythonTool):
    """A tool whose answer to a program is the program itself, without any sandbox."""

    def __init__(self):
        pass

    def submit(self, call, place=()):
        text = call.message or call.code or "(no output)"
        run, fault = Future(), call.fault or ("error" if "raise" in text else "ok")
        run.set_result(tools.noting_ignored(call, tools.Observation(text, fault, 0.0)))
        return run


def play(tokenizer, *turns, end="<|im_end|>", ends=(), **changes):
    """Let a scripted model solve one problem for each list of turns; (model, rollouts)."""
    config = sod.Config(**{**dict(silent_rate=0.0, max_response=3000, overlong_buffer=0,
                                 rollout_engine="generate"), **changes})
    problems = [tools.Problem(f"Question {n}: what is 6 * 7?", "42") for n in range(len(turns))]
    context = sod.student_context(config)
    prompts = [(p, sod.encode_prompt(tokenizer, p, context)) for p in problems]
    model = Scripted(tokenizer, prompts, turns, end)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    agent = sod.Agent(config, model, None, tokenizer, Echo())
    return model, sod.sample_rollouts(agent, model, prompts, (0, "test", 1))
