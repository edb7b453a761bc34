"""A policy trained in several epochs over one rollout, a target network that follows, and an early end by divergence.

The model is used by its methods, never by forward, and the first of them reads a parameter of the root.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import Normal

from tests.integrations.users.common import (
    RANKS,
    check,
    mean_over_ranks,
    noise,
    oracle,
    pull,
    rules_of,
    snapshot,
    ways,
)
from tests.training import Weights

STATES, ACTIONS, ROWS = 20, 18, 8
ROLLOUTS, EPOCHS, TAU, TARGET_KL = 3, 4, 0.2, 0.15


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.log_std = nn.Parameter(torch.full((ACTIONS,), -0.5))
        self.trunk = nn.Sequential(nn.Linear(STATES, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.policy, self.value = nn.Linear(32, ACTIONS), nn.Linear(32, 1)

    def distribution(self, states: Tensor) -> Normal:
        std = self.log_std.exp()
        return Normal(self.policy(self.trunk(states)), std)

    def evaluate(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities, values, entropy)."""
        policy = self.distribution(states)
        return policy.log_prob(actions).sum(-1), self.value(self.trunk(states)).squeeze(-1), policy.entropy().sum(-1)

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For DDP, which averages what went through its own forward."""
        return self.evaluate(states, actions)


Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Rollout:
    """One rank's states, actions and returns, made with the policy and the target as they are."""

    @torch.no_grad()
    def __init__(self, model: ActorCritic, target: ActorCritic, *seed: int) -> None:
        self.states = noise(ROWS, STATES, seed=(1, *seed))
        policy = model.distribution(self.states)
        self.actions = policy.mean + policy.stddev * noise(ROWS, ACTIONS, seed=(2, *seed))
        self.old = policy.log_prob(self.actions).sum(-1)
        rewards = -(self.actions - self.states[:, :ACTIONS]).square().mean(-1)
        values = target.value(target.trunk(self.states)).squeeze(-1)
        self.returns = rewards + 0.9 * values.roll(1)
        self.advantages = self.returns - values

    def loss(self, evaluate: Evaluate) -> tuple[Tensor, Tensor]:
        """(clipped objective and value error, an estimate of the divergence from the rollout's policy)."""
        log_probs, values, entropy = evaluate(self.states, self.actions)
        ratio = (log_probs - self.old).exp()
        gain = torch.minimum(ratio * self.advantages, ratio.clamp(0.8, 1.2) * self.advantages).mean()
        divergence = ((ratio - 1) - ratio.log()).mean().detach()
        return (values - self.returns).square().mean() - gain - 0.01 * entropy.mean(), divergence


@torch.no_grad()
def follow(target: nn.Module, model: nn.Module) -> None:
    for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
        slow.data.mul_(1 - TAU).add_(TAU * fast.data)


def _ppo(group: dist.ProcessGroup, way: str, decides: str) -> dict[str, Any]:
    """`decides`: whether all ranks' divergence ends the epochs "before" the backward, or "between" it and the step."""
    model = ActorCritic()
    rank, rules = dist.get_rank(group), rules_of(model)
    target = copy.deepcopy(model).requires_grad_(False)
    called, optimizer = ways(model, group, way)
    evaluate: Evaluate = called if way == "external" else model.evaluate
    updates = []
    for number in range(ROLLOUTS):
        rollout = Rollout(model, target, number, rank)
        for epoch in range(EPOCHS):
            loss, divergence = rollout.loss(evaluate)
            if decides == "between":
                (loss + pull(model, rules)).backward()
            dist.all_reduce(divergence, group=group)
            if divergence / RANKS > TARGET_KL:
                optimizer.zero_grad()
                break
            if decides == "before":
                (loss + pull(model, rules)).backward()
            optimizer.step()
            optimizer.zero_grad()
            follow(target, model)
            updates.append((number, epoch))
    return {"weights": snapshot(model), "target": {n: p.clone() for n, p in target.named_parameters()}, "at": updates}


def _ppo_plain() -> tuple[Weights, Weights, list[tuple[int, int]]]:
    reference, updates = oracle(ActorCritic()), []
    model: Any = reference.model
    target = copy.deepcopy(model).requires_grad_(False)
    for number in range(ROLLOUTS):
        rollouts = [Rollout(model, target, number, rank) for rank in range(RANKS)]
        for epoch in range(EPOCHS):
            if sum(float(rollout.loss(model.evaluate)[1]) for rollout in rollouts) / RANKS > TARGET_KL:
                break

            def loss(model: Any, rank: int, rollouts: list[Rollout] = rollouts) -> Tensor:
                return rollouts[rank].loss(model.evaluate)[0] + pull(model, reference.rules)

            reference.apply(mean_over_ranks(reference, loss))
            follow(target, model)
            updates.append((number, epoch))
    return reference.weights, dict(target.named_parameters()), updates


@pytest.mark.parametrize(("way", "decides"), [("reduce", "between"), ("external", "between"), ("reduce", "before")])
def test_epochs_over_a_rollout_end_early_on_all_ranks_and_the_target_follows(spawn, way: str, decides: str) -> None:
    """The target's average was of weights still under way; the all-reduce met a gradient's; a method read old ones."""
    found = spawn(_ppo, RANKS, way=way, decides=decides)
    weights, target, updates = _ppo_plain()
    assert len(updates) < ROLLOUTS * EPOCHS and {number for number, _ in updates} == set(range(ROLLOUTS)), updates
    first = snapshot(ActorCritic())
    check([rank["weights"] for rank in found], weights, first)
    check([rank["target"] for rank in found], target, first)
    assert all(rank["at"] == updates for rank in found)
