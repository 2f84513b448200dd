"""How fast is it, and how does the cost grow?

    python .ci/speed.py              peers side by side, then growth; 15 minutes with 2 threads, 20 with one
    python .ci/speed.py --only dpo   one table: dpo, generate, ppo or growth
    python .ci/speed.py --mkl        ours without oneDNN's products, as on a machine where they are no faster

Peers are left out where they are not installed; `pip install "trl==1.12.0" datasets` brings them all (the last TRL with PPO). The
work is the same for all: a GPT-2 of 4 layers, 4 heads, width 128, vocabulary 512, random weights, float32, no dropout. Every
measurement has a process of its own, and contestants take turns; a table holds medians of the rounds. Let nothing else run.
"""
import argparse
import contextlib
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS = os.environ.get("OMP_NUM_THREADS")
SIZES = dict(vocab_size=512, block_size=64, n_layer=4, n_head=4, n_embd=128)
EOS, BATCH, BETA, RATE = 1, 64, 0.1, 1e-4


def synthetic_pairs(n=2048, longest=40, seed=1):
    """Prompts of 8 tokens, completions of 60 to 100 % of `longest`, EOS at the end: lists of ids."""
    import random
    rng = random.Random(seed)
    text = lambda length: [rng.randrange(2, SIZES["vocab_size"]) for _ in range(length)]
    side = lambda: text(rng.randint(longest * 3 // 5, longest) - 1) + [EOS]
    return [{"prompt": text(8), "chosen": side(), "rejected": side()} for _ in range(n)]


def clock(stamps, skip):
    """Median seconds between time stamps, the first ones left out."""
    return statistics.median(b - a for a, b in zip(stamps[skip:], stamps[skip + 1:]))


def product_rate():
    """float32 operations a second in a product of 2048 x 2048 matrices: as PyTorch computes it by default, and as `dpo.py` has it done."""
    import torch
    a, rates = torch.randn(2048, 2048), []
    for context in (contextlib.nullcontext(), adapter().dpo.onednn_products(torch.nn.Linear(1024, 1024))):
        times = []
        with context:
            for _ in range(5):
                started = time.perf_counter()
                a @ a
                times.append(time.perf_counter() - started)
        rates.append(2 * 2048 ** 3 / min(times))
    return {"default_rate": rates[0], "onednn_rate": rates[1]}


# ---- contestants: each returns units a second --------------------------------------------------------------------------

def adapter():
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import bench_adapter
    if os.environ.get("MKL_ONLY"):
        bench_adapter.dpo.onednn_suits = lambda: False
    return bench_adapter


def dpo_ours(steps=40):
    stamps = []
    adapter().dpo_steps(synthetic_pairs(), steps, BATCH, BETA, RATE, SIZES, lambda loss: stamps.append(time.perf_counter()))
    return BATCH / clock(stamps, 10)


def generate_ours():
    prompts, stamps = [pair["prompt"] for pair in synthetic_pairs(256)], [time.perf_counter()]
    for _ in range(8):
        adapter().sample_tokens(prompts, 40, SIZES)
        stamps.append(time.perf_counter())
    return 256 * 40 / clock(stamps, 2)


def ppo_ours(updates=8):
    stamps = []
    adapter().ppo_updates([pair["prompt"] for pair in synthetic_pairs()], updates, 40, 4, SIZES, lambda: stamps.append(time.perf_counter()))
    return 1 / clock(stamps, 2)


def peers_gpt2(kind="GPT2LMHeadModel", **more):
    import transformers
    sizes = dict(n_positions=64, n_embd=128, n_layer=4, n_head=4) | more
    return getattr(transformers, kind)(transformers.GPT2Config(
        vocab_size=512, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=0, **sizes))


def plain_loop(model, completion_logits, online=False, steps=40):
    """The shortest honest loop: rows padded on the right, fused AdamW. completion_logits(model, tokens, real) -> logits that predict
    what stands behind the prompts. The reference is asked about all pairs first or, online, at each step about that step's."""
    import torch
    import torch.nn.functional as F
    pairs, frozen = synthetic_pairs(), copy.deepcopy(model)

    def logps(model, which):
        texts = [pairs[i]["prompt"] + pairs[i][side] for side in ("chosen", "rejected") for i in which]
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        real = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
        logits = completion_logits(model, tokens, real)
        return (logits.log_softmax(-1).gather(-1, tokens[:, 8:, None]).squeeze(-1) * real[:, 8:]).sum(1).view(2, -1)
    with torch.no_grad():
        known = None if online else torch.cat([logps(frozen, range(i, i + BATCH)) for i in range(0, len(pairs), BATCH)], 1)
    optimizer, stamps = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0, fused=True), []
    for _ in range(steps):
        which = torch.randint(len(pairs), (BATCH,))
        with torch.no_grad():
            reference = logps(frozen, which.tolist()) if online else known[:, which]
        margins = logps(model, which.tolist()) - reference
        (-F.logsigmoid(BETA * (margins[0] - margins[1])).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        stamps.append(time.perf_counter())
    return BATCH / clock(stamps, 10)


def dpo_plain_own():
    """Over `dpo.py`'s own model, which is of nanoGPT's kind."""
    return plain_loop(adapter().gpt(SIZES), lambda model, tokens, real: model(tokens)[:, 7:-1])


def dpo_plain_transformers():
    """Over transformers' model, with the head where it is needed."""
    return plain_loop(peers_gpt2(), lambda model, tokens, real: model.lm_head(
        model.transformer(tokens, use_cache=False).last_hidden_state[:, 7:-1]))


def dpo_as_the_papers_code():
    """What a step of the paper's reference code does: an attention mask, all logits, the reference at each step; but AdamW."""
    return plain_loop(peers_gpt2(), lambda model, tokens, real: model(tokens, attention_mask=real.long()).logits[:, 7:-1], online=True)


def generate_transformers():
    import torch
    prompts, model, stamps = torch.tensor([pair["prompt"] for pair in synthetic_pairs(256)]), peers_gpt2().eval(), [time.perf_counter()]
    model.generation_config.eos_token_id = None
    for _ in range(8):
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=40, pad_token_id=0)
        stamps.append(time.perf_counter())
    return 256 * 40 / clock(stamps, 2)


def word_tokenizer():
    """TRL wants text: w2 w3 ... are words of a tokenizer that has no others."""
    import tokenizers
    import transformers
    words = {"<pad>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, 512)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")


def with_clock(stamps):
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments, **options):
            stamps.append(time.perf_counter())
    return Clock()


TRL = dict(report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
           dataloader_pin_memory=False, learning_rate=RATE)


def dpo_trl(steps=40, precompute=True):
    import datasets
    import trl
    words = lambda ids: " ".join("<eos>" if i == EOS else f"w{i}" for i in ids)
    rows = [{"prompt": words(pair["prompt"]), **{side: " " + words(pair[side]) for side in ("chosen", "rejected")}} for pair in synthetic_pairs()]
    model, stamps = peers_gpt2(), []
    arguments = trl.DPOConfig(tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=steps, beta=BETA, max_length=64,
                              precompute_ref_log_probs=precompute, optim="adamw_torch_fused", **TRL)
    trl.DPOTrainer(model, None if precompute else copy.deepcopy(model), args=arguments, train_dataset=datasets.Dataset.from_list(rows),
                   processing_class=word_tokenizer(), callbacks=[with_clock(stamps)]).train()
    return BATCH / clock(stamps, 10)


def dpo_trl_online():
    return dpo_trl(precompute=False)


def ppo_trl(updates=8):
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    rows = datasets.Dataset.from_list([{"input_ids": pair["prompt"]} for pair in synthetic_pairs()])
    policy, stamps, kind = peers_gpt2(), [], "GPT2ForSequenceClassification"
    arguments = PPOConfig(tempfile.mkdtemp(), per_device_train_batch_size=64, num_mini_batches=1, num_ppo_epochs=4, total_episodes=updates * 64,
                          response_length=40, local_rollout_forward_batch_size=64, temperature=1.0, stop_token=None, num_sample_generations=0,
                          kl_coef=0.05, logging_steps=10 ** 6, **TRL)
    PPOTrainer(arguments, word_tokenizer(), policy, copy.deepcopy(policy), peers_gpt2(kind, num_labels=1, n_layer=1, n_embd=32, n_head=2).eval(),
               rows, peers_gpt2(kind, num_labels=1), eval_dataset=rows.select(range(64)), callbacks=[with_clock(stamps)]).train()
    return 1 / clock(stamps, 2)


TABLES = {"dpo": ("pairs/s", [dpo_ours, dpo_plain_own, dpo_plain_transformers, dpo_as_the_papers_code, dpo_trl, dpo_trl_online]),
          "generate": ("tokens/s", [generate_ours, generate_transformers]),
          "ppo": ("updates/s", [ppo_ours, ppo_trl])}


# ---- growth: ours alone, one quantity at a time ------------------------------------------------------------------------

def grow(pairs=512, length=64, width=128, tokens_a_step=8192):
    """DPO steps of a constant number of tokens -> milliseconds a step, seconds before the first one, memory, and operations a step."""
    stamps, config = [time.perf_counter()], SIZES | {"block_size": length, "n_embd": width}
    data, batch = synthetic_pairs(pairs, length - 8), tokens_a_step // (2 * length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    adapter().dpo_steps(data, 10, batch, BETA, RATE, config, lambda loss: stamps.append(time.perf_counter()))
    step, tokens = clock(stamps, 3), 2 * (8 + 0.8 * (length - 8)) * batch
    weights = SIZES["vocab_size"] * width + SIZES["n_layer"] * 12 * width ** 2
    quadratic = 12 * SIZES["n_layer"] * width * (tokens / 2 / batch) / 2             # causal attention reads half of the keys
    return {"step": 1e3 * step, "first": stamps[1] - stamps[0] - step, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
            "rate": tokens * (6 * weights + quadratic) / step, "quadratic": quadratic / (6 * weights + quadratic)}


def growth():
    print("\n| pairs | ms a step | s before the first step | MB |\n|---|---|---|---|")
    for pairs in (1_000, 10_000, 100_000):
        row = alone("grow", pairs=pairs, length=24, width=32)
        print(f"| {pairs:,} | {row['step']:.0f} | {row['first']:.1f} | {row['megabytes']:.0f} |")
    print("\n| tokens in a sequence | ms a step | of it attention's quadratic part, by count |\n|---|---|---|")
    for length in (64, 128, 256, 512):
        row = alone("grow", length=length, pairs=128)
        print(f"| {length} | {row['step']:.0f} | {row['quadratic']:.0%} |")
    print("\n| width | ms a step | of the product rate: default, as dpo.py asks for it |\n|---|---|---|")
    for width in (128, 256, 512):
        row = alone("grow", width=width, pairs=128)
        print(f"| {width} | {row['step']:.0f} | {row['rate'] / row['default_rate']:.0%}, {row['rate'] / row['onednn_rate']:.0%} |")


# ---- one process a measurement -----------------------------------------------------------------------------------------

def alone(name, **options):
    """Run a function of this file in a process of its own -> its numbers, the process's peak memory, and the product rates then."""
    done = subprocess.run([sys.executable, __file__, "--alone", name, json.dumps(options)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(name, options):
    import torch
    if THREADS:
        torch.set_num_threads(int(THREADS))
    result = globals()[name](**options)
    result = result if isinstance(result, dict) else {"rate": result}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**result, "peak": peak, **product_rate()}))


def table(name, rounds):
    unit, contestants = TABLES[name]
    results = {contestant.__name__: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in list(results):
            try:
                results[contestant].append(alone(contestant))
            except RuntimeError as error:
                if "ModuleNotFoundError" not in str(error):
                    raise
                print(f"{contestant} left out: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
                del results[contestant]
    middle = {contestant: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for contestant, runs in results.items()}
    ours = next(iter(middle.values()))["rate"]
    print(f"\n| {name} | {unit} | ours is faster | peak MB | of the product rate: default, as dpo.py asks for it |\n|---|---|---|---|---|")
    for contestant, row in middle.items():
        work = row["rate"] * 80 * (6 * 851_968 + 12 * 4 * 128 * 20)                  # operations a second, if rates are pairs
        share = "" if name != "dpo" else f"{work / row['default_rate']:.0%}, {work / row['onednn_rate']:.0%}"
        print(f"| {contestant} | {row['rate']:.3g} | {ours / row['rate']:.2f}x | {row['peak']:.0f} | {share} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        answer(sys.argv[2], json.loads(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--only", choices=(*TABLES, "growth"), help="one of the tables")
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--mkl", action="store_true", help="ours without oneDNN's products")
        options = parser.parse_args()
        if options.mkl:
            os.environ["MKL_ONLY"] = "1"
        for name in TABLES:
            if options.only in (None, name):
                table(name, options.rounds)
        if options.only in (None, "growth"):
            growth()
