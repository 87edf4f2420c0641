"""What a run will hold is said before it begins; without memory, work is done in smaller pieces."""
import pytest
import torch

import sod_mini as sod
from conftest import gradient, scored_batch, small, tiny
from memory import GIB, peak_of_iteration, random_qwen3, tensors_in


# --- What a run holds -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_holds_what_was_said(monkeypatch, dtype):
    monkeypatch.setattr(sod, "GIB", 1)
    model, config = tiny(dtype=dtype), small(method="grpo", preflight=False)
    optimizer = sod.Optimizer(model, lambda n: 1e-4, config)
    for _ in range(2):
        optimizer.step(0.0)  # takes the moments into being, at the second time round
        sum(p.sum() for p in model.parameters()).backward()
    weights = [*model.parameters(), *optimizer.masters]
    tensors = [*weights, *(p.grad for p in weights), optimizer.adamw.state_dict()]
    sizes = {x.data_ptr(): x.numel() * x.element_size() for x in tensors_in(tensors) if x.dim()}
    said = sod.check_memory(config, tiny(), None, torch.device("cpu"), dtype)
    assert said.startswith(f"{sum(sizes.values())}.000 GiB")


@pytest.mark.parametrize("offload", ["none", "teacher", "all"])
def test_the_counted_iteration_of_the_table_holds_what_was_said(monkeypatch, offload):
    """Teacher and optimiser are counted where they are, and the gradient on top."""
    monkeypatch.setattr("memory.V", 1000)
    student, teacher = (64, 2, 2, 128), (64, 3, 2, 128)
    most = peak_of_iteration(small(offload=offload), student, teacher, 8, 24, 3)
    N, M = (sum(p.numel() for p in random_qwen3(size).parameters()) for size in (student, teacher))
    rest = {"none": 14 * N + 2 * M, "teacher": 14 * N, "all": 2 * N}[offload]
    assert most["resident"] * GIB == pytest.approx(rest, rel=0.01)  # and a table of the positions
    gone = 0 if offload == "none" else 2 * M
    assert most["scoring"] * GIB > rest + gone
    assert most["gradient"] * GIB > rest + (0 if offload == "all" else 4 * N)
    step = 0 if offload == "all" else 8 * N  # the gradient, and a square root of each moment
    assert most["step"] * GIB == pytest.approx(rest + step, rel=0.02)


# --- Half the size, and again ------------------------------------------------------------------


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def failing(work, fails, error=NO_MEMORY):
    """`work`, but for the calls at which `fails(number of the call, *arguments)`."""
    calls = []

    def run(*args):
        calls.append(args)
        if fails(len(calls), *args):
            raise error
        return work(*args)
    return run


@pytest.mark.parametrize("engine, seam, rows", [("generate", "generate", 2),
                                                ("continuous", "decode_chunk", 1)])
def test_sampling_that_runs_out_of_memory_goes_on_with_half_and_gives_the_same_rollouts(
        monkeypatch, scored, engine, seam, rows):
    agent, _ = scored
    agent.config.rollout_batch, agent.config.rollout_engine = 0, engine
    prompts = agent.train_set[:6]

    def play():
        found = sod.sample_rollouts(agent, agent.student, prompts, (0, "test", 1))
        return [(r.ids, r.turns, r.reward) for r in found]
    plain = play()
    count = lambda found: found if isinstance(found, int) else len(found)
    monkeypatch.setattr(sod, seam, failing(getattr(sod, seam),
                                           lambda n, *args: count(args[rows]) > 2))
    assert play() == plain
    assert agent.sizes == {"rollout_batch": 1} and agent.halvings == 2  # 6, 3, 1
    assert play() == plain and agent.halvings == 2


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_backpropagation_that_runs_out_of_memory_begins_anew_and_gives_the_same_gradient(
        monkeypatch, kind):
    agent, batch = scored_batch(dtype=kind)
    size = batch.ids.numel() // 2
    vector = gradient(agent, batch, size // 2)
    loss = sod.backpropagate(agent, batch)
    logp = sod.score(agent, agent.student, batch)[0]
    # The second micro-batch fails, when the first has left its gradient.
    monkeypatch.setattr(sod, "hidden_states", failing(sod.hidden_states, lambda n, *_: n == 2))
    assert torch.equal(gradient(agent, batch, size), vector)
    assert agent.sizes == {"micro_batch_tokens": size // 2} and agent.halvings == 1
    assert agent.config.micro_batch_tokens == size  # what the user has asked for stays
    assert sod.backpropagate(agent, batch) == loss
    agent.sizes.clear()
    agent.config.micro_batch_tokens = 0  # all of them, then half, then a quarter
    too_much = lambda n, model, ids, shared: ids.numel() > size // 2
    monkeypatch.setattr(sod, "hidden_states", failing(sod.hidden_states, too_much))
    assert torch.equal(sod.score(agent, agent.student, batch)[0], logp)
    assert agent.sizes == {"micro_batch_tokens": size // 2} and agent.halvings == 3
    assert agent.seconds["score"] > 0 and agent.seconds["backpropagate"] > 0


@pytest.mark.parametrize("name", ["sample_rollouts", "score", "backpropagate"])
def test_what_does_not_fit_at_its_least_ends_with_a_sentence(monkeypatch, scored, name):
    agent, batch = scored
    agent.config.rollout_engine = "generate"
    for seam in ("generate", "hidden_states"):
        monkeypatch.setattr(sod, seam, failing(None, lambda *_: True))
    work = {"sample_rollouts": lambda: sod.sample_rollouts(
                agent, agent.student, agent.train_set[:3], (0, "test", 1)),
            "score": lambda: sod.score(agent, agent.student, batch),
            "backpropagate": lambda: sod.backpropagate(agent, batch)}[name]
    with pytest.raises(ValueError, match="out of memory with one rollout at a time; lower --max_r"):
        work()
    least = {"sample_rollouts": 1}.get(name, batch.ids.shape[1])
    option = "rollout_batch" if name == "sample_rollouts" else "micro_batch_tokens"
    assert agent.sizes.get(option, least) == least and agent.halvings >= 0


@pytest.mark.parametrize("error, known", [
    (NO_MEMORY, True), (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False)])
def test_every_lack_of_memory_is_known_and_no_other_error_is_hidden(monkeypatch, scored, error,
                                                                    known):
    agent, batch = scored
    monkeypatch.setattr(sod, "hidden_states", failing(sod.hidden_states, lambda n, *_: n == 1,
                                                      error))
    if known:
        sod.score(agent, agent.student, batch)
        assert agent.halvings == 1
    else:
        with pytest.raises(RuntimeError, match="mat1"):
            sod.score(agent, agent.student, batch)
        assert agent.halvings == 0
