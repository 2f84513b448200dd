"""Direct Preference Optimization, complete, in one file.

A small GPT learns to write reviews (supervised fine-tuning, SFT). It completes many prompts several times, and labels say which
of two completions is better. From these it learns in two ways: directly, by DPO (arXiv 2305.18290), and the long way round (RLHF,
reinforcement learning from human feedback): fit a reward model that scores texts, then raise its score by PPO, proximal policy
optimisation. The reviews come from a small language whose true reward is known, so each method is measured against the best that
any method could do: the analytic limit.

    python dpo.py             the whole comparison on two CPU cores, offline, 1.5 minutes; figures and numbers in out/
    python dpo.py --fast      the same story in half a minute, less precise
    python dpo.py --sweep     several betas, numbers of pairs and seeds, 20 minutes: the README's figure

    python dpo.py sft|dpo|rm|ppo|eval|sample --help      the same stages on your own data, from scratch or from GPT-2

Read from top to bottom: each section uses only what is above it, and helpers of its own. On a first reading skip what says that it
is there for speed or for files. This page is section 1.

     2  the review language, its gold reward              7  preferences: Bradley-Terry, JSONL
     3  the tokenizer: byte-pair encoding                 8  DPO: derivation, loss, gradient, trainer
     4  the model: GPT-2                                  9  the family of losses
     5  log-probabilities and sampling                   10  the baseline: reward model and PPO
     6  training: one loop; SFT                          11  evaluation: the analytic limit
                                                         12  the demonstration, and the command line

    paper                             here
    x, y, y_w, y_l                    prompt, completion, chosen, rejected
    pi_theta, pi_ref                  policy (or model), which is trained; reference: a frozen copy of the SFT model, from which pi starts
    log pi(y|x)                       sequence_logps: the sum over the completion's tokens, the end-of-sequence token EOS included
    r(x,y)                            gold_reward (the truth), reward_scores (learnt)
    r^ = beta log(pi/pi_ref)          chosen_rewards, rejected_rewards of dpo_loss
    KL(pi || pi_ref)                  kl: how far pi departs from pi_ref, E_pi[log(pi/pi_ref)], in nats (natural logarithms)
    beta                              beta: the price of a nat of KL, in units of reward
    sigma, s(z)                       the logistic function, 1 / (1 + e^-z); F.logsigmoid is its log
    pi* = pi_ref e^{r/beta} / Z       analytic_limit
"""

import argparse
import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import zlib
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

# large tensors in huge pages, where Linux has them: on an AMD EPYC sampling takes 15% less time. PyTorch reads it at the first tensor
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# === 2. The review language: a small world whose true reward is known =================================================
# A review is one to four clauses and perhaps a closing remark:
#     the plot was very clever, but the acting felt hardly moving. highly recommended.
# Every opinion has a value and the words around it multiply it, so the true reward of any text can be computed, which no
# human data set offers. A reward model still has something to learn: "not" flips, "very" scales, "but" adds weight.

ASPECTS = {
    "film": ("plot cast story acting music script ending hero pacing camera opening villain tone dialogue editing lighting sound "
             "costumes romance humour jokes").split(),
    "meal": ("soup fish bread sauce wine rice salad steak pasta coffee cheese dessert service waiter menu chef portions kitchen "
             "decor pizza noodles").split(),
}
VERBS = ["was", "felt", "seemed", "looked"]
NEGATIONS = {"not": -0.75, "never": -1.0, "hardly": -0.5}
INTENSIFIERS = {"very": 1.5, "rather": 1.25, "quite": 0.75, "truly": 1.5, "slightly": 0.5, "extremely": 2.0}
SHARED_OPINIONS = {2.0: "perfect superb amazing wonderful", 1.5: "great lovely elegant splendid",
                   1.0: "good nice charming pleasant", 0.5: "fine decent solid fair",
                   -0.5: "plain average uneven ordinary", -1.0: "bad weak dull poor",
                   -1.5: "boring clumsy sloppy lifeless", -2.0: "awful terrible horrible dreadful"}
DOMAIN_OPINIONS = {"film": {1.5: "witty gripping moving", 1.0: "funny clever", -1.0: "slow trite",
                            -1.5: "wooden shallow confusing"},
                   "meal": {1.5: "tasty juicy delicious", 1.0: "fresh crisp", -1.0: "cold bland", -1.5: "stale greasy soggy"}}
SHARED_CLOSINGS = {"highly recommended": 3.0, "i loved it": 2.0, "what a treat": 2.0, "bring a friend": 2.0,
                   "a pleasant surprise": 1.0, "nothing special": -1.0, "such a pity": -1.0, "i hated it": -2.0,
                   "save your money": -2.0, "avoid it": -3.0}
DOMAIN_CLOSINGS = {"film": {"worth every minute": 3.0, "go and see it twice": 2.0, "we left early": -2.0, "a waste of time": -3.0},
                   "meal": {"worth every bite": 3.0, "we will come back soon": 2.0, "we went home hungry": -2.0,
                            "a waste of good food": -3.0}}
# the values of opinions and closing remarks by domain, and how often each word occurs; all odds here are free choices
OPINIONS = {domain: {word: value for bank in (SHARED_OPINIONS, own) for value, words in bank.items() for word in words.split()}
            for domain, own in DOMAIN_OPINIONS.items()}                          # domain -> word -> value
CLOSINGS = {domain: {**SHARED_CLOSINGS, **own} for domain, own in DOMAIN_CLOSINGS.items()}
BY_RANK = [1 / (1 + rank) ** 1.3 for rank in range(30)]      # Zipf's law: the k-th word of a list is k^-1.3 as common as its first
FREQUENCY = {word: frequency for banks in (SHARED_OPINIONS, *DOMAIN_OPINIONS.values()) for words in banks.values()
             for word, frequency in zip(words.split(), BY_RANK)}
WEIGHTS = {(domain, mood): [FREQUENCY[word] * math.exp(1.25 * mood * value) for word, value in opinions.items()]     # up to a factor
           for domain, opinions in OPINIONS.items() for mood in (-1, 0, 1)}      # bad, mixed, good: it favours opinions of its sign


def sample_review(rng: random.Random, domain: str = "film") -> str:
    """One review from the corpus's distribution: a mood (bad, mixed, good) tilts the opinions; "but" reverses the mood."""
    def zipf(words):
        return rng.choices(words, BY_RANK[:len(words)])[0]

    def clause(mood):
        negation = rng.choices(["", *NEGATIONS], (15, 3, 1, 1))[0]
        opinion = rng.choices(list(OPINIONS[domain]), WEIGHTS[domain, -mood if negation else mood])[0]    # "not bad" is good
        intensifier = zipf(list(INTENSIFIERS)) if rng.random() < 0.4 else ""
        return " ".join(word for word in ("the", zipf(ASPECTS[domain]), zipf(VERBS), negation, intensifier, opinion) if word)

    mood = rng.choice((-1, -1, 0, 1, 1))
    text = clause(mood)
    for _ in range(rng.choices((0, 1, 2, 3), (0.4, 0.33, 0.19, 0.08))[0]):
        joint = rng.choice((", and ", ", but ", ". "))
        mood = -mood if joint == ", but " else mood
        text += joint + clause(mood)
    if rng.random() < 0.4:
        closings = CLOSINGS[domain]
        text += ". " + rng.choices(list(closings), [math.exp(1.25 * mood * value) for value in closings.values()])[0]
    return text + "."


def any_of(words) -> str:
    """A pattern for one of the words."""
    return f"(?:{'|'.join(words)})"


VERB_PHRASE = rf"{any_of(VERBS)}(?: (?P<negation>{any_of(NEGATIONS)}))?(?: (?P<intensifier>{any_of(INTENSIFIERS)}))?"


def review_pattern(domain: str) -> str:
    """The grammar of a review of this domain, as a regular expression."""
    clause = rf"the {any_of(ASPECTS[domain])} {VERB_PHRASE} {any_of(OPINIONS[domain])}"
    clause = re.sub(r"\?P<\w+>", "?:", clause)                                   # a name may occur in a pattern only once
    return rf"{clause}(?:(?:, and |, but |\. ){clause}){{0,3}}(?:\. {any_of(CLOSINGS[domain])})?\."


OPINION_OF = {**OPINIONS["film"], **OPINIONS["meal"]}
CLOSING_OF = {**CLOSINGS["film"], **CLOSINGS["meal"]}
REVIEW = re.compile("|".join(map(review_pattern, ASPECTS)))
JUDGEMENT = re.compile(rf"(?P<but>, but )?the \w+ {VERB_PHRASE} (?P<opinion>{any_of(OPINION_OF)})\b|\. (?P<closing>{any_of(CLOSING_OF)})\.")


def is_grammatical(text: str) -> bool:
    """Whether the whole text is a review that `sample_review` could have written."""
    return REVIEW.fullmatch(text) is not None


def gold_reward(prompt: str, completion: str) -> float:
    """The true reward of a review: the sum of its clauses' and its closing remark's values; 4 less if it is not grammatical.

    A clause is worth its opinion, -2 to 2, times its intensifier, times its negation, times 1.5 after "but". Scoring
    stops at the fifth clause or the first closing remark, so length alone does not pay without end.
    """
    text, reward = prompt + completion, 0.0
    for clause, match in enumerate(JUDGEMENT.finditer(text), 1):
        if match["closing"]:
            reward += CLOSING_OF[match["closing"]]
            break
        if clause == 5:
            break
        reward += (OPINION_OF[match["opinion"]] * INTENSIFIERS.get(match["intensifier"], 1.0)
                   * NEGATIONS.get(match["negation"], 1.0) * (1.5 if match["but"] else 1.0))
    return reward - (0.0 if is_grammatical(text) else 4.0)


def cut_review(rng: random.Random, review: str) -> tuple[str, str]:
    """A review cut after 2 to 8 words -> prompt and reference completion, its own end, as the paper cuts film reviews."""
    words = review.split(" ")
    cut = rng.randint(2, min(8, len(words) - 1))
    return " ".join(words[:cut]), " " + " ".join(words[cut:])


def is_held_out(prompt: str) -> bool:
    """One prompt in ten is kept for evaluation, by a hash of its text: the same text is always on the same side. Held-out prompts serve
    neither for preferences nor for PPO; the SFT corpus is not split, so SFT may have seen them."""
    return zlib.crc32(prompt.encode()) % 10 == 0


def sample_prompts(seed: int, n: int, held_out: bool, domain: str = "film") -> list[tuple[str, str]]:
    """n (prompt, reference completion) on one side of the split; held-out ones are all different."""
    rng, found, seen = random.Random(seed), [], set()
    while len(found) < n:
        prompt, completion = cut_review(rng, sample_review(rng, domain))
        if is_held_out(prompt) == held_out and not (held_out and prompt in seen):
            seen.add(prompt)
            found.append((prompt, completion))
    return found


# === 3. The tokenizer: byte-pair encoding =============================================================================

EOS_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""   # how GPT-2 cuts text into words


def train_tokenizer(texts: list[str], vocab_size: int = 512) -> tiktoken.Encoding:
    """Learn byte-pair merges from `texts`; return a tiktoken.Encoding with `<|endoftext|>` as its last id.

    The 256 bytes are the first tokens, so any text can be encoded (and vocab_size is 257 at least); then the most frequent adjacent
    pair becomes a token, again and again, until there are vocab_size - 1; lower ids merge first. Merges never cross words. Each
    distinct word is merged once, however often it occurs; only the 8,192 most frequent words of at most 64 characters are used.
    """
    counts = Counter(word for text in texts for word in regex.findall(GPT2_PATTERN, text) if len(word) <= 64)
    if len(counts) > 8192:
        counts = dict(counts.most_common(8192))
    tokens = [bytes([byte]) for byte in range(256)]
    spelt = {word: "".join(map(chr, word.encode())) for word in counts}          # each word's tokens, as a string of chr(id)
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for word, ids in spelt.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break                                                                # every word is one token already
        left, right = max(pairs, key=pairs.get)
        spelt = {word: ids.replace(left + right, chr(len(tokens))) for word, ids in spelt.items()}
        tokens.append(tokens[ord(left)] + tokens[ord(right)])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOS_TEXT: len(tokens)})


def load_tokenizer(name: str = "gpt2") -> tiktoken.Encoding:
    """A public encoding by name. tiktoken fetches it once and keeps it; without network or cache, one clear line."""
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:                                                     # requests' network errors are OSErrors
        raise OSError(f"the {name!r} encoding is not in tiktoken's cache and could not be fetched ({type(error).__name__}): run "
                      f"`python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"` once with a network, "
                      f"with TIKTOKEN_CACHE_DIR set to a directory you can bring here") from None


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Text to ids; `<|endoftext|>` inside a text is text, never the control token."""
    return tokenizer.encode_ordinary(text)


def compact(tokenizer: tiktoken.Encoding, ids: list[int]) -> array:
    """Ids to be kept, in two bytes each where the vocabulary allows: in a list each takes eight at least."""
    return array("H" if tokenizer.n_vocab <= 2 ** 16 else "i", ids)


def decode(tokenizer: tiktoken.Encoding, ids: list[int]) -> str:
    """Ids to text, without the EOS that ends a completion."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eot_token])


# === 4. The model: GPT-2 ==============================================================================================

@dataclass
class GPTConfig:
    """The sizes of a GPT-2; the smallest has 50257, 1024, 12, 12, 768."""
    vocab_size: int
    block_size: int                     # the longest sequence, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    eos_token_id: int | None = None     # GPT-2's convention where not given: the last id of the vocabulary

    def __post_init__(self):
        self.eos_token_id = self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.block_size < 2 or not 0 <= self.dropout < 1:
            raise ValueError(f"block_size {self.block_size} or dropout {self.dropout} is out of range")


def attention(q, k, v, dropout: float = 0.0):
    """Causal attention, softmax(q k^T / sqrt(hs)) v. q, k, v (B,nh,T,hs) -> (B,nh,T,hs): B rows, nh heads of size hs, T tokens.
    When `generate` has read the prompt, only the newest token is a query, q (B,nh,1,hs); it sees the keys and values of all S so
    far, (B,nh,S,hs)."""
    B, n_head, T, size = q.shape
    # three ways to compute the same; the formula itself is the last
    avx2 = q.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if T == 1 and avx2 and not dropout:
        few = max(1, 2 ** 20 // k[0].numel())        # rows of a call: its products, 4 MB, fit into the processor's cache
        return torch.cat([newest_attention(*rows) for rows in zip(q.split(few), k.split(few), v.split(few))])
    if T == 1 or T > 256 or q.device.type != "cpu":                              # PyTorch's own kernel
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout)
    # few tokens on a CPU: a DPO step of 48 takes less time than with that kernel, 7% if MKL multiplies matrices, 60% if oneDNN does
    # (`onednn_products`, section 5); one of 200, in GPT-2's size, 0% and 25%
    q, k, v = (x.reshape(-1, T, size) for x in (q, k, v))
    future = q.new_full((T, T), -math.inf).triu(1)                               # what a token must not see; added to its scores
    weights = F.dropout(torch.baddbmm(future, q, k.mT, alpha=size ** -0.5).softmax(-1), dropout)
    return (weights @ v).view(B, n_head, T, size)


def take(x, rows):
    """x[rows], x (N,C). The gradient of F.embedding is faster than that of an index."""
    return F.embedding(rows, x)


def at_least_float32(x):
    """x in float32, or in float64 if it is that: scores, log-probabilities and what LOSSES make of them are never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Block(nn.Module):
    """A transformer layer, its parameters named as in GPT-2: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.dropout = config.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        # c_attn: queries, keys and values of all heads; c_proj: back to width C; c_fc: up to 4C
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x, attend, only=None):
        """x (..., C) -> (..., C). Everything but attend(qkv (..., 3C), only), which `GPT.forward` passes in, acts on each position
        separately. only (M,): of x (N, C) return these rows alone, (M, C); the others still serve as keys and values. For a reward
        model, which reads one position of a text, a step is 1.2 times as fast."""
        y = self.attn.c_proj(attend(self.attn.c_attn(self.ln_1(x)), only))
        x = (x if only is None else take(x, only)) + F.dropout(y, self.dropout, self.training)
        y = self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """GPT-2's architecture. With n_outputs, a linear head of that width replaces the language-model head:
    one output makes it a reward model or a critic. On a first reading leave it at `pad_token_id`: files follow, then speed."""

    def __init__(self, config: GPTConfig, n_outputs: int | None = None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)                # token embeddings, and the head: tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)                # position embeddings
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.score = None if n_outputs is None else nn.Linear(config.n_embd, n_outputs, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:                                             # residual branches start smaller, as in GPT-2
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.score is not None:
            nn.init.zeros_(self.score.weight)                                    # a new reward or value head says 0 everywhere

    def forward(self, tokens, keep=None, cache=None, start=0, embeddings=None):
        """Next-token logits (or scores).

        tokens (B,T) long, the first at position `start`. Returns (B,T,V), V = vocab_size or n_outputs.
        keep (B,T) bool: return the outputs of these positions only, (keep.sum(), V), row by row. Without a cache, what follows a row's
        last kept position, as pads do, is not computed; and where rows begin alike, as the completions of one prompt do, the common
        beginning is computed once. See `Packed`.
        cache (n_layer, 2, T_max, B, n_head, head_size): in sampling, the keys and values of the `start` tokens before, so that they are
        not computed again; those of `tokens` are added. See `generate`.
        embeddings (B,T,C), without keep: what the model reads instead of the tokens' own embeddings. See `ift_loss`.
        """
        B, T = tokens.shape
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit in a block of {self.config.block_size}")
        assert cache is None or start == 0 or T == 1, "after a filled cache, one token at a time"
        positions = torch.arange(start, start + T, device=tokens.device).expand(B, T)
        packed = Packed(tokens, keep) if keep is not None and cache is None else None           # speed only: think of it as None
        if packed:
            tokens, positions = tokens.flatten()[packed.cells], positions.flatten()[packed.cells]
        dropout = self.config.dropout if self.training else 0.0
        caches = (cache[layer] for layer in range(self.config.n_layer))          # lazy: each `in_rows` takes its layer's, if any

        def in_rows(qkv):                                                        # attention: (b, t, 3C) -> (b, t, C)
            q, k, v = qkv.view(*qkv.shape[:2], 3, self.config.n_head, -1).unbind(2)             # (b, t, nh, hs) each
            if cache is not None:
                so_far = next(caches)[:, :start + T]                             # (2, start + T, B, nh, hs)
                so_far[0, start:], so_far[1, start:] = k.transpose(0, 1), v.transpose(0, 1)
                k, v = so_far.transpose(1, 2)
            return attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout).transpose(1, 2).flatten(2)

        def attend(qkv, only):                                                   # what a Block calls
            return packed.attend(qkv, only, in_rows) if packed else in_rows(qkv)

        embeddings = self.wte(tokens) if embeddings is None else embeddings
        x = F.dropout(embeddings + self.wpe(positions), dropout, self.training)
        for block in self.h[:-1]:
            x = block(x, attend)
        x = self.ln_f(self.h[-1](x, attend, packed.kept if packed else None))    # the last layer: only what is kept
        if keep is not None:
            x = take(x, packed.copies) if packed else x[keep]
        if self.score is None:
            x = F.linear(x, self.wte.weight)
        else:
            with torch.autocast(x.device.type, enabled=False):
                x = F.linear(at_least_float32(x), at_least_float32(self.score.weight))
        return x[:packed.wanted].clone() if packed and len(x) > packed.wanted else x     # no idle rows; FSDP2 warns of views

    def pad_token_id(self):
        """What transformers shall pad with: EOS; for a reward model another id, since transformers reads the score at the last token
        that is no pad, and that must be the text's EOS."""
        return self.config.eos_token_id if self.score is None else int(self.config.eos_token_id == 0)

    def save_pretrained(self, directory, tensors=None):
        """Write config.json and model.safetensors in Hugging Face's GPT-2 layout, readable by GPT2LMHeadModel (or, with one
        output, by GPT2ForSequenceClassification). tensors: the weights to write instead of the model's own, by name."""
        directory, c = Path(directory), self.config
        tensors = {name if name == "score.weight" else f"transformer.{name}": (value.t() if name.endswith(CONV1D) else value).contiguous()
                   for name, value in (tensors or self.state_dict()).items()}
        replace_file(directory / "model.safetensors", lambda draft: save_file(tensors, draft, metadata={"format": "pt"}))
        write_json(directory / "config.json", {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel" if self.score is None else "GPT2ForSequenceClassification"],
            "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "activation_function": "gelu_new",
            "bos_token_id": c.eos_token_id, "eos_token_id": c.eos_token_id,
            "pad_token_id": self.pad_token_id(),
            "tie_word_embeddings": True, **({} if self.score is None else {"num_labels": self.score.out_features})})

    @classmethod
    def from_pretrained(cls, name_or_dir, n_outputs: int | None = None):
        """Read a GPT-2 in Hugging Face's layout: a directory with config.json and model.safetensors, or its shards; or one of SIZES
        by its name. n_outputs replaces the head of a language model by a new one of that width; a saved head is kept."""
        directory = find_model(name_or_dir)
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory}: no config.json there; a model is a directory with config.json and model.safetensors")
        config = json.loads((directory / "config.json").read_text())
        usual = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                 "scale_attn_by_inverse_layer_idx": False, "n_inner": 4 * config["n_embd"] if "n_embd" in config else None}
        for name, value in usual.items():
            if config.get(name) not in (None, value):
                raise ValueError(f"{directory}: its {name} is {config[name]}, and this GPT-2's is {value}")
        eos = config.get("eos_token_id")
        if isinstance(eos, list) and len(eos) != 1:
            raise ValueError(f"{directory}: its EOS ids are {eos}, and this GPT-2 has one")
        tensors = {name.removeprefix("transformer."): value for shard in sorted(directory.glob("model*.safetensors"))
                   for name, value in load_file(shard).items()}
        if not tensors:
            raise ValueError(f"{directory}: no model.safetensors there")
        if "lm_head.weight" in tensors and not torch.equal(tensors["lm_head.weight"], tensors["wte.weight"]):
            raise ValueError(f"{directory}: an untied head, which this GPT-2 does not have")
        # the causal masks of old checkpoints (".attn.bias") and the tied head are not parameters; "c_attn.bias" is one
        tensors = {name: value.t().contiguous() if name.endswith(CONV1D) else value for name, value in tensors.items()
                   if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight"}
        if "score.weight" in tensors:
            n_outputs = len(tensors["score.weight"])
        model = cls(GPTConfig(config["vocab_size"], config["n_positions"], config["n_layer"], config["n_head"], config["n_embd"],
                              config.get("resid_pdrop", 0.0), eos[0] if isinstance(eos, list) else eos), n_outputs)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or set(missing) - {"score.weight"}:
            raise ValueError(f"{directory}: not the weights of this GPT-2; missing {missing[:3]}, unexpected {unexpected[:3]}")
        return model


# Speed only, to be skipped on a first reading: attention for one token, and how `GPT.forward` computes no more than it is asked for.


def newest_attention(q, k, v):
    """Speed only: `attention` for the newest token, term by term, in the order in which `generate` keeps k and v. On a CPU without
    AVX-512 sampling takes 7 to 17% less time than with PyTorch's kernel, if one call's products fit into the processor's cache."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))                         # q (1,B,nh,hs); k, v (S,B,nh,hs)
    weights = ((q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5).softmax(0)   # (S,B,nh,1)
    return (weights * v).sum(0)[:, :, None]


def distinct_prefixes(tokens, keep):
    """The hidden state in column t depends on tokens[:, :t+1] only, so rows that begin alike share states: find each of them once.

    tokens, keep (B,T) -> at (N,): for each state, a cell that has it, a place in the flattened tokens; state (B*T,): for each cell, the
    number of its state.
    The rows  P Q a,  P Q b  have the states P, PQ, PQa and PQb: at = 0 1 2 5, state = 0 1 2 0 1 3 (or other cells of the
    same states, in another order). All cells after a row's last kept one, which nobody reads, count as one more state.
    With eight completions a prompt there are 39% fewer states than cells, and DPO steps are 1.3 times as fast.
    """
    needed = keep.flip(1).cumsum(1).flip(1) > 0                                  # (B, T): kept, or left of a kept one
    # tokens[:, :t+1] as one number: the sum of (token + 1, so that 0 counts) * (a random number of its column), modulo 2^64; different
    # prefixes collide with a chance below 2^-46. numpy draws the random numbers: torch's generator is the user's
    columns = torch.from_numpy(np.random.default_rng(0).integers(2 ** 63, size=tokens.shape[1])).to(tokens.device)
    prefix = torch.where(needed, ((tokens + 1) * columns).cumsum(1), 0).flatten()
    states, state = prefix.unique(return_inverse=True)
    at = torch.empty_like(states).scatter_(0, state, torch.arange(len(prefix), device=tokens.device))    # any one of its cells
    return at, state


def similar_rows(keep, n: int = 3):
    """Rows sorted by length, in n parts, each padded to its own longest row: attention works on rectangles, and its work grows with the
    square of their width. The demonstration's steps take 10 to 14% less time than with one rectangle; with equally long rows, 3% more.

    keep (B,T) -> rectangles: (rows, width) of each part; places (P,): their cells, part by part, each as its place in the flattened `keep`.
    """
    T, columns = keep.shape[1], torch.arange(keep.shape[1], device=keep.device)
    lengths, order = torch.where(keep, columns + 1, 1).amax(1).sort()            # (B,) up to the last kept position
    rows, widths = order.chunk(n), torch.stack([part[-1] for part in lengths.chunk(n)]).tolist()
    places = torch.cat([(T * part[:, None] + columns[:width]).flatten() for part, width in zip(rows, widths)])
    return list(zip(map(len, rows), widths)), places


def pad_rows(rows):
    """Row numbers (n,), with row 0 repeated up to a multiple of 64 while `onednn_products` (section 5) is in effect: what these idle rows
    return is dropped."""
    return F.pad(rows, (0, -len(rows) % 64)) if torch.backends.mkldnn.matmul.fp32_precision == "bf16" else rows


class Packed:
    """How `GPT.forward` computes what `keep` asks for and no more: x is (N, C), each distinct prefix once, instead of (B, T, C). The
    numbers are the same (but cells that share a state share dropout). Attention alone needs whole rows, so it unpacks them.

    tokens, keep (B,T). cells (N,): where in the flattened tokens each state is. kept (M,): the states to return; copies (keep.sum(),):
    which of these, row by row. read (P,): the state in each cell of `rectangles`; found (N,): where in `read` a state is.
    """

    def __init__(self, tokens, keep):
        cells, state = distinct_prefixes(tokens, keep)
        kept, copies = state[keep.flatten()].unique(return_inverse=True)
        self.rectangles, places = similar_rows(keep)
        self.read = state[places]
        found = torch.zeros_like(cells).scatter_(0, self.read, torch.arange(len(self.read), device=cells.device))
        self.wanted = len(copies)                                                # what idle rows return is cut off at this
        self.cells, self.kept, self.copies, self.found = map(pad_rows, (cells, kept, copies, found))

    def attend(self, qkv, only, in_rows):
        """in_rows, attention in rows (b, t, 3C) -> (b, t, C), of packed states: (N, 3C) -> (N, C), or (M, C) with only."""
        parts = take(qkv, self.read).split([rows * width for rows, width in self.rectangles])
        y = torch.cat([in_rows(part.view(*rectangle, -1)).flatten(0, 1) for part, rectangle in zip(parts, self.rectangles)])
        return take(y, self.found if only is None else self.found[only])


# Files: finding models and writing safely. On a first reading go on with section 5.

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")                       # GPT-2 stores the weights of its linear layers transposed


def find_model(name) -> Path:
    """A model's directory. GPT-2's public names are looked up in Hugging Face's cache; nothing is fetched."""
    if Path(name).is_dir():
        return Path(name)
    if str(name) not in SIZES:
        raise ValueError(f"{name}: no such directory, and not one of {', '.join(SIZES)}")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub").expanduser()
    for config in [c for owner in ("openai-community--", "") for c in hub.glob(f"models--{owner}{name}/snapshots/*/config.json")]:
        if list(config.parent.glob("model*.safetensors")):
            return config.parent
    raise ValueError(f"{name}: not in Hugging Face's cache ({hub}), and nothing is fetched here; where there is a network, `hf download "
                     f"openai-community/{name} config.json model.safetensors tokenizer.json --local-dir {name}`, and bring that directory")


LEFTOVER = ".tmp??????"                 # what a kill leaves when it strikes while safetensors writes


def replace_file(path: Path, write):
    """write(draft) under another name, flushed to the disk and renamed: neither a reader nor a crash ever finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.unlink(missing_ok=True)                                                # were it a link, its target would be overwritten
    try:
        draft.touch()
        mode = draft.stat().st_mode
        write(draft)
        draft.chmod(mode)                                                        # safetensors makes files that only their owner can read
        with open(draft, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError, SafetensorError) as error:                    # how each library reports a full disk
        draft.unlink(missing_ok=True)
        raise RunFailed(f"{path} could not be written (a full disk?), an older one is untouched: {str(error).splitlines()[0]}") from None


class RunFailed(Exception):
    """The input was good, yet the run did not reach its end: exit code 1."""


def write_json(path: Path, value):
    """Write JSON; a reader never finds half of it."""
    replace_file(path, lambda draft: draft.write_text(json.dumps(value, indent=1)))


# === 5. Log-probabilities and sampling ================================================================================
# Sequences are padded on the right. Attention is causal, so no real token ever sees a pad, and no attention mask is needed.
# `mask` (B,T) marks the response: its tokens and its EOS, not the prompt, not the pads. It is made from lengths, never from
# "id == pad": a model whose pad is its EOS would never learn to stop.


def pad(prompts: list, completions: list, device="cpu"):
    """Prompts and completions, lists of ids, side by side -> tokens (B,T) long, mask (B,T) bool, on `device`."""
    T = max(len(p) + len(c) for p, c in zip(prompts, completions))
    tokens, mask = np.zeros((len(prompts), T), np.int64), np.zeros((len(prompts), T), bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        n, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :n], tokens[row, n:end], mask[row, n:end] = prompt, completion, True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


#     tokens      P P a b E .        prompt P, completion a b, EOS E, pad .
#     mask        0 0 1 1 1 0
#     predicting  0 1 1 1 0 0        the logits of these positions ...
#     predicted   0 0 1 1 1 0        ... are scored on these tokens


def predicted(mask):
    """(B,T) bool: the response tokens that have a predecessor. A row's first token cannot be predicted."""
    return F.pad(mask[:, 1:].bool(), (1, 0))


def predicting(mask):
    """(B,T) bool: the positions whose output predicts a response token, one to the left of it: the next-token shift."""
    return F.pad(mask[:, 1:].bool(), (0, 1))


MANY_LOGITS = 2 ** 25                   # 128 MB in float32


def token_logps(model, tokens, mask):
    """log pi(token_t | tokens before t) where predicted(mask), 0 elsewhere. tokens, mask (B,T) -> (B,T), float32, in nats.

    `model` is a GPT, or anything that maps tokens (B,T) to logits (B,T,V). A GPT computes logits only where a response token
    is predicted: if prompts are half of the text, that halves the head's work.
    """
    at = predicting(mask)
    logits = model(tokens, at) if isinstance(model, GPT) else model(tokens)[at]                 # (N, V), N = at.sum()
    targets = tokens[predicted(mask)]                                                           # (N,)

    def target_logps(logits, targets):
        return -F.cross_entropy(at_least_float32(logits), targets, reduction="none")
    if logits.numel() <= MANY_LOGITS:
        logps = target_logps(logits, targets)
    else:       # keep no log-softmax of a large vocabulary: the backward pass makes it again from the logits, part by part
        parts = zip(*(x.split(max(1, MANY_LOGITS // logits.shape[1])) for x in (logits, targets)))
        logps = torch.cat([recompute(target_logps, *part, use_reentrant=False) for part in parts])
    return logps.new_zeros(tokens.shape).masked_scatter(predicted(mask), logps)


def sequence_logps(model, tokens, mask):
    """log pi(response | prompt): the *sum* over the tokens where mask is 1. tokens, mask (B,T) -> (B,), in nats."""
    return token_logps(model, tokens, mask).sum(1)


# Speed only: the next three functions choose the library that multiplies matrices. On a first reading go on at `progress_bar`.


@contextlib.contextmanager
def onednn_allowed():
    """Within, oneDNN and not MKL computes a CPU's float32 products. PyTorch does so only where their factors may be rounded to bfloat16,
    so that is allowed here; `onednn_suits` tries whether this CPU then rounds."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        yield
    finally:
        settings.fp32_precision = before


@functools.cache
def onednn_suits() -> bool:
    """Whether oneDNN should compute this machine's float32 products. On AMD's processors with AVX-512, units that MKL leaves idle there,
    a product takes half of MKL's time, a DPO step two thirds; on an Intel Xeon a step takes 7% more. And the products must be exact:
    CPUs with AMX, a unit for bfloat16, round to it, so numbers that bfloat16 cannot hold are tried."""
    cpu = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not cpu.exists() or "AuthenticAMD" not in cpu.read_text():
        return False
    x = torch.linspace(1, 2, 2 ** 16).view(256, 256)
    with onednn_allowed():
        return torch.equal(x @ torch.eye(256), x)


def onednn_products(model):
    """A context in which a CPU's float32 matrix products are computed by oneDNN where that suits.

    oneDNN builds a kernel for each new shape, in half a millisecond, and keeps up to a thousand. So models below 2^19 parameters keep
    MKL, and `GPT.forward` pads with idle rows so that shapes recur: a step takes 7% less time, and memory stays flat.
    """
    on_cpu, size = next(model.parameters()).device.type == "cpu", sum(p.numel() for p in model.parameters())
    return onednn_allowed() if on_cpu and size >= 2 ** 19 and onednn_suits() else contextlib.nullcontext()


def progress_bar(name: str | None, *arguments, **options):
    """tqdm's bar, gone when done; without a name there is none. TQDM_DISABLE=1 in the environment hides them all; disable=False would
    overrule it, so it is not set."""
    return tqdm(*arguments, desc=name, mininterval=0.5, leave=False, **options, **({} if name else {"disable": True}))


@torch.no_grad()
def in_batches(function, model, prompts: list, completions: list, batch_size: int = 512, rows=None, progress=None) -> torch.Tensor:
    """Apply function(model, tokens, mask) -> (B,) to n completions, in batches, without gradient -> (n,) float32 on the CPU. rows: only
    these are computed, the others are 0. Sorted by length, to pad little. progress: the name of a progress bar."""
    model.eval()
    device, values = next(model.parameters()).device, torch.zeros(len(prompts))
    order = sorted(range(len(prompts)) if rows is None else rows, key=lambda i: len(prompts[i]) + len(completions[i]))
    longest = max([1, *(len(completions[i]) for i in order)])
    batch_size = max(1, min(batch_size, 2 ** 28 // (longest * model.config.vocab_size)))        # logits of 1 GB at most
    for start in progress_bar(progress, range(0, len(order), batch_size), unit="batch"):
        batch = order[start:start + batch_size]
        with mixed_precision(device), onednn_products(model):
            values[batch] = function(model, *pad([prompts[i] for i in batch], [completions[i] for i in batch], device)).float().cpu()
    if not values.isfinite().all():
        raise FloatingPointError("the model's log-probabilities or scores are not finite numbers: its training diverged")
    return values


def mixed_precision(device):
    """On a GPU, matrix products, and what only passes their results on, in bfloat16; weights, sums and every loss in float32."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda")


def completion_logps(model, prompts: list, completions: list, **options) -> torch.Tensor:
    """log pi(completion | prompt) of lists of ids, without gradient -> (n,). options: of `in_batches`."""
    return in_batches(sequence_logps, model, prompts, completions, **options)


def completion_logratios(policy, reference, prompts: list, completions: list, **options) -> torch.Tensor:
    """log pi(completion | prompt) - log pi_ref(completion | prompt), in nats -> (n,). Its mean over pi's own samples estimates the KL."""
    return completion_logps(policy, prompts, completions, **options) - completion_logps(reference, prompts, completions, **options)


def generate(model, prompts: list, max_new_tokens: int, temperature: float = 1.0, *, top_k: int = 0, top_p: float = 1.0,
             stop_at_eos: bool = True, batch_size: int = 1024, progress: str | None = None) -> list:
    """Sample one completion for each prompt (lists of ids, of any lengths, each with one token at least).

    Returns lists of ids without the prompt, EOS included where one was sampled. temperature 0 is greedy; top_k and top_p
    narrow the choice to the k likeliest tokens, or to the likeliest that hold a share p. Draws from torch's global generator.
    A prompt that leaves no room for max_new_tokens in the model's block is cut on the left. The model is left in eval mode.
    """
    model.eval()
    room = model.config.block_size - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} leaves no room for a prompt in a block of {model.config.block_size}")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt: the first token needs something to follow, for GPT-2's own weights the EOS id")
    if max_new_tokens < 1 or not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}, temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range")
    lengths, completions = [min(room, len(prompt)) for prompt in prompts], [None] * len(prompts)
    cells = 2 ** 28 // (2 * model.config.n_layer * model.config.n_embd)          # 1 GB of keys and values
    for rows in progress_bar(progress, similar_lengths(lengths, batch_size, cells, max_new_tokens), unit="batch"):
        with mixed_precision(next(model.parameters()).device), onednn_products(model), inference_mode():
            batch = _generate_batch(model, [prompts[i][-room:] for i in rows], max_new_tokens, temperature, top_k, top_p, stop_at_eos)
        for i, completion in zip(rows, batch):
            completions[i] = completion
    return completions


def inference_mode():
    """For tensors that training never sees: sampling takes 5% less time than in torch.no_grad. With several processes it is no_grad all
    the same, since FSDP2 gathers weights once and keeps them for training, too."""
    return torch.no_grad() if dist.is_initialized() else torch.inference_mode()


def similar_lengths(lengths: list, batch_size: int, cells: int, more: int) -> list:
    """Row numbers in batches, short rows first: at most batch_size rows, and `cells` tokens if each row gets `more` and is padded to the
    longest; lengths within 64 of one another, since what a prompt has beyond the shortest is read token by token."""
    batches = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        batch = batches[-1] if batches else []
        if (not batch or len(batch) == batch_size or (len(batch) + 1) * (lengths[row] + more) > cells
                or lengths[row] - lengths[batch[0]] > 64):
            batches.append([])
        batches[-1].append(row)
    return batches


def _generate_batch(model, prompts, max_new_tokens, temperature, top_k, top_p, stop_at_eos):
    """Rows start at column 0 and advance together, one column a step. While a row's prompt lasts, its next token is given, not sampled:
    so prompts of different lengths need neither left padding nor an attention mask. For speed only, so to be skipped at first: `cache`,
    `beginnings` (the columns that all prompts fill, read at once), and dropping finished rows."""
    config, device, B = model.config, next(model.parameters()).device, len(prompts)
    tokens, known = (F.pad(x, (0, max_new_tokens)) for x in pad([[]] * B, prompts, device))     # (B, T); the mask marks prompts here
    lengths, T = known.sum(1), tokens.shape[1]
    ends = lengths + max_new_tokens                                                             # where each row will end
    rows = torch.arange(B, device=device)                                                       # the rows still running
    # by columns: a step writes one stretch of memory, and columns that no row reaches are never touched; the demonstration's sampling
    # takes 10% less time than by rows
    cache = torch.empty(config.n_layer, 2, T, B, config.n_head, config.n_embd // config.n_head, device=device,
                        dtype=model.wte.weight.dtype)
    t = int(lengths.min())
    # rows that begin alike, as samples of one prompt do, are read once: with eight of each, sampling takes 9% less time
    beginnings, which = tokens[:, :t].unique(dim=0, return_inverse=True)                        # (U, t); (B,): each row's among them
    last = (torch.arange(t, device=device) == t - 1).expand_as(beginnings)
    logits = model(beginnings, keep=last, cache=cache[:, :, :, :len(beginnings)])[which]        # of the last column, (B, V)
    for layer in cache:                                                                         # by layer, to hold little twice
        layer[:, :t] = layer[:, :t].index_select(2, which)
    while True:
        given = known[rows, t]
        token = torch.where(given, tokens[rows, t], sample_from(logits.float(), temperature, top_k, top_p))
        tokens[rows, t] = token
        t += 1
        if stop_at_eos:                                         # until rows are dropped, below, those that have ended sample on, unread
            ended = ~given & (token == config.eos_token_id) & (ends[rows] > t)                  # sampled, before the row's last place
            ends[rows[ended]] = t
        running = ends[rows] > t
        if not running.any():
            break
        if running.float().mean() < 0.75:                       # drop finished rows; not at each step, because it copies the cache
            left = running.nonzero()[:, 0]
            rows, token = rows[left], token[left]
            for layer in cache:
                layer[:, :t - 1, :len(left)] = layer[:, :t - 1].index_select(2, left)          # columns filled: `token` is not yet
            cache = cache[:, :, :, :len(left)]                  # the same memory
        logits = model(token[:, None], cache=cache, start=t - 1)[:, 0]                          # (rows, V)
    return [row[start:end] for row, start, end in zip(tokens.tolist(), lengths.tolist(), ends.tolist())]


def sample_from(logits, temperature=1.0, top_k=0, top_p=1.0):
    """One token id for each row of logits (B,V) -> (B,)."""
    greedy = temperature < 1e-4                                 # the likeliest token; all else here is for its check of the logits
    logits = logits if greedy or temperature == 1 else logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        outside = probs.cumsum(-1) - probs >= top_p             # the mass before this token is p already
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)             # order is a permutation: this undoes it
    # inverse transform sampling: the first token whose cumulative probability reaches a uniform number in (0, 1]; that is one
    # random number per row, where torch.multinomial draws one per token
    cumulative = logits.softmax(-1).cumsum(-1)
    if not cumulative[:, -1].isfinite().all():                  # NaN, infinity, or a row of only -infinity among the logits
        raise FloatingPointError("the model's logits are not numbers: no token can be chosen by them")
    if greedy:
        return logits.argmax(-1)
    threshold = (1 - torch.rand(len(logits), 1, device=logits.device)) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold).squeeze(-1)


# === 6. Training: one loop for every stage; supervised fine-tuning ====================================================
# An algorithm is a loss of (model, batch); everything else about training is here, once. On a first reading skip `Run`, which keeps
# checkpoints, and, after `fit`, go on at `shuffled`.


@dataclass
class Training:
    """How one stage is trained."""
    steps: int
    learning_rate: float
    batch_size: int = 64                # rows of one step: texts or pairs; PPO has its own minibatch
    micro_batch: int = 10 ** 9          # rows of one forward pass, all of the step by default; gradients of its micro-batches add up
    warmup: float = 0.05                # share of the steps in which the learning rate rises
    decay: bool = True                  # then it falls to 0 linearly; otherwise it stays
    clip: float = 1.0                   # largest norm of the gradient
    eps: float = 1e-8                   # of Adam
    seed: int = 0                       # order of the data


@dataclass
class Run:
    """Where a stage of the command line writes, and how it is run. Without `out`, nothing is written."""
    out: Path | None = None
    settings: dict | None = None        # a checkpoint made under other settings is refused
    export: object = None               # export(tensors) writes the model that users load
    lines: object = None                # line number of each data row, to say where a NaN came from
    save_every: int = 100               # steps
    resume: bool = False
    fsdp: bool = False                  # shard model and optimiser over the processes (FSDP2) instead of copying them (DDP)
    saved_steps: int = 0                # in the checkpoint

    def load(self):
        """The checkpoint to go on from, or None; a broken one is a ValueError. Nothing in it is executed."""
        if not self.resume or not (path := self.out / "checkpoint.pt").exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            settings = saved["settings"]
            saved = {name: saved[name] for name in ("model", "optimizer", "step", "generators", "memory")}
        except Exception as error:                                               # zip, pickle, missing keys: each its own kind
            raise ValueError(f"{path}: not a checkpoint of this program, or cut short ({type(error).__name__})") from None
        for name in sorted(self.settings.keys() | settings.keys(), key=lambda name: (name != "stage", name)):
            if settings.get(name) != self.settings.get(name):
                raise ValueError(f"{path}: made with {name} = {settings.get(name)}, not {self.settings.get(name)}; "
                                 f"--resume goes on with the same data and settings only")
        return saved

    def start(self, saved, parameters, optimizer, memory: dict) -> int:
        """Put everything into the saved state; of metrics.jsonl keep the steps that it has seen -> the first step to take."""
        if saved:
            for number, state in saved["optimizer"]["state"].items():
                if hasattr(own := parameters[number], "full_tensor"):            # cut the moments as FSDP2 has cut their parameter
                    state.update({name: dist.tensor.distribute_tensor(value, own.device_mesh, own.placements)
                                  for name, value in state.items() if value.dim()})
            optimizer.load_state_dict(saved["optimizer"])
            memory.update(saved["memory"])
            torch.set_rng_state(saved["generators"][0])                          # the CPU's; then each GPU's
            torch.cuda.set_rng_state_all(saved["generators"][1:1 + torch.cuda.device_count()])
            self.saved_steps = saved["step"]
        if self.out and process()[0] == 0:
            path = self.out / "metrics.jsonl"
            rows = path.read_text().splitlines(keepends=True) if saved and path.exists() else []
            try:
                rows = [row for row in rows if row.endswith("}\n") and json.loads(row).get("step", self.saved_steps) < self.saved_steps]
            except ValueError as error:
                raise ValueError(f"{path}: a line of it is not JSON ({error}); without the file --resume goes on, too") from None
            replace_file(path, lambda draft: draft.write_text("".join(rows)))
            overwritten = [] if saved else ["checkpoint.pt", "model*.safetensors", "config.json"]
            for path in [path for name in (LEFTOVER, *overwritten) for path in self.out.glob(name)]:
                path.unlink()
            if saved:
                self.export(saved["model"])                                      # a kill may have come between checkpoint and model
        return self.saved_steps

    def save(self, model, optimizer, step: int, memory: dict):
        """The whole state after `step` steps, in one file: a kill at any moment leaves the old one or the new one."""
        if self.out is None:
            return
        tensors, state = whole(model.state_dict()), whole(optimizer.state_dict())       # all processes take part, so before the if
        self.saved_steps = step
        if process()[0] == 0:
            checkpoint = {"settings": self.settings, "model": tensors, "optimizer": state, "step": step,
                          "generators": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()], "memory": memory}
            replace_file(self.out / "checkpoint.pt", lambda draft: torch.save(checkpoint, draft))
            self.export(tensors)

    def log(self, row: dict):
        if self.out and process()[0] == 0:
            try:
                with open(self.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise RunFailed(f"{self.out / 'metrics.jsonl'}: {error}") from None

    def where(self, micro_batches: list) -> str:
        """For the message of a NaN: the batch's lines, and what can be gone back to."""
        if self.out is None:
            return ""
        lines = sorted({int(self.lines[row]) for batch in micro_batches for row in batch.get("data", ())})
        return (f"; the batch's lines: {', '.join(map(str, lines))}; " + (
            f"the last checkpoint, {self.out}, has {self.saved_steps} steps" if self.saved_steps else "there is no checkpoint yet"))


def process() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) except under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fit(stage: str, model: nn.Module, batches, loss, training: Training, *, dropout=False, on_step=None, quiet=False,
        run: Run | None = None, memory=None):
    """Train `model` in place; return the history, a list with one dict of numbers per step.

    batches(step) -> the step's micro-batches, a list of dicts with "count", the number of terms in the loss, and perhaps "data",
    the numbers of its data rows, to say where a NaN came from.
    loss(model, batch) -> the *sum* of the batch's losses, and a dict of sums to log. dropout: on in SFT only; DPO and PPO compare
    log-probs with stored ones, and dropout would change them at random.
    on_step(logs) sees each step's numbers and may add to them. A loss that is not finite ends the stage (FloatingPointError).
    run: where to log and to save, and to go on from. memory: what `batches` remembers between steps, saved with the rest.
    """
    run, memory, history = run or Run(), {} if memory is None else memory, []
    saved = run.load()
    if saved:
        model.load_state_dict(saved["model"])
    losses = distribute(model, loss, run)                                        # before parameters are listed: FSDP2 replaces them
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, training.learning_rate, (0.9, 0.99), eps=training.eps, weight_decay=0.0, fused=True)
    warmup = max(1, round(training.warmup * training.steps))
    first = run.start(saved, parameters, optimizer, memory)
    del saved                                                                    # as large as weights and moments together
    with onednn_products(model), stop_signals(run.out is not None) as told_to_stop, progress_bar(
            None if quiet or process()[0] > 0 else stage, range(first, training.steps), initial=first, total=training.steps) as bar:
        for step in bar:
            micro_batches = batches(step)
            model.train(dropout)                                                 # batches() may have sampled from the model
            if dropout and process()[1] > 1:
                torch.manual_seed(hash((training.seed, step, process()[0])))     # processes drop different units
            logs = {"step": step, **backward(losses, micro_batches, told_to_stop)}
            stop = logs.pop("stop")
            logs["gradient_norm"] = float(whole(nn.utils.clip_grad_norm_(parameters, training.clip)))
            if not math.isfinite(logs["loss"] + logs["gradient_norm"]):
                raise FloatingPointError(f"{stage}, step {step}: the loss is {logs['loss']}, its gradient's norm {logs['gradient_norm']}; "
                                         f"a smaller learning rate may help{run.where(micro_batches)}")
            rising = (step + 1) / warmup                                         # the rate: the lower of two lines over the steps
            falling = (training.steps - step) / max(1, training.steps - warmup) if training.decay else 1.0
            logs["learning_rate"] = optimizer.param_groups[0]["lr"] = training.learning_rate * min(rising, falling)
            optimizer.step()
            optimizer.zero_grad()
            if on_step:
                on_step(logs)
            history.append(logs)
            bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
            run.log(logs)
            if stop or (step + 1) % run.save_every == 0 or step + 1 == training.steps:
                run.save(model, optimizer, step + 1, memory)
            if stop and step + 1 < training.steps:
                raise RunFailed(f"{stage} stopped after {step + 1} of {training.steps} steps, all saved in {run.out}; "
                                "the same command with --resume goes on from there")
    model.eval()
    return history


def backward(losses, micro_batches: list, told_to_stop: list) -> dict:
    """Gradients of a step's mean loss, and its numbers: sums over all micro-batches / their count, so that they equal one big batch's.
    In one process that is (loss of a micro-batch / count).backward() for each. The rest is for torchrun: of W processes each computes
    every W-th micro-batch; gradients, numbers and the request to stop are summed over processes.
    (Reference log-probs and PPO's rollouts are computed by every process, identically.)"""
    (rank, world), sums = process(), {}
    count = sum(batch["count"] for batch in micro_batches)
    for start in range(0, len(micro_batches), world):
        turn, last = micro_batches[start:start + world], start + world >= len(micro_batches)          # one for each process
        weight = 1.0 if rank < len(turn) else 0.0                                # 0: none is left for this process, but all must take part
        batch = turn[rank] if weight else turn[0]
        with losses.no_sync() if hasattr(losses, "no_sync") and not last else contextlib.nullcontext():       # DDP: exchange once
            total, more = losses(batch)
            (total * (weight * world) / count).backward()                        # DDP and FSDP2 average over processes: so times W
        for name, value in {"loss": total, **more}.items():
            sums[name] = sums.get(name, 0.0) + weight * float(value.detach() if torch.is_tensor(value) else value) / count
    sums["stop"] = len(told_to_stop)
    if world > 1:
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=total.device)
        dist.all_reduce(values)
        sums = dict(zip(sums, values.tolist()))
    return sums


class LossOf(nn.Module):
    """loss(model, batch) as a module's forward: so DDP, which hooks into forward, can train any loss."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch):
        with mixed_precision(next(self.model.parameters()).device):
            return self.loss(self.model, batch)


def distribute(model, loss, run: Run):
    """loss(model, .) as a module that maps a batch to its loss. By DDP each process has a copy of the model, by FSDP2 a part of it."""
    if process()[1] > 1 and run.fsdp:
        from torch.distributed.fsdp import fully_shard                           # here, because it takes a second to load
        gpts = [module for module in model.modules() if isinstance(module, GPT)]
        for part in [part for gpt in gpts for part in (*gpt.h, gpt)]:            # layer by layer, then what is left
            fully_shard(part, reshard_after_forward=True)
    losses = LossOf(model, loss)
    return losses if process()[1] == 1 or run.fsdp else nn.parallel.DistributedDataParallel(losses)


def whole(value):
    """A state dict on the CPU, with every tensor that FSDP2 has sharded put together again."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().cpu() if torch.is_tensor(value) else value


@contextlib.contextmanager
def stop_signals(active: bool):
    """Yield a list that fills on a stop signal (Ctrl-C, or a cluster's SIGTERM); a second time ends at once."""
    said = []

    def note(number, frame):
        said.append(number)
        signal.signal(number, signal.SIG_DFL)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if active}
    try:
        yield said
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shuffled(n: int, training: Training, groups=None):
    """rows(step) -> the data rows of a step. Each epoch is a fresh permutation, a function of (seed, epoch) alone; rows of one
    group follow one another. groups (n,): each row's group, counted from 0; else every row is its own."""
    groups = np.arange(n) if groups is None else groups

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        place = np.random.default_rng([training.seed, epoch]).permutation(groups.max() + 1)       # of each group in this epoch
        return np.argsort(place[groups], kind="stable")          # group by group: groups 0 0 1 1, place 1 0 give rows 2 3 0 1

    def rows(step):
        positions = range(step * training.batch_size, (step + 1) * training.batch_size)
        return np.array([permutation(position // n)[position % n] for position in positions])
    return rows


def micro_batches_of(rows, training: Training) -> list:
    """A step's rows in parts of at most training.micro_batch, small enough for all processes (but the last ones may get none)."""
    size = max(1, min(training.micro_batch, math.ceil(len(rows) / process()[1])))
    return [rows[start:start + size] for start in range(0, len(rows), size)]


def train_sft(model, texts: list, training: Training, run: Run | None = None, **options):
    """Supervised fine-tuning: maximise log pi(text). texts: lists of ids, EOS last; every token but the first is scored."""
    device, rows = next(model.parameters()).device, shuffled(len(texts), training)

    def batch_of(part):
        tokens, mask = pad([[]] * len(part), [texts[i] for i in part], device)
        return {"tokens": tokens, "mask": mask, "count": int(predicted(mask).sum()), "data": part}

    def loss(model, batch):
        return -sequence_logps(model, batch["tokens"], batch["mask"]).sum(), {}
    return fit("SFT", model, lambda step: [batch_of(part) for part in micro_batches_of(rows(step), training)], loss, training,
               dropout=True, run=run, **options)


# === 7. Preferences ===================================================================================================
# People cannot score a text reliably, but they can say which of two is better. The Bradley-Terry model makes such choices from
# rewards: a is preferred to b with probability s(r_a - r_b), s(z) = 1 / (1 + e^-z): even odds if equal, 73% at a difference of one.
# On a first reading skip the files: `chat_template` to `text_field`, and `encode_pairs`.


@dataclass
class Preference:
    """One labelled pair: two completions of a prompt, the better one and the worse one."""
    prompt: str
    chosen: str
    rejected: str
    line: int = 0                       # of the file that it came from


def logistic(x):
    """s(x) = 1 / (1 + e^-x) of numpy arrays, in a form that never overflows."""
    return 0.5 * (1 + np.tanh(x / 2))


def bradley_terry_label(rewards_a, rewards_b, rng: np.random.Generator) -> np.ndarray:
    """Whether a beats b, drawn with P(a > b) = s(r_a - r_b). rewards of any shape -> bool, the same shape."""
    return rng.random(np.shape(rewards_a)) < logistic(np.asarray(rewards_a) - np.asarray(rewards_b))


def sample_preferences(model, tokenizer, prompts: list[str], reward, max_new_tokens: int, per_prompt: int = 4, seed: int = 0):
    """Preference pairs: `per_prompt` completions of each prompt from `model` (the SFT policy), 4 in the paper, and a Bradley-Terry label
    for each pair of them. (In the paper's experiment on film reviews the greater reward(prompt, completion) always wins.)
    Returns the list of Preference, and the Bayes-optimal accuracy, mean s(|r_w - r_l|), which the true reward has on average."""
    first, second = np.triu_indices(per_prompt, 1)                               # every pair, first < second
    ids = [encode(tokenizer, prompt) for prompt in prompts for _ in range(per_prompt)]
    texts = [decode(tokenizer, c) for c in generate(model, ids, max_new_tokens, progress="preferences")]
    rewards = np.array([reward(prompts[i // per_prompt], text) for i, text in enumerate(texts)]).reshape(-1, per_prompt)
    wins = bradley_terry_label(rewards[:, first], rewards[:, second], np.random.default_rng(seed))                  # (P, pairs)
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    pairs = [Preference(prompt, texts[i * per_prompt + w], texts[i * per_prompt + l])
             for i, prompt in enumerate(prompts) for w, l in zip(chosen[i], rejected[i])]
    return pairs, float(logistic(np.abs(rewards[:, first] - rewards[:, second])).mean())


def chat_template(messages: list[dict]) -> str:
    """Conversations as text: each message is "role: content", with a blank line between two."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def load_preferences(path) -> list[Preference]:
    """Read JSONL, one {"prompt": str, "chosen": str, "rejected": str} a line; blank lines are skipped.

    The conversational form, lists of {"role", "content"}, goes through `chat_template`. A fault raises
    ValueError "path:line: what is wrong"; nothing is skipped silently.
    """
    return list(read_preferences(path))


def read_preferences(path):
    """Yield what `load_preferences` returns, line by line: for files larger than memory."""
    for number, record in read_jsonl(path):
        fields = {name: text_field(record, name, f"{path}:{number}") for name in ("prompt", "chosen", "rejected")}
        chat, turns = [isinstance(record[name], list) for name in fields], record["prompt"]
        repeated = all(chat) and turns in (record["chosen"][:len(turns)], record["rejected"][:len(turns)])
        if repeated or any(chat) != all(chat):
            raise ValueError(f"{path}:{number}: prompt, chosen and rejected must be all texts or all lists of messages, and chosen and "
                             "rejected must hold only what follows the prompt")
        if all(chat):                                                            # the answer follows the prompt's turns
            fields["chosen"], fields["rejected"] = "\n\n" + fields["chosen"], "\n\n" + fields["rejected"]
        yield Preference(**fields, line=number)


def read_texts(path, field: str):
    """Yield (line number, text) of JSONL with one {field: text} a line; "messages", a conversation, will do for "text"."""
    for number, record in read_jsonl(path):
        name = "messages" if field == "text" and "messages" in record and record.get("text") is None else field
        yield number, text_field(record, name, f"{path}:{number}")


def read_jsonl(path):
    """Yield (line number, object) for each line that is not blank; ValueError "path:line: ..." for what is not an object."""
    if not Path(path).is_file():
        raise ValueError(f"{path}:0: no such file" if not Path(path).exists() else f"{path}:0: not a file")
    record = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line     # a byte order mark
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                fault = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"not JSON: {getattr(error, 'msg', error)}"
                raise ValueError(f"{path}:{number}: {fault}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: expected an object with named fields, found {type(record).__name__}")
            yield number, record
    if record is None:
        raise ValueError(f"{path}:1: the file holds no record")


def text_field(record: dict, name: str, where: str) -> str:
    """The text of a field, a string or a list of messages; ValueError beginning with `where` if there is none."""
    value = record.get(name)
    if value is None:
        raise ValueError(f"{where}: field {name!r} is {'null' if name in record else 'missing'}")
    is_message = lambda item: isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))
    if isinstance(value, list) and value and all(map(is_message, value)):
        value = chat_template(value) if any(message["content"].strip() for message in value) else ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} must be a string or a list of {{\"role\", \"content\"}} messages, both of them strings")
    if not value.strip():
        raise ValueError(f"{where}: field {name!r} is empty or blank")
    try:
        value.encode()
    except UnicodeEncodeError:                                                   # "\ud800" in JSON: half a surrogate pair
        raise ValueError(f"{where}: field {name!r} holds a character that is not valid Unicode") from None
    many = 2 ** 18                                                               # tiktoken survives 500,000; a million crash it
    if len(value) > many and max(map(len, re.findall(r"\s+", value)), default=0) > many:
        raise ValueError(f"{where}: field {name!r} holds more than {many} blanks in a row")
    return value


@dataclass
class Pairs:
    """Tokenised preferences. Each distinct (prompt, completion) is one row, however many pairs it is in."""
    prompts: list                       # (R) ids of each row's prompt
    completions: list                   # (R) ids of each row's completion, EOS last
    chosen: np.ndarray                  # (N,) each pair's rows
    rejected: np.ndarray                # (N,)
    prompt_index: np.ndarray            # (N,) which prompt a pair belongs to
    lines: np.ndarray = None            # (N,) line of the file
    held_out: np.ndarray = None         # (N,) bool: kept for evaluation
    counts: dict = None                 # what to report: see `encode_pairs`

    def __len__(self):
        return len(self.chosen)

    def subset(self, which):
        """The pairs `which`: a mask (N,), a slice or numbers."""
        of = lambda values: None if values is None else values[which]
        return replace(self, **{name: of(getattr(self, name)) for name in ("chosen", "rejected", "prompt_index", "lines", "held_out")})

    def rows(self):
        """Numbers of the rows that these pairs use."""
        return np.unique(np.concatenate([self.chosen, self.rejected]))


def encode_pairs(tokenizer, preferences, block_size: int, path="pair", skip_long=False) -> Pairs:
    """Tokenise prompt and completion apart and put EOS after the completion: so a prompt's ids are always a prefix of the
    whole. A prompt too long for the block is cut on the left. A completion that does not fit is a ValueError, "path:line: ...",
    or its pair is left out. Texts are not kept: repeats are known by a hash of eight bytes, which takes any two of a million
    different rows for one with a chance of 3e-8."""
    prompts, completions, row_of, prompt_of = [], [], {}, {}
    found, cut, left_out = array("q"), 0, 0                                      # found: the five columns below, pair by pair
    # the last 16 texts' ids are kept: with 28 pairs of eight completions this function takes a fifth of the time
    ids_of = functools.lru_cache(16)(lambda text: [*encode(tokenizer, text), tokenizer.eot_token])
    for number, pair in enumerate(preferences, 1):
        where = f"{path}:{pair.line or number}"
        prompt = ids_of(pair.prompt)[:-1]
        if not prompt:
            raise ValueError(f"{where}: the prompt is empty, and the first token needs something to follow")
        lengths = {side: len(ids_of(getattr(pair, side))) for side in ("chosen", "rejected")}
        longest = max(lengths, key=lengths.get)
        room = block_size - lengths[longest]                                     # one for both: they must follow the same prompt
        if room < 1 and skip_long:
            left_out += 1
            continue
        if room < 1:
            raise ValueError(f"{where}: the {longest} completion has {lengths[longest]} tokens; with a prompt it must fit in "
                             f"{block_size} (--skip-long leaves such pairs out)")
        cut += len(prompt) > room
        for text in (pair.chosen, pair.rejected):
            key = hash((pair.prompt, text, min(room, len(prompt))))
            if key not in row_of:
                row_of[key] = len(prompts)
                prompts.append(compact(tokenizer, prompt[-room:]))
                completions.append(compact(tokenizer, ids_of(text)))
            found.append(row_of[key])
        prompt_number = prompt_of.setdefault(hash(pair.prompt), len(prompt_of))
        found.extend((prompt_number, pair.line or number, is_held_out(pair.prompt)))
    chosen, rejected, prompt_index, lines, held_out = np.array(found).reshape(-1, 5).T.copy()
    counts = {"duplicates": len(chosen) - len(np.unique(np.stack([chosen, rejected], axis=1), axis=0)),
              "pairs with chosen == rejected": int((chosen == rejected).sum()),
              "pairs with a cut prompt": cut,
              "pairs left out, too long": left_out}
    return Pairs(prompts, completions, chosen, rejected, prompt_index, lines, held_out.astype(bool), counts)


def pair_batches(pairs: Pairs, rows, training: Training, device) -> list[dict]:
    """The pairs `rows` (n,) as micro-batches. A completion that is in several pairs passes the model once: with 4 completions a
    prompt, 6 pairs cost 4 forward passes instead of 12. tokens, mask (B,T); completions (B,): their rows in `pairs`; chosen,
    rejected (n,): each pair's places among the B."""
    batches = []
    for part in micro_batches_of(rows, training):
        distinct, position = np.unique(np.concatenate([pairs.chosen[part], pairs.rejected[part]]), return_inverse=True)
        tokens, mask = pad([pairs.prompts[i] for i in distinct], [pairs.completions[i] for i in distinct], device)
        chosen, rejected = torch.from_numpy(position).to(device).chunk(2)
        batches.append({"tokens": tokens, "mask": mask, "completions": torch.from_numpy(distinct).to(device), "chosen": chosen,
                        "rejected": rejected, "count": len(part), "data": part})
    return batches


# === 8. Direct Preference Optimization ================================================================================
# The derivation, from the objective of RLHF to a loss without a reward model. [Eq n] is of arXiv 2305.18290. [test_...] is the test in
# test_dpo.py that checks the step, in a world so small that every completion can be listed.
# Symbols: x prompt, y completion, y_w and y_l the chosen (winner) and the rejected (loser), pi the policy we train,
# pi_ref the frozen reference, r the reward, s(z) = 1 / (1 + e^-z) the logistic function.
#
# (1) The objective of RLHF [Eq 3]: much reward, little departure from the reference. beta prices the departure, which is
#     measured by the Kullback-Leibler divergence KL( pi || pi_ref ) = E_{y~pi}[ log pi(y|x) - log pi_ref(y|x) ].
#         max_pi  E_{y~pi}[ r(x,y) ] - beta KL( pi(.|x) || pi_ref(.|x) )                     [test_rlhf_objective_optimum]
#
# (2) Its exact solution [Eq 4]. Write both terms as one expectation and take out the factor -beta:
#         E_pi[ r - beta log(pi/pi_ref) ]  =  -beta E_pi[ log( pi / (pi_ref e^{r/beta}) ) ].
#     Let Z(x) = sum_y pi_ref(y|x) e^{r(x,y)/beta}. Then pi*(y|x) = pi_ref(y|x) e^{r(x,y)/beta} / Z(x) is a distribution.
#     Put pi_ref e^{r/beta} = pi* Z into the line above: the objective is  -beta KL(pi || pi*) + beta log Z(x).  Z does not
#     depend on pi, and a KL is never negative (Jensen's inequality), and zero only where its arguments agree. So pi* is the
#     optimum and beta log Z(x) its value.                                                    [test_closed_form_optimum]
#     Why not stop here? Z sums over every completion there is. Reweighting samples of pi_ref estimates pi* (section 11), but
#     every answer would cost many samples, and the reward of each.
#
# (3) Read (2) backwards [Eq 5]: a policy *is* a reward, up to a term that depends on the prompt alone.
#         r(x,y) = beta log( pi*(y|x) / pi_ref(y|x) ) + beta log Z(x)                                [test_reward_inverts]
#
# (4) Preferences see only differences of reward, by the Bradley-Terry model:
#         p(y_w > y_l | x) = s( r(x,y_w) - r(x,y_l) ).
#     Put (3) in: beta log Z(x) is in both rewards and cancels [Eq 6].            [test_partition_function_cancels]
#     Likewise, adding any f(x) to r changes neither p nor pi* [Lemmas 1, 2].                        [test_reward_shift]
#
# (5) Maximum likelihood of the labels, with the policy as the only unknown [Eq 7]. Let
#         d_w = log pi(y_w|x) - log pi_ref(y_w|x),   d_l likewise,   h = d_w - d_l:
#         L_DPO = -E[ log s( beta h ) ]                                        [test_loss_is_the_bradley_terry_likelihood]
#     Why may pi stand for pi*? Put r = beta log(pi/pi_ref) into (2): Z is 1 and pi* is pi. So every policy is the optimum for
#     a reward of its own, and fitting pi fits a reward [Theorem 1]. Of infinitely many labels of a pair (a, b), a wins the share
#     p = s(r_a - r_b). With z = beta (d_a - d_b) their mean loss is -p log s(z) - (1-p) log s(-z), least where s(z) = p: for all pairs
#     that is the pi* of (2), if the network can express it. If no chain of pairs links two completions, their ratio is left free.
#     At the start pi = pi_ref, so h = 0 and the loss is log 2 = 0.6931 whatever the data.   [test_loss_starts_at_log_2]
#
# The gradient, by hand. Let r^ = beta log(pi/pi_ref), z = beta h = r^_w - r^_l. As d/dz log s(z) = 1 - s(z) = s(-z), the chain rule gives
#
# (6)     grad L = -beta  s(r^_l - r^_w)  ( grad log pi(y_w|x)  -  grad log pi(y_l|x) )         of one pair
#                        \___________/      \________________/      \________________/
#                        how wrong the      make the chosen         make the rejected
#                        ranking still is   likelier                unlikelier           [test_loss_gradient_by_hand]
#
#     The reference has no gradient: it enters through the weight alone. The weight is 1/2 at the start, near 1 on a badly
#     misranked pair, near 0 once the margin r^_w - r^_l is well above 1: a pair once learnt stops pulling.
#                                                                                           [test_loss_gradient_weight]
#     Unlikelihood, -log pi(y_w) + alpha log pi(y_l), has no such weight: a completion that loses more than 1/alpha times as
#     often as it wins is pushed down for ever. Completions share one network, so grammar is lost, too: see "Unlikelihood", with
#     alpha = 1, in the table that the program prints.                               [test_loss_unlikelihood_never_lets_go]
# On to the code: (5) is one line of it.


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta=0.1, label_smoothing=0.0):
    """The DPO loss of a batch of pairs, and the rewards that the policy implies.

    All arguments (B,): log-probabilities in nats, *summed* over the tokens of a completion, EOS included, prompt excluded.
    beta: the weight of the KL in the objective (1), in reward units per nat. Large beta stays near the reference,
    unless a completion wins each time: that pulls without end at any beta.
    label_smoothing: the chance that a label is flipped, in [0, 0.5) (conservative DPO; 0 is the paper's loss).
    Returns losses (B,), chosen_rewards (B,), rejected_rewards (B,): rewards are beta * log-ratio, detached, for logging. The
    reference is frozen: pass its log-probabilities without gradient.
    Source: arXiv 2305.18290, Eq 7.
    """
    chosen_logratios = at_least_float32(policy_chosen_logps) - reference_chosen_logps            # d_w
    rejected_logratios = at_least_float32(policy_rejected_logps) - reference_rejected_logps      # d_l
    z = beta * (chosen_logratios - rejected_logratios)                                           # beta h
    # logsigmoid, never log(sigmoid): at z = -200 the sigmoid is 0 in float32 and its log -inf
    losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def correct(margins):
    """1 where a pair is ranked as its label says, 1/2 at a tie, 0 elsewhere."""
    return (margins.sign() + 1) / 2


def train_preferences(model, reference, pairs: Pairs, training: Training, beta: float = 0.1, loss=None, hyper=None, stage="DPO",
                      **options):
    """Train `model` in place on preferences against the frozen `reference`; return the history.

    loss: a function like those of section 9; hyper: its own settings. Without a loss it is DPO. The reference never changes, so it is
    asked once, before the first step, about the completions that training will see.
    """
    if hyper and not loss:
        raise TypeError(f"hyper without a loss that it could belong to: {hyper}")
    device, pairs_of = next(model.parameters()).device, shuffled(len(pairs), training, pairs.prompt_index)
    epoch = math.ceil(len(pairs) / training.batch_size)                          # steps, after which all pairs have been seen
    seen = [pairs_of(step) for step in range(min(training.steps, epoch))]
    reference_logps = completion_logps(reference, pairs.prompts, pairs.completions, batch_size=min(512, 2 * training.micro_batch),
                                       rows=pairs.subset(np.concatenate(seen)).rows(),                      # (R,)
                                       progress=None if options.get("quiet") or process()[0] > 0 else "reference").to(device)
    lengths = torch.tensor([len(completion) for completion in pairs.completions], device=device)      # (R,)

    def preference_loss(model, batch):
        w, l = batch["chosen"], batch["rejected"]                                # each pair's places among the batch's rows
        logps = sequence_logps(model, batch["tokens"], batch["mask"])
        ref, length = reference_logps[batch["completions"]], lengths[batch["completions"]]
        four = logps[w], logps[l], ref[w], ref[l]
        losses, chosen_rewards, rejected_rewards = dpo_loss(*four, beta)         # these rewards are logged for every loss
        if loss:
            losses = loss(*four, beta=beta, chosen_lengths=length[w], rejected_lengths=length[l], **(hyper or {}))
        margins = chosen_rewards - rejected_rewards
        return losses.sum(), {"chosen_reward": chosen_rewards.sum(), "rejected_reward": rejected_rewards.sum(),
                              "margin": margins.sum(), "accuracy": correct(margins).sum()}
    return fit(stage, model, lambda step: pair_batches(pairs, pairs_of(step), training, device), preference_loss, training, **options)


# === 9. The family of losses ==========================================================================================
# Each takes what it needs of these (B,) vectors of summed log-probs and returns (B,). pc, pr: the policy's, of the chosen and of the
# rejected completion; rc, rr: the reference's. So d_w = pc - rc, d_l = pr - rr and h = d_w - d_l, as in section 8. In the comments
# eps = label_smoothing and |y| is the number of tokens. A comment says so where beta means something else. This is a catalogue: read
# dpo, cdpo and ipo in FORMULAS, and look up the others when you need them. The three longest stand before it.


def _exo(pc, pr, rc, rr, beta, label_smoothing=1e-3):
    # KL( (q, 1-q) || (1-eps, eps) ),  q = s(beta h)          the reverse KL: seeks modes; needs eps > 0  [2402.00856 Eq 16]
    z, eps = beta * ((pc - rc) - (pr - rr)), label_smoothing
    return z.sigmoid() * (F.logsigmoid(z) - math.log(1 - eps)) + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(eps))


def _chipo(pc, pr, rc, rr, beta, r_max=10.0):
    # -log s( clip_{+-2R}[ beta (phi(e^{d_w}) - phi(e^{d_l})) ] ),  phi(z) = z + log z,  R = r_max;  beta: of KL + chi^2/2  [2407.13399]
    # above e^40 both exponentials are scaled down, or float32 would overflow: the clip leaves little more than the sign there
    d_w, d_l = pc - rc, pr - rr
    far = F.relu(torch.maximum(d_w, d_l) - 40).detach()
    # exponentials and logs are subtracted separately: z + log z first would round the logs away
    difference = ((d_w - far).exp() - (d_l - far).exp()) + (d_w - d_l)
    return -F.logsigmoid((beta * difference).clamp(-2 * r_max, 2 * r_max))


def _orpo(pc, pr, beta, chosen_lengths, rejected_lengths, lam=None):
    # -log P_w - lam log s( log odds_w - log odds_l ),  odds = P/(1-P),  log P = log pi(y) / |y|           [2403.07691]
    # no reference; beta is only the default of lam, the weight of the odds term
    def log_odds(logp):                                       # log P - log(1-P)
        logp = logp.clamp(max=-1e-6)                          # P = 1 has infinite odds
        return logp - torch.log(-torch.expm1(logp))           # expm1 keeps the digits of 1 - P near P = 1
    logp_w, logp_l = pc / chosen_lengths, pr / rejected_lengths
    return -logp_w - (beta if lam is None else lam) * F.logsigmoid(log_odds(logp_w) - log_odds(logp_l))


FORMULAS = {        # pc, pr: the policy's summed log-probs of chosen and rejected; rc, rr: the reference's
    # -log s(beta h)                                          beta: weight of the KL                     [2305.18290 Eq 7]
    "dpo": lambda pc, pr, rc, rr, beta: dpo_loss(pc, pr, rc, rr, beta)[0],
    # -(1-eps) log s(beta h) - eps log s(-beta h)         least where s(beta h) = 1-eps     [E. Mitchell, note on cDPO, 2023]
    "cdpo": lambda pc, pr, rc, rr, beta, label_smoothing=0.1: dpo_loss(pc, pr, rc, rr, beta, label_smoothing)[0],
    # [-(1-eps) log s(beta h) + eps log s(-beta h)] / (1-2 eps)   unbiased if a share eps of the labels is flipped  [2403.00409]
    "robust": lambda pc, pr, rc, rr, beta, label_smoothing=0.1: (
        (1 - label_smoothing) * dpo_loss(pc, pr, rc, rr, beta)[0]
        - label_smoothing * dpo_loss(pr, pc, rr, rc, beta)[0]) / (1 - 2 * label_smoothing),
    # (h - 1/(2 tau))^2                                       beta is tau; h of sums, as in the paper (TRL: of means)  [2310.12036 Eq 17]
    "ipo": lambda pc, pr, rc, rr, beta: ((pc - rc) - (pr - rr) - 1 / (2 * beta)).square(),
    # max(0, 1 - beta h)                                      SLiC's hinge on DPO's margin, as RSO has it  [2309.06657]
    "hinge": lambda pc, pr, rc, rr, beta: F.relu(1 - beta * ((pc - rc) - (pr - rr))),
    "exo": _exo,
    "chipo": _chipo,
    # -log s(beta h) - eta beta log pi(y_w)                   the SFT term guards against over-optimising  [2405.16436]
    "rpo": lambda pc, pr, rc, rr, beta, eta=0.005: dpo_loss(pc, pr, rc, rr, beta)[0] - eta * beta * pc,
    # -log s( beta (d_w - max(0, d_l)) )                      no push down once below the reference        [2408.09834]
    "minor": lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * ((pc - rc) - F.relu(pr - rr))),
    "orpo": _orpo,
    # -log s( beta/|y_w| log pi_w - beta/|y_l| log pi_l - gamma )   no reference; beta 2 to 10 is a scale  [2405.14734]
    "simpo": lambda pc, pr, beta, chosen_lengths, rejected_lengths, gamma=0.5: (
        -F.logsigmoid(beta * (pc / chosen_lengths - pr / rejected_lengths) - gamma)),
    # -log pi(y_w) + alpha log pi(y_l)                        no weight that fades: see (6); no beta [2305.18290 App C.3]
    "unlikelihood": lambda pc, pr, alpha=0.1: -pc + alpha * pr,
    # -log pi(y_w)                                            Preferred-FT: imitate the chosen; no beta [2305.18290 s. 6]
    "sft": lambda pc: -pc}


def plackett_luce_loss(policy_logps, reference_logps, beta):
    """DPO for rankings of K completions: -log of the probability that the Plackett-Luce model gives the ranking.

    policy_logps, reference_logps (B,K): summed log-probs, best completion first. Returns (B,). K = 2 is the DPO loss.
    The model picks the best of K with probability softmax(r), then the best of the remaining K-1, and so on:
    -sum_k log( exp(b_k) / sum_{j>=k} exp(b_j) ),  b = beta log(pi/pi_ref).  Source: arXiv 2305.18290, App A.3.
    """
    rewards = beta * (at_least_float32(policy_logps) - reference_logps)      # b (B,K)
    return sum(rewards[:, k:].logsumexp(-1) - rewards[:, k] for k in range(rewards.shape[1]))


def ift_loss(model: GPT, tokens, mask, lam=0.2, gamma=0.95):
    """Intuitive fine-tuning: SFT in which the model reads its own guesses, and each token is weighted by the losses that follow it.

    tokens, mask (B,T) -> the mean over the batch. Needs no pairs and no reference. lam = gamma = 0 is SFT, with each text's mean loss.
    Source: arXiv 2405.11870. Its equations and its released code disagree; this follows the code, except that the code mixes in
    embeddings frozen at the start. gamma = 0 means the plain mean, where steps 4 and 5 would weight each loss by itself.
    """
    embeddings = None
    if lam:
        with torch.no_grad():
            guess = F.pad(model(tokens).argmax(-1)[:, :-1], (1, 0))                             # 1. the model's own guesses
            own, guessed = model.wte(tokens), model.wte(guess)
            embeddings = torch.where(predicted(mask)[..., None], (1 - lam) * own + lam * guessed, own)     # 2. are mixed in
    losses = -token_logps(lambda tokens: model(tokens, embeddings=embeddings), tokens, mask)     # 3. l_t
    if gamma == 0:
        return (losses.sum(1) / predicted(mask).sum(1).clamp(min=1)).mean()
    to_come, c = torch.zeros_like(losses[:, 0]), []
    for t in reversed(range(tokens.shape[1])):                                                  # 4. c_t = sum_{i>=t} gamma^{i-t} l_i
        to_come = losses[:, t] + gamma * to_come
        c.append(to_come)
    c = torch.stack(c[::-1], 1) * predicted(mask)                                               # not detached
    return ((losses * c).sum(1) / c.sum(1).clamp(min=1e-30)).mean()                             # 5. sum l_t c_t / sum c_t; 0 for 0 / 0


def by_name(name: str, formula):
    """`formula` under the full names of its arguments; a hyper-parameter that it does not have is a TypeError, not ignored, and a
    label_smoothing that it cannot take a ValueError."""
    takes = inspect.signature(formula).parameters.keys()

    def loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps=None, reference_rejected_logps=None, *, beta=0.1,
             chosen_lengths=None, rejected_lengths=None, **hyper):
        given = {"pc": policy_chosen_logps, "pr": policy_rejected_logps, "rc": reference_chosen_logps, "rr": reference_rejected_logps,
                 "beta": beta, "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
        if unknown := hyper.keys() - (takes - given.keys()):
            raise TypeError(f"{name} has no hyper-parameter {', '.join(sorted(unknown))}")
        if "chosen_lengths" in takes and (chosen_lengths is None or rejected_lengths is None):
            raise ValueError(f"{name} needs chosen_lengths and rejected_lengths")
        if "rc" in takes and (reference_chosen_logps is None or reference_rejected_logps is None):
            raise ValueError(f"{name} needs reference_chosen_logps and reference_rejected_logps")
        smoothing = hyper.get("label_smoothing", 0.1)                            # 0.1 stands for any default, which needs no check
        if not 0 <= smoothing < 0.5 or name == "exo" and smoothing == 0:
            raise ValueError(f"{name} takes a label_smoothing {'above' if name == 'exo' else 'from'} 0 and below 0.5, not {smoothing}")
        logps = {key: at_least_float32(given[key]) for key in ("pc", "pr", "rc", "rr") if key in takes}
        return formula(**{key: value for key, value in given.items() if key in takes} | logps, **hyper)
    return loss


LOSSES = {name: by_name(name, formula) for name, formula in FORMULAS.items()}


# === 10. The baseline: RLHF with a reward model and PPO ===============================================================
# What DPO avoids: first fit a reward model to the labels by maximum likelihood, then maximise objective (1) with it by
# reinforcement learning. The two losses side by side: DPO's is -log s of beta times a difference of log-ratios, the reward
# model's is -log s of a difference of scores. It is the same regression; only the fitted function differs.


def last_response_token(mask):
    """(B,T) bool, true once a row: at the last token where mask is 1. It comes from the mask, so padding cannot move it."""
    mask = mask.bool()
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def reward_scores(reward_model, tokens, mask):
    """The reward model's score of each row, read at the response's last token. tokens, mask (B,T) -> (B,); a row without a response
    is a RuntimeError."""
    return reward_model(tokens, last_response_token(mask)).view(len(tokens))


def train_reward_model(reward_model, pairs: Pairs, training: Training, **options):
    """Fit a GPT with one output, in place, by maximum likelihood under Bradley-Terry: -log s(score_w - score_l)."""
    device, pairs_of = next(reward_model.parameters()).device, shuffled(len(pairs), training, pairs.prompt_index)

    def loss(model, batch):
        scores = reward_scores(model, batch["tokens"], batch["mask"])
        margins = scores[batch["chosen"]] - scores[batch["rejected"]]
        return -F.logsigmoid(margins).sum(), {"accuracy": correct(margins).sum()}
    return fit("reward model", reward_model, lambda step: pair_batches(pairs, pairs_of(step), training, device), loss, training,
               **options)


def score_completions(reward_model, prompts: list, completions: list, **options) -> torch.Tensor:
    """Scores of lists of ids, without gradient -> (n,). options: of `in_batches`."""
    return in_batches(reward_scores, reward_model, prompts, completions, **options)


# PPO. The policy's move is the next token, its state the text so far. The return from a token on is the sum of the rewards from there
# on; a critic V is fitted to predict it, and a token's advantage A is the return minus V: how much better things went. Why that helps:
# grad pi = pi grad log pi, so the gradient of E_pi[R], R the sum of all rewards, is E_pi[ sum_t R grad log pi(y_t) ]. Given the text
# before y_t, grad log pi(y_t) has mean 0, as probabilities sum to 1: so what that text settles, the rewards already paid and V, may be
# taken off R. This leaves E_pi[ sum_t A_t grad log pi(y_t) ]: the same mean, less noise. (So, too, the log pi in the KL adds no
# gradient of its own.) A rollout is a batch of completions, sampled by pi_old, the policy as it was then. At pi = pi_old the gradient of
# (pi/pi_old) A is A grad log pi; clipping the ratio near 1 lets one rollout serve several steps. The numbers return in the code below:
#   1. sample completions from the policy at temperature 1: no top-k, or stored and new log-probs would speak of different policies;
#   2. score them: r(x,y) at the last token; a completion without EOS scores `missing_eos` at most;
#   3. charge the KL token by token: r_t = -beta (log pi(y_t) - log pi_ref(y_t)). Score plus the sum of the r_t has (1) as its mean;
#   4. advantages by generalised advantage estimation (GAE); returns = advantages + values, which is the sum above at lam = 1, else an
#      estimate of it with less noise; only then whiten the advantages (mean 0, standard deviation 1);
#   5. a few epochs of clipped steps on the batch;
#   6. with an adaptive KL, adjust beta towards the target.


@dataclass
class PPO:
    """Settings of PPO, after Ziegler et al. (arXiv 1909.08593) and `lm-human-preference-details`."""
    beta: float = 0.1                   # weight of the KL, in reward units per nat
    rollout: int = 256                  # completions per update; small batches hurt (2404.10719)
    epochs: int = 4                     # passes over a rollout
    minibatch: int = 128                # completions per optimiser step
    max_new_tokens: int = 48
    gamma: float = 1.0                  # no discount: a review's end counts as much as its beginning
    lam: float = 0.95                   # GAE: 1 uses the rewards to come (unbiased), 0 the critic's next prediction (low variance)
    clip: float = 0.2                   # the ratio's range 1 +- clip
    value_clip: float = 0.2             # moving a value further than this from the rollout's gains nothing
    value_weight: float = 0.1           # of the critic's loss beside the policy's; they share only the clipping of the gradient
    missing_eos: float = -1.0           # the most that a completion which did not end can score; rewards are normalised
    stop_at_eos: bool = True            # False: every completion has max_new_tokens tokens
    target_kl: float | None = None      # None: beta stays fixed; a number of nats: beta adapts until the KL is this
    kl_horizon: int = 10_000            # completions in which beta changes by about a fifth at most
    group: int = 0                      # GRPO (group relative policy optimisation): completions per prompt, compared with each other

    def __post_init__(self):
        if self.rollout % self.minibatch:
            raise ValueError(f"a rollout of {self.rollout} completions is not a multiple of the minibatch, {self.minibatch}")
        if self.group == 1 or self.group and self.rollout % self.group:
            raise ValueError(f"a rollout of {self.rollout} completions does not divide into groups of {self.group}, two at least")


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation. rewards, values, mask (B,T) -> advantages, returns (B,T), 0 where mask is 0.

    delta_t = r_t + gamma V_{t+1} - V_t is the surprise of one step, and A_t = delta_t + gamma lam A_{t+1} sums those to come, the later
    the less; after the last token V and A are 0.
    Source: arXiv 1506.02438.
    """
    rewards, values = (x.masked_fill(~mask.bool(), 0) for x in (rewards, values))
    advantages, A, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        A = torch.where(mask[:, t].bool(), delta + gamma * lam * A, 0)
        advantages[:, t], next_value = A, values[:, t]
    return advantages, advantages + values


def group_advantages(rewards, mask, group: int):
    """GRPO: how much better a completion did than its group's mean, in the group's standard deviations; each of its tokens
    gets that number. rewards, mask (B,T), rows of one prompt together -> (B,T). Source: arXiv 2402.03300, but the KL stays in
    the reward, as in PPO, so that beta keeps its meaning, and in the loss all tokens weigh the same, not all completions."""
    total = rewards.masked_fill(~mask.bool(), 0).sum(1).view(-1, group)
    return ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).view(-1, 1) * mask


def whiten(x, mask):
    """Mean 0 and standard deviation 1 over the places where mask is 1; 0 elsewhere."""
    kept = x[mask.bool()]
    return ((x - kept.mean()) / (kept.std(unbiased=False) + 1e-8)).masked_fill(~mask.bool(), 0)


def ppo_losses(logps, old_logps, advantages, values, old_values, returns, mask, clip=0.2, value_clip=0.2):
    """PPO's two losses per token, and the ratio; all (B,T), losses 0 and the ratio 1 where mask is 0, whatever is there.

    policy: -min( ratio A, clip(ratio, 1-clip, 1+clip) A ), ratio = pi/pi_old. Once the ratio has moved past the clip in the
    direction that A asks for, the gradient of that token is exactly zero. Source: arXiv 1707.06347, Eq 7.
    value: 1/2 max( (V - R)^2, (clip(V, V_old +- value_clip) - R)^2 ).
    """
    outside = ~mask.bool()
    logps, old_logps, advantages, values, old_values, returns = (
        x.masked_fill(outside, 0) for x in (logps, old_logps, advantages, values, old_values, returns))
    ratio = (logps - old_logps).exp()
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value_loss = 0.5 * torch.max((values - returns).square(), (clipped_values - returns).square())
    return policy_loss, value_loss, ratio


def adapt_beta(beta, kl, target, n, horizon):
    """Ziegler et al.'s controller, after n completions: beta (1 + clip(kl/target - 1, +-0.2) n/horizon)."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


def kl_estimates(policy_logps, reference_logps):
    """Two estimates per sample y ~ pi of KL(pi || pi_ref), from lr = log pi(y) - log pi_ref(y): both are unbiased.

    k1 = lr may be negative; k3 = e^-lr - 1 + lr never is. Near the reference k3 varies less, far from it much more. Beware: with
    the sign of lr reversed, k3's mean is another divergence. PPO and section 11 compute k1 where they need it.
    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    lr = policy_logps - reference_logps
    return lr, torch.expm1(-lr) + lr


@torch.no_grad()
def ppo_rollout(policy, critic, reference, prompts, reward, ppo: PPO, beta: float):
    """Steps 1 to 4: a batch of experience. prompts: lists of ids; reward(prompts, completions) -> (n,).
    Returns a dict of (n,T) tensors, a dict of statistics, and the completions."""
    device, room = next(policy.parameters()).device, policy.config.block_size - ppo.max_new_tokens
    prompts = [prompt[-room:] for prompt in prompts]                                                              # what generate reads
    completions = generate(policy, prompts, ppo.max_new_tokens, stop_at_eos=ppo.stop_at_eos)                      # 1
    scores = torch.as_tensor(reward(prompts, completions), dtype=torch.float32, device=device)                    # 2
    ended = torch.tensor([c[-1] == policy.config.eos_token_id or not ppo.stop_at_eos for c in completions], device=device)
    scores = torch.where(ended, scores, scores.clamp(max=ppo.missing_eos))
    tokens, mask = pad(prompts, completions, device)
    rows = max(1, 2 ** 28 // (tokens.shape[1] * policy.config.vocab_size))                                         # logits of 1 GB at most

    def of_all(function, model):
        with mixed_precision(device):                                            # as in training, so that the first ratio is 1
            return torch.cat([function(model, *part) for part in zip(tokens.split(rows), mask.split(rows))])
    logps, ref = of_all(token_logps, policy), of_all(token_logps, reference)
    rewards = -beta * (logps - ref)                                                                               # 3
    rewards[last_response_token(mask)] += scores
    if ppo.group:
        values = returns = torch.zeros_like(rewards)
        advantages = group_advantages(rewards, mask, ppo.group)                                                   # 4, GRPO
    else:
        values = of_all(token_values, critic)
        advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.lam)                                      # 4
        advantages = whiten(advantages, mask)
    statistics = {"reward": scores.mean().item(), "kl": (logps - ref).sum(1).mean().item(), "beta": beta,
                  "length": mask.sum(1).float().mean().item(), "ended": ended.float().mean().item()}
    return {"tokens": tokens, "mask": mask, "old_logps": logps, "old_values": values, "returns": returns,
            "advantages": advantages}, statistics, completions


def token_values(critic, tokens, mask):
    """The critic's value of the text before each response token: V is read where that token is predicted. (B,T), 0 elsewhere."""
    values = critic(tokens, predicting(mask)).squeeze(-1)
    return values.new_zeros(tokens.shape).masked_scatter(predicted(mask), values)


def train_ppo(policy, critic, reference, prompts: list, reward, ppo: PPO, training: Training, stage="PPO", watch=None, **options):
    """Train `policy` and `critic` (a GPT with one output; None for GRPO) in place on objective (1); return the history.

    prompts: lists of ids, drawn anew for each rollout. reward(prompts, completions) -> (n,), any function of the ids.
    training.steps counts optimiser steps: each rollout serves epochs * rollout / minibatch of them.
    watch(prompts, completions) -> a dict of more numbers to log, once per rollout.
    """
    for model in (policy, reference, critic or policy):
        model.eval()                                                             # no dropout, not even in the first rollout
    device, memory = next(policy.parameters()).device, {"beta": ppo.beta}        # what batches(step) remembers: see `fit`
    rows = shuffled(ppo.rollout, replace(training, batch_size=ppo.minibatch))    # an epoch of it is a pass over a rollout

    def batches(step):
        if step % (ppo.epochs * ppo.rollout // ppo.minibatch) == 0:
            rng, each = np.random.default_rng([training.seed, step, 1]), ppo.group or 1        # 1: other numbers than those of `shuffled`
            memory["which"] = rng.integers(len(prompts), size=ppo.rollout // each).repeat(each).tolist()
            drawn = [prompts[i] for i in memory["which"]]
            memory["data"], memory["statistics"], completions = ppo_rollout(
                policy, critic, reference, drawn, reward, ppo, memory["beta"])
            if watch:
                memory["statistics"].update(watch(drawn, completions))
            if ppo.target_kl:                                                                                     # 6
                memory["beta"] = adapt_beta(memory["beta"], memory["statistics"]["kl"], ppo.target_kl, ppo.rollout, ppo.kl_horizon)
        parts = micro_batches_of(rows(step), training)
        return [{**{name: tensor[part].to(device) for name, tensor in memory["data"].items()}, "data": [memory["which"][i] for i in part],
                 "count": int(memory["data"]["mask"][part].sum())} for part in parts]

    def loss(models, batch):                                                                                      # 5
        logps = token_logps(models["policy"], batch["tokens"], batch["mask"])
        values = token_values(models["critic"], batch["tokens"], batch["mask"]) if critic else batch["old_values"]
        policy_loss, value_loss, ratio = ppo_losses(logps, batch["old_logps"], batch["advantages"], values, batch["old_values"],
                                                    batch["returns"], batch["mask"], ppo.clip, ppo.value_clip)
        return (policy_loss + ppo.value_weight * value_loss).sum(), {
            "policy_loss": policy_loss.sum(), "value_loss": value_loss.sum(), "ratio_moved": (ratio - 1).abs().sum(),
            **{name: value * batch["count"] for name, value in memory["statistics"].items()}}                  # means; `fit` divides them
    models = nn.ModuleDict({"policy": policy, **({"critic": critic} if critic else {})})
    return fit(stage, models, batches, loss, training, memory=memory, **options)


# === 11. Evaluation: what is the best that any method could do, and how near does each come? ==========================
# (2) gives the best policy at every beta, pi* = pi_ref e^{r/beta} / Z. To sample from it is expensive, but its reward and KL can be
# estimated from K samples of the reference per prompt, each weighted by pi*/pi_ref = e^{r/beta} / Z (importance sampling):
#     Z                   ~  mean_k e^{r_k/beta}
#     E_{pi*}[r]          ~  sum_k softmax(r/beta)_k r_k
#     KL(pi* || pi_ref)   =  E_{pi*}[r]/beta - log Z                                                [test_analytic_limit]
# Each beta gives one point of the analytic limit: at its KL (the mean over prompts) no policy has more reward, or it would beat pi* in
# (1). From K samples the limit comes out low, by a fraction that falls as 1/K, far from the reference more slowly.


@dataclass
class Frontier:
    """Rewards of K reference samples for each of P held-out prompts, and the limit curve they imply on a grid of G betas."""
    rewards: np.ndarray                 # (P, K)
    betas: np.ndarray                   # (G,) falling, so that the KL rises
    kl: np.ndarray                      # (P, G) nats
    reward: np.ndarray                  # (P, G)

    def at_kl(self, kl, prompts=slice(None)):
        """The limit's reward at a mean KL over the prompts; beyond the grid, the best that K samples hold."""
        return np.interp(kl, self.kl[prompts].mean(0), self.reward[prompts].mean(0))

    def at_beta(self, beta):
        """The (KL, reward) that theory predicts for RLHF or DPO at this beta."""
        kl, reward = analytic_limit(self.rewards, [beta])
        return float(kl.mean()), float(reward.mean())

    def efficiency(self, kl, reward, prompts=slice(None)):
        """(reward - reference reward) / (limit's reward at the same KL - reference reward). kl, reward (P,), per prompt."""
        base = self.rewards[prompts].mean()
        return (reward[prompts].mean() - base) / (self.at_kl(kl[prompts].mean(), prompts) - base)


def analytic_limit(rewards, betas):
    """rewards (P,K) of reference samples, betas (G,) -> kl (P,G) in nats, reward (P,G) of pi_ref e^{r/beta}/Z."""
    kl, reward = [], []
    for beta in betas:
        scaled = torch.from_numpy(rewards / beta)
        expected = (scaled.softmax(1).numpy() * rewards).sum(1)
        reward.append(expected)
        kl.append(expected / beta - scaled.logsumexp(1).numpy() + math.log(rewards.shape[1]))      # log mean = logsumexp - log K
    return np.stack(kl, 1), np.stack(reward, 1)


def build_frontier(rewards) -> Frontier:
    """The limit curve of rewards (P,K), on betas from far above the rewards' spread to far below."""
    if rewards.min() == rewards.max():
        raise ValueError("all rewards are equal: no policy is better than another")
    betas = rewards.std() * np.geomspace(30, 0.03, 120)
    return Frontier(rewards, betas, *analytic_limit(rewards, betas))


def frontier_error(frontier: Frontier, kl: float) -> float:
    """Relative bias of the limit's gain at this KL, from its own samples. A bias that falls as 1/K is twice as large for half of each
    prompt's K samples, so |whole - mean of the two halves| is the whole's bias, without their noise. At 3 nats it falls more slowly,
    and this says up to a third too little."""
    half = frontier.rewards.shape[1] // 2
    halves = [build_frontier(part) for part in (frontier.rewards[:, :half], frontier.rewards[:, half:])]
    limit = frontier.at_kl(kl)
    return float(abs(limit - np.mean([half.at_kl(kl) for half in halves])) / (limit - frontier.rewards.mean()))


def best_of_n(rewards, n: int):
    """Reward and KL of "sample n, keep the best", from rewards (P,K) -> (P,), (P,), without further sampling.

    Sorted rewards u_1 <= ... <= u_K: the best of n draws falls on rank k with probability (k/K)^n - ((k-1)/K)^n. Equal rewards
    are one level, within which the choice is as the reference's: so KL = sum over levels P_best log(P_best / P_ref), which the
    well-known log n - (n-1)/n bounds from above.
    """
    reward, kl = np.empty(len(rewards)), np.empty(len(rewards))
    for i, row in enumerate(rewards):
        levels, counts = np.unique(row, return_counts=True)
        cdf = np.concatenate([[0.0], counts.cumsum() / len(row)])
        best = cdf[1:] ** n - cdf[:-1] ** n
        reward[i] = best @ levels
        kl[i] = (best * np.log(np.maximum(best, 1e-300) / (counts / len(row)))).sum()
    return reward, kl


def standard_error(values, groups=None) -> float | None:
    """The standard error of the mean of values (n,), in their unit. groups (n,): values of one group, as the pairs of one prompt, may
    depend on one another; only groups are independent (a cluster-robust error). Without it each value is its own group. None where
    there are fewer than two."""
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(groups, np.asarray(values, float) - np.mean(values, dtype=float))        # each group's share in the mean's error
    return math.sqrt(len(sums) / (len(sums) - 1) * (sums @ sums)) / len(values) if len(sums) > 1 else None


def mean_and_error(name: str, values, groups=None) -> dict:
    """{name: the mean, name_se: its `standard_error`}."""
    return {name: float(np.mean(np.asarray(values))), name + "_se": standard_error(np.asarray(values), groups)}


def judge(tokenizer, prompts: list, completions: list) -> dict:
    """The truth about completions. prompts: P pairs (prompt, reference completion); completions: P*S lists of ids, S of each
    prompt in a row. Returns (P,S) arrays: gold reward; win, whether it beats the reference completion (a tie is half a win);
    grammatical; length in tokens, EOS included."""
    S = len(completions) // len(prompts)
    texts = [(prompts[i // S][0], decode(tokenizer, completion)) for i, completion in enumerate(completions)]
    reward = np.array([gold_reward(*text) for text in texts]).reshape(-1, S)
    target = np.array([gold_reward(*pair) for pair in prompts])[:, None]
    return {"reward": reward, "win": (reward > target) + 0.5 * (reward == target),
            "grammatical": np.array([is_grammatical(prompt + text) for prompt, text in texts]).reshape(-1, S),
            "length": np.array([len(completion) for completion in completions]).reshape(-1, S)}


def summarise(frontier: Frontier, kl, judged: dict, **more) -> dict:
    """One method's row from kl (P,), per held-out prompt, and what `judge` said; standard errors are over prompts.

    The efficiency's error is a bootstrap (its spread over 200 resamplings of the prompts): policy and limit are compared on
    the same prompts, so what these have in common cancels. At a KL that cannot be told from 0 there is no efficiency (None).
    """
    reward, rng = judged["reward"].mean(1), np.random.default_rng(0)
    gain, efficiency, efficiency_se = reward - frontier.rewards.mean(1), None, None
    if kl.mean() > max(0.01, 3 * standard_error(kl)):
        efficiency = float(frontier.efficiency(kl, reward))
        draws = [rng.integers(len(kl), size=len(kl)) for _ in range(200)]
        efficiency_se = float(np.std([frontier.efficiency(kl, reward, draw) for draw in draws]))
    return {**mean_and_error("reward", reward), **mean_and_error("gain", gain), **mean_and_error("kl", kl),      # gain: over the reference
            "efficiency": efficiency, "efficiency_se": efficiency_se, "win_rate": float(judged["win"].mean()),
            "grammatical": float(judged["grammatical"].mean()), "length": float(judged["length"].mean()), **more}


def evaluate(policy, reference, frontier: Frontier, prompts: list, tokenizer, samples: int, max_new_tokens: int, progress=None):
    """Sample the policy on held-out prompts, at temperature 1, and measure it against the truth: one method's row.
    Its KL is the mean of log pi - log pi_ref over the policy's own samples, unbiased, in nats per completion."""
    ids = [encode(tokenizer, prompt) for prompt, _ in prompts for _ in range(samples)]
    completions = generate(policy, ids, max_new_tokens, progress=progress)
    kl = completion_logratios(policy, reference, ids, completions).numpy()
    return summarise(frontier, kl.reshape(-1, samples).mean(1), judge(tokenizer, prompts, completions))


# === 12. The demonstration, and the command line ======================================================================

VOCAB_SIZE, BLOCK_SIZE, MAX_NEW_TOKENS = 576, 96, 56
BETA = 2.0                              # about one nat of KL: the gold reward spreads over several units


@dataclass
class Scale:
    """How large the demonstration is: precision against seconds."""
    sft_steps: int = 1200               # of 64 reviews
    prompts: int = 8192
    per_prompt: int = 8                 # completions of each, so 28 pairs: 229,376 pairs
    prompts_a_step: int = 16            # with all their pairs
    dpo_steps: int = 768                # one and a half passes
    reward_model_steps: int = 768
    baseline_steps: int = 128           # Preferred-FT, Unlikelihood
    ppo_rollouts: int = 80              # of 256 completions
    held_out: int = 96                  # prompts of the evaluation
    samples: int = 32                   # completions of each, per method
    limit_samples: int = 1024           # K: samples of pi_ref for each, for the analytic limit


FAST = Scale(sft_steps=600, prompts=1024, dpo_steps=96, reward_model_steps=96, baseline_steps=32, ppo_rollouts=8,
             held_out=48, samples=16, limit_samples=256)


@dataclass
class World:
    """What all methods share: the SFT policy, the preferences, and the truth that they are measured against."""
    scale: Scale
    seed: int
    tokenizer: tiktoken.Encoding
    reference: GPT
    prompts: list                       # ids, for PPO
    pairs: Pairs
    held_out: list                      # (prompt, reference completion)
    truth: dict                         # of the limit's samples, (P, K) each: see `judge`
    frontier: Frontier
    histories: dict                     # stage -> what `fit` returned
    sft_seconds: float
    checks: dict                        # name -> number, for the summary


def make_world(scale: Scale, seed: int, pool=None) -> World:
    """Corpus, tokenizer, SFT, preferences, and the analytic limit on held-out prompts. The corpus is of films and some meals,
    everything else is of films, so that notebook 4 can test on meals what was learnt on films.
    pool: what `two_processes` gives: one of them samples the limit while this process samples the preferences."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    corpus = [sample_review(rng, "meal" if rng.random() < 0.15 else "film") for _ in range(64 * scale.sft_steps)]
    tokenizer = train_tokenizer(corpus[:10_000], VOCAB_SIZE)
    texts = [encode(tokenizer, text) + [tokenizer.eot_token] for text in corpus]
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # one layer is enough to write reviews: two, with two heads each, have the same loss, and everything takes 1.4 times as long
    reference = GPT(GPTConfig(tokenizer.n_vocab, BLOCK_SIZE, n_layer=1, n_head=4, n_embd=64)).to(device)
    # in batches of 96 the same texts give the same loss in less time, but then DPO's and PPO's efficiency is .02 lower (two seeds)
    started = time.time()
    history = train_sft(reference, texts, Training(scale.sft_steps, 1e-2, batch_size=64, seed=seed))
    sft_seconds = time.time() - started
    prompts = [prompt for prompt, _ in sample_prompts(seed + 1000, scale.prompts, held_out=False)]
    held_out = sample_prompts(seed + 2000, scale.held_out, held_out=True)
    arguments, threads = (tokenizer, held_out, scale.limit_samples, seed), torch.get_num_threads()
    if pool:                                                                     # sending a model moves its weights: so send a copy
        truth = pool.submit(sample_limit, copy.deepcopy(reference), *arguments)
        torch.set_num_threads(max(1, threads // 2))
    preferences, _ = sample_preferences(reference, tokenizer, prompts, gold_reward, MAX_NEW_TOKENS, scale.per_prompt, seed)
    pairs = encode_pairs(tokenizer, preferences, BLOCK_SIZE)
    truth = truth.result() if pool else sample_limit(reference, *arguments)
    torch.set_num_threads(threads)
    return World(scale, seed, tokenizer, reference, [encode(tokenizer, prompt) for prompt in prompts], pairs, held_out, truth,
                 build_frontier(truth["reward"]), {"SFT": history}, sft_seconds, {})


def sample_limit(reference, tokenizer, held_out: list, samples: int, seed: int) -> dict:
    """The truth about many of the reference's completions of each held-out prompt: see `judge`."""
    torch.manual_seed(seed)
    ids = [encode(tokenizer, prompt) for prompt, _ in held_out for _ in range(samples)]
    return judge(tokenizer, held_out, generate(reference, ids, MAX_NEW_TOKENS, progress="analytic limit"))


def with_scalar_head(model: GPT, extra_layers: int = 0) -> GPT:
    """A copy with one output, 0 at first, in place of the language-model head: a reward model or a critic to be.
    extra_layers: this many new ones go between the copied layers and the head."""
    config = replace(model.config, n_layer=model.config.n_layer + extra_layers)
    copied = GPT(config, n_outputs=1).to(next(model.parameters()).device)
    copied.load_state_dict(model.state_dict(), strict=False)                     # not strict: what is new has no weights to load
    return copied


def preference_training(world: World, steps: int, learning_rate=1.4e-3) -> Training:
    """Whole prompts a step, with all their pairs, so that each completion passes the model once."""
    return Training(steps, learning_rate, batch_size=world.scale.prompts_a_step * math.comb(world.scale.per_prompt, 2), seed=world.seed)


def run_preferences(world: World, stage="DPO", loss="dpo", beta=BETA, steps=None, n_pairs=None, **hyper) -> GPT:
    """A copy of the SFT policy trained on the world's preferences, or on the first n_pairs of them."""
    policy, pairs = copy.deepcopy(world.reference), world.pairs.subset(slice(n_pairs))
    training = preference_training(world, steps or world.scale.dpo_steps)

    def look(logs):                                                              # eight times: KL and length of 256 samples
        if logs["step"] % max(1, training.steps // 8) == 0:
            prompts = world.prompts[:256]
            completions = generate(policy, prompts, MAX_NEW_TOKENS)
            kl = completion_logratios(policy, world.reference, prompts, completions)
            logs.update(kl=kl.mean().item(), length=float(np.mean([len(completion) for completion in completions])))
    world.histories[stage] = train_preferences(policy, world.reference, pairs, training, beta, LOSSES[loss], hyper, stage,
                                               on_step=look)
    return policy


def run_reward_model(world: World) -> GPT:
    """A reward model fitted to the world's preferences, from the SFT policy's body and one layer more: it has to apply "not" to "good"
    before it adds up, and with one layer gets 95% of the Bayes-optimal accuracy instead of 99%. Its accuracy goes to world.checks."""
    reward_model = with_scalar_head(world.reference, extra_layers=1)
    training = preference_training(world, world.scale.reward_model_steps, 3e-3)
    world.histories["reward model"] = train_reward_model(reward_model, world.pairs, training)
    world.checks["reward_model_accuracy"], world.checks["bayes_accuracy"] = reward_model_accuracy(reward_model, world)
    return reward_model


def reward_model_accuracy(reward_model, world: World, n: int = 2048):
    """Accuracy on fresh pairs of held-out prompts -> (reward model's, Bayes-optimal).

    No labels are drawn: a pair ranked like the gold reward is right with probability s(|r_w - r_l|), the Bayes-optimal
    accuracy, else with its complement; a tie is right half of the time.
    """
    torch.manual_seed(world.seed)
    prompts = sample_prompts(world.seed + 3000, n // 4, held_out=True)
    ids = [encode(world.tokenizer, prompt) for prompt, _ in prompts for _ in range(8)]
    completions = generate(world.reference, ids, MAX_NEW_TOKENS)
    gold = np.diff(judge(world.tokenizer, prompts, completions)["reward"].reshape(-1, 2))
    score = np.diff(score_completions(reward_model, ids, completions).numpy().reshape(-1, 2))
    bayes = logistic(np.abs(gold))
    return float((0.5 + (bayes - 0.5) * np.sign(gold * score)).mean()), float(bayes.mean())


def run_ppo(world: World, stage="PPO-GT", reward_model=None, beta=BETA, **settings) -> GPT:
    """A copy of the SFT policy trained by PPO on the reward model or, without one, on the gold reward (ground truth).
    settings: of `PPO`; group=8 makes it GRPO.

    Rewards are normalised to mean 0 and standard deviation 1 on reference samples, and beta is divided by that deviation too:
    so it means here what it means in DPO.
    """
    def gold(prompts, completions):
        text = functools.partial(decode, world.tokenizer)
        return torch.tensor([gold_reward(text(prompt), text(completion)) for prompt, completion in zip(prompts, completions)])

    def watch(prompts, completions):
        return {"gold_reward": gold(prompts, completions).mean().item()}
    raw = gold if reward_model is None else functools.partial(score_completions, reward_model)
    first = range(min(4096, len(world.pairs.prompts)))
    sample = raw([world.pairs.prompts[i] for i in first], [world.pairs.completions[i] for i in first])
    mean, std = sample.mean(), sample.std()
    # less work than PPO's usual four epochs in minibatches of 128, and better here (two seeds)
    ppo = PPO(**{"beta": beta / std.item(), "max_new_tokens": MAX_NEW_TOKENS, "epochs": 3, "minibatch": 64, **settings})
    training = Training(world.scale.ppo_rollouts * ppo.epochs * ppo.rollout // ppo.minibatch, 1e-3, eps=1e-5, seed=world.seed)
    policy = copy.deepcopy(world.reference)
    world.histories[stage] = train_ppo(
        policy, None if ppo.group else with_scalar_head(policy), world.reference, world.prompts,
        lambda *texts: (raw(*texts) - mean) / std, ppo, training, stage, watch if reward_model is not None else None)
    for row in world.histories[stage]:                                           # its reward without the normalisation
        row["gold_reward" if reward_model is None else "learnt_reward"] = row["reward"] * std.item() + mean.item()
    return policy


def run_rlhf(world: World, stage="PPO-RM", **options) -> GPT:
    """The pipeline that DPO replaces: a reward model, then PPO on it."""
    return run_ppo(world, stage, run_reward_model(world), **options)


def run_best_of_n(world: World, n: int) -> dict:
    """Best-of-N's row, from the samples of the limit: nothing is trained."""
    reward, kl = best_of_n(world.truth["reward"], n)
    groups = {name: values[:, :values.shape[1] // n * n].reshape(len(values), -1, n) for name, values in world.truth.items()}
    best = groups["reward"].argmax(-1)[..., None]                                # (P, K/n, 1)
    judged = {name: np.take_along_axis(values, best, -1)[..., 0] for name, values in groups.items()}
    return summarise(world.frontier, kl, {**judged, "reward": reward[:, None]}, seconds=0.0)


def measure(world: World, name: str, run, **options) -> tuple[GPT, dict]:
    """Train by run(world, name, **options) and evaluate on the held-out prompts -> policy, row."""
    torch.manual_seed(world.seed)                                                # a row does not depend on what ran before it
    started = time.time()
    policy = run(world, name, **options)
    seconds = time.time() - started
    row = evaluate(policy, world.reference, world.frontier, world.held_out, world.tokenizer, world.scale.samples, MAX_NEW_TOKENS,
                   progress=name)
    row["seconds"] = seconds
    if options.get("loss", "dpo") == "dpo":                                      # DPO and PPO aim at pi*, other losses elsewhere
        row["theory_kl"], row["theory_reward"] = world.frontier.at_beta(options.get("beta", BETA))
        row["kl_over_theory"] = row["kl"] / row["theory_kl"]
    return policy, row


def measure_all(world: World, jobs: list, pool=None) -> tuple[dict, dict]:
    """`measure` for each (name, run, options) -> rows and example completions by name; histories and checks go to `world`.
    pool: what `two_processes` gives; without one it makes its own. On a GPU the jobs run here, one after another."""
    with (contextlib.nullcontext(pool) if pool else two_processes()) as pool:
        results = list((pool.map if pool else map)(work, [(world, *job) for job in jobs]))
    for _, _, _, histories, checks in results:
        world.histories.update(histories), world.checks.update(checks)
    return {name: row for name, row, *_ in results}, {name: texts for name, _, texts, *_ in results}


@contextlib.contextmanager
def two_processes():
    """A pool of two more processes, each with half of the threads; on a GPU None. Models as small as the demonstration's leave a
    second thread half idle, so two processes of one thread do 1.4 times the work of one process of two."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        yield None
        return
    threads = max(1, torch.get_num_threads() // 2)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), start_worker, (threads,)) as pool:
        for _ in range(2):
            pool.submit(os.getpid)                                               # any small job starts a process, which takes two seconds
        yield pool


def start_worker(threads: int):
    """What each of `two_processes` does first."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)                                 # Ctrl-C ends it at once, without a traceback
    line = 1 + multiprocessing.current_process()._identity[0] % 2
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, position=line)        # from now on each of its bars has its own line


def work(job):
    """One job of `measure_all`, in its process -> name, row, examples, and the histories and checks that it adds."""
    world, name, run, options = job
    world = replace(world, histories={}, checks={})                              # to return only what this job adds
    policy, row = measure(world, name, run, **options)
    return name, row, examples(policy, world), world.histories, world.checks


def examples(policy, world: World, n: int = 3) -> list[str]:
    """One completion of each of the first n held-out prompts, with its gold reward."""
    torch.manual_seed(world.seed)
    prompts = [prompt for prompt, _ in world.held_out[:n]]
    texts = [decode(world.tokenizer, ids) for ids in generate(policy, [encode(world.tokenizer, p) for p in prompts], MAX_NEW_TOKENS)]
    return [f"{gold_reward(prompt, text):+6.2f} ...{text}" for prompt, text in zip(prompts, texts)]


def demonstrate(scale: Scale, seed: int, out: Path, note: str = ""):
    """Every method of the paper's first experiment, trained and measured; writes summary.json and two figures to `out`."""
    started, few = time.time(), scale.baseline_steps
    with two_processes() as pool:
        world = make_world(scale, seed, pool)
        rows, texts = measure_all(world, [                                       # the longest first
            ("PPO-RM", run_rlhf, {}), ("PPO-GT", run_ppo, {}), ("DPO", run_preferences, {}),
            ("Unlikelihood", run_preferences, {"loss": "unlikelihood", "steps": few, "alpha": 1.0}),
            ("Preferred-FT", run_preferences, {"loss": "sft", "steps": few})], pool)
    methods = {"SFT": summarise(world.frontier, np.zeros(scale.held_out), world.truth, seconds=world.sft_seconds)}
    methods |= {f"Best-of-{n}": run_best_of_n(world, n) for n in (4, 16, 64)}
    methods |= {name: rows[name] for name in ("Preferred-FT", "Unlikelihood", "PPO-RM", "PPO-GT", "DPO")}
    kl, reward = world.frontier.at_beta(BETA)
    checks = {"theory_kl": kl, "theory_reward": reward, "frontier_error_at_3_nats": frontier_error(world.frontier, 3.0), **world.checks,
              "dpo_first_loss_minus_log_2": world.histories["DPO"][0]["loss"] - math.log(2),
              "ppo_first_ratio_minus_1": world.histories["PPO-GT"][0]["ratio_moved"]}
    limit = limit_points(world.frontier)
    parameters = sum(parameter.numel() for parameter in world.reference.parameters())
    write_json(out / "summary.json", {
        "methods": methods, "frontier": limit, "checks": checks, "seconds": time.time() - started,
        "config": {**asdict(scale), "beta": BETA, "seed": seed, "note": note, "parameters": parameters}})
    texts["SFT"] = examples(world.reference, world)
    for i, (prompt, _) in enumerate(world.held_out[:len(texts["SFT"])]):
        print(f"\n{prompt} ...", *(f"  {name:7s}{texts[name][i]}" for name in ("SFT", "PPO-RM", "DPO")), sep="\n")
    print_table(methods)
    figure, axes = new_figure(1, 1, (7, 4.6), note)
    draw_frontier(axes[0, 0], limit, methods)
    figure.savefig(out / "frontier.png")
    plot_training(world.histories, out / "training.png", note)
    print(f"""
Theory puts DPO and RLHF at KL {kl:.2f}, reward {reward:.2f} for beta {BETA:g}.
The limit, from samples, comes out at least {checks["frontier_error_at_3_nats"]:.1%} too low at 3 nats.
Reward model: {checks["reward_model_accuracy"]:.1%} of held-out pairs right; the true reward gets {checks["bayes_accuracy"]:.1%}.
DPO's first loss - log 2: {checks["dpo_first_loss_minus_log_2"]:.0e}.
PPO's first |ratio - 1|: {checks["ppo_first_ratio_minus_1"]:.0e}.
Figures and numbers: {out}/frontier.png, training.png, summary.json. {time.time() - started:.0f} s. {note}""")


def sweep(seeds, out: Path, scale: Scale, note=""):
    """Several betas for DPO, with twice the demonstration's steps, and for PPO; DPO with fewer pairs and with the demonstration's
    steps; everything redone for each seed. Writes sweep.json and sweep.png."""
    started, methods, frontiers, accuracies = time.time(), {}, [], []
    with two_processes() as pool:
        for seed in tqdm(seeds, desc="sweep", unit="seed"):
            world = make_world(scale, seed, pool)
            reward_model = run_reward_model(world)
            accuracies.append((world.checks["reward_model_accuracy"], world.checks["bayes_accuracy"]))
            frontiers.append(world.frontier)
            jobs = [(f"DPO beta={beta:g}", run_preferences, {"beta": beta, "steps": 2 * scale.dpo_steps}) for beta in (4, 3, 2, 1.5, 1.2)]
            few = [n for n in (1024, 8192, 32768) if n < len(world.pairs)]
            jobs += [(f"DPO beta={BETA:g} pairs={n}", run_preferences, {"n_pairs": n}) for n in (*few, len(world.pairs))]
            jobs += [(f"PPO-GT beta={beta:g}", run_ppo, {"beta": beta}) for beta in (4, 2, 1.2)]
            jobs += [(f"PPO-RM beta={beta:g}", run_ppo, {"beta": beta, "reward_model": reward_model}) for beta in (4, 2, 1.2)]
            rows = measure_all(world, jobs, pool)[0] | {f"Best-of-{n}": run_best_of_n(world, n) for n in (4, 16, 64)}
            methods |= {f"{name} seed={seed}": row for name, row in rows.items()}
            widest = max(row["kl"] for name, row in methods.items() if "pairs" not in name)
            errors = {f"{kl:.2f}": [frontier_error(frontier, kl) for frontier in frontiers] for kl in (1, 3, widest)}
            results = {"methods": methods, "means": over_seeds(methods), "frontier": limit_points(*frontiers), "frontier_error": errors,
                       "reward_model_and_bayes_accuracy": accuracies, "config": {**asdict(scale), "seeds": list(seeds)},
                       "seconds": time.time() - started}
            write_json(out / "sweep.json", results)
    plot_sweep(results, out / "sweep.png", note)
    print_table(results["means"])
    print("Accuracy of reward model / Bayes-optimal, by seed:", *(f"{model:.3f} / {bayes:.3f}" for model, bayes in accuracies),
          "\nRelative bias of the limit, by KL:", *(f"{kl} nats {np.mean(error):.2%}" for kl, error in errors.items()),
          f"\nFigure and numbers: {out}/sweep.png, sweep.json. {results['seconds']:.0f} s. {note}")


def over_seeds(methods: dict) -> dict:
    """Rows "setting seed=S" -> setting: {name: mean over seeds, name_se: its standard error}."""
    values, means = defaultdict(list), defaultdict(dict)
    for name, row in methods.items():
        for key in row:
            if row[key] is not None and not key.endswith("_se"):
                values[name.rsplit(" seed=", 1)[0], key].append(row[key])
    for (setting, key), numbers in values.items():
        means[setting] |= mean_and_error(key, numbers)
    return means


def limit_points(*frontiers: Frontier) -> list[dict]:
    """The limit curve, averaged over seeds; se: the standard error over prompts of its gain at this KL. A prompt with more KL has more
    reward, beta for each nat (the curve's slope): that moves it along the curve, not off it, so beta times its KL is taken off first."""
    curves = [(f.betas, f.kl.mean(0), f.reward.mean(0), np.apply_along_axis(
        standard_error, 0, f.reward - f.betas * f.kl - f.rewards.mean(1, keepdims=True)) / math.sqrt(len(frontiers))) for f in frontiers]
    return [dict(zip(("beta", "kl", "reward", "se"), point)) for point in np.mean(curves, 0).T.tolist()]


def print_table(methods: dict):
    """Rows with standard errors where there are any: over prompts for one run, over seeds for a sweep."""
    def cell(row, key, digits):
        error = "" if row.get(key + "_se") is None else f" ±{row[key + '_se']:.{digits}f}"
        return "-" if row.get(key) is None else f"{row[key]:.{digits}f}{error}"
    columns = {"gold reward": ("reward", 2), "KL, nats": ("kl", 2), "efficiency": ("efficiency", 3), "win rate": ("win_rate", 3),
               "grammatical": ("grammatical", 3), "tokens": ("length", 1), "seconds": ("seconds", 0)}
    print(f"\n{'':23s}" + "".join(f"{title:>15s}" for title in columns))
    for name, row in methods.items():
        print(f"{name:23s}" + "".join(f"{cell(row, *column):>15s}" for column in columns.values()))


COLOURS = {"SFT": "#000000", "Preferred-FT": "#E69F00", "Unlikelihood": "#CC79A7", "PPO-RM": "#56B4E9", "PPO-GT": "#0072B2",
           "DPO": "#D55E00", "Best-of-N": "#009E73"}                             # Okabe and Ito's palette, safe for all eyes


def new_figure(rows: int, columns: int, size, title="", **options):
    """A figure of `size` inches with a grid of axes (rows, columns); options: of matplotlib's `subplots`."""
    from matplotlib.figure import Figure                                         # here, because it takes a second to load
    figure = Figure(size, dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, axes


def draw_frontier(axis, limit: list, methods: dict):
    """Reward against KL under the analytic limit [the paper's Figure 2, left]; bars: 1.96 standard errors, of the gain for the
    reward. Stars mark where theory puts DPO at each beta. A method's family is its name's first word."""
    kl, reward, error = (np.array([point[key] for point in limit]) for key in ("kl", "reward", "se"))
    widest = 1.15 * max(row["kl"] for name, row in methods.items() if name != "Unlikelihood")
    axis.plot(kl, reward, color="black", lw=2, label="analytic limit")
    axis.fill_between(kl, reward - 1.96 * error, reward + 1.96 * error, color="black", alpha=0.12, lw=0, label="its 95% interval")
    for name, row in methods.items():
        family = "Best-of-N" if name.startswith("Best") else name.split(" ")[0]
        if row["kl"] > widest:
            axis.plot([], [], " ", label=f"{name}: KL {row['kl']:.0f}, reward {row['reward']:.1f}, off the plot")
            continue
        axis.errorbar(row["kl"], row["reward"], 1.96 * (row.get("gain_se", row["reward_se"]) or 0), 1.96 * (row["kl_se"] or 0),
                      ms=6, fmt={"Best-of-N": "s", "PPO-RM": "^"}.get(family, "o"), capsize=2, color=COLOURS[family], label=family)
        if family == "DPO":
            axis.plot(row["theory_kl"], row["theory_reward"], "*", ms=15, mfc="none", color=COLOURS["DPO"], label="DPO in theory")
    axis.set(xlim=(-0.03 * widest, widest), ylim=(reward[0] - 0.8, 1.08 * np.interp(widest, kl, reward)),
             xlabel="KL(policy || reference), nats per completion", ylabel="gold reward")
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    axis.legend(once.values(), once.keys(), fontsize=8, loc="lower right")


def plot_sweep(results: dict, path: Path, note=""):
    """The frontier, means over seeds; where DPO lands with few and with many pairs, and how near the limit."""
    figure, axes = new_figure(1, 3, (14, 4.6), note, width_ratios=(2, 1, 1))
    means = {name: row for name, row in results["means"].items() if "pairs" not in name}
    draw_frontier(axes[0, 0], results["frontier"], means)
    for name, row in means.items():
        if name.startswith("DPO"):
            axes[0, 0].annotate(name.replace("DPO ", ""), (row["kl"], row["reward"]), (-8, 9), textcoords="offset points",
                                ha="right", fontsize=8, color=COLOURS["DPO"])
    rows = {int(name.split("pairs=")[1]): row for name, row in results["means"].items() if "pairs=" in name}
    for axis, key, label in zip(axes[0, 1:], ("kl_over_theory", "efficiency"), ("DPO's KL / the KL in theory", "DPO's efficiency")):
        axis.errorbar(list(rows), [row.get(key, math.nan) for row in rows.values()],
                      [1.96 * (row.get(key + "_se") or 0) for row in rows.values()], fmt="o-", capsize=2, color=COLOURS["DPO"])
        axis.axhline(1, color="black", lw=0.8, ls=":")
        axis.set(xscale="log", ylabel=label, xlabel=f"training pairs (beta {BETA:g}, {results['config']['dpo_steps']} steps)")
    axes[0, 1].set(yscale="log")
    axes[0, 1].set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes[0, 1].minorticks_off()
    axes[0, 2].set(ylim=(0, 1.05))
    figure.savefig(path)


def plot_training(histories: dict, path: Path, note=""):
    """The curves to watch while training; each is a running mean over a twentieth of its points, 20 at most."""
    figure, axes = new_figure(2, 4, (13, 5.6), note)
    policies = ("DPO", "PPO-RM", "PPO-GT", "Unlikelihood")
    panels = (("loss, nats per pair", ("DPO", "reward model"), ("loss",)),
              ("implied rewards", ("DPO",), ("chosen_reward", "rejected_reward")),
              ("margin, chosen - rejected", ("DPO",), ("margin",)),
              ("accuracy, training pairs", ("DPO", "reward model"), ("accuracy",)),
              ("KL to the reference, nats", policies, ("kl",)),
              ("length, tokens", policies, ("length",)),
              ("gold and learnt reward", ("PPO-RM",), ("gold_reward", "learnt_reward")),
              ("loss, nats per token", ("SFT",), ("loss",)))
    for axis, (title, stages, keys) in zip(axes.flat, panels):
        for stage, key in itertools.product(stages, keys):
            steps, values = zip(*[(row["step"], row[key]) for row in histories[stage] if key in row])
            width = min(20, 1 + len(values) // 20)
            axis.plot(steps[width - 1:], np.convolve(values, np.ones(width) / width, "valid"), lw=1.3,
                      color=COLOURS.get(stage) if len(keys) == 1 else None, label=f"{stage} {key.replace('_', ' ')}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.legend(fontsize=8)
    axes[0, 0].axhline(math.log(2), color="grey", lw=0.8, ls=":")
    axes[1, 0].set_yscale("symlog", linthresh=1)
    figure.savefig(path)


# ---- The stages on your own data and models: files and the command line, to be skipped on a first reading ------------

LEARNING_RATES = {"sft": 3e-3, "dpo": 5e-4, "rm": 1e-3, "ppo": 5e-4}             # at width 128; times (128 / width)^2 above
OURS = {"checkpoint.pt", "metrics.jsonl", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def byte_letters() -> dict:
    """GPT-2 writes each byte as one printable letter: itself where it has one, else the next one from U+0100 on. byte -> letter."""
    others = itertools.count(256)
    return {byte: chr(byte if chr(byte).isprintable() and chr(byte) != " " else next(others)) for byte in range(256)}


def save_tokenizer(tokenizer: tiktoken.Encoding, directory, pad_token_id=None):
    """Write tokenizer.json, from which transformers' AutoTokenizer makes the same ids. tiktoken merges any two neighbours whose
    whole is a token, lowest id first: so every way to halve a token is listed as a merge, in the order of ids."""
    letters, ranks = byte_letters(), tokenizer._mergeable_ranks
    spell = lambda token: "".join(letters[byte] for byte in token)
    merges = [[spell(token[:i]), spell(token[i:])] for token in sorted(ranks, key=ranks.get) for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {**{spell(token): rank for token, rank in ranks.items()}, **tokenizer._special_tokens}
    write_json(Path(directory) / "tokenizer.json", {
        "version": "1.0", "added_tokens": [{"id": i, "content": text, **flags} for text, i in tokenizer._special_tokens.items()],
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}})
    write_json(Path(directory) / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True,
               "clean_up_tokenization_spaces": False, **{f"{name}_token": EOS_TEXT for name in ("eos", "bos", "unk")},
               "pad_token": next((token for token, i in vocabulary.items() if i == pad_token_id), None)})


def read_tokenizer(directory, vocab_size: int = 50257) -> tiktoken.Encoding:
    """The tokenizer beside a model: tokenizer.json, or vocab.json, of GPT-2's kind; GPT-2's own if there is none and the size fits."""
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        saved = json.loads((directory / "tokenizer.json").read_text("utf-8"))
        model, cut = saved["model"], saved.get("pre_tokenizer") or {}
        if (model.get("type", "BPE") != "BPE" or cut.get("type") != "ByteLevel" or cut.get("add_prefix_space")
                or not cut.get("use_regex", True) or saved.get("normalizer")):
            raise ValueError(f"{directory}: its tokenizer.json is not of GPT-2's kind, a byte-level BPE")
        letters = byte_letters().values()                                        # a pad may be a byte
        added = [token for token in saved.get("added_tokens", ()) if token["content"] not in letters]
        vocabulary, special = model["vocab"], {token["content"]: token["id"] for token in added}
        if not all(token.get("special", True) for token in added if token["content"] != EOS_TEXT):
            raise ValueError(f"{directory}: its tokenizer has added tokens that are not special, which would be cut as other text is")
        merged = [vocabulary["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in model.get("merges", ())]
        if merged != sorted(merged):                                             # tiktoken merges by id
            raise ValueError(f"{directory}: the merges of its tokenizer.json are not in the order of the ids")
    elif (directory / "vocab.json").is_file():
        vocabulary, special = json.loads((directory / "vocab.json").read_text("utf-8")), {}
    elif vocab_size == 50257:
        return load_tokenizer("gpt2")
    else:
        raise ValueError(f"{directory}: no tokenizer.json there")
    if EOS_TEXT in vocabulary:
        special[EOS_TEXT] = vocabulary[EOS_TEXT]
    if EOS_TEXT not in special:
        raise ValueError(f"{directory}: its tokenizer has no {EOS_TEXT}")
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {bytes(byte_of[letter] for letter in token): i for token, i in vocabulary.items() if token not in special}
    ids = sorted([*ranks.values(), *special.values()])
    if ids != list(range(len(ids))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{directory}: its tokenizer's ids are not 0, 1, 2, ..., or a byte has none")
    return tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def open_model(name: str, device, n_outputs=None, like=None, scores=False) -> tuple[GPT, tiktoken.Encoding]:
    """A model and its tokenizer. n_outputs: of a new head for a language model. like: the (model, tokenizer) whose ids it must
    understand. scores: it must be a reward model."""
    directory = find_model(name)
    try:
        model = GPT.from_pretrained(directory, n_outputs)
        tokenizer = read_tokenizer(directory, model.config.vocab_size)
        has_eos = isinstance(json.loads((directory / "config.json").read_text()).get("eos_token_id"), (int, list))
    except (SafetensorError, RuntimeError, LookupError, TypeError, AttributeError, ValueError, OSError) as error:
        reason = str(error).strip().replace("\n", " ")[:300]
        known = reason.startswith(str(directory))
        raise ValueError(reason if known else f"{directory}: not a model that can be read: {type(error).__name__}, {reason}") from None
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{directory}: its tokenizer has {tokenizer.n_vocab} tokens, its model {model.config.vocab_size}")
    if has_eos and tokenizer.eot_token != model.config.eos_token_id < model.config.vocab_size:
        raise ValueError(f"{directory}: its EOS is token {model.config.eos_token_id}, and not {EOS_TEXT}, {tokenizer.eot_token}")
    outputs = None if model.score is None else model.score.out_features
    if outputs != (1 if scores else n_outputs):
        raise ValueError(f"{directory}: " + (
            "not a reward model, which has one trained output (eval of a language model needs --reference)" if scores else
            f"its trained head has {outputs} outputs, not {n_outputs}" if n_outputs else
            "a reward model, where a language model is needed"))
    if like and tokenizer._mergeable_ranks != like[1]._mergeable_ranks:
        raise ValueError(f"{directory}: its vocabulary of {tokenizer.n_vocab} tokens is not that of --init, of {like[1].n_vocab}")
    if like and model.config.block_size < like[0].config.block_size:
        raise ValueError(f"{directory}: its block of {model.config.block_size} tokens is shorter than --init's {like[0].config.block_size}")
    model.config.eos_token_id = tokenizer.eot_token
    return model.to(device).eval(), tokenizer


def training_rows(held_out, options):
    """bool (N,): which rows are for training: all with --all, or where a split would leave none."""
    held_out = np.array(held_out, bool) & (not options.all)
    return ~held_out | held_out.all()


def report(path, n: int, counts: dict):
    """Say, once and not in each process, how many rows a file has, and what was counted in it."""
    if process()[0] == 0:
        print(f"{path}: {n} rows" + "".join(f"; {value} {name}" for name, value in counts.items() if value))


def read_pairs(options, tokenizer, block_size: int) -> tuple[Pairs, Pairs | None]:
    """--data as pairs for training, and the held-out pairs if there are any."""
    pairs = encode_pairs(tokenizer, read_preferences(options.data), block_size, options.data, options.skip_long)
    if not len(pairs):
        raise ValueError(f"{options.data}:1: no pair fits in {block_size} tokens")
    train = training_rows(pairs.held_out, options)
    report(options.data, len(pairs), {**pairs.counts, "pairs held out, by prompt": int((~train).sum())})
    return pairs.subset(train), None if train.all() else pairs.subset(~train)


def plan(options, model: GPT, tokenizer, lines, prefix="") -> tuple[Training, Run]:
    """How a stage is to be trained, and where it writes. prefix: of the names of the weights that users load."""
    if options.batch_size > 2 * len(lines) + 4096:
        raise ValueError(f"--batch-size {options.batch_size} is far more than the {len(lines)} rows there are")
    steps = options.steps or math.ceil(options.epochs * len(lines) / options.batch_size)
    rate = options.learning_rate or LEARNING_RATES[options.stage] * min(1, (128 / model.config.n_embd) ** 2)
    # these may change before a run is resumed, but not what the files hold
    free = ("out", "resume", "overwrite", "save_every", "fsdp", "micro_batch", "data", "init", "reference", "reward")
    settings = {name: str(value) for name, value in vars(options).items() if name not in free}
    checksum = lambda path: zlib.crc32(np.memmap(path, np.uint8, "r"))           # CRC-32: has the file changed since the checkpoint?
    settings["checksum of the data"] = checksum(options.data)
    for name in ("init", "reference", "reward"):
        if getattr(options, name, None):
            weights = find_model(getattr(options, name)).glob("model*.safetensors")
            settings[f"checksum of --{name}"] = [checksum(path) for path in sorted(weights)]

    def export(tensors):
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        save_tokenizer(tokenizer, options.out, model.pad_token_id())
        model.save_pretrained(options.out, own)
    return Training(steps, rate, options.batch_size, options.micro_batch or 10 ** 9, seed=options.seed), Run(
        options.out, settings, export, lines, options.save_every, options.resume, options.fsdp)


def stage_sft(options, device) -> dict:
    """`sft`: fit a language model to texts, from scratch or from --init -> the summary's numbers."""
    if options.init:
        model, tokenizer = open_model(options.init, device)
        for name in ("vocab-size", "block-size", "n-layer", "n-head", "n-embd", "dropout"):
            if getattr(options, name.replace("-", "_")) != OPTIONS[name][0]:
                raise ValueError(f"--{name} is for a model from scratch; that of --init has its own")
    else:
        if options.vocab_size < 257:
            raise ValueError(f"--vocab-size {options.vocab_size}: 257 at least, the 256 bytes and {EOS_TEXT}")
        sample = [text for _, text in itertools.islice(read_texts(options.data, "text"), 20_000)]
        tokenizer = train_tokenizer(sample, options.vocab_size)
        model = GPT(GPTConfig(tokenizer.n_vocab, options.block_size, options.n_layer, options.n_head, options.n_embd,
                              options.dropout)).to(device)
    size, texts, lines, held_out, seen, cut = model.config.block_size, [], [], [], set(), 0
    for line, text in read_texts(options.data, "text"):
        ids = [*encode(tokenizer, text), tokenizer.eot_token]
        starts = [min(start, len(ids) - 2) for start in range(0, len(ids), size)]              # EOS alone has nothing to predict it
        pieces = [compact(tokenizer, ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)]) if b - a > 1]
        cut += len(pieces) > 1
        seen.add(hash(text))
        texts += pieces
        lines += [line] * len(pieces)
        held_out += [is_held_out(text)] * len(pieces)
    lines, train = np.array(lines), training_rows(held_out, options)
    n = len(np.unique(lines))
    report(options.data, n, {f"texts longer than the block, cut; {len(texts)} pieces with the uncut ones": cut,
                             "rows held out": len(np.unique(lines[~train])), "duplicates": n - len(seen)})
    train_sft(model, list(itertools.compress(texts, train)), *plan(options, model, tokenizer, lines[train]))
    rest = list(itertools.compress(texts, ~train))
    if not rest:
        return {}
    loss = -float(completion_logps(model, [[]] * len(rest), rest).sum()) / sum(len(text) - 1 for text in rest)
    return {"held_out_loss": loss, "held_out_perplexity": math.exp(min(loss, 700))}


def stage_dpo(options, device) -> dict:
    """`dpo`: fit --init to preference pairs, by DPO or another --loss -> held-out accuracy and margins."""
    model, tokenizer = opened = open_model(options.init, device)
    reference = open_model(options.reference, device, like=opened)[0] if options.reference else copy.deepcopy(model)
    hyper = loss_settings(options)
    pairs, held_out = read_pairs(options, tokenizer, model.config.block_size)
    training, run = plan(options, model, tokenizer, pairs.lines)
    train_preferences(model, reference, pairs, training, options.beta, LOSSES[options.loss], hyper, run=run)
    return compare(model, reference, held_out, options.beta) if held_out else {}


def loss_settings(options) -> dict:
    """--hyper NAME=VALUE ... as a dict, tried on a pair so that a bad name or value is found before anything is written."""
    hyper, one = {}, torch.ones(1)
    for setting in options.hyper:
        name, _, value = setting.partition("=")
        try:
            hyper[name] = float(value)
            found = LOSSES[options.loss](-one, -2 * one, -one, -one, beta=options.beta, chosen_lengths=one, rejected_lengths=one, **hyper)
        except (ValueError, RuntimeError):                                       # not a number; too large for one
            found = torch.tensor(math.nan)
        except TypeError:
            raise ValueError(f"--hyper {setting}: the loss {options.loss} has no hyper-parameter {name!r}") from None
        if not found.isfinite().all() or hyper.get("r_max", 1) <= 0:
            raise ValueError(f"--hyper {setting}: not a number that the loss {options.loss} can use")
    return hyper


def stage_rm(options, device) -> dict:
    """`rm`: fit a reward model to preference pairs, from --init with a new head (a reward model's own stays) -> as `stage_dpo`."""
    model, tokenizer = open_model(options.init, device, n_outputs=1)
    pairs, held_out = read_pairs(options, tokenizer, model.config.block_size)
    training, run = plan(options, model, tokenizer, pairs.lines)
    train_reward_model(model, pairs, training, run=run)
    return compare(model, None, held_out) if held_out else {}


def compare(model, reference, pairs: Pairs, beta=None) -> dict:
    """Accuracy and margin, with standard errors over prompts, of the rewards that a reward model gives, or that a policy implies: the
    latter are beta log(pi/pi_ref) for every --loss. "loss" is -log s(margin): the reward model's own, or the DPO loss."""
    if model.score is None:
        rewards = beta * completion_logratios(model, reference, pairs.prompts, pairs.completions, rows=pairs.rows())       # (R,)
    else:
        rewards = score_completions(model, pairs.prompts, pairs.completions, rows=pairs.rows())                            # (R,)
    chosen, rejected = rewards[pairs.chosen], rewards[pairs.rejected]                                                      # (N,)
    margins = chosen - rejected
    return {"pairs": len(pairs), **mean_and_error("accuracy", correct(margins), pairs.prompt_index),
            **mean_and_error("margin", margins, pairs.prompt_index), "loss": -F.logsigmoid(margins).mean().item(),
            "chosen_reward": chosen.mean().item(), "rejected_reward": rejected.mean().item()}


def stage_ppo(options, device) -> dict:
    """`ppo`: maximise --reward by PPO from --init, the KL to --init weighted by --beta -> held-out reward and KL."""
    policy, tokenizer = opened = open_model(options.init, device)
    reward_model = open_model(options.reward, device, like=opened, scores=True)[0]
    reference, critic = copy.deepcopy(policy), with_scalar_head(policy)
    room = policy.config.block_size - options.max_new_tokens
    ppo = PPO(options.beta, options.batch_size, options.ppo_epochs, options.minibatch or options.batch_size, options.max_new_tokens)
    if room < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens} leaves no room for a prompt in {policy.config.block_size} tokens")
    lines, texts = zip(*read_texts(options.data, "prompt"))
    prompts, train = [encode(tokenizer, text) for text in texts], training_rows([is_held_out(text) for text in texts], options)
    report(options.data, len(prompts), {"prompts cut on the left": sum(len(prompt) > room for prompt in prompts),
                                        "prompts held out": int((~train).sum()), "duplicates": len(texts) - len(set(texts))})
    prompts = [compact(tokenizer, prompt[-room:]) for prompt in prompts]
    sample = list(itertools.islice(itertools.cycle(prompts), 512))               # the reward's mean and spread before training
    completions = generate(policy, sample, options.max_new_tokens)
    scores = score_completions(reward_model, sample, completions)
    mean, std = scores.mean(), scores.std(correction=0).item()
    if std < 1e-6:
        raise ValueError(f"{options.reward}: it gives all of {len(sample)} completions the same score, so there is nothing to learn")
    endless = sum(completion[-1] != tokenizer.eot_token for completion in completions)
    if 2 * endless > len(sample) and process()[0] == 0:
        print(f"{options.init}: {endless} of {len(sample)} completions do not end within --max-new-tokens {options.max_new_tokens}; "
              f"the reward of such a one is {PPO.missing_eos:g} at most, in standard deviations from the mean")
    ppo = replace(ppo, beta=ppo.beta / std)                                      # its weight beside normalised rewards
    training, run = plan(options, policy, tokenizer, np.array(lines)[train], "policy.")
    training = replace(training, steps=options.steps or training.steps * ppo.epochs * (ppo.rollout // ppo.minibatch), eps=1e-5)
    reward = lambda prompts, completions: (score_completions(reward_model, prompts, completions) - mean) / std
    train_ppo(policy, critic, reference, list(itertools.compress(prompts, train)), reward, ppo, training, run=run)
    rest = list(itertools.compress(prompts, ~train))[:256]
    if not rest:
        return {}
    before, after = (generate(model, rest, options.max_new_tokens) for model in (reference, policy))
    return {"prompts": len(rest), **mean_and_error("held_out_reward", score_completions(reward_model, rest, after)),
            **mean_and_error("reward_before", score_completions(reward_model, rest, before)),
            **mean_and_error("held_out_kl", completion_logratios(policy, reference, rest, after))}


def stage_eval(options, device) -> dict:
    """`eval`: accuracy and margins of a policy against --reference, or of a reward model, on the held-out pairs."""
    model, tokenizer = opened = open_model(options.init, device, scores=not options.reference)
    reference = open_model(options.reference, device, like=opened)[0] if options.reference else None
    pairs, held_out = read_pairs(options, tokenizer, model.config.block_size)
    if not options.all and held_out is None:
        print("the split would leave one side empty: every pair is evaluated")
    return compare(model, reference, held_out or pairs, options.beta)


def stage_sample(options, device) -> dict:
    """`sample`: print completions of each --prompt by each --init, side by side."""
    models = [open_model(name, device) for name in options.init]
    reference, tokenizer = open_model(options.reference, device, like=models[0]) if options.reference else models[0]
    texts, rows = [text for text in options.prompt for _ in range(options.n)], []
    for name, (model, own) in zip(options.init, models):
        torch.manual_seed(options.seed)
        ids, block = [encode(own, text) or [own.eot_token] for text in texts], model.config.block_size
        new = min(options.max_new_tokens, max(block - max(map(len, ids)), block // 2))         # a long prompt keeps half of the block
        if any(len(prompt) > block - new for prompt in ids) or new < options.max_new_tokens:
            print(f"{name}: its block of {block} tokens has room for the last {block - new} tokens of a prompt and {new} new ones")
        completions = generate(model, ids, new, options.temperature, top_k=options.top_k, top_p=options.top_p)
        ids, rewards = [prompt[new - block:] for prompt in ids], ["-"] * len(ids)
        if own._mergeable_ranks == tokenizer._mergeable_ranks and reference.config.block_size >= model.config.block_size:
            rewards = [f"{options.beta * ratio:+.2f}" for ratio in completion_logratios(model, reference, ids, completions)]
        rows.append([f"  {name}  reward {reward}  ...{decode(own, completion)}" for completion, reward in zip(completions, rewards)])
    for text, row in zip(texts, zip(*rows)):
        print(f"\n{text} ...", *row, sep="\n")
    return {}


TRAIN = " out resume overwrite save-every epochs steps batch-size micro-batch learning-rate fsdp"
# name: (function, one line, its options); all take --seed. "init?", "init+" and "batch-size?" are --init and --batch-size with other
# rules or defaults, see OPTIONS
STAGES = {
    "sft": (stage_sft, "imitate texts", "data init? all vocab-size block-size n-layer n-head n-embd dropout" + TRAIN),
    "dpo": (stage_dpo, "learn from preferences", "data init reference all skip-long loss hyper beta" + TRAIN),
    "rm": (stage_rm, "fit a reward model", "data init all skip-long" + TRAIN),
    "ppo": (stage_ppo, "maximise a reward model", "data init all reward beta ppo-epochs minibatch max-new-tokens"
            + TRAIN.replace("batch-size", "batch-size?")),
    "eval": (stage_eval, "held-out preference accuracy and margins", "data init reference all skip-long beta"),
    "sample": (stage_sample, "completions, side by side", "init+ reference prompt n max-new-tokens temperature top-k top-p beta")}
# name: (default, help). The default is a value, or a type where there is none; False: a switch; []: may be repeated
OPTIONS = {
    "data": (Path, "JSONL: {prompt, chosen, rejected}, {text} for sft, {prompt} for ppo"),
    "out": (Path, "directory for the model, its checkpoint and metrics.jsonl"),
    "init": (str, f"the model to start from: a directory, or {', '.join(SIZES)}"),
    "init?": (str, f"start from this directory, or {', '.join(SIZES)}; else from scratch"),
    "init+": ([], "a model; may be repeated"),
    "reference": (str, "the reference policy; else --init, the first one (eval of a reward model: leave it out)"),
    "reward": (str, "the reward model's directory"),
    "prompt": ([], "a text to go on from; may be repeated. \"\" is for GPT-2's own weights, which begin after an EOS"),
    "all": (False, "use every row: no tenth of the prompts is held out"),
    "skip-long": (False, "leave out pairs with a completion that does not fit, and count them"),
    "loss": ("dpo", f"one of {', '.join(LOSSES)}"),
    "hyper": ([], "NAME=VALUE, a setting of the loss, such as label_smoothing=0.1"),
    "vocab-size": (512, "from scratch: tokens of the byte-pair encoding, 257 at least"),
    "block-size": (256, "from scratch: longest sequence, in tokens"),
    "n-layer": (4, "from scratch: layers"), "n-head": (4, "from scratch: attention heads"), "n-embd": (128, "from scratch: width"),
    "dropout": (0.0, "from scratch: share of units dropped in training"),
    "resume": (False, "go on from --out's checkpoint, if there is one"),
    "overwrite": (False, "write into --out though it is not empty"),
    "save-every": (100, "steps between checkpoints"),
    "epochs": (1.0, "passes over the data"),
    "steps": (int, "optimiser steps, instead of --epochs"),
    "batch-size": (64, "rows of one step, of all processes together"),
    "batch-size?": (256, "completions of a rollout; small ones hurt"),
    "micro-batch": (int, "rows of one forward pass; less memory, same gradient"),
    "learning-rate": (float, "its peak; by default after the stage and the model's width"),
    "fsdp": (False, "under torchrun: shard the model (FSDP2) instead of copying it (DDP)"),
    "ppo-epochs": (4, "passes over a rollout of --batch-size completions"),
    "minibatch": (int, "completions of one optimiser step; else the whole rollout"),
    "max-new-tokens": (48, "longest completion"), "n": (1, "completions of each prompt"),
    "temperature": (1.0, "0 is greedy"), "top-k": (0, "only the k likeliest tokens; 0 is all"),
    "top-p": (1.0, "only the likeliest tokens that hold this share"),
    "seed": (0, "one seed gives the same numbers again on the same machine"),
    "beta": (0.1, "weight of the KL, in reward units per nat; section 9 says what it is in other losses")}
MUST = "data", "out", "init", "init+", "reward", "prompt"                        # must be given
ZERO = "seed", "top-k", "temperature", "dropout"                                 # may be 0


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, like every other error here."""

    def error(self, message):
        self.exit(2, f"dpo.py: {message}\n")


def add_option(parser, name: str):
    """Add an option of the table OPTIONS; numbers must be positive, or 0 where that means something."""
    default, text = OPTIONS[name]
    kind = default if isinstance(default, type) else type(default)

    def number(value):
        if not 0 <= kind(value) < 1e9 or kind(value) == 0 and name not in ZERO:
            raise argparse.ArgumentTypeError(f"{value} is out of range")
        return kind(value)
    if default is False:
        how = {"action": "store_true"}
    elif default == []:
        how = {"action": "append", "default": []}
    else:
        how = {"type": number if kind in (int, float) else kind, "default": None if isinstance(default, type) else default,
               "choices": LOSSES if name == "loss" else None}
    parser.add_argument("--" + name.rstrip("?+"), help=text, required=name in MUST, **how)


def run_stage(options):
    """One stage, from its arguments to its summary."""
    started, world, local = time.time(), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda, out = torch.cuda.is_available(), options.out
    device = f"cuda:{local}" if cuda else "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
    if cuda:
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if out:
        names = {path.name.removesuffix(".part") for path in out.glob("*") if not path.match(LEFTOVER)}
        # a run of ours has a checkpoint, beside which others may have put files, or it had no time yet to save anything
        ours = "checkpoint.pt" in names or names <= OURS - {"model.safetensors", "config.json"}
        if names and not options.overwrite and not (options.resume and ours):
            raise ValueError(f"{out}: " + ("holds a run already: --resume goes on with it, --overwrite begins anew" if ours else
                                           "not empty, and not a run of this program: --overwrite writes into it all the same"))
        above = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"{out}: --out must be a directory that can be written")
        starts = [getattr(options, name, None) for name in ("init", "reference", "reward")]
        if any(find_model(name).resolve() == out.resolve() for name in starts if name):
            raise ValueError(f"{out}: --out would overwrite a model that the run starts from")
    torch.manual_seed(options.seed)
    summary = {"stage": options.stage, **STAGES[options.stage][0](options, device), "seconds": round(time.time() - started, 1)}
    if options.stage != "sample" and process()[0] == 0:
        Run(out).log({"summary": True, **summary})
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in summary.items()))


def main(arguments=None) -> int:
    """The command line: the demonstration, the sweep or one stage -> exit code."""
    parser = Parser(description="Direct Preference Optimization. Without arguments: the whole comparison.")
    parser.add_argument("--fast", action="store_true", help="the same story in a third of the time, less precise")
    parser.add_argument("--sweep", action="store_true", help="several betas, numbers of pairs and seeds: the README's first figure")
    add_option(parser, "seed")
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory for the results")
    stages = parser.add_subparsers(dest="stage", title="on your own data")
    for name, (_, line, names) in STAGES.items():
        stage = stages.add_parser(name, help=line, description=line)
        stage.set_defaults(out=None)
        for option in (names + " seed").split():
            add_option(stage, option)
    options = parser.parse_args(arguments)
    if options.stage and (sys.argv[1:] if arguments is None else arguments)[0] != options.stage:
        parser.error(f"options before {options.stage} belong to the demonstration; the stage's own go after its name")
    code, scale, note = 0, FAST if options.fast else Scale(), "fast run, less precise" if options.fast else ""
    try:
        if not options.stage:
            options.out.mkdir(parents=True, exist_ok=True)
        if options.stage:
            run_stage(options)
        elif options.sweep:
            finer = replace(scale, limit_samples=2 * scale.limit_samples, reward_model_steps=4 * scale.reward_model_steps // 3)
            sweep(range(options.seed, options.seed + 3), options.out, finer, note)
        else:
            demonstrate(scale, options.seed, options.out, note)
    except (FloatingPointError, RunFailed, RuntimeError, ValueError, OSError) as error:
        code = 2 if isinstance(error, (ValueError, OSError)) else 1
        lost = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if lost and process()[1] > 1:
            error = f"another process died or hangs; --resume goes on from the last checkpoint ({str(error).splitlines()[0]})"
        if process()[0] == 0 or lost:                                            # what all processes find, one says
            print(f"dpo.py: {str(error).strip()}".splitlines()[0], file=sys.stderr)
    except KeyboardInterrupt:
        code = 1
        print("dpo.py: stopped", file=sys.stderr)
    if dist.is_initialized():
        if not code:                                                             # all processes leave together, at once: ending gloo's
            dist.barrier()                                                       # threads one by one now and then aborts when busy
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
