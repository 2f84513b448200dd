# ======================================================================================================================
# 3. The command line: your data, GPT-2, more machines, nothing lost
# ======================================================================================================================
import contextlib
import hashlib
import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import json, math, random, os
import numpy as np
import pytest
import torch
import dpo
from dpo import GPT
from test_dpo import close, rejects, tiny_gpt, column

torch.set_num_threads(1)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments):
    """The exit code of `python dpo.py arguments`, without a new interpreter."""
    return dpo.main([str(argument) for argument in arguments])


def summary(directory):
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])


TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 64 --vocab-size 300".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """60 reviews as texts, pairs and prompts; an SFT model and a reward model trained on them by the command line."""
    path, rng = tmp_path_factory.mktemp("stages"), random.Random(0)
    cuts = [dpo.cut_review(rng, dpo.sample_review(rng)) for _ in range(60)]
    write_jsonl(path / "texts.jsonl", [{"text": prompt + completion} for prompt, completion in cuts])
    write_jsonl(path / "prompts.jsonl", [{"prompt": prompt} for prompt, _ in cuts])
    write_jsonl(path / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": cuts[i - 1][1]} for i, (p, c) in enumerate(cuts)])
    assert run("sft", "--data", path / "texts.jsonl", "--out", path / "sft", "--batch-size", 8, *TINY) == 0
    assert run("rm", "--data", path / "pairs.jsonl", "--init", path / "sft", "--out", path / "rm", "--batch-size", 8) == 0
    return path


def command(world, stage, *more):
    """The arguments of a short run of a stage: 12 steps, batches of 8."""
    own = {"sft": ["--data", world / "texts.jsonl", *TINY, "--dropout", 0.1],
           "dpo": ["--data", world / "pairs.jsonl", "--init", world / "sft", "--learning-rate", 1e-2],
           "rm": ["--data", world / "pairs.jsonl", "--init", world / "sft"],
           "ppo": ["--data", world / "prompts.jsonl", "--init", world / "sft", "--reward", world / "rm", "--minibatch", 4, "--max-new-tokens", 8]}
    return [stage, "--steps", 12, "--batch-size", 8, *own[stage], *more]


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def killed(arguments, delay):
    """Run in a process of its own, and kill -9 it after `delay` seconds -> its exit code."""
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(run(*arguments)))
    child.start()
    child.join(delay)
    child.kill()
    child.join()
    return child.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "rm", "ppo"])
def test_kill_and_resume_changes_no_bit(world, tmp_path, stage):
    """Killed at ten random moments and resumed after each, a run ends with the bytes of an unbroken one: weights, and every step's
    numbers, none of them twice. The kills fall anywhere in the seconds that a run takes, reading and writing included.
    Rejected: an unbroken run of another seed."""
    started = time.time()
    assert killed(command(world, stage, "--out", tmp_path / "whole", "--save-every", 1), 100) == 0
    seconds, rng, kills = time.time() - started, random.Random(stage), 0
    arguments = command(world, stage, "--out", tmp_path / "broken", "--save-every", 1, "--resume")
    while kills < 10:
        if killed(arguments, rng.uniform(0, seconds)) == -signal.SIGKILL:
            kills += 1
        if (tmp_path / "broken" / "metrics.jsonl").exists() and "summary" in (tmp_path / "broken" / "metrics.jsonl").read_text():
            assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
            for path in (tmp_path / "broken").iterdir():                         # done: begin anew, until ten kills have struck
                path.unlink()
    assert killed(arguments, 100) == 0

    def check(directory):
        assert weights(directory) == weights(tmp_path / "whole")
        rows, expected = ([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (directory, tmp_path / "whole"))
        assert rows[:-1] == expected[:-1] and [row["step"] for row in rows[:-1]] == list(range(12)) and rows[-1]["summary"]
    check(tmp_path / "broken")
    assert run(*command(world, stage, "--out", tmp_path / "other", "--seed", 1)) == 0
    rejects(check, tmp_path / "other")
