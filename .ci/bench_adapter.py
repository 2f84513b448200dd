"""Side-by-side timings call these three functions; they call the code of the command line's stages, with no path of their own."""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo


def gpt(config, n_outputs=None):
    return dpo.GPT(dpo.GPTConfig(**config), n_outputs)


def dpo_steps(pairs, steps, batch_size, beta, lr, config, on_step):
    """DPO on tokenised pairs, reference log-probs first; on_step(loss) after every optimiser step."""
    model = gpt(config)
    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    n = len(pairs)
    data = dpo.Pairs([p for p, _ in rows], [c for _, c in rows], np.arange(n), n + np.arange(n), np.arange(n))
    training = dpo.Training(steps, lr, batch_size, warmup=0.0, decay=False)
    dpo.train_preferences(model, model, data, training, beta, quiet=True, on_step=lambda logs: on_step(logs["loss"]))


def sample_tokens(prompts, new_tokens, config):
    """One completion of exactly `new_tokens` tokens for each prompt."""
    torch.manual_seed(0)
    return dpo.generate(gpt(config), prompts, new_tokens, stop_at_eos=False)


def ppo_updates(prompts, updates, new_tokens, epochs, config, on_step):
    """PPO with a constant reward, 64 prompts an update in one minibatch, a critic of the policy's size; on_step() after every update."""
    policy, reference, critic = gpt(config), gpt(config), gpt(config, 1)
    reference.load_state_dict(policy.state_dict())
    ppo = dpo.PPO(beta=0.05, rollout=64, minibatch=64, epochs=epochs, max_new_tokens=new_tokens, stop_at_eos=False)
    training = dpo.Training(updates * epochs, 1e-4, 64, warmup=0.0, decay=False)
    dpo.train_ppo(policy, critic, reference, prompts, lambda p, c: torch.ones(len(p)), ppo, training, quiet=True,
                  on_step=lambda logs: (logs["step"] + 1) % epochs == 0 and on_step())
