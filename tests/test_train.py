"""The loop: what it does to weights, what it writes, and how it stops."""
import copy
import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sod_mini as sod
import tools
from conftest import WORLD, command, gradient, json_lines, scored_batch, small, tiny


# --- Scoring ----------------------------------------------------------------------------------


@torch.no_grad()
def plain_logprobs(model, prompt, rollout):
    """(response,) of the sampled tokens after a prompt, 0 elsewhere, by the model's own forward."""
    response = rollout.ids[len(rollout.prompt):]
    ids = torch.tensor([prompt + response])
    logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    sampled = torch.tensor(rollout.step_id[len(rollout.prompt):]) > 0
    return torch.where(sampled, logp[len(prompt) - 1:], 0.0)


@pytest.mark.parametrize("method", ["sod", "opsd_gt", "opsd_hint"])
def test_scores_are_those_of_the_plain_forward_pass_where_the_student_sampled(method, monkeypatch):
    """A teacher that is told more sees another prompt, and scores the same ids."""
    monkeypatch.setattr(tools.Problem, "hint", "think twice", raising=False)
    load = tools.load_problems
    monkeypatch.setattr(tools, "load_problems", lambda path, calls: [
        dataclasses.replace(p, hint="think twice") for p in load(path, calls)])
    agent, batch = scored_batch(method=method, prompts=2)
    told = {"sod": "", "opsd_gt": "\nThe answer is {}.", "opsd_hint": "\nHint: think twice"}
    for i, r in enumerate(batch.rollouts):
        problem = dataclasses.replace(r.problem, question=r.problem.question
                                      + told[method].format(r.problem.answer))
        prompt = sod.encode_prompt(agent.tokenizer, problem)
        place = slice(len(r.prompt), len(r.ids))
        outside = torch.cat([batch.logp_s[i, :len(r.prompt)], batch.logp_s[i, len(r.ids):]])
        assert outside.eq(0).all()
        for got, want in ((batch.logp_s[i, place], plain_logprobs(agent.student, r.prompt, r)),
                          (batch.logp_t[i, place], plain_logprobs(agent.teacher, prompt, r))):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_batch_holds_what_was_sampled_and_cuts_to_some_of_its_rows():
    turns = [sod.Turn([1, 2], outcome="error", tool_ids=[3]), sod.Turn([4])]
    long = sod.Rollout(None, [9], turns, reward=0.5)
    short, lost = (sod.Rollout(None, [8], [sod.Turn([5])], finish_reason=f, reward=-1.0)
                   for f in ("answer", "infrastructure"))
    batch = sod.collate([short, long, lost], "cpu")
    assert batch.ids.tolist() == [[8, 5, 0, 0, 0], [9, 1, 2, 3, 4], [8, 5, 0, 0, 0]]
    assert batch.step_id.tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 2], [0] * 5]
    assert batch.failed.tolist() == [[False, False], [True, False], [False, False]]
    assert batch.reward.tolist()[:2] == [-1.0, 0.5] and math.isnan(batch.reward[2])
    batch.d = torch.tensor([[1.0, 0], [2, 3], [0, 0]])
    cut = batch.select([2, 0])
    assert cut.ids.tolist() == [[8, 5], [8, 5]] and cut.step_id.tolist() == [[0, 0], [0, 1]]
    assert cut.rollouts == [lost, short] and cut.lengths == [2, 2] and cut.logp_s is None
    assert cut.d.tolist() == [[0, 0], [1, 0]]
    other = sod.collate([long], "cpu", [[6, 7, 7]])
    assert other.ids.tolist() == [[6, 7, 7, 1, 2, 3, 4]]
    assert other.step_id.tolist() == [[0, 0, 0, 1, 1, 0, 2]]


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [random.Random(0).randint(1, 50) for _ in range(100)]
    batches = list(sod.micro_batches(lengths, 200))
    assert sorted(i for b in batches for i in b) == list(range(100)) and len(batches) < 40
    assert all(len(b) * max(lengths[i] for i in b) <= 200 for b in batches)
    assert list(sod.micro_batches([500], 200)) == [[0]]  # too long for the budget: alone, not lost
    # What all rows begin with counts once: 30 + 3 * 10 tokens.
    assert list(sod.micro_batches([40] * 4, 60, None, 30)) == [[0, 1, 2], [3]]
    some = sod.micro_batches(lengths, 200, [2, 7, 9])
    assert sorted(i for batch in some for i in batch) == [2, 7, 9]


@pytest.mark.parametrize("method, kl", [("sod", "sampled"), ("opsd_gt", "full")])
def test_scores_loss_and_gradient_do_not_depend_on_how_the_batch_was_cut(method, kl):
    agent, batch = scored_batch(method=method, kl=kl, clip_low=0.01, clip_high=0.01, prompts=2)
    for p in agent.student.parameters():
        p.data += 0.01 * torch.randn_like(p)  # so that some tokens are clipped
    found = []
    for tokens in (10**6, 700, 1):
        vector = gradient(agent, batch, tokens)
        found.append((vector, *sod.backpropagate(agent, batch), sod.score(agent, agent.teacher,
                                                                          batch)[0]))
    (whole, loss, clipped, logp), *others = found
    assert whole.norm() > 0 and 0 < clipped < 1
    for other in others:
        assert (other[0] - whole).norm() / whole.norm() < 1e-4
        assert other[1:3] == pytest.approx((loss, clipped), rel=1e-4)
        torch.testing.assert_close(other[3], logp, atol=1e-4, rtol=1e-4)


def with_examples(batch):
    """The same rollouts after 300 more ids, the same before each question."""
    start = [i % 100 + 3 for i in range(300)]
    longer = sod.collate(batch.rollouts, "cpu", [start + r.prompt for r in batch.rollouts])
    for name in ("logp_s", "logp_t", "advantages"):
        setattr(longer, name, F.pad(getattr(batch, name), (len(start), 0)))
    return longer


def test_ids_that_all_rows_begin_with_are_read_once_and_scores_and_gradient_stay(scored,
                                                                                monkeypatch):
    agent, batch = scored
    longer = with_examples(batch)
    assert batch.shared == 0 and longer.shared >= 300  # it is worth a second pass in one of them
    assert longer.select([3, 1]).shared == longer.shared
    once, gradient_once = sod.score(agent, agent.student, longer), gradient(agent, longer)
    read = []
    agent.student.base_model.register_forward_hook(
        lambda model, args, options, out: read.append(options["input_ids"].numel()),
        with_kwargs=True)
    sod.score(agent, agent.student, longer)
    assert sum(read) < sum(longer.lengths) * 0.6
    longer.shared = 0
    read.clear()
    for mine, plain in zip(once, sod.score(agent, agent.student, longer)):
        torch.testing.assert_close(mine, plain, atol=2e-5, rtol=1e-5)
    assert sum(read) > sum(longer.lengths)
    plain = gradient(agent, longer)
    assert (gradient_once - plain).norm() / plain.norm() < 1e-5


def test_the_last_id_of_a_prompt_is_never_shared_so_that_a_row_without_a_response_has_one_left(
        scored):
    assert sod.shared_prefix([[1, 2, 3]] * 2) == 2 and sod.shared_prefix([[1, 2, 3], [1, 4]]) == 1
    agent, _ = scored
    bare = sod.Rollout(None, [5, 6, 7, 8], [], finish_reason="infrastructure")
    batch = sod.collate([bare, bare], "cpu")
    assert batch.shared == 3 and not sod.score(agent, agent.student, batch)[0].any()


def test_recomputed_layers_which_keep_no_cache_read_whole_rows(scored):
    agent, batch = scored
    longer = with_examples(batch)
    plain = gradient(agent, longer)
    sod.enable_checkpointing(agent.student)
    assert (gradient(agent, longer) - plain).norm() / plain.norm() < 1e-5


def test_gradient_checkpointing_changes_memory_not_the_gradient(scored):
    agent, batch = scored
    plain = gradient(agent, batch)
    sod.enable_checkpointing(agent.student)
    assert (gradient(agent, batch) - plain).norm() / plain.norm() < 1e-5


def test_full_kl_of_the_loss_is_the_weighted_token_mean():
    agent, batch = scored_batch(kl="full", method="sod_only", prompts=2)
    assert batch.advantages.eq(0).all()  # nothing is left for the policy loss
    total = count = 0
    for i, r in enumerate(batch.rollouts):
        with torch.no_grad():
            p, q = (m(torch.tensor([r.ids])).logits[0, :-1].log_softmax(-1)
                    for m in (agent.student, agent.teacher))
        kl = (p.exp() * (p - q)).sum(-1)
        for t, k in enumerate(r.step_id[1:]):
            if k > 0:
                total, count = total + float(batch.w[i, k - 1] * kl[t]), count + 1
    assert sod.backpropagate(agent, batch)[0] == pytest.approx(total / count, rel=1e-4)


def test_loss_of_demonstrations_is_the_cross_entropy_of_assistant_tokens():
    agent = sod.load_agent(small(method="sft", temperature=2.0))  # that is for rollouts only
    shown = agent.train_set[:3]
    own = torch.cat([plain_logprobs(agent.student, r.prompt, r)[torch.tensor(
        r.step_id[len(r.prompt):]) > 0] for r in shown])
    loss, clipped = sod.backpropagate(agent, sod.collate(shown, "cpu"))
    assert loss == pytest.approx(-float(own.mean()), rel=1e-4) and clipped == 0
    _, turns = tools.load_demonstrations(WORLD / "demonstrations.jsonl")[0]
    wrote = [i for i, k in zip(shown[0].ids, shown[0].step_id) if k > 0]
    assert agent.tokenizer.decode(wrote) == "".join(
        t["content"] + "<|im_end|>" for t in turns if t["role"] == "assistant")


def test_nothing_is_learnt_from_rollouts_that_the_machine_failed(scored):
    agent, batch = scored
    lost = [dataclasses.replace(r, finish_reason="infrastructure") for r in batch.rollouts[:6]]
    failed = sod.collate([*lost, *batch.rollouts[6:]], "cpu").select(range(6))
    assert failed.step_id.eq(0).all() and failed.reward.isnan().all()
    assert sod.backpropagate(agent, failed) == (0.0, 0.0)
    assert all(p.grad is None for p in agent.student.parameters())


# --- Optimiser --------------------------------------------------------------------------------


def optimizer_of(model, lr=1e-6, **changes):
    return sod.Optimizer(model, lambda n: lr, small(**{"grad_clip": 1e9, **changes}))


def push(model, scale=1.0):
    """A gradient of `scale` for every weight."""
    (sum(p.float().sum() for p in model.parameters()) * scale).backward()


def travelled(dtype, step, updates=40):
    """Mean way of weights under a constant gradient, as a share of lr * updates."""
    model = tiny(dtype=dtype, num_hidden_layers=1)
    start = [p.detach().double().clone() for p in model.parameters()]
    take = step(model)
    for _ in range(updates):
        push(model)
        take()
    ways = [(a - p.detach().double()).flatten() for a, p in zip(start, model.parameters())]
    return float(torch.cat(ways).mean()) / (1e-6 * updates)


def ours(model):
    optimizer = optimizer_of(model, weight_decay=0.0)
    return lambda: optimizer.step(0.0)


def in_place(model):
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    return lambda: (adamw.step(), adamw.zero_grad())


def test_at_lr_1e_6_a_weight_in_bf16_stands_still_and_ours_moves():
    assert travelled(torch.float32, ours) == pytest.approx(1, abs=0.05)
    assert travelled(torch.bfloat16, ours, 1000) == pytest.approx(1, abs=0.05)
    assert abs(travelled(torch.bfloat16, in_place, 1000)) < 0.2


@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_step_is_torchs_adamw_on_fp32_weights(dtype, offload):
    model = tiny(dtype=dtype)
    rates = lambda n: 1e-3 / n
    optimizer = sod.Optimizer(model, rates, small(grad_clip=0.5, offload=offload))
    reference = [torch.nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
    adamw = torch.optim.AdamW(reference, betas=(0.9, 0.999), weight_decay=0.01)
    torch.manual_seed(1)
    for update in range(1, 6):
        for p, master in zip(model.parameters(), reference):
            grad = torch.randn(p.shape).to(dtype)
            (p * grad).sum().backward()
            master.grad = grad.float()
        adamw.param_groups[0]["lr"] = rates(update)
        norm = torch.nn.utils.clip_grad_norm_(reference, 0.5)
        adamw.step()
        assert optimizer.step(0.0) == pytest.approx(float(norm), rel=1e-5)
    assert optimizer.updates == 5
    for p, q, master in zip(model.parameters(), reference, optimizer.masters):
        torch.testing.assert_close(master, q, atol=1e-8, rtol=1e-6)
        assert torch.equal(p, master.to(dtype))


def test_an_optimiser_comes_off_its_model_and_another_one_takes_its_place():
    model = tiny(dtype=torch.bfloat16)
    first = optimizer_of(model)
    push(model)
    assert all(p.grad is None for p in model.parameters())
    first.step(0.0)
    first.detach()
    second = optimizer_of(model, lr=1e-2)
    push(model)
    assert all(master.grad is None for master in first.masters)
    before = [p.clone() for p in model.parameters()]
    assert second.step(0.0) > 0 and second.updates == first.updates == 1
    assert all((p < b).all() for p, b in zip(model.parameters(), before))
    second.detach()
    push(model)
    assert all(p.grad is not None for p in model.parameters())


def test_a_resumed_optimiser_has_the_moments_of_the_save_and_the_options_of_this_run():
    model = tiny()
    first = optimizer_of(model)
    push(model)
    first.step(0.0)
    second = sod.Optimizer(tiny(), lambda n: 0.1, small(weight_decay=0.5, beta1=0.8))
    second.load_state_dict(first.state_dict())
    assert second.updates == 1
    for mine, theirs in zip(second.adamw.state.values(), first.adamw.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    assert second.adamw.param_groups[0]["weight_decay"] == 0.5
    assert second.adamw.param_groups[0]["betas"] == (0.8, 0.999)


def test_gradients_of_micro_batches_add_up_in_fp32():
    model = tiny(dtype=torch.bfloat16)
    optimizer = optimizer_of(model)
    for scale in [1.0] + [2.0 ** -10] * 64:  # in bf16, 1 + 2^-10 is 1
        push(model, scale)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.grad.eq(1 + 64 * 2.0 ** -10).all() for m in optimizer.masters)


@pytest.mark.parametrize("loss, scale", [(0.0, math.inf), (math.nan, 1.0), (math.inf, 1.0)])
def test_an_update_that_is_not_finite_is_not_taken_and_leaves_no_trace(loss, scale):
    model = tiny()
    optimizer = optimizer_of(model)
    before = [p.clone() for p in model.parameters()]
    push(model, scale)
    assert not math.isfinite(optimizer.step(loss)) and optimizer.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    push(model)
    assert math.isfinite(optimizer.step(0.0)) and optimizer.updates == 1
    assert not optimizer.adamw.state_dict()["state"][0]["exp_avg"].isnan().any()


@pytest.mark.parametrize("total", [1, 2, 9, 100])
def test_every_update_of_sft_trains_down_to_the_last(total):
    scale = [sod.cosine_scale(n, total) for n in range(1, total + 1)]
    assert min(scale) > 0 and max(scale) == 1
    assert scale[total // 10:] == sorted(scale[total // 10:], reverse=True)
    assert scale[:total // 10] == pytest.approx([n * 10 / total for n in range(1, 1 + total // 10)])
    if total == 100:  # 10 updates of warm-up, then 91 pieces of half a cosine
        assert scale[54] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 45 / 91))


# --- Runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in sod.METHODS if m != "vanilla"])
def test_every_method_trains(method):
    agent = sod.load_agent(small(method=method, sft_epochs=1, sft_batch=20, max_response=120,
                                 prompts=2))
    before = torch.cat([p.detach().flatten().clone() for p in agent.student.parameters()])
    start = copy.deepcopy(agent.teacher).state_dict() if agent.teacher else {}
    rows = [m for m, _ in sod.train(agent)]
    after = torch.cat([p.detach().flatten() for p in agent.student.parameters()])
    assert [m["iteration"] for m in rows] == [1, 2] and not torch.equal(before, after)
    assert all(math.isfinite(v) for m in rows for v in m.values() if isinstance(v, float))
    for name, value in start.items():  # frozen
        assert torch.equal(agent.teacher.state_dict()[name], value)


@pytest.mark.parametrize("weights", [w for w in sod.WEIGHTS if w != "sod"])
def test_every_weight_scheme_trains(weights, scored, monkeypatch):
    agent, batch = scored
    agent.config.weights = weights
    monkeypatch.setattr(sod, "sample_rollouts", lambda *_: batch.rollouts)
    m, batch = sod.train_step(agent, 1)
    assert batch.w.shape == batch.d.shape and torch.equal(
        batch.w, sod.WEIGHTS[weights](batch, agent.config))
    assert (m["w"] == 1) == (weights == "uniform") and math.isfinite(m["loss"])


def test_an_iteration_counts_its_updates_and_warms_up(monkeypatch):
    agent = sod.load_agent(small(num_minibatches=4, warmup=4, max_response=100, group_size=2))
    list(sod.train(agent))
    assert agent.optimizer.updates == 8 and agent.optimizer.adamw.param_groups[0]["lr"] == 1e-3
    assert [agent.optimizer.learning_rate(n) / 1e-3 for n in range(1, 7)] == pytest.approx(
        [.25, .5, .75, 1, 1, 1])


def test_items_are_drawn_epoch_by_epoch_in_a_new_order_each_time():
    items, config = list("abcdefg"), small(seed=5)
    drawn = [sod.draw(items, config, i, 3, 2) for i in range(1, 15)]
    assert all(batch[::2] == batch[1::2] for batch in drawn)  # each twice, side by side
    singles = [x for batch in drawn for x in batch[::2]]
    epochs = [singles[n:n + 7] for n in range(0, 42, 7)]
    assert all(sorted(epoch) == items for epoch in epochs) and len(set(map(tuple, epochs))) > 3
    assert sod.draw(items, config, 14, 3, 2) == drawn[-1] != sod.draw(items, small(), 14, 3, 2)


def test_rollouts_learn_in_groups_of_their_problem(scored):
    _, batch = scored
    questions = [r.problem.question for r in batch.rollouts]
    assert [len(list(group)) for _, group in itertools.groupby(questions)] == [3] * 4
    torch.testing.assert_close(batch.A, sod.group_advantages(batch.reward, 3))
    gap = batch.w.gather(1, (batch.step_id - 1).clamp(min=0)) * (batch.logp_t - batch.logp_s)
    torch.testing.assert_close(batch.advantages,
                               torch.where(batch.step_id > 0, batch.A[:, None] + gap, 0.0))


def test_distillation_brings_the_student_closer_to_the_teacher():
    agent = sod.load_agent(small(method="opd_only", iterations=4, prompts=8, group_size=4,
                                 lr=3e-4))
    kl = [m["kl_estimate"] for m, _ in sod.train(agent)]
    assert np.mean(kl[2:]) < 0.9 * np.mean(kl[:2])  # the rest is the gap of the check digits


def test_prompts_over_budget_are_counted_and_skipped(tmp_path, capsys):
    rows = [{"question": "Start with 5. Add 3.", "answer": "8"},
            {"question": "Add 1. " * 400, "answer": "2"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    agent = sod.load_agent(small(train_data=str(tmp_path / "p.jsonl")))
    assert len(agent.train_set) == 1
    assert "1 problems or demonstrations are too long and skipped" in capsys.readouterr().out


# --- The command ------------------------------------------------------------------------------


def test_a_run_writes_a_checkpoint_that_transformers_loads(tmp_path, capfd):
    options = dict(iterations=1, prompts=2, group_size=2, eval_problems=3, eval_samples=1,
                   out=tmp_path, name="a")
    assert command(options) == 0
    said, place = capfd.readouterr().out, tmp_path / "a" / "checkpoint"
    assert "student before" in said and "teacher" in said and "a/rollouts.html" in said
    AutoModelForCausalLM.from_pretrained(place)
    assert AutoTokenizer.from_pretrained(place).chat_template
    card = (place / "README.md").read_text()
    for key in ("The embedded student of sod-mini, trained", "library_name: transformers",
                "pipeline_tag: text-generation",
                "on-policy-distillation", "| student after |", "Its licence"):
        assert key in card
    (m,) = json_lines(tmp_path / "a" / "metrics.jsonl")
    assert m["iteration"] == 1 and 0 <= m["correct"] <= 1
    rollouts = json_lines(tmp_path / "a" / "rollouts.jsonl")
    assert len(rollouts) == 4 and rollouts[0]["turns"][0]["w"] == 1


def test_a_checkpoint_is_served_with_the_sampling_it_was_measured_with(scored, tmp_path):
    agent, _ = scored
    agent.student.shipped_generation = GenerationConfig(  # as Qwen2.5-Coder's
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1,
        eos_token_id=[1, 2], pad_token_id=2)
    agent.config.eval_top_p = 0.6
    sod.write_model(agent, tmp_path, {})
    served = GenerationConfig.from_pretrained(tmp_path)
    assert served.eos_token_id == [1, 2] and served.pad_token_id == 2 and served.do_sample
    assert (served.temperature, served.top_p, served.top_k) == (1.0, 0.6, 0)
    assert served.repetition_penalty in (None, 1.0)


def test_vanilla_only_measures(tmp_path, capsys):
    assert command(dict(method="vanilla", eval_problems=2, out=tmp_path, name="v")) == 0
    assert "| student before |" in capsys.readouterr().out
    assert not (tmp_path / "v" / "checkpoint").exists()


def test_every_option_shows_its_comment_and_default_in_help(capsys):
    with pytest.raises(SystemExit):
        sod.parse_config(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name} " in text for field in dataclasses.fields(sod.Config))
    assert "w_k <= 1 + delta (Eq. 7) [0.2]" in text
    assert "assistant turns in a rollout [12]" in text  # of the options shared with evaluate.py


def test_presets_set_the_papers_numbers_and_options_win_over_them():
    paper, _ = sod.parse_config(["--preset", "paper", "--train_data", "x.jsonl"])
    assert (paper.prompts, paper.group_size, paper.num_minibatches) == (64, 16, 4)
    assert (paper.max_prompt, paper.max_response, paper.max_turns) == (2560, 20480, 16)
    assert (paper.lr, paper.delta, paper.epsilon, paper.clip_high) == (1e-6, 0.2, 1e-6, 0.28)
    assert (paper.eval_top_p, paper.silent_rate, paper.overlong_buffer) == (0.6, 0.0, 1024)
    mine, preset = sod.parse_config(["--preset", "gpu", "--train_data", "x.jsonl", "--lr", "3e-6"])
    assert preset == "gpu" and mine.lr == 3e-6 and mine.gradient_checkpointing


@pytest.mark.parametrize("arguments", [
    ["--train_data", "x.jsonl"], ["--student", "Qwen/Qwen3-0.6B"],
    ["--method", "sft", "--demonstrations", "mine.jsonl"],
    ["--method", "vanilla", "--eval_data", "mine.jsonl"]])
def test_other_models_or_data_ask_for_a_preset_by_name(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        sod.parse_config(arguments)
    said = capsys.readouterr().err
    assert f"{arguments[-2][2:]} is {arguments[-1]!r}" in said and "--preset world" in said
    data = ["--train_data", "x.jsonl"] * ("--train_data" not in arguments)  # gpu names none
    for preset in sod.PRESETS:
        assert sod.parse_config([*arguments, *data, "--preset", preset])[1] == preset


def test_the_world_spelled_otherwise_needs_no_preset_and_what_one_replaces_is_told(capsys):
    _, preset = sod.parse_config(["--train_data", str(WORLD / "train.jsonl")])
    sod.print_start(preset)
    assert preset == "world" and "replaced" not in capsys.readouterr().out
    sod.print_start("gpu")
    said = capsys.readouterr().out
    assert "replaced by the preset, unless an option was given: " in said
    assert all(f"{name} {value!r}" in said for name, value in sod.GPU.items())


@pytest.mark.parametrize("family", ["GPT2", "Qwen2"])
def test_a_model_with_dropout_has_none_here_so_the_ratio_begins_at_1(family, tmp_path):
    """In GPT-2 the rate is an nn.Dropout's, in Qwen2 a number of the attention module."""
    rates = dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, attention_dropout=0.2)
    tiny(family, **rates).save_pretrained(tmp_path)
    model = sod.load_model(str(tmp_path), "cpu", torch.float32)
    sod.enable_checkpointing(model)
    rollouts = [sod.Rollout(None, [5] * 9, [sod.Turn([7, 8, 9] * 9)]) for _ in range(3)]
    batch, config = sod.collate(rollouts, "cpu"), small(num_minibatches=1, clip_low=0, clip_high=0)
    agent = sod.Agent(config, model, None, None, None)
    batch.logp_s, _ = sod.score(agent, model, batch)
    batch.advantages = torch.randn(batch.ids.shape)
    vectors = [gradient_of(agent, batch, tokens) for tokens in (10**6, 1)]
    assert vectors[0].norm() > 0
    torch.testing.assert_close(*vectors, atol=1e-6, rtol=1e-4)
    model.train()
    logp, _ = sod.sampled_logprobs(model, batch, 1.0)
    torch.testing.assert_close(logp, batch.logp_s, atol=1e-5, rtol=0)


def gradient_of(agent, batch, tokens):
    agent.student.zero_grad()
    agent.config.micro_batch_tokens = tokens
    sod.backpropagate(agent, batch)
    return torch.cat([p.grad.flatten() for p in agent.student.parameters()])
