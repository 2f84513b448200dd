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
import torch.nn.functional as F
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "rm", "ppo"])
def test_two_processes_equal_one(world, tmp_path, stage):
    """torchrun with two processes, by DDP and by FSDP2: the losses of one process to 1e-5, though the batch of 5 is uneven;
    rank 0 alone has written. Rejected: half of the batch."""
    options = ["--steps", 4, "--batch-size", 5 if stage != "ppo" else 6] + (["--minibatch", 3] if stage == "ppo" else [])
    arguments = [a for a in command(world, stage) if a not in ("--dropout", 0.1)] + options
    assert run(*arguments, "--out", tmp_path / "one") == 0
    for flags in ([], ["--fsdp", "--micro-batch", 1]):
        out = tmp_path / ("fsdp" if flags else "ddp")
        result = torchrun(*arguments, *flags, "--out", out)
        assert result.returncode == 0, result.stderr
        rows, expected = ([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()[:-1]] for path in (out, tmp_path / "one"))
        assert [row["step"] for row in rows] == [0, 1, 2, 3]
        for name in ("loss", "gradient_norm"):
            close(column(rows, name), column(expected, name), name, tolerance=1e-5)
        close(GPT.from_pretrained(out).wte.weight, GPT.from_pretrained(tmp_path / "one").wte.weight, tolerance=1e-4)
        assert result.stdout.count("rows") == 1


def torchrun(*arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", dpo.__file__,
                           *map(str, arguments)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_less_data_than_processes(world, tmp_path):
    """One pair, a batch of one, two processes: the second has nothing of its own, and the numbers are those of one process."""
    data = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "the plot", "chosen": " was good.", "rejected": " was bad."}])
    arguments = "dpo", "--data", data, "--init", world / "sft", "--steps", 3, "--batch-size", 1
    for flags in ([], ["--fsdp"]):
        assert torchrun(*arguments, *flags, "--out", tmp_path / "two", "--overwrite").returncode == 0
        assert run(*arguments, "--out", tmp_path / "one", "--overwrite") == 0
        rows, expected = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()[:-1]] for name in ("two", "one"))
        close(column(rows, "loss"), column(expected, "loss"), tolerance=1e-5)


@pytest.mark.slow
def test_a_dead_process_ends_all(world, tmp_path):
    """Of two processes one is killed: the other says so and ends, torchrun too; the checkpoint is whole."""
    out = tmp_path / "out"
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", dpo.__file__,
                            *map(str, command(world, "dpo", "--steps", 100_000, "--save-every", 5, "--out", out))],
                           stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "checkpoint.pt").exists() and job.poll() is None:
        time.sleep(0.2)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 1 and "another process died" in said
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] >= 5


PAIR = '{"prompt": "p", "chosen": "c", "rejected": "r"}'


@pytest.mark.parametrize("line, complaint", [
    (b"{", "not JSON"), (b"[1]", "object"), (b"\xff\xfe\x00", "UTF-8"), (b"\x00\x01", "not JSON"), (b'{"prompt": "p", "chosen": "c"}', "missing"),
    *[(PAIR.replace('"c"', value).encode(), complaint) for value, complaint in [("null", "null"), ("3", "string"), ('" "', "empty"), ("[]", "string"),
                                                                                 (json.dumps("long " * 99), "tokens")]]], ids=repr)
def test_faults_of_data_end_before_training(world, tmp_path, capfd, line, complaint):
    """Exit code 2 and one line, path:line: what is wrong; nothing is written. For the texts of sft and the prompts of ppo too."""
    for stage in ("dpo", "rm") if b"tokens" in complaint.encode() else ("dpo", "rm", "sft", "ppo"):
        path, good = tmp_path / "data.jsonl", PAIR.encode()
        field = {"sft": b"text", "ppo": b"prompt"}.get(stage)
        bad = line
        if field:
            good, bad = b'{"%s": "p"}' % field, line.replace(b'"prompt": "p", "chosen"', b'"%s"' % field)
            bad = bad if bad != b'{"%s": "c"}' % field else b"{}"
        path.write_bytes(good + b"\n\n" + bad + b"\n")
        options = {"sft": TINY, "ppo": ["--init", world / "sft", "--reward", world / "rm"]}.get(stage, ["--init", world / "sft"])
        assert run(stage, "--data", path, "--out", tmp_path / "out", *options) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"dpo.py: {path}:3: ") and complaint in said and said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_faults_of_files_and_arguments(world, tmp_path, capfd):
    """Absent, empty, a directory, an unknown model, a model that needs a network, a broken one, a wrong vocabulary, an output
    directory with other people's files: exit code 2 and one line that names it."""
    (tmp_path / "empty.jsonl").touch()
    for path in (tmp_path / "absent.jsonl", tmp_path / "empty.jsonl", tmp_path):
        for stage, more in (("sft", TINY), ("dpo", ["--init", world / "sft"]), ("ppo", ["--init", world / "sft", "--reward", world / "rm"])):
            assert run(stage, "--data", path, "--out", tmp_path / "out", *more) == 2
            said = capfd.readouterr().err
            assert said.startswith(f"dpo.py: {path}:") and said.count("\n") == 1
    broken, other, foreign = (tmp_path / name for name in ("broken", "other", "foreign"))
    tiny_gpt(300, block_size=64).save_pretrained(broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    (tmp_path / "t.jsonl").write_text('{"text": "quite other words"}')
    assert run("sft", "--data", tmp_path / "t.jsonl", "--out", other, *TINY) == 0
    foreign.mkdir(), (foreign / "thesis.tex").write_text("x")
    data, out = world / "pairs.jsonl", tmp_path / "out"
    for options, complaint in [(["--init", "gpt2"], "hf download"), (["--init", "no/such"], "no such directory"), (["--init", broken], "broken"),
                               (["--init", world / "rm"], "reward model"), (["--init", world / "sft", "--reference", other], "vocabulary"),
                               (["--init", world / "sft", "--out", foreign], "--overwrite"), (["--init", world / "sft", "--out", world / "rm"], "--resume"),
                               (["--init", world / "sft", "--out", world / "sft", "--overwrite"], "overwrite a model"),
                               (["--init", world / "sft", "--hyper", "label_smoothing=0.1"], "label_smoothing")]:
        capfd.readouterr()
        assert run("dpo", "--data", data, "--out", out, *options) == 2
        said = capfd.readouterr().err
        assert complaint in said and said.count("\n") == 1, said
        assert not out.exists() and [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    assert run("dpo", "--data", data, "--init", world / "sft", "--out", foreign, "--overwrite") == 0 and (foreign / "thesis.tex").exists()


def test_checkpoints_that_are_refused(world, tmp_path, capfd):
    """Cut short, another program's, code in disguise, made with other settings or data: exit code 2, one line, nothing changed."""
    import pickle

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    out = tmp_path / "out"
    assert run(*command(world, "dpo", "--out", out)) == 0
    good = (out / "checkpoint.pt").read_bytes()
    for content, complaint in [(good[:-1000], "cut short"), (b"", "cut short"), (pickle.dumps(Code()), "cut short"), (good, "beta")]:
        (out / "checkpoint.pt").write_bytes(content)
        before = {path: path.read_bytes() for path in out.iterdir()}
        capfd.readouterr()
        assert run(*command(world, "dpo", "--out", out, "--resume", *(["--beta", 0.2] if content is good else []))) == 2
        said = capfd.readouterr().err
        assert complaint in said and said.count("\n") == 1 and before == {path: path.read_bytes() for path in out.iterdir()}
    assert not (tmp_path / "executed").exists()
    assert run(*command(world, "dpo", "--out", out, "--resume")) == 0            # the good one: done already, nothing to do


def limited(limit, arguments):
    """Run with files limited to `limit` bytes: beyond, writing fails as on a full disk."""
    def job():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(run(*arguments))
    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    child.join()
    return child.exitcode


def test_full_disk(world, tmp_path, capfd):
    """A checkpoint that cannot be written ends the run with code 1 and one line; the previous checkpoint is byte for byte there."""
    out = tmp_path / "out"
    arguments = command(world, "dpo", "--out", out, "--save-every", 4)
    assert killed(arguments, 100) == 0
    before = {name: (out / name).read_bytes() for name in dpo.OURS}
    arguments = [48 if argument == 12 else argument for argument in arguments]
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    saved["settings"]["steps"] = "48"
    torch.save(saved, out / "checkpoint.pt")
    kept = (out / "checkpoint.pt").read_bytes()
    capfd.readouterr()
    assert limited(len(kept) // 2, arguments + ["--resume"]) == 1
    said = capfd.readouterr().err
    assert "could not be written" in said.splitlines()[-1] and "Traceback" not in said
    assert (out / "checkpoint.pt").read_bytes() == kept and (out / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert not list(out.glob("*.part"))


def test_nan_names_the_lines(world, tmp_path, capfd, monkeypatch):
    """A loss that is not finite at step 5: code 1; the message has the step, that batch's lines and the last good checkpoint, which
    can be gone on from."""
    calls, good = [], dpo.LOSSES["dpo"]

    def faulty(*logps, **options):
        calls.append(1)
        return good(*logps, **options) * (math.nan if len(calls) == 6 else 1)
    monkeypatch.setitem(dpo.LOSSES, "dpo", faulty)
    out = tmp_path / "out"
    assert run(*command(world, "dpo", "--out", out, "--save-every", 2)) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert "step 5" in said and f"checkpoint, {out}, has 4 steps" in said
    pairs, _ = dpo.read_pairs(argparse_like(world), dpo.read_tokenizer(world / "sft"), 64)
    rows = dpo.shuffled(len(pairs), dpo.Training(12, 1, 8), pairs.prompt_index)(5)
    assert ", ".join(map(str, sorted(pairs.lines[rows]))) in said
    assert run(*command(world, "dpo", "--out", out, "--save-every", 2, "--resume")) == 0


def argparse_like(world):
    import argparse
    return argparse.Namespace(data=world / "pairs.jsonl", skip_long=False, all=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path, capfd, number, monkeypatch):
    """Ctrl-C during step 3 of 12: the step is finished and saved, the message names --resume, and going on gives the unbroken run's bytes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*command(world, "dpo", "--out", whole)) == 0
    good, calls = dpo.LOSSES["dpo"], []

    def interrupted(*logps, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return good(*logps, **options)
    monkeypatch.setitem(dpo.LOSSES, "dpo", interrupted)
    assert run(*command(world, "dpo", "--out", broken)) == 1
    said = capfd.readouterr().err
    assert "stopped after 3 of 12 steps" in said and "--resume" in said
    assert run(*command(world, "dpo", "--out", broken, "--resume")) == 0
    assert weights(broken) == weights(whole)


def test_data_is_counted(world, tmp_path, capsys):
    """Two duplicates, one pair with equal sides, one prompt cut on the left, one completion too long and left out: all are reported."""
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    rows += [rows[3], rows[4], {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "word " * 99, "chosen": "a", "rejected": "b"},
             {"prompt": "q", "chosen": "a " * 99, "rejected": "b"}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert run("dpo", "--data", data, "--init", world / "sft", "--out", tmp_path / "out", "--skip-long", "--steps", 1) == 0
    said = capsys.readouterr().out
    for words in ("24 rows", "2 duplicates", "1 pairs with chosen == rejected", "1 pairs with a cut prompt", "1 pairs left out, too long"):
        assert words in said


def test_split_is_by_prompt():
    """200 prompts with five pairs each: no prompt stands on both sides, about a tenth is held out. Rejected: a split by row."""
    preferences = [dpo.Preference(f"prompt {i % 200}", f"a{i}", f"b{i}", i + 1) for i in range(1000)]
    pairs = dpo.encode_pairs(dpo.train_tokenizer(["prompt 1 a b"]), preferences, 32)

    def check(held_out):
        train, rest = pairs.subset(~held_out), pairs.subset(held_out)
        assert not set(train.prompt_index) & set(rest.prompt_index) and len(train) + len(rest) == 1000 and 50 <= len(rest) <= 150
        side = lambda part, i: bytes(part.completions[part.chosen[i]].astype(np.uint8)[:-1]).decode()
        assert side(rest, 0) == f"a{rest.lines[0] - 1}"
    check(pairs.held_out)
    rejects(check, np.arange(1000) < 100)


@pytest.mark.slow
def test_memory_grows_by_token_ids_only():
    """Pairs of 20 kB of text stream through encode_pairs: of 40 MB of text, what stays is the ids, 4 bytes each, and 1 kB a pair at
    most for arrays and indices. Rejected: the texts kept."""
    import tracemalloc
    tokenizer = dpo.train_tokenizer(["word " * 9])

    def check(keep):
        kept = []

        def stream():
            for i in range(2000):
                pair = dpo.Preference(f"{i}", "word " * 2000 + str(i), "word " * 2000 + f"b{i}")
                if keep:
                    kept.append(pair)
                yield pair
        tracemalloc.start()
        pairs = dpo.encode_pairs(tokenizer, stream(), 20_000)
        used, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        ids = 4 * sum(len(c) for c in pairs.completions)
        assert peak < ids + 2000 * 1024 + 2e6, (used, peak, ids)
    check(False)
    rejects(check, True)


def test_special_tokens_in_data_are_text(world, tmp_path):
    """`<|endoftext|>` planted in prompt and completion: its ids are those of its letters; the one EOS is the one we put at the end."""
    tokenizer = dpo.read_tokenizer(world / "sft")
    pairs = dpo.encode_pairs(tokenizer, [dpo.Preference("a<|endoftext|>b", "c<|endoftext|>d", "e")], 64)
    for ids, text in ((pairs.prompts[0], "a<|endoftext|>b"), (pairs.completions[0][:-1], "c<|endoftext|>d")):
        assert tokenizer.eot_token not in ids and tokenizer.decode(ids.tolist()) == text
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a<|endoftext|>b", "chosen": "c<|endoftext|>", "rejected": "<|endoftext|>"}])
    assert run("dpo", "--data", data, "--init", world / "sft", "--out", tmp_path / "out", "--steps", 2) == 0


TEXTS = ["the plot was good, but", "é 日本 😀  \n\t y", "<|endoftext|> stays text", "'ll don't 12345 !!"]


def test_what_we_save_loads_in_transformers(world, monkeypatch):
    """AutoTokenizer and GPT2LMHeadModel read our directory: the same ids, logits to 1e-4; and we read what they save."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(world / "sft"), dpo.read_tokenizer(world / "sft")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == dpo.encode(ours, text)
    assert theirs.eos_token_id == ours.eot_token == 299
    model, (own, _) = transformers.GPT2LMHeadModel.from_pretrained(world / "sft").eval(), dpo.open_model(world / "sft", "cpu")
    tokens = torch.tensor([dpo.encode(ours, TEXTS[0])])
    close(own(tokens), model(tokens).logits, tolerance=1e-4)


def test_shards_and_their_tokenizers(world, tmp_path):
    """A model saved by transformers in shards, with its tokenizer as tokenizer.json, or vocab.json and merges.txt alone."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = transformers.GPT2LMHeadModel.from_pretrained(world / "sft").eval(), transformers.AutoTokenizer.from_pretrained(world / "sft")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB"), tokenizer.save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    ours, encoding = dpo.open_model(tmp_path / "theirs", "cpu")
    tokens = torch.tensor([dpo.encode(encoding, TEXTS[1])])
    close(ours(tokens), model(tokens).logits, tolerance=1e-4)
    (tmp_path / "theirs" / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    for text in TEXTS:
        assert dpo.encode(dpo.open_model(tmp_path / "theirs", "cpu")[1], text) == dpo.encode(encoding, text) == tokenizer(text)["input_ids"]


def test_sample_prints_side_by_side(world, capsys):
    """Two models, two prompts, two completions each; a model's reward against itself is 0; the same seed says the same again."""
    arguments = "sample", "--init", world / "sft", "--init", world / "sft", "--prompt", "the plot", "--prompt", "the", "--n", 2, "--top-k", 9, "--top-p", 0.9
    said = []
    for seed in (0, 0, 1):
        assert run(*arguments, "--seed", seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert said[0].count("the plot ...") == 2 and said[0].count("reward +0.00") == 8


def test_eval_of_the_reference_and_of_a_reward_model(world, capsys):
    """A policy against itself has margin 0 and loss log 2; a reward model needs no reference; a language model does."""
    assert run("eval", "--data", world / "pairs.jsonl", "--init", world / "sft", "--reference", world / "sft") == 0
    said = capsys.readouterr().out
    assert "margin 0  " in said and "loss 0.6931" in said
    assert run("eval", "--data", world / "pairs.jsonl", "--init", world / "rm") == 0 and "accuracy" in capsys.readouterr().out
    assert run("eval", "--data", world / "pairs.jsonl", "--init", world / "sft") == 2


def test_lean_logps_equal_plain_ones(monkeypatch):
    """With a large vocabulary the log-softmax is made again in the backward pass, in parts: the same log-probs and gradients."""
    logits = torch.randn(700, 50_000, requires_grad=True)
    tokens, mask = torch.randint(50_000, (1, 701)), torch.ones(1, 701)
    logps = dpo.token_logps(lambda tokens: F.pad(logits.view(1, 700, -1), (0, 0, 0, 1)), tokens, mask)
    expected = logits.log_softmax(-1).gather(1, tokens[:, 1:].reshape(-1, 1)).view(1, 700)
    close(logps[:, 1:], expected, tolerance=1e-5)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (logps, expected)]
    close(*gradients, tolerance=1e-5)
