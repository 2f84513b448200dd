"""Frozen Lake, where every method meets the exact answer.

A language model is too large for its best policy to be computed; a gridworld is not. Here the optimum of
    max_pi  E[R] - beta KL(pi || pi_ref)                                                       (DPO paper, Eq 3)
is computed exactly, and DPO and its relatives are measured against it. The start cell plays the part of the prompt, an action
that of a token, an episode that of a completion; the reward is for reaching the goal. Every policy is scored exactly, even one
that was learnt from samples.

    python gridworld.py                              the table of methods and the figures in out/, half a minute on one core
    python gridworld.py --slip 0.2                   the same on slippery ice, where DPO misses the optimum
    python gridworld.py --map 8x8 --beta 0.5         --map takes 4x4, 8x8 or rows of your own: SFF/FHF/FFG

Contents: 1 the lake · 2 policies and their exact worth · 3 the soft optimum · 4 trajectories · 5 DPO on infinite data ·
6 DPO on n pairs · 7 slippery ice · 8 the methods · 9 the IFT experiment · 10 failures · 11 figures · 12 the command line.
On a first reading: 1 to 5, the table METHODS, the first lines of 7, and 10.

Symbols: S cells, A = 4 actions (left, down, right, up), H the horizon, the most steps of an episode, t the step. A policy is an
array (H,S,A): it knows the step, because the best action depends on how many steps are left. R is the return of a trajectory
tau = (s_0, a_0, s_1, ...), d(tau) = log pi(tau)/pi_ref(tau) its log-ratio (the dynamics cancel, so it is a sum over steps),
h = d_w - d_l a pair's margin, s(z) the logistic sigmoid (s alone is a cell). A law is a distribution of trajectories.
"""
import argparse
import math
import sys
import time
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dpo import LOSSES, plackett_luce_loss

MAPS = {"4x4": ["SFFF", "FHFH", "FFFH", "HFFG"],
        "8x8": ["SFFFFFFF", "FFFFFFFF", "FFFHFFFF", "FFFFFHFF", "FFFHFFFF", "FHHFFFHF", "FHFFHFHF", "FFFHFFFG"]}
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))                                   # (row, column): left, down, right, up


# === 1. The lake ======================================================================================================
# The world is a table of probabilities. On deterministic ice every step goes as intended; on slippery ice it may slide off to
# either side, and that is all it takes to break DPO (section 7).

class FrozenLake:
    """A gridworld of ice: S start, F frozen, H hole, G goal. Entering G pays 1; G and H end the episode.

    map_name: "4x4", "8x8", or rows of text (a list, or one string with "/" or newlines). slip: the chance that a step
    does not go as intended; each perpendicular direction gets slip/2 (gymnasium's slippery lake is slip = 2/3). horizon: the
    most steps an episode may take; by default the fewest that reach the goal.
    P (S,A,S): transition probabilities; terminal (S,) bool; reward (S,): paid on *entering* a cell; start: a cell's index.
    Raises ValueError for a bad map, slip or horizon.
    """

    def __init__(self, map_name="4x4", slip=0.0, horizon=None):
        if not (isinstance(slip, Real) and 0 <= slip <= 1):
            raise ValueError(f"slip is a probability in [0, 1], not {slip!r}")
        self.rows = check_map(map_name)
        self.slip, self.deterministic = float(slip), slip == 0
        height, width = len(self.rows), len(self.rows[0])
        self.shape = height, width
        letters = np.array(list("".join(self.rows)))
        cells = np.arange(len(letters))
        self.start = int(cells[letters == "S"][0])
        self.terminal, self.reward = np.isin(letters, ["G", "H"]), (letters == "G").astype(float)
        # where each direction leads (S,A): a step over the edge goes nowhere, and no step leaves a terminal cell
        row, column = np.divmod(cells, width)
        moved = [(row + dy).clip(0, height - 1) * width + (column + dx).clip(0, width - 1) for dy, dx in MOVES]
        self.intended = np.where(self.terminal[:, None], cells[:, None], np.stack(moved, -1))
        # the outcomes of an action: the intended one, and those of its two neighbours in the circle left-down-right-up   (S,A,3)
        outcomes = np.stack([self.intended, np.roll(self.intended, 1, 1), np.roll(self.intended, -1, 1)], -1)
        chance = np.array([1 - self.slip, self.slip / 2, self.slip / 2])
        self.next, self.chance = outcomes[:, :, chance > 0], chance[chance > 0]             # (S,A,O) and (O,): the O that can happen
        self.P = (np.eye(len(cells))[self.next] * self.chance[:, None]).sum(2)
        # the fewest steps from each cell to the goal; a shortest way enters no cell twice, so S sweeps find them all
        self.distance = np.where(letters == "G", 0.0, np.inf)
        for _ in cells:
            self.distance = np.where(self.terminal, self.distance, 1 + self.distance[self.intended].min(1))
        if horizon is None:
            if self.distance[self.start] == np.inf:
                raise ValueError("no path leads from S to G: give a horizon, or another map")
            horizon = int(self.distance[self.start])
        if isinstance(horizon, bool) or not isinstance(horizon, (int, np.integer)) or horizon < 1:
            raise ValueError(f"horizon is a whole number of steps, at least 1, not {horizon!r}")
        self.horizon = int(horizon)


def check_map(map_name):
    """The rows of a map, or ValueError saying what is wrong with it."""
    rows = map_name
    if isinstance(map_name, str):
        rows = MAPS.get(map_name) or map_name.replace("/", " ").split()
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, str) and row for row in rows):
        raise ValueError(f'a map is "4x4", "8x8" or rows of text, not {map_name!r}')
    letters = "".join(rows)
    if unknown := set(letters) - set("SFHG"):
        raise ValueError(f'unknown letters {"".join(sorted(unknown))!r} in the map {map_name!r}: '
                         'use "4x4", "8x8" or rows of S, F, H, G')
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"rows of unequal length in the map: {[len(row) for row in rows]}")
    if letters.count("S") != 1:
        raise ValueError(f"a map has one start S, this one has {letters.count('S')}")
    if "G" not in letters:
        raise ValueError("a map needs a goal G: without one every policy is optimal")
    return list(rows)


# === 2. Policies and their exact worth ================================================================================
# What the table reports of a policy is exact: sums over all trajectories are computed by sweeps over the steps, backwards for
# what is still to come, forwards for where the walker is. No number in it is a Monte-Carlo estimate.

def check_arguments(lake, reference, beta):
    """The reference as float64 (H,S,A), or ValueError. Zeros are refused: where pi_ref is 0, log pi/pi_ref has no value."""
    reference, shape = np.asarray(reference, dtype=float), (lake.horizon, len(lake.P), 4)
    if reference.shape != shape:
        raise ValueError(f"the reference has shape {reference.shape}; (horizon, states, actions) is {shape}")
    if not (np.isfinite(reference).all() and (reference > 0).all()):
        raise ValueError("the reference must give every action a positive probability")
    total = reference.sum(-1, keepdims=True)
    if not np.allclose(total, 1, rtol=0, atol=1e-6):
        raise ValueError("the reference is not normalised: some probabilities do not sum to 1")
    if not np.allclose(total, 1, rtol=0, atol=1e-12):                                       # probabilities that were float32
        reference = reference / total
    if not (isinstance(beta, Real) and 0 < beta < math.inf):
        raise ValueError(f"beta, the weight of the KL, must be positive, not {beta!r}")
    return reference


def uniform_policy(lake):
    """Each action with chance 1/4  (H,S,A)."""
    return np.full((lake.horizon, len(lake.P), 4), 0.25)


def walker_policy(lake, skill=0.5):
    """The stand-in for an SFT model: with chance `skill` a step towards the goal, else a random one. In the program's 8 steps it
    reaches the goal of the 4x4 map in 1 of 5 episodes, a uniform policy in 3 of 1,000: the returns of a pair would then hardly ever
    differ."""
    closer = lake.distance[lake.intended] < lake.distance[:, None]                          # does it lead closer to the goal? (S,A)
    ways = closer.sum(1, keepdims=True)                                                     # how many do  (S,1)
    step = np.where(ways > 0, skill * closer / np.maximum(ways, 1) + (1 - skill) / 4, 0.25)
    return np.tile(step, (lake.horizon, 1, 1))


def look_ahead(lake, values):
    """E[r(s') + value(s')] for every (s,a), given values (S,) -> (S,A). Zero in terminal cells, which pay nothing more."""
    return (lake.reward + values)[lake.next] @ lake.chance * ~lake.terminal[:, None]


def visits(lake, policy):
    """(H,S): the probability that the episode is still going on at step t, with the walker on cell s."""
    mu = np.zeros((lake.horizon, len(lake.P)))
    mu[0, lake.start] = 1.0
    for t in range(lake.horizon - 1):
        mu[t + 1] = np.einsum("s,sa,sap->p", mu[t], policy[t], lake.P) * ~lake.terminal
    return mu


def return_masses(lake, policy):
    """(2,): the probability that an episode returns 0, and that it returns 1; or their masses, if the policy is not normalised."""
    mass = ends = np.stack([1 - lake.reward, lake.reward])                                  # (2,S)
    for t in reversed(range(lake.horizon)):
        mass = np.where(lake.terminal, ends, (policy[t] * (mass[:, lake.next] @ lake.chance)).sum(-1))
    return mass[:, lake.start]


def expected_return(lake, policy):
    """E[R], the success rate."""
    return float(return_masses(lake, policy)[1])


def kl_divergence(lake, policy, other):
    """KL(policy || other) of the distributions of trajectories: the KL of the actions, summed over the steps until the episode ends."""
    ratio = np.log(np.maximum(policy, 1e-300)) - np.log(np.maximum(other, 1e-300))
    return float((visits(lake, policy)[:, :, None] * policy * ratio).sum())


def cells_visited(lake, policy, share=0.01):
    """How many cells at least one episode in a hundred visits, the start included. Column c is computed as if c ended the episode."""
    ever = np.eye(len(lake.P))                                                              # [s, cell]: P(on cell, now or later | on s)
    for t in reversed(range(lake.horizon)):
        ever = np.einsum("sa,sap->sp", policy[t], lake.P) @ ever
        np.fill_diagonal(ever, 1.0)
    return int((ever[lake.start] >= share).sum())


def total_variation(lake, policy, other, reference):
    """Half the L1 distance of the action distributions, at the worst (t,s) that the reference reaches: data says nothing of the others."""
    return float(0.5 * np.abs(policy - other).sum(-1)[visits(lake, reference) > 0].max())


def score(lake, policy, reference, beta, optimum):
    """The columns of the table: how far the policy is from the optimum ("kl" is KL(optimum || policy)), and what it is worth."""
    success = expected_return(lake, policy)
    return {"mse": float(np.square(policy - optimum)[visits(lake, reference) > 0].mean()),
            "tv": total_variation(lake, policy, optimum, reference), "kl": kl_divergence(lake, optimum, policy),
            "objective": success - beta * kl_divergence(lake, policy, reference),
            "success": success, "cells": cells_visited(lake, policy)}


# === 3. The soft optimum ==============================================================================================
# What every method is compared with. Q is what an action is worth, V what a cell is, from step t on; backwards, from V_H = 0:
#     Q_t(s,a) = E[r(s') + V_{t+1}(s')],   V_t(s) = beta log sum_a pi_ref exp(Q_t/beta),   pi*_t = pi_ref exp((Q_t - V_t)/beta)
# On deterministic ice this gives pi*(tau) = pi_ref(tau) exp(R/beta)/Z and V_0(start) = beta log Z: DPO's Eq 4.
#                                                                                          [test_gridworld_trajectory_law]

def soft_optimal_policy(lake, reference, beta):
    """The policy that maximises E[R] - beta KL(pi || reference), by soft value iteration. reference and result (H,S,A)."""
    return soft_value_iteration(lake, check_arguments(lake, reference, beta), beta)[0]


def soft_value_iteration(lake, reference, beta):
    """The optimum (H,S,A) with its values V (H+1,S) and Q (H,S,A)."""
    V, Q = np.zeros((lake.horizon + 1, len(lake.P))), np.zeros((lake.horizon, len(lake.P), 4))
    for t in reversed(range(lake.horizon)):
        Q[t] = look_ahead(lake, V[t + 1])
        top = Q[t].max(-1, keepdims=True)                                    # taken out, so that exp(Q/beta) cannot overflow
        V[t] = top[:, 0] + beta * np.log((reference[t] * np.exp((Q[t] - top) / beta)).sum(-1))
    policy = reference * np.exp((Q - V[:-1, :, None]) / beta)
    return policy / policy.sum(-1, keepdims=True), V, Q


# === 4. Trajectories ==================================================================================================
# A batch of trajectories is a dict of arrays: steps (N,H), the index of (t, s_t, a_t) in a flattened policy, or H*S*A once
# the episode has ended (`trajectory_logps` reads a zero there); weight (N,); return (N,); length (N,) in actions; state (N,H+1).

def enumerate_trajectories(lake, reference):
    """Every trajectory that the reference can draw, with its probability as weight. On slippery ice there are very many."""
    state, steps = np.full((1, 1), lake.start), np.zeros((1, 0), int)
    weight, returns = np.ones(1), np.zeros(1)
    for t in range(lake.horizon):
        now = state[:, -1]
        # a trajectory that has not ended branches into all actions and outcomes; one that has is carried along
        parent, action, after = np.nonzero((lake.P[now] > 0) & ~lake.terminal[now, None, None])
        done = np.flatnonzero(lake.terminal[now])
        index = np.ravel_multi_index((t, now[parent], action), reference.shape)
        chance = weight[parent] * reference[t, now[parent], action] * lake.P[now[parent], action, after]
        weight = np.concatenate([chance, weight[done]])
        returns = np.concatenate([returns[parent] + lake.reward[after], returns[done]])
        before = np.concatenate([parent, done])
        steps = np.column_stack([steps[before], np.concatenate([index, np.full(len(done), reference.size)])])
        state = np.column_stack([state[before], np.concatenate([after, now[done]])])
    return {"steps": steps, "weight": weight, "return": returns, "length": (steps < reference.size).sum(1), "state": state}


def sample_trajectories(lake, policy, n, rng):
    """n episodes at once, each of weight 1/n."""
    state, steps = np.full((n, lake.horizon + 1), lake.start), np.full((n, lake.horizon), policy.size)
    for t in range(lake.horizon):
        now = state[:, t]
        live = ~lake.terminal[now]
        # to draw an index, count the cumulative sums below a uniform number (clip: the last sum may round to below 1)
        action = (policy[t, now].cumsum(-1) < rng.random((n, 1))).sum(-1).clip(max=3)
        outcome = (lake.chance.cumsum() < rng.random((n, 1))).sum(-1).clip(max=len(lake.chance) - 1)
        state[:, t + 1] = lake.next[now, action, outcome]
        steps[live, t] = np.ravel_multi_index((t, now[live], action[live]), policy.shape)
    return {"steps": steps, "weight": np.full(n, 1 / n), "return": lake.reward[state[:, -1]],
            "length": (steps < policy.size).sum(1), "state": state}


def trajectory_logps(log_policy, trajectories):
    """log pi(tau) without the dynamics: the sum of the actions' log-probs. log_policy (H,S,A) tensor -> (N,)."""
    flat = F.pad(log_policy.flatten(), (0, 1))                                              # the zero of an ended episode
    return flat[torch.as_tensor(trajectories["steps"])].sum(-1)


def ranked_samples(lake, reference, n, rng, K=2, draw=sample_trajectories):
    """n rankings of K draws by the Plackett-Luce model of their returns: arrays (n,K,...), best first. K = 2 is Bradley-Terry."""
    pool = draw(lake, reference, n * K, rng)
    noisy = (pool["return"] + rng.gumbel(size=n * K)).reshape(n, K)                  # the Gumbel trick: sorting R + noise draws a ranking
    order = np.argsort(-noisy, axis=1) + K * np.arange(n)[:, None]                   # ranking k is of the draws K k, ..., K k + K - 1
    return {key: value[order] for key, value in pool.items()}


# === 5. DPO on infinite data ==========================================================================================
# Both trajectories of a pair are drawn from the reference, and labelled by Bradley-Terry: P(tau_1 > tau_2) = s(R_1 - R_2).
# The infinite-data loss is the expectation over pairs and labels. On deterministic ice its minimum is known exactly, on any map:
#
# Take a loss that is convex in the log-ratios d. Replace each d by its mean over the trajectories of the same return: the loss
# does not rise (Jensen), and the mass E_ref exp(d), 1 for a policy, does not either (Jensen again). To bring the mass back to
# 1, add a constant to every d; that changes no h (and raises pi(y_w), which RPO, SFT, MinorDPO and unlikelihood reward). So the
# best law is pi_ref(tau) exp(u(R)): one number u(0) for failure, one, u(1), for success. (EXO and chi-squared PO are not
# convex, but their best law has this form too: under it every pair is at its own minimum.) As the mass is 1, the difference
# u(1) - u(0) gives both, and bisection finds it to the last digit. The law belongs to a policy (H,S,A), because the weight
# still to come depends only on the cell and the step: `tilt` computes it backwards.
#                                                            [test_gridworld_return_law_is_the_minimiser_over_policies]

RETURNS = torch.tensor([0.0, 1.0], dtype=torch.float64)
WINS = torch.sigmoid(RETURNS[:, None] - RETURNS)                             # [i,j]: the chance that return i beats return j  (2,2)
SOLVED_ON_SLIPPERY_ICE = ("dpo", "cdpo", "robust", "ipo")                    # for infinite data: section 7
LEAST_BETA = 0.0025                                                          # on slippery ice: below, descent ends short of the minimum


def population_dpo(lake, reference, beta, loss="dpo", flip=0.0, **hyper):
    """The minimiser (H,S,A) of the infinite-data loss of dpo.LOSSES[loss]. Cells that the reference never reaches keep its actions.

    On deterministic ice it is exact, for all losses but orpo and simpo. On slippery ice it is available for sft, where it is exact
    too, and for dpo, cdpo, robust and ipo. These four may have several minima there: the result is the one that descent
    from near the reference reaches, and others may be lower.             [test_gridworld_slippery_objective_has_other_minima]
    flip: the chance that a label is reversed. ValueError for bad arguments; on deterministic ice, if there is no minimiser; on slippery
    ice, if beta is below LEAST_BETA. OverflowError on slippery ice if beta times the log-ratios spans too wide a range for the series
    of `pair_expectation`.
    """
    reference = check_arguments(lake, reference, beta)
    if not 0 <= flip <= 1:
        raise ValueError(f"flip is a probability in [0, 1], not {flip!r}")
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: use one of {', '.join(LOSSES)}")
    if loss in ("orpo", "simpo"):
        raise ValueError(f"{loss} divides by the length and has no reference: no exact minimiser is known; train it on pairs")
    LOSSES[loss](*torch.zeros(4, 1), beta=beta, **hyper)                                    # a setting that it does not have: TypeError
    if lake.deterministic:
        policy = minimise_over_returns(lake, reference, pair_objective(lake, reference, beta, loss, flip, **hyper))
    elif loss == "sft":
        policy = tilt(lake, reference, winner_log_weights(lake, reference, flip))
    else:
        if beta < LEAST_BETA:
            raise ValueError(f"beta {beta:g} is below {LEAST_BETA}: on slippery ice descent would end short of the minimum")
        policy = minimise_over_policies(lake, reference, beta, loss, flip=flip, **hyper)
    return np.where((visits(lake, reference) > 0)[:, :, None], policy, reference)


def tilt(lake, base, log_weights):
    """The policy (H,S,A) that imitates best (by maximum likelihood) the law base(tau) exp(log_weights[R])/Z of trajectories.

    m_t(s) = sum_a base_t(a|s) E m_{t+1}(s') is the weight still to come, E over s'; pi_t(a|s) is a's share of that sum. All are
    logarithms, as exp(1/beta) may overflow. On deterministic ice the policy's law *is* the tilted law. `base` may be unnormalised.
    """
    log_end = np.where(lake.reward > 0, log_weights[1], log_weights[0])
    log_m, policy = log_end, np.empty_like(base)
    for t in reversed(range(lake.horizon)):
        log_action = np.log(base[t]) + np.logaddexp.reduce(log_m[lake.next] + np.log(lake.chance), axis=-1)     # (S,A)
        total = np.logaddexp.reduce(log_action, axis=-1)
        policy[t] = np.exp(log_action - total[:, None])
        log_m = np.where(lake.terminal, log_end, total)
    return policy


def winner_log_weights(lake, reference, flip=0.0):
    """(2,): log( P(the winner returns R) / P(pi_ref returns R) ) for R = 0 and 1; that is log( 2 E s(R - R') ), R' the opponent's."""
    return np.log(2 * ((1 - flip) * WINS + flip * WINS.T).numpy() @ return_masses(lake, reference))


def pair_objective(lake, reference, beta, loss="dpo", flip=0.0, **hyper):
    """The function u (2,) -> expected loss over pairs and labels, u[R] the log-ratio of all trajectories of return R; for rpo, sft and
    unlikelihood up to a constant, since log-ratios take the place of log-probs."""
    law = torch.tensor(return_masses(lake, reference))
    weight = (2 * law[:, None] * law * ((1 - flip) * WINS + flip * WINS.T)).flatten()       # (winner, loser), as WINS
    winner, loser = torch.cartesian_prod(torch.arange(2), torch.arange(2)).T
    zero = torch.zeros(4, dtype=torch.float64)
    return lambda u: weight @ LOSSES[loss](u[winner], u[loser], zero, zero, beta=beta, **hyper)


def ranking_objective(lake, reference, beta, K=4):
    """The same for Plackett-Luce rankings of K draws: all 2^K tuples of returns, weighted by the chance of that ranking."""
    law = torch.tensor(return_masses(lake, reference))
    ranked = torch.cartesian_prod(*([torch.arange(2)] * K))                                 # (2^K, K), best first
    zero = torch.zeros(ranked.shape, dtype=torch.float64)
    # the chance that K draws end up as this tuple: they may come in K! orders
    weight = math.factorial(K) * law[ranked].prod(-1) * torch.exp(-plackett_luce_loss(RETURNS[ranked], zero, 1.0))
    return lambda u: weight @ plackett_luce_loss(u[ranked], zero, beta)


def minimise_over_returns(lake, base, objective):
    """The policy of law base(tau) exp(u(R)) with the u of least objective, by bisection on the slope in x = u(1) - u(0)."""
    mass = torch.tensor(return_masses(lake, base))
    if mass.min() == 0:
        return tilt(lake, base, np.zeros(2))                                # all returns are equal: there is nothing to prefer

    def log_ratios(x):                                                      # u(0) and u(1), such that the total mass is one
        return torch.stack([torch.zeros_like(x), x]) - torch.logaddexp(mass[0].log(), mass[1].log() + x)

    def slope(value):
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(objective(log_ratios(x)), x)[0].item()

    low, high = -1e6, 1e6
    if not slope(low) <= 0 <= slope(high):
        raise ValueError("no minimiser within |u(1) - u(0)| < 1e6: the loss falls for ever (label smoothing or alpha too large), "
                         "or beta is below 1e-6")
    for _ in range(80):                                                     # 2e6 / 2^80 is below rounding
        middle = (low + high) / 2
        here = slope(middle)
        if here < 0 or (here == 0 and middle < 0):                          # EXO and chi-squared PO are flat far from 0: go towards 0
            low = middle
        else:
            high = middle
    return tilt(lake, base, log_ratios(torch.tensor(high, dtype=torch.float64)).numpy())


# === 6. DPO on n pairs ================================================================================================
# With finite data, trajectories of the same return no longer have the same best log-ratio: the loss is averaged over the pairs
# and minimised over the policy's logits. The error falls as n^-1/2, as for a well-behaved maximum-likelihood estimate.

def minimise(objective, x, steps=300, tolerance=1e-9):
    """The point of least max|gradient| met in three runs of L-BFGS (a quasi-Newton method) of at most `steps` iterations, the first
    from x, the others from the best point so far. Two use a line search; the second forgets the curvature that the first gathered,
    which frees it where the first was stuck. The third takes plain steps: near the minimum only gradients still tell points apart."""
    best, least = x, math.inf
    for search in ("strong_wolfe", "strong_wolfe", None):
        x = best.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([x], max_iter=steps if search else min(steps, 100), history_size=50,
                                      tolerance_grad=tolerance, tolerance_change=0, line_search_fn=search)

        def closure():
            nonlocal best, least
            try:
                value = objective(x)
            except OverflowError:                                           # far too long a step: return a high value without slope
                x.grad = torch.zeros_like(x)
                return torch.tensor(1e10, dtype=x.dtype)
            x.grad = torch.autograd.grad(value, x)[0]
            if x.grad.abs().max() < least:
                best, least = x.detach().clone(), x.grad.abs().max()
            return value
        optimiser.step(closure)
    if least == math.inf:
        raise OverflowError("the objective has no value at the start")
    return best


def best_policy(lake, reference, objective, steps=300):
    """The policy (H,S,A) of least objective(log_policy), by descent from the reference. A logit is x/sqrt(how often the reference
    takes that action): rare ones are learnt as fast as common ones, and cells it never reaches keep its actions.

    Where the goal is out of reach, the preference losses have no slope at the reference but, with a small beta, negative curvature: a
    saddle. On deterministic ice the minimum keeps the reference there; on slippery ice it may not: descent starts 1/1000 away."""
    log_reference = torch.tensor(reference).log()
    share = torch.tensor(visits(lake, reference)[:, :, None] * reference)                   # P(action a in cell s at step t)
    scale = torch.where(share > 0, share.rsqrt(), 0.0)
    log_policy = lambda x: torch.log_softmax(log_reference + scale * x, -1)
    noise = torch.tensor(np.random.default_rng(0).normal(size=share.shape))
    start = torch.zeros_like(share) if lake.deterministic else 1e-3 * noise
    return log_policy(minimise(lambda x: objective(log_policy(x)), start, steps)).exp().numpy()


def bradley_terry(trajectories):
    """(N,N): the probability that a pair's winner is the i-th of the listed trajectories, and its loser the j-th."""
    R, law = trajectories["return"], trajectories["weight"]
    return 2 * law[:, None] * law / (1 + np.exp(R - R[:, None]))


def fit_pairs(lake, reference, trajectories, wins, beta, loss="dpo", steps=300, **hyper):
    """The policy of least loss on pairs of listed trajectories; wins[i,j] (N,N): how often i was preferred to j."""
    i, j = np.nonzero(wins)
    weight = torch.tensor(wins[i, j] / wins.sum())
    ref = trajectory_logps(torch.tensor(reference).log(), trajectories)

    def objective(log_policy):
        logps = trajectory_logps(log_policy, trajectories)
        losses = LOSSES[loss](logps[i], logps[j], ref[i], ref[j], beta=beta, **hyper)
        return weight @ losses / beta**2                                                    # for DPO the curvature is then about one
    return best_policy(lake, reference, objective, steps)


def convergence(sizes=(1000, 3162, 10_000, 31_623, 100_000), seeds=8, beta=0.5, seed=0):
    """DPO on n pairs of the 3x3 lake: {"sizes", "errors" (len(sizes), seeds), "slope" of log error over log n}. The error is the
    root of the mean squared distance to pi*, where (t,s) counts as often as the reference is there."""
    lake, rng = FrozenLake("SFF\nFHF\nFFG"), np.random.default_rng(seed)
    reference = walker_policy(lake)
    optimum, trajectories = soft_optimal_policy(lake, reference, beta), enumerate_trajectories(lake, reference)
    pairs = bradley_terry(trajectories)
    mu = visits(lake, reference)[:, :, None]
    errors = np.zeros((len(sizes), seeds))
    for row, column in np.ndindex(errors.shape):
        wins = rng.multinomial(sizes[row], pairs.ravel()).reshape(pairs.shape)
        policy = fit_pairs(lake, reference, trajectories, wins, beta, steps=60)
        errors[row, column] = math.sqrt((mu * np.square(policy - optimum)).sum() / mu.sum())
    slope = np.polyfit(np.log(sizes), np.log(errors).mean(1), 1)[0]
    return {"sizes": np.array(sizes), "errors": errors, "slope": float(slope)}


# === 7. Slippery ice ==================================================================================================
# By section 3, R = V_0 + beta d*(tau) + luck: d* is the log-ratio of pi*, luck the sum of r(s') + V(s') - E[r(s') + V(s')]. DPO credits
# the policy with the luck and misses pi*, even with infinite data (2409.02392). Labels by beta d* alone (minus the regret) repair it.
#
# To show this exactly we need E f(d_1 - d_2) over all pairs, f even (why: see `minimise_over_policies`). Listing pairs is hopeless
# (4x4, 8 steps: 83 million trajectories), but with a cosine series of f
#     f(h) = sum_k c_k cos(w_k h),     E f(d_1 - d_2) = Re sum_k c_k E exp(i w_k d_1) E exp(-i w_k d_2) = sum_k c_k |phi(w_k)|^2,
# because d_1 and d_2 are independent and distributed alike. phi(w) = E exp(i w d) is the characteristic function of a sum over
# steps; one backward sweep computes it.
#                                                                              [test_gridworld_pair_expectation_is_exact]

def pair_expectation(lake, reference, terms, f, reward=None):
    """E f(d_1 - d_2) over pairs of the reference's trajectories, for an even and smooth f. d is the sum of terms[t,s,a] (H,S,A)
    and, if given, of reward[s'] (S,). OverflowError if 256 cosines do not give 9 digits: |d_1 - d_2| then spans too many of f's
    widths."""
    live, chance, reference = torch.tensor(~lake.terminal), torch.tensor(lake.chance), torch.tensor(reference)
    reward = torch.tensor(np.zeros(len(lake.P)) if reward is None else reward)
    most = least = torch.zeros_like(reward)                                 # the largest and the least d, by dynamic programming
    for t in reversed(range(lake.horizon)):
        most = torch.where(live, (terms[t].detach() + (reward + most)[lake.next].amax(-1)).amax(-1), 0.0)
        least = torch.where(live, (terms[t].detach() + (reward + least)[lake.next].amin(-1)).amin(-1), 0.0)
    width = max((most - least)[lake.start].item(), 1e-3)                    # so |d_1 - d_2| <= width
    # least squares at Chebyshev points, by cosines of period 4 width: f need not be periodic then, and a few give 13 digits
    for K in (24, 32, 64, 128, 256):
        x = torch.cos(math.pi * (torch.arange(4 * K, dtype=torch.float64) + 0.5) / (4 * K))
        w = 0.5 * math.pi * torch.arange(K, dtype=torch.float64)
        basis, values = torch.cos(w * x[:, None]), f(width * x)
        c = torch.linalg.lstsq(basis, values[:, None], rcond=1e-14, driver="gelsd").solution[:, 0]
        error = (basis @ c - values).abs().max() / values.abs().max().clamp(min=1)
        if error < 1e-13:
            break
    if error > 1e-9:
        raise OverflowError(f"f is not smooth enough, or d too wide, for a cosine series (error {error:.0e})")
    step_factor = torch.exp(1j / width * w[:, None, None, None] * terms)    # exp(i w d) is a product of these  (K,H,S,A)
    reward_factor = torch.exp(1j / width * w[:, None] * reward)             # and of these  (K,S)
    phi = torch.ones_like(reward_factor)
    for t in reversed(range(lake.horizon)):
        onward = ((reward_factor * phi)[:, lake.next] * chance).sum(-1)
        phi = torch.where(live, (reference[t] * step_factor[:, t] * onward).sum(-1), 1.0)
    return c @ phi[:, lake.start].abs().square()


def winner_minus_loser(lake, reference, advantage=None):
    """E[(winner's count of (t,s,a)) - (loser's)] over pairs labelled by returns, or by sums of `advantage`. -> (H,S,A)

    With D the first's sum less the second's, dD is count_1 - count_2, and E log(2 cosh(D/2)) has the gradient E[(s(D) - 1/2) dD]: half.
    """
    compared = torch.tensor(np.zeros_like(reference) if advantage is None else advantage, requires_grad=True)
    reward = lake.reward if advantage is None else None
    potential = pair_expectation(lake, reference, compared, lambda D: F.softplus(D) - D / 2, reward)
    return 2 * torch.autograd.grad(potential, compared)[0]


def minimise_over_policies(lake, reference, beta, loss="dpo", advantage=None, anchor=None, flip=0.0, history=None,
                           steps=300, **hyper):
    """The policy of least population loss. advantage: labels compare its sums, not the returns. anchor: the policy in the
    denominator of the log-ratios, by default the reference; pairs are always drawn from the reference. history: a list to which
    the policy of every evaluation is appended.

    Let h = d_1 - d_2 for a pair in the order it was drawn, and p the chance that the first wins. With f split into an even and an
    odd part, E[p f(h) + (1-p) f(-h)] = E even(h) + E[(2p-1) odd(h)]. The losses in SOLVED_ON_SLIPPERY_ICE have a linear odd part,
    -k h, so the labels matter only through expected counts of steps. For DPO, -log s(beta h) = log(2 cosh(beta h / 2)) - beta h / 2.
    What is minimised, and printed nowhere, is the loss less its value at h = 0, over beta^2.
    """
    if loss not in SOLVED_ON_SLIPPERY_ICE:
        raise ValueError(f"{loss}: no exact minimiser on slippery ice (only {', '.join(SOLVED_ON_SLIPPERY_ICE)} and sft)")
    def f(h):
        zero = torch.zeros_like(h)
        return LOSSES[loss](h, zero, zero, zero, beta=beta, **hyper)
    even = lambda h: (f(h) + f(-h)) / 2 - f(torch.zeros_like(h))
    one = torch.ones((), dtype=torch.float64)
    k = (f(-one) - f(one)).item() / 2
    counts = (1 - 2 * flip) * winner_minus_loser(lake, reference, advantage)
    log_anchor = torch.tensor(reference if anchor is None else anchor).log()

    def objective(log_policy):
        if history is not None:
            history.append(log_policy.detach().exp().numpy())
        pairs = pair_expectation(lake, reference, log_policy - log_anchor, even)
        return (pairs - k * (counts * (log_policy - log_anchor)).sum()) / beta**2           # for DPO the curvature is then about one
    return best_policy(lake, reference, objective, steps)


def advantages(lake, reference, beta):
    """A*_t(s,a) = Q* - V* = beta log pi*/pi_ref, the negative of the regret. Labelled by its sums, DPO is exact on any ice (CPL,
    2310.13639)."""
    _, V, Q = soft_value_iteration(lake, check_arguments(lake, reference, beta), beta)
    return Q - V[:-1, :, None]


def luck(lake, reference, beta):
    """Standard deviation, under the reference, of the luck in R. Its terms are uncorrelated, so their variances add."""
    worth = (lake.reward + soft_value_iteration(lake, reference, beta)[1][1:])[:, lake.next]        # (H,S,A,outcomes)
    variance = np.square(worth) @ lake.chance - np.square(worth @ lake.chance)
    return math.sqrt((visits(lake, reference)[:, :, None] * reference * variance).sum().clip(min=0))


def slip_curve(slips=(0, 0.05, 0.1, 0.2, 0.3, 0.45, 2 / 3), beta=0.1, map_name="4x4", horizon=8):
    """pi*, DPO, DPO on regret labels and the reference for every slip: {(name, column of `score`): array}, "slip" and "luck"."""
    rows = []
    for slip in slips:
        lake = FrozenLake(map_name, slip, horizon)
        reference = walker_policy(lake)
        policies = {"pi*": soft_optimal_policy(lake, reference, beta), "DPO": population_dpo(lake, reference, beta),
                    "regret": minimise_over_policies(lake, reference, beta, advantage=advantages(lake, reference, beta)),
                    "reference": reference}
        row = {"slip": slip, "luck": luck(lake, reference, beta)}
        for name, policy in policies.items():
            for column, value in score(lake, policy, reference, beta, policies["pi*"]).items():
                row[name, column] = value
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


# === 8. The methods ===================================================================================================
# Each is a function (lake, reference, beta, rng) -> (policy, own): its policy, and the optimum that theory gives it (or None).
# On deterministic ice the preference losses are minimised on infinite data; losses without an exact minimiser are trained on
# PAIRS sampled pairs or rankings. beta is the KL weight of DPO, and tau of IPO. The table METHODS is at the end of the section.

PAIRS = 4096
logit = lambda p: math.log(p / (1 - p))
WIN = 1 / (1 + math.exp(-1))                                                 # s(1): the chance that success beats failure


def adam(loss, parameters, steps, lr):
    """The parameters (a list of tensors) after so many steps of Adam on loss(parameters)."""
    parameters = [p.detach().clone().requires_grad_() for p in parameters]
    optimiser = torch.optim.Adam(parameters, lr, fused=True)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(parameters).backward()
        optimiser.step()
    return [p.detach() for p in parameters]


def on_samples(objective, **sampling):
    """A method: Adam, from the reference, on objective(logps, reference_logps, lengths, beta) of ranked samples (PAIRS,K)."""
    def method(lake, reference, beta, rng):
        data = ranked_samples(lake, reference, PAIRS, rng, **sampling)
        log_reference = torch.tensor(reference).log()
        ref, lengths = trajectory_logps(log_reference, data), torch.tensor(data["length"], dtype=torch.float64)
        loss = lambda x: objective(trajectory_logps(torch.log_softmax(x[0], -1), data), ref, lengths, beta)
        logits = adam(loss, [log_reference], steps=200, lr=0.03)[0]
        return torch.softmax(logits, -1).numpy(), None
    return method


def pair_loss(loss, **hyper):
    """A loss of dpo.LOSSES as an objective of `on_samples`. A beta in hyper takes the place of the table's."""
    def objective(logps, ref, lengths, beta):
        settings = {"beta": beta, **hyper}
        return LOSSES[loss](logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1], chosen_lengths=lengths[:, 0],
                            rejected_lengths=lengths[:, 1], **settings).mean()
    return objective


def population(loss, strength=None, flip=0.0, **hyper):
    """A method: the minimiser of a loss of dpo.LOSSES on infinite data (on slippery ice, of a loss not SOLVED there, on samples).
    Its own optimum, on deterministic ice, is pi_ref(tau) exp(strength R/beta)/Z: for the strengths see METHODS."""
    def method(lake, reference, beta, rng):
        if not (lake.deterministic or loss in SOLVED_ON_SLIPPERY_ICE):
            return on_samples(pair_loss(loss, **hyper))(lake, reference, beta, rng)
        known = lake.deterministic and strength is not None
        own = tilt(lake, reference, [0.0, strength / beta]) if known else None
        return population_dpo(lake, reference, beta, loss, flip, **hyper), own
    return method


# --- Imitation --------------------------------------------------------------------------------------------------------

def preferred_ft(lake, reference, beta, rng):
    """SFT on the winners of pairs."""
    return population_dpo(lake, reference, beta, "sft"), tilt(lake, reference, winner_log_weights(lake, reference))


def best_of_n(N, n=50_000):
    """Imitation of the best of N draws (2401.01879), n times. The chance q of failure becomes q^N."""
    def method(lake, reference, beta, rng):
        q = return_masses(lake, reference)[0]
        failure, success = max(q ** (N - 1), 1e-300), sum(q**k for k in range(N))           # q^N / q and (1 - q^N)/(1 - q)
        own = tilt(lake, reference, np.log([failure, success]))
        pool = sample_trajectories(lake, reference, N * n, rng)
        first_best = pool["return"].reshape(n, N).argmax(1)
        best = pool["steps"].reshape(n, N, -1)[np.arange(n), first_best]                    # (n,H)
        taken = np.bincount(best.ravel(), minlength=reference.size + 1)[:-1].reshape(reference.shape)    # how often (t,s,a) was taken
        policy = taken + 1e-9 * reference                                           # unvisited cells keep the reference
        return policy / policy.sum(-1, keepdims=True), own
    return method


# --- Relatives of DPO -------------------------------------------------------------------------------------------------

def rejection_sample(lake, reference, n, rng, beta):
    """RSO's sampler: keep a draw of the reference with chance exp((R - r_max)/beta) -> n of those kept, with replacement."""
    pool = sample_trajectories(lake, reference, 10 * n, rng)
    kept = np.flatnonzero(rng.random(10 * n) < np.exp((pool["return"] - pool["return"].max()) / beta))
    chosen = rng.choice(kept, n)
    return {key: value[chosen] for key, value in pool.items()}


def rso(lake, reference, beta, rng):
    """Hinge loss on pairs drawn from what RSO accepts, pi_ref exp(R/beta)/Z; its log-ratios are still to pi_ref (2309.06657)."""
    if not lake.deterministic:
        draw = lambda *arguments: rejection_sample(*arguments, beta)
        return on_samples(pair_loss("hinge"), draw=draw)(lake, reference, beta, rng)
    accepted = tilt(lake, reference, [0.0, 1 / beta])
    return minimise_over_returns(lake, reference, pair_objective(lake, accepted, beta, "hinge")), accepted


def lambert_w(x):
    """The w that solves w e^w = x, for x >= 0, by Newton's method."""
    w = np.log1p(x)
    for _ in range(50):
        w -= (w - x * np.exp(-w)) / (1 + w)
    return w


def chi_squared_po(lake, reference, beta, rng):
    """DPO with phi(z) = z + log z in place of log z (2407.13399). Its optimum solves beta phi(z) = R - lam for z = pi/pi_ref:
    z = W(exp((R - lam)/beta)), with Lambert's function W, and lam such that the total mass is one."""
    if not lake.deterministic:
        return on_samples(pair_loss("chipo"))(lake, reference, beta, rng)
    low, high = -1 - beta, 1.0                                                      # mass >= 1 at low, <= 1 at high
    for _ in range(100):
        lam = (low + high) / 2
        ratio = lambert_w(np.exp(np.minimum((RETURNS.numpy() - lam) / beta, 700)))
        low, high = (lam, high) if return_masses(lake, reference) @ ratio > 1 else (low, lam)
    return population_dpo(lake, reference, beta, "chipo"), tilt(lake, reference, np.log(ratio))


def plackett_luce(lake, reference, beta, rng, K=4):
    """Rankings of K draws by the Plackett-Luce model of the returns. Its optimum is DPO's."""
    if not lake.deterministic:
        objective = lambda logps, ref, lengths, beta: plackett_luce_loss(logps, ref, beta).mean()
        return on_samples(objective, K=K)(lake, reference, beta, rng)
    policy = minimise_over_returns(lake, reference, ranking_objective(lake, reference, beta, K))
    return policy, tilt(lake, reference, [0.0, 1 / beta])


def mrpo(lake, reference, beta, rng):
    """DPO against the harmonic mean of two references, the data's and a uniform one: 1 / sum_k alpha_k/pi_k, alpha = 1/2 (2405.16388).
    It is taken step by step, not over whole responses as in the paper, so that the optimum is a policy (H,S,A)."""
    harmonic = 1 / (0.5 / reference + 0.5 / uniform_policy(lake))                   # not normalised, and need not be
    if not lake.deterministic:
        return minimise_over_policies(lake, reference, beta, anchor=harmonic, steps=60), None
    policy = minimise_over_returns(lake, harmonic, pair_objective(lake, reference, beta))
    return policy, tilt(lake, harmonic, [0.0, 1 / beta])


def apo(lake, reference, beta, rng, rounds=3, momentum=0.5):
    """Accelerated preference optimisation (2410.06293). In round t DPO, with pairs from q_t and q_t as its reference, gives p_t, and
    q_{t+1} is proportional to p_t (p_t / p_{t-1})^momentum. It begins with q_0 = p_{-1} = pi_ref; the last q is the policy.

    The KL weight of a round is rounds * beta. So on deterministic ice plain rounds would end at pi*; momentum goes beyond, to a known
    strength. The extrapolation is exact: step by step in the log-probabilities, then normalised over whole trajectories by `tilt`.
    """
    q = p_before = reference                                                        # q is pi_ref exp(u R)/Z, and
    u = u_before = 0.0                                                              # p_before is pi_ref exp(u_before R)/Z
    for _ in range(rounds):
        if not (q > 0).all():
            raise OverflowError("a probability of the reference-to-be is too small for float64")
        p, u_now = population_dpo(lake, q, rounds * beta), u + 1 / (rounds * beta)
        with np.errstate(divide="ignore"):
            q = tilt(lake, p * (p / p_before) ** momentum, [0.0, 0.0])
        u = u_now + momentum * (u_now - u_before)
        p_before, u_before = p, u_now
    return q, tilt(lake, reference, [0.0, u]) if lake.deterministic else None


def kto_loss(logps, ref, lengths, beta):
    """1 - s(beta (d - z0)) for the wanted, plus 1 - s(beta (z0 - d)) for the unwanted (2402.01306). z0 = max(0, mean d over
    mismatched prompts and completions), without gradient. As there is one start, it is here the mean over all samples; they are the
    reference's, so that mean estimates -KL(pi_ref || pi) and z0 stays 0: on the lake KTO's point of reference has no effect."""
    d = logps - ref
    z0 = d.mean().clamp(min=0).detach()
    return (1 - torch.sigmoid(beta * (d[:, 0] - z0))).mean() + (1 - torch.sigmoid(beta * (z0 - d[:, 1]))).mean()


def mpo_loss(logps, ref, lengths, beta):
    """MPO-style, after the abstract of 2312.16430: -E s(log pi_w - log pi_l) - beta E_{y ~ pi_ref} log pi(y). The second term is
    beta KL(pi_ref || pi), up to a constant, on samples drawn in advance: here the pairs themselves."""
    return -torch.sigmoid(logps[:, 0] - logps[:, 1]).mean() - beta * logps.mean()


# --- Policy gradients -------------------------------------------------------------------------------------------------

def exact_objective(lake, log_policy, log_reference, beta):
    """E[R] - beta KL(pi || pi_ref), differentiable in log_policy (...,H,S,A)."""
    reward, live, chance = torch.tensor(lake.reward), torch.tensor(~lake.terminal), torch.tensor(lake.chance)
    values = torch.zeros(len(lake.P), dtype=torch.float64)
    for t in reversed(range(lake.horizon)):
        gain = (reward + values)[..., lake.next] @ chance - beta * (log_policy - log_reference)[..., t, :, :]
        values = (log_policy[..., t, :, :].exp() * gain).sum(-1) * live
    return values[..., lake.start]


def ppo_exact(lake, reference, beta, rng):
    """The policy gradient with nothing sampled: L-BFGS on E[R] - beta KL. What PPO would find with infinite data."""
    objective = lambda log_policy: -exact_objective(lake, log_policy, torch.tensor(reference).log(), beta) / beta
    return best_policy(lake, reference, objective), soft_optimal_policy(lake, reference, beta)


def ppo(clip=0.2, stop=None, epochs=4, iterations=60, episodes=1024, lr=0.1, history=None):
    """PPO on sampled episodes, with the clipped ratio; or, with clip=None, ESPO (2202.00079): no clip, and no more epochs once
    mean |ratio - 1| > stop. history: a list to which E[R] - beta KL (exact) is appended after every iteration."""
    def method(lake, reference, beta, rng):
        log_reference = torch.tensor(reference).log()
        logits = log_reference.clone().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr, eps=1e-5, fused=True)
        for iteration in range(iterations):
            optimiser.param_groups[0]["lr"] = lr * (1 - iteration / iterations)
            # 1. episodes of the current policy
            old = torch.log_softmax(logits.detach(), -1)
            batch = sample_trajectories(lake, old.exp().numpy(), episodes, rng)
            live = batch["steps"] < reference.size
            step = batch["steps"][live]                                             # (M,): the index of (t,s,a) of every step taken
            old_logps = old.flatten()[step]
            # 2. rewards: at every step the KL's, for the sampled action; at the last step the goal's as well
            reward = np.zeros(live.shape)
            reward[live] = -beta * (old_logps - log_reference.flatten()[step]).numpy()
            reward[np.arange(episodes), batch["length"] - 1] += batch["return"]
            # 3. advantages: the reward still to come, less its mean over all visits to (t,s)   (GAE with gamma = lambda = 1)
            to_go = reward[:, ::-1].cumsum(1)[:, ::-1][live]
            cell = step // 4                                                        # the index of (t,s)
            baseline = np.bincount(cell, to_go) / np.maximum(np.bincount(cell), 1)
            advantage = torch.tensor(to_go - baseline[cell])
            advantage = advantage / (advantage.std() + 1e-8)
            # 4. a few epochs on the same episodes
            for _ in range(epochs):
                ratio = (torch.log_softmax(logits, -1).flatten()[step] - old_logps).exp()
                if stop is not None and (ratio - 1).abs().mean() > stop:
                    break
                gain = ratio * advantage
                if clip is not None:
                    gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage)
                optimiser.zero_grad()
                (-gain.mean()).backward()
                optimiser.step()
            if history is not None:
                history.append(exact_objective(lake, torch.log_softmax(logits.detach(), -1), log_reference, beta).item())
        return torch.softmax(logits.detach(), -1).numpy(), soft_optimal_policy(lake, reference, beta)
    return method


ESPO_SETTINGS = {"clip": None, "stop": 0.25, "epochs": 10}


# --- Intuitive fine-tuning (IFT) and its two-layer policy ---------------------------------------------------------------

def new_networks(lake, copies, width, generator):
    """Weights of `copies` independent policies, (copies, in, width) and (copies, width, 4): two layers over (cell, step)."""
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return [normal(copies, len(lake.P) + lake.horizon, width), 0.1 * normal(copies, width, 4) / math.sqrt(width)]


def network(weights, inputs):
    """log pi(a | input): inputs (copies or 1, M, in) -> (copies, M, 4)."""
    return torch.log_softmax(torch.tanh(inputs @ weights[0]) @ weights[1], -1)


def network_inputs(lake, cells, steps):
    """One-hot cell beside one-hot step (..., S + H)."""
    return torch.tensor(np.concatenate([np.eye(len(lake.P))[cells], np.eye(lake.horizon)[steps]], -1))


def network_policy(lake, weights):
    """The networks' log-probabilities at every step and cell (copies,H,S,4): what `network` gives for `network_inputs`."""
    cells, steps = weights[0][:, None, :len(lake.P)], weights[0][:, len(lake.P):, None]          # a one-hot input selects a row
    return torch.log_softmax(torch.tanh(cells + steps) @ weights[1][:, None], -1)


def ift_loss(lake, weights, trajectories, lam=0.2, gamma=0.95):
    """Intuitive fine-tuning, after the released code of 2405.11870. trajectories: arrays (copies,B,...) -> (copies,).

    1. The model's own guess of the current cell: where its greedy action would have led from the cell before. (Our reading, for a
       grid, of the paper's guessed token.)   2. The input is (1-lam) the cell + lam the guess, without gradient into it.
    3. l_t = -log pi(a_t | that input).   4. c_t = sum_{i>=t} gamma^(i-t) l_i, not detached: a step answers for what follows.
    5. L = sum l_t c_t / sum c_t. gamma = 0 is taken to mean the plain mean of l_t, and lam = gamma = 0 is SFT.
    """
    cells, steps = trajectories["state"][..., :-1], trajectories["steps"]
    mask = torch.tensor(steps < lake.horizon * len(lake.P) * 4)
    times = np.broadcast_to(np.arange(lake.horizon), steps.shape)
    look = lambda inputs: network(weights, inputs.flatten(1, 2)).unflatten(1, steps.shape[1:])
    inputs = network_inputs(lake, cells, times)
    if lam:
        greedy = look(inputs).argmax(-1).numpy()                                                  # 1
        guess = np.concatenate([cells[..., :1], lake.intended[cells, greedy][..., :-1]], -1)      # no guess for the start
        inputs = (1 - lam) * inputs + lam * network_inputs(lake, guess, times)                    # 2
    losses = -look(inputs).gather(-1, torch.tensor(steps % 4)[..., None])[..., 0] * mask          # 3
    if gamma == 0:
        return (losses.sum(-1) / mask.sum(-1)).mean(-1)
    ahead = np.subtract.outer(np.arange(lake.horizon), np.arange(lake.horizon))                   # i - t
    to_come = losses @ torch.tensor(np.tril(gamma ** np.maximum(ahead, 0.0)))                     # 4
    return ((losses * to_come).sum(-1) / to_come.sum(-1).clamp(min=1e-300)).mean(-1)              # 5


def ift(lake, reference, beta, rng):
    """IFT of a network on the chosen trajectories of 512 pairs. It uses neither the reference nor the rejected ones."""
    chosen = {key: value[None, :, 0] for key, value in ranked_samples(lake, reference, 512, rng).items()}
    weights = new_networks(lake, 1, 32, torch.Generator().manual_seed(int(rng.integers(2**31))))
    weights = adam(lambda weights: ift_loss(lake, weights, chosen).sum(), weights, steps=150, lr=0.01)
    return network_policy(lake, weights)[0].exp().numpy(), None


# --- The table --------------------------------------------------------------------------------------------------------
# The numbers are strengths, beta h, where h is the margin of success over failure that is best if success wins with chance p = s(1):
# p loss'(h) = (1-p) loss'(-h). For DPO that is p s(-beta h) = (1-p) s(beta h), so beta h = logit p = 1.
# MinorDPO stays at the reference (d = 0), where its loss has a kink. Some pairs are ties; hence raising success pays only if
# 2(1-p) < (2p-1) P(failure), and at p = .73 that reads .54 < .46 P(failure): never.

METHODS = {
    "SFT": lambda lake, reference, beta, rng: (reference, reference),                  # to imitate itself changes nothing
    "Preferred-FT": preferred_ft, "Best-of-4": best_of_n(4),
    "PPO, exact gradient": ppo_exact, "PPO, sampled": ppo(), "ESPO, sampled": ppo(**ESPO_SETTINGS),
    "DPO": population("dpo", 1),                                                    # beta h = logit p = 1
    "cDPO": population("cdpo", logit(0.9 * WIN + 0.1 * (1 - WIN))),                 # smoothing .1
    "robust DPO": population("robust", 1, flip=0.1),                                # smoothing .1, and a tenth of the labels wrong
    "IPO": population("ipo", (2 * WIN - 1) / 2),                                    # tau h, where h is the mean of +-1/(2 tau)
    "SLiC hinge": population("hinge", 1),                                           # its kink, since p > 1/2
    "RSO": rso,
    "EXO": population("exo", (2 * WIN - 1) * logit(0.999)),                         # smoothing .001
    "chi-squared PO": chi_squared_po,
    "RPO": population("rpo"),                                                       # no closed form known
    "MinorDPO": population("minor", 0),
    "MRPO, 2 references": mrpo, "APO, accelerated": apo, "Plackett-Luce, K=4": plackett_luce,
    "ORPO": on_samples(pair_loss("orpo", lam=0.1)), "SimPO": on_samples(pair_loss("simpo", beta=2.0)),   # beta: a scale
    "KTO": on_samples(kto_loss), "MPO-style": on_samples(mpo_loss), "IFT, network": ift,
}


def methods_table(lake, reference, beta, seed=0, progress=None):
    """A row (dict) for every method: the columns of `score`, "own": max TV to its own known optimum, seconds, policy. A method whose
    loss cannot be computed in float64 (on slippery ice, at a very large or small beta) is left out and named on stderr."""
    optimum, rows = soft_optimal_policy(lake, reference, beta), []
    for name, method in METHODS.items():
        if progress:
            progress(name)
        started = time.perf_counter()
        try:
            policy, own = method(lake, reference, beta, np.random.default_rng(seed))
        except OverflowError as error:
            print(f"gridworld.py: {name} is left out: {error}", file=sys.stderr)
            continue
        rows.append({"method": name, "seconds": time.perf_counter() - started, "policy": policy,
                     "own": None if own is None else total_variation(lake, policy, own, reference),
                     **score(lake, policy, reference, beta, optimum)})
    return rows


def convergence_curves(lake, reference, beta, seed=0):
    """{name: max TV to pi*, best so far, at every evaluation of DPO's L-BFGS}, on deterministic ice and on slippery ice (the lake's
    own, or .2); {name: E[R] - beta KL after every iteration of PPO (4 seeds, iterations)}."""
    distances, worths = {}, {}
    slippery = lake.slip if lake.slip > 0 else 0.2
    for slip in (0.0, slippery):
        other, path = FrozenLake(lake.rows, slip, lake.horizon), []
        optimum = soft_optimal_policy(other, reference, beta)
        minimise_over_policies(other, reference, beta, history=path, steps=100)
        errors = [total_variation(other, policy, optimum, reference) for policy in path]
        distances[f"DPO, slip {slip:.2g}"] = np.minimum.accumulate(errors)
    for name, settings in (("PPO, clipped", {}), ("ESPO, no clip", ESPO_SETTINGS)):
        runs = [[] for _ in range(4)]
        for k, run in enumerate(runs):
            ppo(**settings, history=run)(lake, reference, beta, np.random.default_rng((seed, k)))
        worths[name] = np.array(runs)
    return distances, worths


# === 9. The IFT experiment ============================================================================================
# Intuitive Fine-Tuning's Frozen Lake (2405.11870): a two-layer policy sees one optimal and one sub-optimal trajectory. The paper
# states neither map, width, steps nor seeds, and gives the order DPO, IFT, ORPO, SFT, best first. What we find: over all cells
# the means are in that order at width 64, with gaps of 1 or 2 s.e., but not at width 16 or 256; on the trajectory SFT, ORPO and
# IFT are level and DPO is last. All cells: all four do worse than no training, as pi* is the untrained network in 28 of the 38 (t,s).

PAPER_ORDER = ("DPO", "IFT", "ORPO", "SFT")
IFT_METHODS = ("untrained", *reversed(PAPER_ORDER), "PPO")
IFT_SETTINGS = ({"width": 16}, {"width": 256}, {"steps": 50}, {"steps": 600}, {"lam": 0.0}, {"lam": 0.5})


def ift_experiment(width=64, steps=200, lam=0.2, gamma=0.95, beta=0.1, seeds=20, seed=0, methods=IFT_METHODS):
    """{method: {"trajectory" and "all cells": MSE to pi*, "success": rate}}, each (seeds,); every seed has its own network and
    trajectories. SFT and IFT see the optimal one, DPO and ORPO the pair; PPO, which the paper left out, sees the reward (exact
    gradient). The reference is the untrained network; "all cells" are those (t,s) that can be reached. methods: which to train."""
    lake, rng = FrozenLake("4x4"), np.random.default_rng(seed)
    uniform = uniform_policy(lake)

    def draw(policy, returns):                                                      # one trajectory a seed: arrays (seeds, 1, ...)
        batch = sample_trajectories(lake, policy, 200 * seeds, rng)
        found = np.flatnonzero(batch["return"] == returns)[:seeds, None]
        return {key: value[found] for key, value in batch.items()}
    good = draw(soft_optimal_policy(lake, uniform, 0.05), 1)                        # 6 steps: all shortest ways, equally likely
    bad = draw(uniform, 0)
    start = new_networks(lake, seeds, width, torch.Generator().manual_seed(seed))
    log_reference = network_policy(lake, start)

    def logps(log_policy, batch):                                                   # every seed's log pi(tau), as `trajectory_logps`
        return F.pad(log_policy.flatten(1), (0, 1)).gather(1, torch.tensor(batch["steps"][:, 0])).sum(1)

    def pair(loss, weights):
        log_policy = network_policy(lake, weights)
        good_length, bad_length = (torch.tensor(batch["length"][:, 0], dtype=torch.float64) for batch in (good, bad))
        return LOSSES[loss](logps(log_policy, good), logps(log_policy, bad), logps(log_reference, good), logps(log_reference, bad),
                            beta=beta, chosen_lengths=good_length, rejected_lengths=bad_length)
    losses = {"untrained": None, "SFT": lambda weights: ift_loss(lake, weights, good, lam=0, gamma=0),
              "ORPO": lambda weights: pair("orpo", weights), "IFT": lambda weights: ift_loss(lake, weights, good, lam, gamma),
              "DPO": lambda weights: pair("dpo", weights),
              "PPO": lambda weights: -exact_objective(lake, network_policy(lake, weights), log_reference, beta)}

    optimum = np.stack([soft_optimal_policy(lake, policy, beta) for policy in log_reference.exp().numpy()])
    on_path = np.zeros((seeds, lake.horizon, len(lake.P)), bool)
    on_path[np.arange(seeds)[:, None], np.arange(lake.horizon), good["state"][:, 0, :-1]] = True
    result = {}
    for name in methods:
        weights = adam(lambda weights: losses[name](weights).sum(), start, steps, lr=0.01) if losses[name] else start
        policy = network_policy(lake, weights).exp().numpy()
        mse = np.square(policy - optimum).mean(-1)                                  # (seeds,H,S)
        result[name] = {"trajectory": (mse * on_path).sum((1, 2)) / on_path.sum((1, 2)),
                        "all cells": mse[:, visits(lake, uniform) > 0].mean(1),
                        "success": np.array([expected_return(lake, p) for p in policy])}
    return result


def mean_and_error(runs, axis=0):
    """The mean over independent runs, at least two, and its standard error."""
    return runs.mean(axis), runs.std(axis, ddof=1) / math.sqrt(runs.shape[axis])


def order_of(result, metric):
    """The paper's four methods by mean error, best first, and for each two neighbours in the paper's order the z-score of their
    difference (paired over seeds): if z < -2 the paper's order holds there, if z > 2 it is reversed."""
    order = sorted(PAPER_ORDER, key=lambda name: result[name][metric].mean())
    scores = {}
    for better, worse in zip(PAPER_ORDER, PAPER_ORDER[1:]):
        gap, error = mean_and_error(result[better][metric] - result[worse][metric])
        scores[better, worse] = gap / (error + 1e-300)
    return order, scores


# === 10. Failures =====================================================================================================
# Bandits: one state, K arms, and pairs (winner, loser) that always come out the same way. DPO moves away from the reference for
# ever, whatever beta is; IPO and MPO-style stop. And where arms share features, mass goes to an arm that is in no pair.

def bandit(loss, pairs, reference, beta, steps=0):
    """The policy over arms on deterministic preferences: Adam's path (steps,K), or with steps=0 the minimiser. beta is tau for
    IPO; "mpo" is -E s(log pi_w - log pi_l) - beta E_ref log pi. With steps, beta may be G numbers: the paths (steps,G,K)."""
    winner, loser = torch.tensor(pairs).T
    beta = torch.as_tensor(beta, dtype=torch.float64)
    log_reference = torch.tensor(reference, dtype=torch.float64).log()
    policy = lambda logits: torch.log_softmax(log_reference + logits, -1)
    path = []

    def objective(logits):
        logps = policy(logits)
        path.append(logps.detach().exp().numpy())
        if loss == "mpo":
            losses = -torch.sigmoid(logps[..., winner] - logps[..., loser]).mean(-1) - beta * (logps @ log_reference.exp())
        else:
            losses = LOSSES[loss](logps[..., winner], logps[..., loser], log_reference[winner], log_reference[loser],
                                  beta=beta[..., None]).mean(-1)
        return losses.sum()                                                         # each beta has logits of its own
    logits = torch.zeros(*beta.shape, len(reference), dtype=torch.float64)
    if not steps:
        return policy(minimise(objective, logits, tolerance=1e-12)).exp().numpy()
    adam(lambda x: objective(x[0]), [logits], steps, lr=0.1)
    return np.array(path)


def bandit_figures(taus=(0.1, 0.5, 1.0), steps=3000):
    """IPO's examples (2310.12036): {(loss, tau): Adam's path of pi(a)} for a > b, and {tau: IPO's policy} for a > b > c."""
    paths = {loss: bandit(loss, [(0, 1)], [0.5, 0.5], taus, steps)[..., 0] for loss in ("dpo", "ipo", "mpo")}      # (steps,G)
    two = {(loss, tau): path for loss in paths for tau, path in zip(taus, paths[loss].T)}
    return two, {tau: bandit("ipo", [(0, 1), (1, 2), (0, 2)], [1 / 3] * 3, tau) for tau in taus}


def unseen_arm(beta=0.1, steps=500, copies=20, width=16, seed=0):
    """DPO on a over b, with a third arm c that is in no pair -> log pi (steps, copies, 3), losses (steps, copies).

    A ReLU network without biases scores the features a = 1, b = 0, c = 3, so what raises a by z raises c by 3z. In a table
    (`bandit`) c's logit has no gradient. All copies start at pi_ref = (.49, .49, .02).
    """
    log_reference = torch.tensor([0.49, 0.49, 0.02], dtype=torch.float64).log()
    features = torch.tensor([[1.0], [0.0], [3.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    start = [normal(copies, 1, width), normal(copies, width, 1) / math.sqrt(width)]
    scores = lambda w: (torch.relu(features @ w[0]) @ w[1])[..., 0]                 # (copies,3)
    path, curve = [], []

    def loss(w):
        logps = torch.log_softmax(log_reference + scores(w) - scores(start), -1)    # starts at the reference exactly
        losses = LOSSES["dpo"](logps[:, 0], logps[:, 1], log_reference[0], log_reference[1], beta=beta)
        path.append(logps.detach().numpy())
        curve.append(losses.detach().numpy())
        return losses.sum()
    adam(loss, start, steps, lr=0.01)
    return np.array(path), np.array(curve)


# === 11. Figures ======================================================================================================
# Matplotlib is imported where it is used, so that importing this file does not need it. The colours are Okabe and Ito's, safe for
# the colour-blind.

BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#999999"
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "lines.linewidth": 2.2, "lines.markersize": 7, "legend.frameon": False, "figure.constrained_layout.use": True}


@contextmanager
def panels(path, columns, width, height, rows=1):
    """The axes of a new figure, which is saved at the end of the block."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height))
        yield figure.subplots(rows, columns, squeeze=False).flat
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def plot_maps(lake, policies, path):
    """{title: policy} as maps: colour is the expected number of visits, arrows are the actions taken there, averaged over steps."""
    high, wide = lake.shape
    rows = math.ceil(len(policies) / 3)
    y, x = np.divmod(np.arange(len(lake.P)), wide)
    most = max(2, *(visits(lake, policy).sum(0)[~lake.terminal].max() for policy in policies.values()))
    with panels(path, 3, 11.9, 3.9 * rows * min(max(high / wide, 0.4), 3), rows) as axes:         # a corridor has room for its title
        for ax, (title, policy) in zip(axes, policies.items()):
            heat, taken = visits(lake, policy).sum(0), (visits(lake, policy)[:, :, None] * policy).sum(0)
            image = ax.imshow(np.where(lake.terminal, np.nan, heat).reshape(lake.shape), cmap="Blues", vmin=0, vmax=most)
            for s, letter in enumerate("".join(lake.rows)):
                if letter in "HG":
                    ax.fill_between([x[s] - 0.5, x[s] + 0.5], y[s] - 0.5, y[s] + 0.5, lw=0,
                                    color=YELLOW if letter == "G" else GREY)
                ax.text(x[s] - 0.33, y[s] - 0.3, letter.strip("F"), ha="center", va="center", weight="bold")
            share = 0.45 * taken / np.maximum(heat, 1e-9)[:, None]                   # certainty is an arrow of nearly half a cell
            for action, (dy, dx) in enumerate(MOVES):
                some = (share[:, action] > 0.02) & (heat > 0.005)
                ax.quiver(x[some], y[some], dx * share[some, action], dy * share[some, action], angles="xy",
                          scale_units="xy", scale=1, width=0.012, headwidth=4, headlength=4, headaxislength=3.5)
            ax.set(title=title, xticks=[], yticks=[])
            ax.grid(False)
        image.figure.colorbar(image, ax=image.figure.axes, label="expected visits per episode", shrink=0.7)


def plot_convergence(distances, worths, levels, pairs, path):
    """What `convergence_curves` and `convergence` return; levels: {name: E[R] - beta KL} to draw as lines."""
    with panels(path, 3, 15, 4.2) as (left, middle, right):
        for colour, (name, curve) in zip((BLUE, ORANGE), distances.items()):
            left.semilogy(range(1, len(curve) + 1), np.maximum(curve, 1e-17), color=colour, label=name)
        left.set(xlabel="evaluations of the population loss", ylabel="max TV to $\\pi^*$ (best so far)",
                 title="DPO on infinite data")
        for colour, (name, runs) in zip((PURPLE, GREEN), worths.items()):
            mean, error = mean_and_error(runs)
            middle.plot(range(1, len(mean) + 1), mean, color=colour, label=name)
            middle.fill_between(range(1, len(mean) + 1), mean - error, mean + error, color=colour, alpha=0.3)
        for (name, level), colour, style in zip(levels.items(), ("black", BLUE), ("--", ":")):
            middle.axhline(level, color=colour, ls=style, label=name)
        middle.set(xlabel="iterations of 1024 episodes", ylabel="E[R] - $\\beta$ KL (reward)",
                   title=f"policy gradients, {len(runs)} seeds")
        n, seeds, (mean, error) = pairs["sizes"], pairs["errors"].shape[1], mean_and_error(pairs["errors"], 1)
        right.errorbar(n, mean, error, fmt="o", color=BLUE, capsize=4, label=f"DPO, {seeds} seeds (slope {pairs['slope']:.2f})")
        right.loglog(n, mean[-1] * (n / n[-1]) ** -0.5, color=ORANGE, ls="--", label="$n^{-1/2}$")
        right.set(xlabel="preference pairs n", ylabel="rms error of the policy", title="DPO on sampled pairs, 3x3 lake")
        for ax in (left, middle, right):
            ax.legend()


def plot_slip(curve, path):
    """What `slip_curve` returns."""
    lines = {"pi*": ("-", "black", "$\\pi^*$"), "regret": ("s--", GREEN, "DPO on regret labels"), "DPO": ("o-", ORANGE, "DPO"),
             "reference": (":", GREY, "reference")}
    labels = {"tv": "max TV to $\\pi^*$   (luck: reward)", "objective": "E[R] - $\\beta$ KL (reward)", "success": "success rate"}
    with panels(path, 3, 14, 4.2) as axes:
        axes[0].plot(curve["slip"], curve["luck"], "^:", color=GREY, label="luck: s.d. of $\\sum r+V-E[r+V]$")
        for ax, (column, label) in zip(axes, labels.items()):
            for name in ("regret", "DPO") if column == "tv" else lines:
                style, colour, legend = lines[name]
                ax.plot(curve["slip"], curve[name, column], style, color=colour, label=legend)
            ax.set(xlabel="slip", ylabel=label)
            ax.legend(fontsize=10)
        top = max(0.5, 1.05 * max(curve["DPO", "tv"].max(), curve["luck"].max()))
        axes[0].set(title="DPO misses the optimum", ylim=(-0.02, top))


# === 12. The command line =============================================================================================

def print_table(lake, best, rows):
    """Print the rows of `methods_table`, under the `score` of pi* itself."""
    print(f"\n{'method':20s}   own TV      MSE   max TV KL(*||pi) E[R]-bKL  success cells seconds")
    for row in [{"method": "pi*", "own": None, "seconds": 0.0, **best}] + rows:
        own = "-" if row["own"] is None else f"{row['own']:.1e}"
        print(f"{row['method']:20s} {own:>8s} {row['mse']:8.1e} {row['tv']:8.1e} {max(row['kl'], 0):9.4f} "
              f"{row['objective']:8.4f} {row['success']:8.4f} {row['cells']:5d} {row['seconds']:7.2f}")
    print("own TV: max TV to the optimum a method is known to have (-: none known). cells: those that 1 episode in 100 enters.")
    if not lake.deterministic:
        print("On slippery ice DPO, cDPO, robust DPO, IPO, MRPO and APO are at the minimum that descent from near the reference\n"
              "reaches; others may be lower. SLiC, RSO, EXO, chi-squared PO, RPO, MinorDPO and Plackett-Luce have no exact minimiser\n"
              f"here: like ORPO, SimPO, KTO and MPO-style they are trained on {PAIRS} sampled pairs or rankings, and over-fit them.\n"
              "RSO with a small beta accepts hardly any failures, so its pairs are ties, labelled by the toss of a coin.")


def print_ift(result):
    """Print what `ift_experiment` returns, with standard errors, and the order of the methods."""
    seeds = len(result["DPO"]["success"])
    print(f"\nIFT's Frozen Lake: one optimal, one sub-optimal trajectory, two-layer policy, {seeds} seeds (MSE, mean +- s.e.)")
    print(f"{'':10s}{'trajectory':>22s}{'all cells':>22s}{'success':>10s}")
    for name, runs in result.items():
        errors = "".join("{:13.4f} +- {:.4f}".format(*mean_and_error(runs[metric])) for metric in ("trajectory", "all cells"))
        print(f"{name:10s}{errors}{runs['success'].mean():10.3f}")
    print(f"The paper's order, best first: {', '.join(PAPER_ORDER)}. Ours (a-b: by how many paired s.e. a is worse):")
    for metric in ("trajectory", "all cells"):
        order, z = order_of(result, metric)
        print(f"  {metric:12s} {', '.join(order):24s}", "  ".join(f"{a}-{b} {value:+.1f}" for (a, b), value in z.items()))


def main(arguments=None):
    """The command line: prints all tables and saves three figures in --out -> exit code, 2 if it refuses a map or a number."""
    parser = argparse.ArgumentParser("gridworld.py", description="Frozen Lake: every method against the exact optimum.")
    parser.add_argument("--map", default="4x4", help="4x4, 8x8 or rows such as SFF/FHF/FFG (default 4x4)")
    parser.add_argument("--slip", type=float, default=0.0, help="chance of not going where one meant to (default 0)")
    parser.add_argument("--beta", type=float, default=0.1, help="weight of the KL, in rewards per nat (default 0.1)")
    parser.add_argument("--horizon", type=int, help="steps in an episode (default: the shortest way to the goal and 2 more)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of the figures (default out)")
    options = parser.parse_args(arguments)
    started, beta, seed, out = time.perf_counter(), options.beta, options.seed, options.out
    try:
        lake = FrozenLake(options.map, options.slip, options.horizon)
        if options.horizon is None:
            lake = FrozenLake(lake.rows, lake.slip, lake.horizon + 2)
        if not LEAST_BETA <= beta <= 50:
            raise ValueError(f"beta {beta:g} is not between {LEAST_BETA} and 50: outside, float64 does not hold what every method needs")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is a whole number from 0 to 2^63 - 1, not {seed}")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gridworld.py: error: {error}", file=sys.stderr)
        return 2
    reference = walker_policy(lake)
    torch.set_num_threads(1)                                                        # small tensors: more threads would only wait
    print(f"{'/'.join(lake.rows)}  horizon {lake.horizon}  slip {lake.slip:.3g}  beta {beta:g}  seed {seed}\nreference: "
          f"success {expected_return(lake, reference):.4f}, luck of the moves (s.d.) {luck(lake, reference, beta):.3f}")

    def show(text):
        if sys.stderr.isatty():
            print(f"\r{text:30s}", end="\r", file=sys.stderr, flush=True)
    rows, optimum = methods_table(lake, reference, beta, seed, show), soft_optimal_policy(lake, reference, beta)
    show("")
    best, table = score(lake, optimum, reference, beta, optimum), {row["method"]: row for row in rows}
    print_table(lake, best, rows)
    maps = {name: table[name]["policy"] for name in ("DPO", "IPO", "Best-of-4", "PPO, sampled")}
    plot_maps(lake, {"reference (SFT)": reference, "$\\pi^*$": optimum, **maps}, out / "gridworld_maps.png")

    pairs = convergence(seed=seed)
    print(f"\nDPO on n pairs (3x3, beta .5): the error falls as n^{pairs['slope']:.3f} (theory: -1/2)")
    levels = {"$\\pi^*$": best["objective"], "DPO, infinite data": table["DPO"]["objective"]}
    plot_convergence(*convergence_curves(lake, reference, beta, seed), levels, pairs, out / "gridworld_convergence.png")
    curve = slip_curve(beta=beta)
    print("\nslip curve (4x4, horizon 8)  " + "".join(f"{slip:8.2f}" for slip in curve["slip"]))
    for key in ("luck", ("DPO", "tv"), ("regret", "tv"), ("pi*", "objective"), ("DPO", "objective"), ("pi*", "success"),
                ("DPO", "success")):
        label = key if key == "luck" else " ".join(key)
        print(f"  {label:27s}" + "".join(f"{value:8.4f}" for value in curve[key]))
    plot_slip(curve, out / "gridworld_slip.png")

    result = ift_experiment(seed=seed)
    print_ift(result)
    for setting in IFT_SETTINGS:                                                    # lam is IFT's alone
        changed = result | ift_experiment(seed=seed, methods=["IFT"] if "lam" in setting else PAPER_ORDER, **setting)
        orders = (f"{metric}: {', '.join(order_of(changed, metric)[0])}" for metric in ("trajectory", "all cells"))
        print(f"  with {setting}: {'; '.join(orders)}")
    two, three = bandit_figures()
    print("\nTwo arms, one always preferred, its probability after 3000 steps: "
          + ", ".join(f"{loss} {tau}: {p[-1]:.4f}" for (loss, tau), p in two.items()))
    for tau, policy in three.items():
        print(f"Three arms a > b > c, IPO, tau {tau}: " + ", ".join(f"{p:.3f}" for p in policy))
    path, losses = unseen_arm()
    path, losses = path[[0, -1]].mean(1), losses[[0, -1]].mean(1)                   # the first and the last step, means over copies
    print(f"DPO on a > b with shared features: loss {losses[0]:.3f} -> {losses[1]:.3f}, log pi(a) {path[0, 0]:.2f} -> {path[1, 0]:.2f}, "
          f"log pi(c), never shown, {path[0, 2]:.2f} -> {path[1, 2]:.2f}")
    print(f"\nfigures in {out}/; {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
