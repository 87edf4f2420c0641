"""The fast engine gives the rollouts of the plain one, token for token, whatever the model."""
import dataclasses
import gc
import threading
import weakref
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sod_mini as sod
import tools
from conftest import WORLD

SMALL = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256,
             tie_word_embeddings=True)
MODELS = {"qwen3": dict(SMALL, head_dim=16), "llama": SMALL,
          "qwen2": dict(SMALL, tie_word_embeddings=False),  # its queries, keys, values have a bias
          "gpt2": dict(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=256)}


def make_model(kind, settings):
    """Weights large enough that every token depends on what its row holds, and ends that come."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    ends = torch.randperm(500)[:30].tolist()
    model.generation_config = model.shipped_generation = GenerationConfig(eos_token_id=ends)
    return model


class Answers:
    """A tool whose answer is as long as its call says, ready at once or a little later."""

    def __init__(self, delay=0.0):
        self.delay, self.pool = delay, ThreadPoolExecutor(4)

    def submit(self, call, place=()):
        answer = tools.Observation("7 " * (len(call.code) % 17), "ok", 0.0)
        if self.delay:
            return self.pool.submit(lambda: threading.Event().wait(self.delay) or answer)
        run = Future()
        run.set_result(answer)
        return run


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Random models write no tool calls: let four of five turns count as one."""
    monkeypatch.setattr(tools.HermesCalls, "parse", lambda self, text: (
        tools.ToolCall(text) if len(text) % 5 else None))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORLD / "student")


PROMPTS = [[n * 7 + i for i in range(3 + n * 5 % 31)] for n in range(9)]  # 3 to 32 ids


def play(model, tokenizer, tool=None, temperature=1.0, prefix=(), **changes):
    changes = {"max_response": 90, "max_turns": 6, "overlong_buffer": 0} | changes
    agent = sod.Agent(sod.Config(**changes), model, None, tokenizer, tool or Answers())
    prompts = [(tools.Problem("q", "1"), [*prefix, *ids]) for ids in PROMPTS]
    return sod.sample_rollouts(agent, model, prompts, (0, "test", 3), temperature=temperature)


def record(rollouts):
    return [(r.ids, r.finish_reason, [dataclasses.astuple(turn) for turn in r.turns])
            for r in rollouts]


FAST = {"all at once": {}, "refilled": dict(rollout_batch=4, decode_chunk=3),
        "one read at a time": dict(micro_batch_tokens=1), "chunk of 1": dict(decode_chunk=1)}


@pytest.mark.parametrize("temperature", [1.0, 1e-12], ids=["sampled", "greedy"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_fast_engine_gives_the_rollouts_of_the_plain_one_token_for_token(
        kind, temperature, tokenizer):
    model = make_model(kind, MODELS[kind])
    plain = record(play(model, tokenizer, temperature=temperature, rollout_engine="generate"))
    for name in FAST if kind == "qwen3" and temperature == 1.0 else ["refilled"]:
        changes = FAST[name]
        assert record(play(model, tokenizer, temperature=temperature, **changes)) == plain, name
    late = play(model, tokenizer, Answers(0.02), temperature, tool_poll_timeout=0.0, decode_chunk=2)
    assert record(late) == plain  # rows that wait are left out, and go on afterwards
    if temperature == 1.0:  # and they were all kinds of rollouts
        assert len({len(turn[4]) for _, _, turns in plain for turn in turns}) > 5
        assert len({finish for _, finish, _ in plain}) > 1
        assert max(len(turns) for _, _, turns in plain) > 2


def test_positions_after_the_window_of_a_model_are_never_asked_for(tokenizer):
    """GPT-2 has a table of positions: padding and the rest of a chunk must not leave it."""
    model, settings = make_model("gpt2", MODELS["gpt2"]), dict(max_response=40, max_turns=9)
    plain = play(model, tokenizer, rollout_engine="generate", **settings)
    window = max(len(r.ids) for r in plain)
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:window]
    model.config.n_positions = window
    assert record(play(model, tokenizer, decode_chunk=16, **settings)) == record(plain)


def test_rollouts_do_not_wait_for_the_slow_tool_of_another_one(tokenizer):
    class Stuck(Answers):
        """Ends its first call only when nobody else is under way."""

        def __init__(self, others):
            super().__init__()
            self.others, self.stuck = others, None

        def submit(self, call, place=()):
            if not self.stuck:
                self.stuck, self.first = Future(), super().submit(call)
                threading.Timer(30, self.stuck.cancel).start()
                return self.stuck
            self.others -= 1
            if not self.others:
                self.stuck.set_result(self.first.result())
            return super().submit(call)

    model = make_model("llama", MODELS["llama"])
    plain = play(model, tokenizer, rollout_engine="generate")
    calls = [sum(turn.outcome == "ok" for turn in r.turns) for r in plain]
    tool = Stuck(others=sum(calls) - max(calls))
    assert record(play(model, tokenizer, tool, tool_poll_timeout=0.0)) == record(plain)
    assert tool.others <= 0


@pytest.mark.parametrize("kind", MODELS)
def test_what_all_prompts_begin_with_is_read_once_and_the_rollouts_stay(
        kind, tokenizer, monkeypatch):
    model, prefix = make_model(kind, MODELS[kind]), [11 * i % 500 for i in range(40)]
    plain = record(play(model, tokenizer, prefix=prefix, rollout_engine="generate"))
    real, read = sod.ContinuousBatch.forward, []

    def forward(batch, ids, start, rows=None):
        read.append((int(start.min()), ids.numel()))
        return real(batch, ids, start, rows)
    monkeypatch.setattr(sod.ContinuousBatch, "forward", forward)
    for name in ("all at once", "refilled"):
        read.clear()
        assert record(play(model, tokenizer, prefix=prefix, **FAST[name])) == plain, name
        assert [n for start, n in read if start < len(prefix)] == [len(prefix)]  # slots used again


def test_what_is_only_read_is_not_multiplied_with_the_vocabulary(monkeypatch, tokenizer):
    """torch multiplies (rows, 1, D) states, cut out of longer ones, by a copy of the head for each
    row where the weights are frozen and bf16: .5 to 1.2 seconds a row of a 0.5B to 1.5B."""
    model = make_model("qwen3", MODELS["qwen3"])
    head, sizes, real = model.get_output_embeddings().weight, [], torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if weight is head:
            sizes.append(x.shape)
        return real(x, weight, bias)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    rollouts = play(model, tokenizer, **FAST["all at once"])
    assert {len(size) for size in sizes} == {2}
    assert sum(rows for rows, _ in sizes) < 2 * sum(len(r.ids) - len(r.prompt) for r in rollouts)


def test_tokens_of_a_chunk_are_sampled_without_waiting_for_the_device():
    """On the meta device, where there are no numbers, every read of one is an error."""
    batch = sod.ContinuousBatch(make_model("qwen3", MODELS["qwen3"]).to("meta"), 3)
    batch.rollouts = [sod.Rollout(None, ids, [sod.Turn()], uniforms=np.full(9, 0.5))
                      for ids in PROMPTS[:3]]
    picked = []

    def pick(logits, uniforms):
        picked.append(sod.sample_next_token(logits, uniforms, top_p=0.9))
        return picked[-1]
    batch.prefill(3, 100)
    with pytest.raises(NotImplementedError, match="meta"):
        batch.decode(3, 4, pick)
    assert len(picked) == 4  # only the ids of the whole chunk were asked for


def recording(monkeypatch, record):
    """Let a batch do on the CPU what it does on a GPU, with a `record` of our own."""
    start = sod.ContinuousBatch.__init__

    def begin(batch, *args):
        start(batch, *args)
        batch.graphs = {}
    monkeypatch.setattr(sod.ContinuousBatch, "__init__", begin)
    monkeypatch.setattr(sod, "record", record)


@pytest.mark.parametrize("kind", MODELS)
def test_passes_that_are_recorded_and_replayed_at_fixed_addresses_give_the_same_rollouts(
        kind, tokenizer, monkeypatch):
    """As CUDA graphs are: recording does nothing yet, and a replay knows nothing but addresses."""
    model, counts = make_model(kind, MODELS[kind]), Counter()
    plain = record(play(model, tokenizer, rollout_engine="generate"))

    def pretend(work, graphs):
        batch, before = work.func.__self__, addresses(work.func.__self__)
        counts["recorded"] += 1

        def replay():
            assert addresses(batch) == before and batch.graphs is not None
            counts["replayed"] += 1
            work()
        return SimpleNamespace(replay=replay)
    recording(monkeypatch, pretend)
    assert record(play(model, tokenizer, rollout_batch=5)) == plain
    slow = play(model, tokenizer, Answers(0.02), tool_poll_timeout=0.0, decode_chunk=2)
    assert record(slow) == plain
    assert counts["replayed"] > 20 * counts["recorded"] > 0


def addresses(batch):
    layers = [x.data_ptr() for layer in batch.cache.layers for x in (layer.keys, layer.values)]
    return [*layers, *(x.data_ptr() for x in (batch.last, batch.start, batch.uniforms))]


def test_the_cache_is_gone_with_the_last_turn(tokenizer, monkeypatch):
    """Scoring needs its room, at once and not when the garbage collector comes by."""
    caches, start = [], sod.ContinuousBatch.__init__

    def begin(batch, *args):
        start(batch, *args)
        caches.append(weakref.ref(batch.cache))
    monkeypatch.setattr(sod.ContinuousBatch, "__init__", begin)
    gc.disable()
    try:
        play(make_model("qwen3", MODELS["qwen3"]), tokenizer)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_where_recording_fails_sampling_goes_on_with_a_sentence(tokenizer, monkeypatch, capsys):
    def fail(work, graphs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    model = make_model("qwen3", MODELS["qwen3"])
    plain = record(play(model, tokenizer))
    recording(monkeypatch, fail)
    assert record(play(model, tokenizer)) == plain
    assert capsys.readouterr().out == (
        "no CUDA graph of a decode pass (operation not permitted when stream is capturing): "
        "sampling goes on, and is slower\n")


def test_sampling_from_a_model_in_training_mode_is_refused():
    with pytest.raises(AssertionError, match="eval"):
        sod.ContinuousBatch(make_model("llama", SMALL).train(), 1)


def skeleton(kind, settings):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


ROPE = dict(rope_theta=1e4, original_max_position_embeddings=64)
REFUSED = {
    "sliding window": ("mistral", dict(SMALL, sliding_window=8)),
    "sliding layers": ("qwen2", dict(SMALL, use_sliding_window=True, sliding_window=8,
                                     max_window_layers=1)),
    "dynamic": ("llama", dict(SMALL, rope_parameters=dict(ROPE, rope_type="dynamic", factor=2.0))),
    "alibi": ("bloom", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "mamba": ("mamba", dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_known_to_be_served_is_refused_with_a_sentence(name):
    kind, settings = REFUSED[name]
    with pytest.raises(ValueError, match=f"not this {kind} model; use --rollout_engine generate"):
        sod.check_continuous(skeleton(kind, settings))


@pytest.mark.parametrize("kind, settings", [*MODELS.items(), (
    "llama", dict(SMALL, rope_parameters=dict(ROPE, rope_type="yarn", factor=4.0)))])
def test_a_model_with_full_attention_in_all_layers_is_accepted_before_its_weights(kind, settings):
    sod.check_continuous(skeleton(kind, settings))
