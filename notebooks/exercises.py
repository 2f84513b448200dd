"""The exercises: the heart of DPO and of what it replaces, in eight functions to write yourself.

Replace each `raise NotImplementedError` with your code; nothing else needs to change. In the repository's directory

    DPO_MODULE=exercises pytest --tb=short                       grades all of them
    DPO_MODULE=exercises pytest --tb=short -k exercise_gae       grades one; its docstring says which -k

A wrong answer is told its likely mistake. A stub that you leave fails; a function that you delete is skipped (except dpo_loss).
No solution needs more than fifteen lines; `solutions.py` has one for each. They come in the order of the method, but are
independent, except that sft_loss can use sequence_logps.

B is the number of sequences or pairs, T the number of tokens, V the size of the vocabulary. Log-probabilities are in nats.
s(z) = 1 / (1 + e^-z) is the logistic function.
`mask` (B,T) is True on the tokens of the response, including its EOS, and False on the prompt and on pads:

    tokens   P P a b E .         prompt P, response a b, EOS E, pad .
    mask     0 0 1 1 1 0
"""
import numpy as np
import torch
import torch.nn.functional as F


def sequence_logps(model, tokens, mask):
    """log pi(response | prompt) of each row: the sum of the log-probabilities of its response tokens.

    model(tokens) -> logits (B,T,V), where logits[:, t] predict the token at t + 1, not the one at t. tokens (B,T) long;
    mask (B,T) bool, never True in column 0, which nothing predicts. Returns (B,), in nats, differentiable.

        log pi(y|x) = sum_{t: mask[t]} log softmax(logits[t-1])[tokens[t]]

    Graded by: DPO_MODULE=exercises pytest -k exercise_sequence_logps
    """
    raise NotImplementedError("sequence_logps is still to be written")


def sft_loss(model, tokens, mask):
    """Supervised fine-tuning: the mean negative log-probability of a response token, a scalar in nats per token.

    Arguments as in sequence_logps. All response tokens of the batch count the same, so a long response counts for more than a
    short one: divide the batch's sum by the batch's number of response tokens.

        L = -sum_rows log pi(y|x) / sum_rows |y|

    Graded by: DPO_MODULE=exercises pytest -k exercise_sft
    """
    raise NotImplementedError("sft_loss is still to be written")


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta=0.1, label_smoothing=0.0):
    """The DPO loss of each pair, and the rewards that the policy implies (arXiv 2305.18290, Eq 7).

    The first four arguments (B,): summed log-probabilities in nats. beta: reward units per nat. label_smoothing: e, the chance
    that a label is flipped, in [0, 0.5). Returns losses (B,), not their mean, chosen_rewards (B,) and rejected_rewards (B,), the
    latter two without gradient. The losses must stay finite, and so must their gradient, at margins of 1e5 in float32.

        d_w = log pi(y_w|x) - log pi_ref(y_w|x),   d_l likewise,   z = beta (d_w - d_l),   rewards = beta d
        losses = -log s(z) where e = 0; in general 1-e times that plus e times the same with -z in place of z

    Graded by: DPO_MODULE=exercises pytest -k test_loss          (with --tb=short: the messages are long)
    """
    raise NotImplementedError("dpo_loss is still to be written")


def dpo_gradient(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
                 beta=0.1, label_smoothing=0.0):
    """The gradient of the *sum* of dpo_loss's losses, by hand: no autograd.

    Arguments as in dpo_loss. Returns two tensors (B,): the derivatives with respect to policy_chosen_logps and to
    policy_rejected_logps, in loss units per nat. Take them with pen and paper first; for e = 0 they hold the weight in the
    paper's gradient:

        dL/d log pi(y_w) = -beta s(-z),   dL/d log pi(y_l) = +beta s(-z)              (e = 0; find the general case)

    Graded by: DPO_MODULE=exercises pytest -k exercise_gradient
    """
    raise NotImplementedError("dpo_gradient is still to be written")


def reward_model_loss(chosen_scores, rejected_scores):
    """The reward model's loss of each pair: minus the log-likelihood of its label under Bradley-Terry.

    chosen_scores, rejected_scores (B,): the scores of the two completions, in reward units. Returns losses (B,), not their
    mean; they must stay finite at margins of 1e5 in float32.

        p(y_w > y_l) = s(score_w - score_l)

    Graded by: DPO_MODULE=exercises pytest -k exercise_reward_model
    """
    raise NotImplementedError("reward_model_loss is still to be written")


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (arXiv 1506.02438; section 10 of dpo.py).

    rewards, values (B,T): the reward paid for a token, and the critic's value of the text before it. They may hold anything
    where mask (B,T) is False; the response is one run of tokens without a gap. Returns advantages, as they are, and returns
    (B,T), both 0 where mask is False. After the last response token V and A are 0.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

    Graded by: DPO_MODULE=exercises pytest -k exercise_gae
    """
    raise NotImplementedError("gae is still to be written")


def ppo_losses(logps, old_logps, advantages, values, old_values, returns, mask, clip=0.2, value_clip=0.2):
    """PPO's policy loss (arXiv 1707.06347, Eq 7) and value loss (clipped, as PPO's codes have it) of each token, and the ratio.

    All tensors (B,T), the results too: A advantages, V values, R returns. Returns policy_loss and value_loss, both 0 where mask is
    False, and ratio.

        ratio  = pi / pi_old
        policy = -min( ratio A, clip(ratio, 1-clip, 1+clip) A )
        value  = 1/2 max( (V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2 )

    Graded by: DPO_MODULE=exercises pytest -k exercise_ppo
    """
    raise NotImplementedError("ppo_losses is still to be written")


def soft_value_iteration(P, reward, terminal, reference, beta):
    """The policy that maximises E[sum of rewards] - beta KL(pi || reference) in H steps, from the last step backwards.

    All are numpy arrays; S states, A actions. P (S,A,S): transition probabilities. reward (S,): paid on *entering* a state.
    terminal (S,) bool: the episode ends there and pays nothing more, so Q is 0 and the policy stays at the reference. reference
    (H,S,A): positive probabilities. beta: reward units per nat; it may be .0005, where exp(Q/beta) overflows unless the largest
    Q is taken out.
    Returns the policy (H,S,A). With V_H = 0:

        Q_t(s,a)    = E_{s' ~ P(s,a)}[ reward(s') + V_{t+1}(s') ]
        V_t(s)      = beta log sum_a reference_t(a|s) exp(Q_t(s,a)/beta)
        pi*_t(a|s)  = reference_t(a|s) exp((Q_t(s,a) - V_t(s))/beta)

    `gridworld.FrozenLake` has such P, reward and terminal.

    Graded by: DPO_MODULE=exercises pytest -k exercise_soft_value_iteration
    """
    raise NotImplementedError("soft_value_iteration is still to be written")
