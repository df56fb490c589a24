"""stable-baselines3: an optimizer inside a policy, and losses of its own."""

import pytest
import torch
from torch import nn

import normkit

sb3 = pytest.importorskip("stable_baselines3", reason="needs stable-baselines3, which is no extra of normkit")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_ppo_steps_with_preconditioned_gradients():
    ends = []
    for attach in (False, True):
        agent = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=16, n_epochs=2, seed=0, device="cpu")
        if attach:
            bnp = normkit.BNP(agent.policy)
            bnp.attach(agent.policy.optimizer)
        agent.learn(64)
        ends.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]))
    state = agent.policy.optimizer.state_dict()["bnp"]
    assert {float(entry["steps"]) for entry in state.values()} == {2.0 * 2 * 2}  # rollouts, epochs, batches
    assert {type(m) for m in agent.policy.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not torch.equal(*ends)
    assert ends[1].isfinite().all()


def test_a_saved_agent_keeps_the_statistics(tmp_path):
    agent = sb3.A2C("MlpPolicy", "CartPole-v1", n_steps=8, seed=0, device="cpu")
    normkit.BNP(agent.policy).attach(agent.policy.optimizer)
    agent.learn(32)
    agent.save(tmp_path / "agent")
    saved = sb3.A2C.load(tmp_path / "agent", env=agent.get_env())
    bnp = normkit.BNP(saved.policy)
    bnp.attach(saved.policy.optimizer)
    saved.set_parameters(agent.get_parameters())
    ours, theirs = bnp.state_dict(), agent.policy.optimizer.state_dict()["bnp"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[path]["mean"], theirs[path]["mean"]) for path in ours)
