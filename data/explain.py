"""One iteration of SOD on four rollouts of one problem, walked through on the screen.

    python data/explain.py
    python data/explain.py --seed 7 --weights uniform      options are those of sod_mini.py

Each number stands beside the name and the line of the function in sod_mini.py that made it. These
are called here one after the other, as `train_step` does; this file takes no more than means.
"""
import contextlib
import inspect
import io
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sod_mini as sod

# One problem, four rollouts, one update. With this seed three are right and one is wrong, and two
# meet a tool that does not answer and go on from there.
ASKED = ["--preset", "world", "--prompts", "1", "--group_size", "4", "--num_minibatches", "1",
         "--eval_data", "", "--seed", "30"]


def by(function):
    """The name and the line of a function of sod_mini.py."""
    return f"[{function.__qualname__}, sod_mini.py:{inspect.getsourcelines(function)[1]}]"


def say(title, *lines):
    print(f"\n{title}")
    for line in lines:
        print("    " + sod.tools.printable(line))


def numbers(values, form="{:+.2f}"):
    return "  ".join(form.format(float(x)) for x in values)


def conversation(batch, i, calls):
    """The turns of a rollout, each with what the tool answered."""
    for k, turn in enumerate(batch.rollouts[i].turns, start=1):
        call = calls.parse(turn.text)
        wrote = (call.code if call and call.code else turn.text).strip()
        failed = "  (a failed call)" if turn.failed else ""
        answer = (turn.tool_text or batch.rollouts[i].finish_reason).strip().rpartition("\n")[2]
        yield f"step {k}  {wrote[:50]!r} -> {answer[:50]}{failed}"


def explain(agent):
    config, student, tokenizer = agent.config, agent.student, agent.tokenizer
    method, calls = sod.METHODS[config.method], sod.student_context(config).calls
    agent.optimizer = sod.make_optimizer(agent)
    prompts = sod.draw(agent.train_set, config, 1, config.prompts, config.group_size)
    problem, ids = prompts[0]
    say(f"The problem {by(sod.draw)}", problem.question, f"its answer: {problem.answer}",
        f"as ids {by(sod.encode_prompt)}: {len(ids)} tokens, which end with "
        f"{tokenizer.decode(ids[-4:])!r}")
    rollouts = sod.sample_rollouts(agent, student, prompts, (config.seed, "rollouts", 1))
    sod.check_sandbox(rollouts)
    for r in rollouts:
        r.reward = sod.outcome_reward(r, config)
    batch = sod.collate(rollouts, student.device)
    for i, r in enumerate(rollouts):
        say(f"1. Rollout {i + 1} {by(sod.sample_rollouts)}", *conversation(batch, i, calls),
            f"ends by {r.finish_reason}; graded {r.reason}")
    say(f"2. Rewards {by(sod.outcome_reward)}", numbers(batch.reward))

    batch.logp_s, batch.entropy_s = sod.score(agent, student, batch)
    if method.scorer:
        batch.logp_t, batch.entropy_t = agent.score_teacher(agent, batch)
    say(f"3. Scores: the log-probability of each of {int(batch.sampled.sum())} sampled tokens "
        f"{by(sod.score)}", f"mean of the student  {float(batch.logp_s[batch.sampled].mean()):.2f} "
        "nats", *([f"mean of the teacher  {float(batch.logp_t[batch.sampled].mean()):.2f} nats"]
                  if method.scorer else []))
    batch.A = sod.group_advantages(batch.reward, config.group_size)
    say(f"4. Advantage of each rollout: its reward, compared with its group "
        f"{by(sod.group_advantages)}", numbers(batch.A))
    if method.scorer:
        K = batch.failed.shape[1]
        batch.d = sod.step_divergence(batch.logp_s, batch.logp_t, batch.step_id, K)
        batch.w = sod.WEIGHTS[config.weights if method.weighted else "uniform"](batch,
                                                                                config).float()
        for i, r in enumerate(rollouts):
            steps = len(r.turns)
            say(f"5. Drift and trust by step, rollout {i + 1} "
                f"{by(sod.step_divergence)} {by(sod.step_weights)}",
                "d       " + numbers(batch.d[i, :steps], "{:5.2f}"),
                "w       " + numbers(batch.w[i, :steps], "{:5.2f}"),
                "failed  " + "  ".join(f"{'yes' if x else 'no':>5}"
                                       for x in batch.failed[i, :steps].tolist()))
    coef = config.opd_coef if config.kl == "sampled" else 0.0  # kl full: the KL is in the loss
    batch.advantages = sod.token_advantages(config.method, batch.A, batch.logp_s, batch.logp_t,
                                            batch.step_id, batch.w, coef)
    if method.scorer:
        say(f"6. What a token is worth {by(sod.token_advantages)}",
            *token_lines(batch, tokenizer, method.outcome, coef))
    loss, clip_frac = sod.backpropagate(agent, batch)
    say(f"7. The update {by(sod.policy_loss)} {by(sod.backpropagate)}",
        f"loss {loss:+.4f} nats, of which only the gradient matters; {clip_frac:.0%} of tokens "
        "outside the clip range, for the ratio is 1 in a first update")
    norm = agent.optimizer.step(loss)
    say(f"The weights have moved {by(sod.Optimizer.step)}",
        f"norm of the gradient {norm:.2f}, cut to {config.grad_clip}; lr {config.lr}")
    after, _ = sod.score(agent, student, batch)
    say("What it changed in these very tokens, for those whose worth was",
        *[f"{name}: {float((after - batch.logp_s)[of].mean()):+.4f} nats on average"
          for name, of in (("above 0", batch.advantages > 0), ("below 0", batch.advantages < 0))
          if of.any()])


def token_lines(batch, tokenizer, outcome, coef):
    """A_it of the token that gets the most from the teacher, and of the one that loses most."""
    worth = torch.where(batch.sampled, batch.logp_t - batch.logp_s, 0.0)
    for name, place in (("most for", worth.argmax()), ("most against", worth.argmin())):
        i, t = divmod(int(place), worth.shape[1])
        k = int(batch.step_id[i, t])
        A, w = float(batch.A[i]) * outcome, coef * float(batch.w[i, k - 1])
        s, teacher = float(batch.logp_s[i, t]), float(batch.logp_t[i, t])
        yield (f"the teacher is {name} {tokenizer.decode([int(batch.ids[i, t])])!r} in step {k} of "
               f"rollout {i + 1}:")
        yield (f"    A + w (logp_t - logp_s) = {A:+.2f} + {w:.2f} * ({teacher:.2f} - {s:.2f}) = "
               f"{float(batch.advantages[i, t]):+.2f}")


def main(argv=None):
    config, _ = sod.parse_config(ASKED + (sys.argv[1:] if argv is None else argv))
    sod.transformers.utils.logging.disable_progress_bar()
    if config.method in ("sft", "vanilla"):
        raise sod.UserError(f"method {config.method} samples no rollouts to explain; choose one of "
                            "the others, such as --method sod")
    with contextlib.redirect_stdout(io.StringIO()):  # the start lines of a run
        agent = sod.load_agent(config)
    explain(agent)


if __name__ == "__main__":
    sys.exit(sod.run_command(partial(main, None)))
