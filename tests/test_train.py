"""The loop: what it does to weights, what it writes, and how it stops."""
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sod_mini as sod
import tools

WORLD = ROOT / "data" / "world"
SMALL = dict(student=str(WORLD / "student"), teacher=str(WORLD / "teacher"), steps=2,
             train_data=str(WORLD / "train.jsonl"), eval_data=str(WORLD / "heldout.jsonl"),
             demonstrations=str(WORLD / "demonstrations.jsonl"), prompts_per_step=4, group_size=3,
             max_response=200, eval_problems=4, eval_samples=2, sft_batch=16, lr=1e-3)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def config(**changes):
    return sod.Config(**{**SMALL, **changes})


def batch_of_rollouts(**changes):
    """An agent and a scored batch of the real student with the real tool."""
    c = config(**changes)
    agent = sod.load_agent(c)
    problems = tools.load_problems(c.train_data)[:c.prompts_per_step]
    prompts, _ = sod.fitting_prompts(agent, problems)
    rollouts = sod.sample_rollouts(agent.student, agent.tokenizer,
                                   [p for p in prompts for _ in range(c.group_size)],
                                   agent.tool, c, sod.random_numbers(c.seed, "rollouts", 1))
    agent.student.train()
    return agent, sod.score_batch(agent, rollouts, c), c


def gradient(agent, scored, c):
    """What update() would hand to AdamW."""
    agent.optimizer = agent.optimizer or sod.Optimizer(agent.student, c.lr, c)
    agent.optimizer.clear()
    agent.optimizer.step = lambda scale: 0.0
    sod.update(agent, scored, list(range(len(scored.rollouts))), c)
    return torch.cat([g.flatten() for g in agent.optimizer.grads])


# --- Scoring ----------------------------------------------------------------------------------


def test_scores_are_those_of_the_plain_forward_pass_in_every_batch_cut():
    agent, scored, c = batch_of_rollouts()
    for i in (0, 5, 11):
        rollout = scored.rollouts[i]
        ids = torch.tensor([rollout.ids])
        for model, got in ((agent.student, scored.logp_s), (agent.teacher, scored.logp_t)):
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].log_softmax(-1)
            plain = F.pad(logp.gather(1, ids[0, 1:, None])[:, 0], (1, 0))
            plain = torch.where(torch.tensor(rollout.step_id) >= 0, plain, 0.0)
            torch.testing.assert_close(got[i, :len(rollout.ids)], plain, atol=1e-4, rtol=1e-4)
    c = dataclasses.replace(c, micro_batch_tokens=1)
    again = sod.score(agent.student, scored.rollouts, c)[0]
    torch.testing.assert_close(again, scored.logp_s, atol=1e-4, rtol=1e-4)


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [random.Random(0).randint(1, 50) for _ in range(100)]
    batches = list(sod.micro_batches(lengths, 200))
    assert sorted(i for b in batches for i in b) == list(range(100))
    assert all(len(b) * max(lengths[i] for i in b) <= 200 for b in batches)
    assert list(sod.micro_batches([500], 200)) == [[0]]  # too long for the budget: alone, not lost


@pytest.mark.parametrize("method, kl", [("sod", "sampled"), ("sod", "full"), ("opsd_gt", "full")])
def test_gradient_does_not_depend_on_how_the_batch_was_cut(method, kl):
    agent, scored, c = batch_of_rollouts(method=method, kl=kl)
    cuts = [gradient(agent, scored, dataclasses.replace(c, micro_batch_tokens=tokens))
            for tokens in (10**6, 1500, 1)]
    assert cuts[0].norm() > 0
    for other in cuts[1:]:
        assert (other - cuts[0]).norm() / cuts[0].norm() < 1e-4


def test_gradient_checkpointing_changes_memory_not_the_gradient():
    agent, scored, c = batch_of_rollouts()
    plain = gradient(agent, scored, c)
    sod.enable_checkpointing(agent.student)
    assert (gradient(agent, scored, c) - plain).norm() / plain.norm() < 1e-5


def test_full_kl_of_the_loss_is_the_weighted_token_mean():
    agent, scored, c = batch_of_rollouts(kl="full", method="sod_only")
    assert scored.advantages.eq(0).all()  # nothing is left for the policy loss
    agent.optimizer = sod.Optimizer(agent.student, c.lr, c)
    _, loss, _ = sod.update(agent, scored, list(range(len(scored.rollouts))), c)
    total, count = 0.0, 0
    for i, r in enumerate(scored.rollouts):
        fresh = sod.load_model(c.student, "cpu", torch.float32)
        ids = torch.tensor([r.ids])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (fresh, agent.teacher))
        kl = (p.exp() * (p - q)).sum(-1)
        for t, k in enumerate(r.step_id[1:]):
            if k >= 0:
                total, count = total + float(scored.w[i, k] * kl[t]), count + 1
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_self_teacher_sees_the_privileged_text_and_scores_the_same_ids():
    agent, scored, c = batch_of_rollouts(method="opsd_gt")
    rollout = scored.rollouts[0]
    prompt = sod.teacher_prompts(agent, [rollout])[0]
    assert f"The answer is {rollout.problem.answer}." in agent.tokenizer.decode(prompt)
    ids = torch.tensor([prompt + rollout.ids[rollout.prompt_len:]])
    with torch.no_grad():
        logp = agent.teacher(ids).logits[0, :-1].log_softmax(-1)
    plain = logp.gather(1, ids[0, 1:, None])[len(prompt) - 1:, 0]
    plain = torch.where(scored.step_id[0, rollout.prompt_len:len(rollout.ids)] >= 0, plain, 0.0)
    torch.testing.assert_close(scored.logp_t[0, rollout.prompt_len:len(rollout.ids)], plain,
                               atol=1e-4, rtol=1e-4)


# --- Optimiser --------------------------------------------------------------------------------


def small_model(dtype):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, intermediate_size=32)).to(dtype)


def travel(dtype, make, steps=40):
    """How far weights go under a constant gradient of 1, as a share of lr * steps."""
    model = small_model(dtype)
    c = config(weight_decay=0.0, grad_clip=1e9)
    optimizer, start = make(model, c), [p.detach().double() for p in model.parameters()]
    for _ in range(steps):
        sum(p.float().sum() for p in model.parameters()).backward()
        optimizer.step()
    low = getattr(optimizer, "low", [None] * len(start))
    master = [p.detach() if x is None else sod.join(p.detach(), x)
              for p, x in zip(model.parameters(), low)]
    moved = torch.cat([(s - m.double()).flatten() for s, m in zip(start, master)])
    return float(moved.mean()) / (1e-6 * steps)


def test_at_lr_1e_6_a_weight_in_bf16_stands_still_and_ours_moves():
    class InPlace(torch.optim.AdamW):
        def __init__(self, model, c):
            super().__init__(model.parameters(), lr=1e-6, weight_decay=0.0)

        def step(self):
            super().step()
            self.zero_grad()
    ours = travel(torch.bfloat16, lambda m, c: sod.Optimizer(m, 1e-6, c))
    assert ours == pytest.approx(1.0, abs=0.01)
    assert abs(travel(torch.bfloat16, InPlace)) < 0.2


def test_both_halves_of_a_weight_are_the_weight_to_the_bit():
    bits = torch.randint(-2 ** 31, 2 ** 31, (100_000,), dtype=torch.int64).to(torch.int32)
    edge = torch.tensor([0.0, -0.0, 1.0, 1 + 2 ** -8, 1 + 3 * 2 ** -8, -1 - 2 ** -8, 3e38, 1e-40])
    w = torch.cat([edge, bits.view(torch.float32)])
    w = w[w.abs() < 3.38e38]
    p, low = torch.empty_like(w, dtype=torch.bfloat16), torch.empty_like(w, dtype=torch.int16)
    sod.split(w, p, low)
    assert torch.equal(sod.join(p, low).view(torch.int32), w.view(torch.int32))
    assert ((p.float() - w).abs() <= (w.to(torch.bfloat16).float() - w).abs()).all()  # nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_adamw_is_torchs_adamw_on_fp32_weights(dtype, monkeypatch):
    monkeypatch.setattr(sod, "PIECE", 100)  # every weight in several pieces
    c = config(grad_clip=0.5, lr=1e-3)
    for offload in ("none", "all"):
        model = small_model(dtype)
        ours = sod.Optimizer(model, c.lr, dataclasses.replace(c, offload=offload))
        reference = [torch.nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
        theirs = torch.optim.AdamW(reference, c.lr, (c.beta1, c.beta2), weight_decay=c.weight_decay)
        for step in range(5):
            ours.grads = [torch.randn(p.shape) for p in reference]
            for p, g in zip(reference, ours.grads):
                p.grad = g.clone()
            norm = torch.nn.utils.clip_grad_norm_(reference, c.grad_clip)
            theirs.step()
            assert ours.step() == pytest.approx(float(norm), rel=1e-6)
        for p, low, q in zip(model.parameters(), ours.low, reference):
            w = p if low is None else sod.join(p, low)
            torch.testing.assert_close(w, q, atol=1e-8, rtol=1e-6)


def test_one_update_a_batch_needs_no_forward_pass_for_the_old_policy(monkeypatch):
    agent, scored, c = batch_of_rollouts(updates_per_step=2)
    once, plain = dataclasses.replace(c, updates_per_step=1), gradient(agent, scored, c)
    passes, forward = [], sod.hidden_states
    monkeypatch.setattr(sod, "hidden_states", lambda m, ids: passes.append(m) or forward(m, ids))
    fresh = sod.score_batch(agent, scored.rollouts, once)
    assert agent.student not in passes and agent.teacher in passes
    torch.testing.assert_close(gradient(agent, fresh, once), plain, atol=1e-6, rtol=1e-4)
    for name in ("logp_s", "entropy_s", "advantages"):
        a, b = (torch.where(x.step_id >= 0, getattr(x, name), 0.0) for x in (fresh, scored))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fresh.w, scored.w, atol=1e-4, rtol=1e-4)


def test_bf16_gradients_are_summed_in_fp32_over_micro_batches():
    model = small_model(torch.bfloat16)
    optimizer = sod.Optimizer(model, 1e-3, config())
    for scale in [1.0] + [2.0 ** -10] * 64:  # in bf16, 1 + 2^-10 is 1
        (sum(p.float().sum() for p in model.parameters()) * scale).backward()
    assert all(p.grad is None for p in model.parameters())
    assert float(optimizer.grads[0].flatten()[0]) == 1.0 + 64 * 2.0 ** -10


def test_a_step_with_a_non_finite_norm_is_not_taken_and_leaves_no_trace():
    model = small_model(torch.float32)
    optimizer = sod.Optimizer(model, 1e-2, config())
    before = [p.clone() for p in model.parameters()]
    (next(model.parameters()).sum() * math.inf).backward()
    assert not math.isfinite(optimizer.step())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    sum(p.sum() for p in model.parameters()).backward()
    assert math.isfinite(optimizer.step()) and optimizer.taken == 1


# --- Runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*sod.METHODS, "sft"])
def test_every_method_trains(method):
    c = config(method=method, sft_epochs=1, sft_batch=20)
    agent = sod.load_agent(c)
    agent.practice = agent.practice[0][:40], 0
    before = torch.cat([p.detach().flatten().clone() for p in agent.student.parameters()])
    rows = list(sod.train(c, agent))
    after = torch.cat([p.detach().flatten() for p in agent.student.parameters()])
    assert len(rows) == 2 and not torch.equal(before, after)
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    if agent.teacher is not None:
        assert not any(p.requires_grad for p in agent.teacher.parameters())


@pytest.mark.parametrize("weights", sod.WEIGHTS)
def test_every_weight_scheme_trains(weights):
    row = next(sod.train(config(weights=weights)))
    assert (row["w"] == 1) == (weights == "uniform") and math.isfinite(row["loss"])


def test_two_runs_with_one_seed_are_the_same_run():
    def trace(seed):
        keys = ("reward", "loss", "d", "w", "tokens", "grad_norm")
        return [[row[k] for k in keys] for row in sod.train(config(seed=seed))]
    assert trace(3) == trace(3) != trace(4)


def test_step_counts_optimiser_steps_and_warms_up():
    agent = sod.load_agent(config(updates_per_step=4, warmup=4))
    agent.optimizer = sod.Optimizer(agent.student, 1e-3, agent.config)
    step, scales = agent.optimizer.step, []
    agent.optimizer.step = lambda scale: scales.append(scale) or step(scale)
    list(sod.train(agent.config, agent))
    assert agent.optimizer.taken == 8 and scales == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_distillation_brings_the_student_closer_to_the_teacher():
    rows = list(sod.train(config(method="opd_only", steps=4, prompts_per_step=8, group_size=4,
                                 lr=1e-3, max_response=384)))
    kl = [row["reverse_kl"] for row in rows]
    assert np.mean(kl[1:]) < 0.8 * kl[0]


def test_imitation_loss_is_the_mean_over_assistant_tokens():
    agent = sod.load_agent(config(method="sft"))
    problem, turns = tools.load_demonstrations(WORLD / "demonstrations.jsonl")[0]
    ids, step_id = sod.encode_demonstration(agent.tokenizer, problem, turns)
    agent.optimizer = sod.Optimizer(agent.student, 1e-3, agent.config)
    with torch.no_grad():
        logp = agent.student(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    own = [-float(logp[t - 1, ids[t]]) for t, k in enumerate(step_id) if k >= 0]
    loss, _ = sod.imitation_step(agent, [(ids, step_id)], agent.config)
    assert loss == pytest.approx(np.mean(own), rel=1e-4)
    assert agent.tokenizer.decode([i for i, k in zip(ids, step_id) if k >= 0]) == "".join(
        t["content"] + "<|im_end|>" for t in turns if t["role"] == "assistant")


def test_interval_resamples_problems_not_samples():
    correct = np.repeat([[1], [0]], 50, 0).repeat(4, 1)  # 100 problems, all samples alike
    mean, low, high = sod.average_with_interval(correct)
    assert mean == 50 and low == pytest.approx(40.2, abs=1) and high == pytest.approx(59.8, abs=1)


# --- The command ------------------------------------------------------------------------------


def command(*arguments, tmp_path=None, **env):
    return subprocess.run([sys.executable, str(ROOT / "sod_mini.py"), *map(str, arguments)],
                          capture_output=True, text=True, cwd=tmp_path or ROOT,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env})


def test_a_run_writes_a_checkpoint_that_transformers_loads(tmp_path):
    done = command("--steps", 1, "--prompts_per_step", 2, "--group_size", 2, "--eval_problems", 3,
                   "--eval_samples", 1, "--out", tmp_path, "--name", "a", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student before" in done.stdout and "teacher" in done.stdout
    place = tmp_path / "a" / "checkpoint"
    AutoModelForCausalLM.from_pretrained(place)
    assert AutoTokenizer.from_pretrained(place).chat_template
    card = (place / "README.md").read_text()
    for key in ("license: apache-2.0", "base_model:", "library_name: transformers",
                "pipeline_tag: text-generation", "- on-policy-distillation", "| student after |"):
        assert key in card
    (row,) = map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == 1 and 0 <= row["right"] <= 1
    rollouts = list(map(json.loads, (tmp_path / "a" / "rollouts.jsonl").read_text().splitlines()))
    assert len(rollouts) == 4 and rollouts[0]["turns"][0]["w"] == 1
    assert "page  " in done.stdout and (tmp_path / "a" / "rollouts.html").stat().st_size > 15_000
    again = command("--out", tmp_path, "--name", "a", tmp_path=tmp_path)
    assert again.returncode == 1 and "exists already" in again.stderr


def test_vanilla_only_measures(tmp_path):
    done = command("--method", "vanilla", "--eval_problems", 2, "--out", tmp_path, "--name", "v")
    assert done.returncode == 0 and "| student before |" in done.stdout
    assert not (tmp_path / "v" / "checkpoint").exists()


def test_every_option_shows_its_comment_and_default_in_help():
    text = command("--help").stdout
    for field in dataclasses.fields(sod.Config):
        assert f"--{field.name} " in text
    assert "w_k <= 1 + delta (Eq. 7) [0.2]" in text


@pytest.mark.parametrize("arguments, sentence", [
    (["--detla", "1"], "unrecognized arguments: --detla"),
    (["--delt", "1"], "unrecognized arguments: --delt"),
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--lr", "nan"], "lr is nan; it must be"),
    (["--lr", "-1"], "lr is -1.0; it must be at least"),
    (["--steps", "0"], "steps is 0; it must be at least 1"),
    (["--method", "ppo"], "method is 'ppo'; choose from vanilla, sft, grpo"),
    (["--weights", "none"], "weights is 'none'; choose from sod, uniform"),
    (["--method", "opd", "--weights", "decay"], "method opd fixes its own weights"),
    (["--kl", "half"], "kl is 'half'; choose from sampled, full"),
    (["--eval_top_p", "1.5"], "eval_top_p is 1.5"),
    (["--prompts_per_step", "3"], "prompts_per_step 3 does not divide into 2"),
    (["--gradient_checkpointing", "yes"], "'yes' is neither true nor false"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
])
def test_wrong_usage_is_one_sentence_and_status_2(arguments, sentence):
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(sys.stderr, "write", said.append)
        sod.parse_config(arguments)
    assert stop.value.code == 2 and sentence in "".join(said)


def test_presets_set_the_papers_numbers_and_options_win_over_them():
    paper, _ = sod.parse_config(["--preset", "paper"])
    assert (paper.prompts_per_step, paper.group_size, paper.updates_per_step) == (64, 16, 4)
    assert (paper.max_prompt, paper.max_response, paper.max_turns) == (2560, 20480, 16)
    assert (paper.lr, paper.delta, paper.epsilon, paper.clip_high) == (1e-6, 0.2, 1e-6, 0.28)
    assert (paper.eval_top_p, paper.silent_rate, paper.overlong) == (0.6, 0.0, 1024)
    mine, preset = sod.parse_config(["--train_data", "x.jsonl", "--lr", "3e-6"])
    assert preset == "gpu" and mine.lr == 3e-6 and mine.gradient_checkpointing


def broken(tmp_path, name):
    """A file or folder that the run must refuse."""
    path = tmp_path / name
    text = {"json.jsonl": '{"question": "1+1", "answer": "2"}\n{"question": "1+\n',
            "empty.jsonl": "", "keys.jsonl": '{"text": "1+1"}\n', "binary.jsonl": "\0\1\2",
            "long.jsonl": json.dumps({"question": "Add 1. " * 500, "answer": "2"}),
            "hint.jsonl": '{"question": "1+1", "answer": "2"}\n'}.get(name)
    path.mkdir() if text is None else path.write_text(text)
    return path


def test_other_data_select_the_gpu_preset_and_the_world_spelled_otherwise_does_not():
    def preset(*arguments):
        return sod.parse_config(list(arguments))[1]
    assert preset("--train_data", str(WORLD / "train.jsonl")) == "world"
    assert preset("--student", "runs/cold/checkpoint") == "world"
    assert preset("--method", "sft", "--demonstrations", "mine.jsonl") == "gpu"
    assert preset("--method", "vanilla", "--eval_data", "mine.jsonl") == "gpu"


@pytest.mark.parametrize("option, name, sentence, more", [
    ("--train_data", "json.jsonl", "line 2: found broken JSON", []),
    ("--train_data", "empty.jsonl", "is empty", []),
    ("--train_data", "keys.jsonl", "line 1: found no question", []),
    ("--train_data", "binary.jsonl", "no UTF-8 text", []),
    ("--train_data", "folder", "is a directory", []),
    ("--train_data", "long.jsonl", "all 1 prompts are longer than 128 tokens", []),
    ("--train_data", "hint.jsonl", "1 of 1 problems", ["--method", "opsd_hint"]),
    ("--train_data", "hint.jsonl", "nothing to measure on", ["--method", "vanilla"]),
    ("--demonstrations", "keys.jsonl", "line 1: found no conversation", ["--method", "sft"]),
    ("--student", "model", "cannot load", []),
    ("--teacher", "model", "cannot load", []),
])
def test_bad_input_is_one_sentence_and_status_1(tmp_path, capsys, option, name, sentence, more):
    changes = dict(zip(["--steps", "--eval_data", "--out"], ["1", "", str(tmp_path)]))
    arguments = [x for pair in changes.items() for x in pair]
    status = sod.main([*arguments, "--preset", "world", option, str(broken(tmp_path, name)), *more])
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 1 and sentence in said[-1] and "Traceback" not in "".join(said)
    assert not list(tmp_path.glob("s*-2*"))  # no folder of a run that never began


def test_missing_folder_and_unreachable_hub_are_one_sentence(tmp_path):
    gone = command("--student", tmp_path / "gone", "--out", tmp_path)
    assert gone.returncode == 1 and "there is no folder" in gone.stderr.splitlines()[-1]
    hub = command("--student", "nobody/nothing", "--out", tmp_path)
    assert hub.returncode == 1 and "cannot load nobody/nothing" in hub.stderr.splitlines()[-1]


def test_a_disk_that_cannot_be_written_stops_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    done = command("--out", tmp_path / "file")
    assert done.returncode == 1 and "cannot write to" in done.stderr


def test_teacher_with_other_ids_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student")
    AutoModelForCausalLM.from_pretrained(WORLD / "teacher").save_pretrained(tmp_path / "t")
    tokenizer.save_pretrained(tmp_path / "t")
    spec = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="different ids for the same text .they differ from token"):
        sod.load_agent(config(teacher=str(tmp_path / "t")))


def test_prompts_over_budget_are_counted_and_skipped(tmp_path):
    rows = [{"question": "Start with 5. Add 3.", "answer": "8"},
            {"question": "Add 1. " * 400, "answer": "2"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    row = next(sod.train(config(train_data=str(tmp_path / "p.jsonl"))))
    assert row["skipped"] == 1
