"""Training a pair for real at a small scale: resumable to the bit, recorded, gated."""

import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model

from deferral_train.errors import InputError
from deferral_train.pairs.gate import GateResult, check_pair
from deferral_train.pairs.load import load_models, load_tokenizer, make_pair
from deferral_train.pairs.overlap import find_overlap, read_training_ids
from deferral_train.pairs.padding import IGNORED, next_token_logits
from deferral_train.pairs.prompts import Prompt, write_prompts
from deferral_train.pairs.scratch.alignable import alignable, draft_weights
from deferral_train.pairs.scratch.batches import AnswerBatches, PairBatches, WindowBatches
from deferral_train.pairs.scratch.models import new_model
from deferral_train.pairs.scratch.muon import Muon, orthogonal
from deferral_train.pairs.scratch.optimise import LoopSettings, first_layers, optimise
from deferral_train.pairs.scratch.tokenizer import QUESTION, train_tokenizer
from deferral_train.pairs.scratch.train import train_pair
from deferral_train.pairs.scratch.train_config import ModelSize, PairConfig, PairText, Schedule

SMALL = {
    "drafter": ModelSize(1, 16, 2, 32),
    "verifier": ModelSize(2, 32, 2, 64),
    "vocab_size": 320,
    "context": 32,
}
SENTENCES = [
    "the red fox runs over the hill",
    "a blue bird sings in the tree",
    "two men walk along the river",
]
GERMAN = ["der rote fuchs rennt", "ein blauer vogel singt", "zwei maenner gehen"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "book.txt").write_text("".join(f"{SENTENCES[i % 3]} {i % 7}\n" for i in range(8000)))
    (folder / "all.en").write_text("".join(f"{SENTENCES[i % 3]} {i}\n" for i in range(300)))
    (folder / "all.de").write_text("".join(f"{GERMAN[i % 3]} {i}\n" for i in range(300)))
    return folder


def llama_config(text, **changes):
    config = PairConfig(
        text=PairText(files=(str(text / "book.txt"),)),
        drafter_schedule=Schedule(40, 4, 3e-3, warmup=5),
        verifier_schedule=Schedule(
            60, 4, 3e-3, warmup=5, muon_rate=0.02, final_rate=0.0, shallow_layers=1, shallow_steps=30
        ),
        **SMALL,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def llama(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("llama")
    return out, train_pair(llama_config(text), out)


def test_a_trained_pair_is_two_checkpoints_that_load(llama, text):
    out, result = llama
    pair = load_models(result.drafter, result.verifier, device="cpu")
    assert 300 < pair.vocab_size == len(pair.tokenizer) <= 320
    assert result.losses["verifier"] < 4.0
    assert not (out / "work").exists()
    record = json.loads((out / "pair.json").read_text())
    assert record["config"]["verifier"]["layers"] == pair.verifier.config.num_hidden_layers == 2
    assert record["fingerprints"] == pair.fingerprints
    ids = pair.tokenizer("the red fox runs over")["input_ids"]
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            pair.verifier(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:])
        )
    assert nats < 3.0


def test_training_ids_find_the_training_text(llama, text):
    seen = read_training_ids(llama[0])
    assert len(seen["ids"]) > 40
    assert find_overlap(seen, [Prompt("book.txt#1", "")]) == ["book.txt#1"]


def test_a_finished_pair_is_reused_and_another_configuration_refused(llama, text):
    out, result = llama
    before = (out / "verifier" / "model.safetensors").stat().st_mtime_ns
    again = train_pair(llama_config(text), out)
    assert again.reused
    assert (again.gate, again.losses) == (result.gate, result.losses)
    assert (out / "verifier" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds a pair of another configuration"):
        train_pair(llama_config(text, seed=1), out)


HERE = os.path.dirname(__file__)
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from deferral_train.pairs.scratch.train import train_pair
sys.path[:0] = {tests!r}
from test_train import llama_config
from pathlib import Path
def bars(role, steps):
    def report(step, tokens, loss):
        print(role, step, flush=True)
    return report
train_pair(llama_config(Path({text!r}), checkpoint_seconds=0.0), {out!r}, bars)
"""


def test_a_killed_training_ends_with_the_same_bits(llama, text, tmp_path, warm):
    """SIGKILL amid the verifier, then amid the drafter, then run on; every step writes a checkpoint."""
    out = tmp_path / "killed"
    script = SCRIPT.format(tests=[HERE, os.path.dirname(HERE)], text=str(text), out=str(out))
    for role, step in (("verifier", 23), ("drafter", 17)):
        process = subprocess.Popen([warm.python, "-c", script], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.split() == [role, str(step)]:
                break
        assert warm.kill(process) == -signal.SIGKILL
        assert not (out / role).exists()
    resumed_at = []
    result = train_pair(
        llama_config(text, checkpoint_seconds=0.0),
        out,
        lambda role, steps: lambda step, tokens, loss: resumed_at.append((role, step)),
    )
    assert resumed_at[0][0] == "drafter"
    assert 15 <= resumed_at[0][1] <= 19
    for role in ("drafter", "verifier"):
        ours, theirs = (load_file(folder / role / "model.safetensors") for folder in (out, llama[0]))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert result.losses == llama[1].losses


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_layers_that_wait_add_nothing_until_they_learn(kind):
    """A fresh model with its first layer alone is the whole model; afterwards it is not, and nothing of it is lost."""
    tokenizer = train_tokenizer(SENTENCES, 320, kind == "t5")
    targets = ("b.txt",) if kind == "t5" else ()
    config = PairConfig(
        kind=kind,
        text=PairText(files=("a.txt",), targets=targets),
        **{**SMALL, "verifier": ModelSize(3, 32, 2, 64)},
    )
    model = new_model(config, "verifier", tokenizer)
    rows = [tokenizer(text)["input_ids"] for text in SENTENCES]
    batches = PairBatches(rows, rows, tokenizer.pad_token_id, 3, 0)
    if kind == "llama":
        batches = AnswerBatches(rows, rows, tokenizer.pad_token_id, 3, 0)
    before = [weight.clone() for weight in model.parameters()]

    def logits(layers):
        with torch.no_grad(), first_layers(model, layers):
            return next_token_logits(model, batches.batch(0))

    assert torch.equal(logits(1), logits(3))
    schedule = Schedule(6, 3, 3e-3, warmup=1, muon_rate=0.02, shallow_layers=1, shallow_steps=5)
    layers_seen = []
    names = [name for name, _ in model.named_parameters()]

    def report(step, tokens, loss):
        moved = {
            name for name, old, new in zip(names, before, model.parameters()) if not torch.equal(old, new)
        }
        layers_seen.append(any(re.search(r"(layers|block)\.2\.", name) for name in moved))

    optimise(
        model, batches, schedule, LoopSettings(Path("unused"), "x", checkpoint_seconds=1e9), report=report
    )
    assert layers_seen == [False] * 5 + [True]
    assert not torch.equal(logits(1), logits(3))
    assert [name for name, _ in model.named_parameters()] == names


def test_muon_takes_steps_whose_singular_values_are_alike():
    """Against the singular value decomposition; tall, wide, and far from well conditioned."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 24), (40, 16), (16, 40)):
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        matrix = u @ torch.diag(torch.logspace(0, -2, min(shape))) @ v
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        along = u.T @ orthogonal(matrix) @ v.T
        assert torch.all((along.diagonal() > 0.6) & (along.diagonal() < 1.3)), along.diagonal()
        assert (along - torch.diag(along.diagonal())).abs().max() < 1e-3
    parameter = torch.nn.Parameter(torch.ones(4, 2))
    parameter.grad = u[:4, :2] * 3
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    still = torch.nn.Parameter(torch.ones(4, 2))
    Muon([still], lr=0.1).step()  # no gradient, no step
    assert torch.equal(still, torch.ones(4, 2))
    expected = torch.ones(4, 2) * 0.95 - 0.1 * 2**0.5 * orthogonal(u[:4, :2])
    torch.testing.assert_close(parameter.detach(), expected)


def test_a_damaged_or_foreign_checkpoint_is_refused(text, tmp_path):
    config = llama_config(text)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "verifier.pt").write_bytes(b"\x80\x04no tensors")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        train_pair(config, tmp_path)
    torch.save({"outcome": "another"}, tmp_path / "work" / "verifier.pt")
    with pytest.raises(InputError, match="of another configuration"):
        train_pair(config, tmp_path)


def test_t5_on_parallel_text_with_distillation(text, tmp_path):
    config = PairConfig(
        kind="t5",
        text=PairText(files=(str(text / "all.en"),), targets=(str(text / "all.de"),)),
        drafter_schedule=Schedule(30, 8, 3e-3, warmup=5, distil=0.5),
        verifier_schedule=Schedule(110, 8, 3e-3, warmup=5),
        **SMALL,
    )
    result = train_pair(config, tmp_path)
    pair = load_models(result.drafter, result.verifier, device="cpu")
    assert pair.is_encoder_decoder
    assert result.losses["verifier"] < result.losses["drafter"]
    source = pair.tokenizer("the red fox runs over the hill 3", return_tensors="pt")
    output = pair.verifier.generate(input_ids=source["input_ids"], max_new_tokens=12, do_sample=False)
    assert pair.tokenizer.decode(output[0], skip_special_tokens=True).startswith("der rote fuchs")
    assert read_training_ids(tmp_path)["ids"][0].startswith("all.en:")


def test_distillation_draws_the_drafter_to_the_verifier(tmp_path):
    """A teacher whose distribution has nothing to do with the text: only the distilled student moves towards it."""
    teacher = tiny_model("llama", seed=1)
    stream = torch.randint(4, 40, (2000,), generator=torch.Generator().manual_seed(0))
    batches = WindowBatches(stream.int(), 16, 8, seed=0)
    batch = batches.batch(10_000)

    def divergence(distil):
        student = tiny_model("llama", seed=2).requires_grad_(True)
        settings = LoopSettings(tmp_path / f"{distil}.pt", "test")
        optimise(student, batches, Schedule(80, 8, 3e-3, 1.0, 5, distil=distil), settings, teacher)
        with torch.no_grad():
            p, q = (next_token_logits(model, batch).log_softmax(-1) for model in (teacher, student))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(1.0) < 0.75 * divergence(0.0)


def drafts_that_reach(logits, labels, top_k, window):
    """Every draft of every start, step by step, as GRIFFIN trains them."""
    weights = torch.zeros(labels.shape)
    for row, gold in enumerate(labels.tolist()):
        for start in range(len(gold)):
            for at in range(start, min(start + window, len(gold))):
                if gold[at] == IGNORED:
                    break
                weights[row, at] += 1
                if gold[at] not in logits[row, at].topk(top_k).indices.tolist():
                    break
    return weights


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_the_alignable_mask_counts_the_drafts_that_reach_a_position(window):
    draw = torch.Generator().manual_seed(window)
    for top_k in (1, 3):
        logits = torch.randn(6, 12, 8, generator=draw)
        labels = logits.argsort(-1, descending=True)[..., 0]
        others = torch.randint(0, 8, labels.shape, generator=draw)
        labels = torch.where(torch.rand(labels.shape, generator=draw) < 0.6, labels, others)
        for row, length in enumerate((12, 12, 7, 3, 1, 0)):
            labels[row, length:] = IGNORED
        reachable, inside = alignable(logits, labels, top_k), labels != IGNORED
        found = draft_weights(reachable, inside, window)
        assert torch.equal(found, drafts_that_reach(logits, labels, top_k, window))
        assert window == 1 or found.max() > 1


def test_the_mask_weighs_the_distillation_and_is_off_by_default(text, tmp_path):
    """One step with the mask moves as the weighted divergence says, and off it counts every label once."""
    teacher = tiny_model("t5", seed=1)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 40, (5 + n % 6,), generator=draw).tolist() for n in range(8)]
    batches = PairBatches(rows, rows[::-1], pad_id=0, size=8, seed=0)
    batch = batches.batch(0)

    def gradient(top_k):
        student = tiny_model("t5", seed=2).requires_grad_(True)
        logits, distribution = (
            next_token_logits(model, batch).log_softmax(-1) for model in (student, teacher)
        )
        weights = (batch["labels"] != IGNORED).float()
        if top_k:
            weights = drafts_that_reach(logits, batch["labels"], top_k, 4)
        ((distribution.exp() * (distribution - logits)).sum(-1) * weights).sum().div(weights.sum()).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    def moved(top_k):
        """AdamW's first step is the sign of the gradient, wherever that is not nearly 0."""
        student = tiny_model("t5", seed=2).requires_grad_(True)
        before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
        schedule = Schedule(
            1, 8, 1e-3, 1.0, 0, weight_decay=0.0, distil=1.0, alignable_top_k=top_k, draft_window=4
        )
        optimise(student, batches, schedule, LoopSettings(tmp_path / "none.pt", "test"), teacher)
        return torch.cat([p.detach().flatten() for p in student.parameters()]) - before

    for top_k in (0, 3):
        wanted, other = gradient(top_k), gradient(3 - top_k)
        sure = wanted.abs() > 1e-4 * wanted.abs().max()
        assert (moved(top_k)[sure].sign() == -wanted[sure].sign()).float().mean() > 0.999
        assert (wanted[sure].sign() != other[sure].sign()).float().mean() > 0.02
    with pytest.raises(InputError, match="alignable_top_k=3 masks the distillation, and distil is 0"):
        Schedule(1, 1, alignable_top_k=3)
    with pytest.raises(InputError, match="alignable_top_k=-1, draft_window=5: use 0"):
        Schedule(1, 1, distil=1.0, alignable_top_k=-1)
    plain = llama_config(text)
    masked = Schedule(40, 4, 3e-3, warmup=5, distil=0.5, alignable_top_k=3)
    assert llama_config(text, drafter_schedule=masked).outcome_hash() != plain.outcome_hash()


def test_batches_depend_on_seed_and_step_alone():
    stream = torch.arange(1000, dtype=torch.int32)
    one, two = (WindowBatches(stream, 10, 4, seed=5) for _ in range(2))
    for step in (30, 3, 30):
        assert all(torch.equal(one.batch(step)[k], two.batch(step)[k]) for k in ("input_ids", "labels"))
    assert torch.equal(one.batch(7)["labels"], one.batch(7)["input_ids"] + 1)
    epoch = torch.cat([one.batch(step)["input_ids"][:, 0] for step in range(25)])
    assert len(set(epoch[:99].tolist())) == 99
    assert not torch.equal(
        one.batch(0)["input_ids"], WindowBatches(stream, 10, 4, seed=6).batch(0)["input_ids"]
    )
    with pytest.raises(InputError, match="less than one context"):
        WindowBatches(stream[:5], 10, 4, seed=0)


def test_sentence_batches_cover_an_epoch_and_mask_padding():
    sources = [[7] * (1 + i % 9) + [i + 10] for i in range(64)]
    batches = PairBatches(sources, [row[-1:] for row in sources], pad_id=0, size=8, seed=0)
    rows = [batches.batch(step) for step in range(8)]
    seen = sorted(int(label) for batch in rows for label in batch["labels"].flatten() if label != IGNORED)
    assert seen == [i + 10 for i in range(64)]
    assert all(torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0) for batch in rows)
    again = PairBatches(sources, [row[-1:] for row in sources], pad_id=0, size=8, seed=0)
    assert torch.equal(again.batch(11)["input_ids"], batches.batch(11)["input_ids"])


def test_tokenizer_is_lossless_and_deterministic():
    texts = ["def f(x):\n    return x  # ünïcode \t", *SENTENCES] * 3
    tokenizer = train_tokenizer(texts, 330, close_texts=False)
    for sample in (*texts[:2], "never seen: 漢字 \x00\n\n  end "):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    assert tokenizer.get_vocab() == train_tokenizer(texts, 330, close_texts=False).get_vocab()


def test_gate_scores_match_a_plain_computation(llama, text):
    result = llama[1]
    pair = load_models(result.drafter, result.verifier, device="cpu")
    held = [Prompt("a", "the red fox runs "), Prompt("b", "two men walk along the ", "river 3\n")]
    gate = check_pair(pair, held, context=64, tries=1)
    nats, tv, tokens = [0.0, 0.0], 0.0, 0
    for item in held:
        ids = torch.tensor([pair.tokenizer(item.prompt + (item.reference or ""))["input_ids"]])
        with torch.no_grad():
            distributions = [
                m(ids).logits[0, :-1].double().log_softmax(-1) for m in (pair.drafter, pair.verifier)
            ]
        for i, distribution in enumerate(distributions):
            nats[i] -= float(distribution.gather(1, ids[0, 1:, None]).sum())
        tv += float((distributions[0].exp() - distributions[1].exp()).abs().sum() / 2)
        tokens += ids.shape[1] - 1
    assert gate.tokens == tokens
    assert gate.drafter_nats == pytest.approx(nats[0] / tokens, abs=1e-5)
    assert gate.verifier_nats == pytest.approx(nats[1] / tokens, abs=1e-5)
    assert gate.mean_tv == pytest.approx(tv / tokens, abs=1e-5)


def test_gate_sees_a_dearer_verifier_and_refuses_equals(llama):
    result = llama[1]
    pair = load_models(result.drafter, result.verifier, device="cpu")
    same = make_pair(pair.verifier, pair.verifier, pair.tokenizer)
    held = [Prompt("a", SENTENCES[0] * 5)]
    equal = check_pair(same, held, tries=1)
    assert equal.advantage == pytest.approx(0)
    assert equal.mean_tv == pytest.approx(0)
    assert equal.agreement == 1
    with pytest.raises(InputError, match=r"better by 0.000 nats .* its pass costs .* needs 3.0"):
        equal.require()
    GateResult(3.0, 2.7, 0.3, 0.7, 100, 1e-3, 4e-3).require()
    with pytest.raises(InputError, match="no token to score"):
        check_pair(pair, [Prompt("a", "")], tries=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, "vocab_size=100"),
        ({"context": 2}, "context=2"),
        ({"kind": "t5"}, "text.targets is empty"),
        ({"verifier_schedule": Schedule(10, 2, distil=0.5)}, "verifier_schedule.distil"),
        (
            {"verifier_schedule": Schedule(10, 2, shallow_layers=2, shallow_steps=5)},
            "verifier_schedule.shallow_layers=2: the verifier has 2 layers",
        ),
    ],
)
def test_bad_configurations_are_refused_by_name(changes, message, text):
    with pytest.raises(InputError, match=message):
        llama_config(text, **changes)


def test_bad_sizes_and_schedules():
    with pytest.raises(InputError, match="multiple of 2"):
        ModelSize(1, 30, 4, 64)
    with pytest.raises(InputError, match="steps and batch"):
        Schedule(0, 4)
    with pytest.raises(InputError, match="rates must be positive"):
        Schedule(10, 4, learning_rate=0.0)
    with pytest.raises(InputError, match=r"muon_rate=-1.0, final_rate=0.1: use 0 or more"):
        Schedule(10, 4, muon_rate=-1.0)
    with pytest.raises(InputError, match=r"final_rate=2.0: .* share of the peak"):
        Schedule(10, 4, final_rate=2.0)
    with pytest.raises(InputError, match="shallow_layers=1, shallow_steps=0: set both above 0, or neither"):
        Schedule(10, 4, shallow_layers=1)
    with pytest.raises(InputError, match="shallow_steps=10 of steps=10 leave none"):
        Schedule(10, 4, shallow_layers=1, shallow_steps=10)
    with pytest.raises(InputError, match=r"text\.targets has 2 files for 1"):
        PairText(files=("a",), targets=("b", "c"))


def test_a_diverging_training_stops_with_advice(text, tmp_path):
    config = llama_config(text, verifier_schedule=Schedule(60, 4, learning_rate=1e18, warmup=0))
    with pytest.raises(InputError, match="lower learning_rate"):
        train_pair(config, tmp_path)


def test_tokenizer_folder_loads_as_what_was_trained(llama):
    tokenizer = load_tokenizer(llama[0] / "verifier")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_the_gate_scores_a_pair_of_questions_through_its_template(tmp_path):
    """Nats of the answer alone, given the question as the template writes it; computed here without the gate."""
    rows = [Prompt(f"q{n}", f"how many of {n % 7}", f"there are {n % 7} of it") for n in range(60)]
    write_prompts(tmp_path / "rows.jsonl", rows)
    config = PairConfig(
        text=PairText(files=(str(tmp_path / "rows.jsonl"),), answers=True),
        vocab_size=300,
        context=64,
        drafter=ModelSize(1, 16, 1, 32),
        verifier=ModelSize(2, 16, 1, 32),
        drafter_schedule=Schedule(10, 4),
        verifier_schedule=Schedule(30, 4),
    )
    told: list[str] = []
    result = train_pair(config, tmp_path / "pair")
    pair = load_models(result.drafter, result.verifier, device="cpu")
    assert pair.tokenizer.chat_template == QUESTION
    gate = check_pair(pair, rows[:5], tries=1, say=told.append)
    nats = tokens = 0.0
    for row in rows[:5]:
        question = pair.tokenizer(row.prompt)["input_ids"]
        answer = [*pair.tokenizer(row.reference)["input_ids"], pair.tokenizer.eos_token_id]
        with torch.inference_mode():
            distribution = pair.verifier(torch.tensor([question + answer])).logits[0].log_softmax(-1)
        for place, token in enumerate(answer):
            nats -= float(distribution[len(question) + place - 1, token])
        tokens += len(answer)
    assert gate.verifier_nats == pytest.approx(nats / tokens, rel=1e-4)
    assert gate.tokens == tokens
    assert told == ["gate: timing the passes of both models, measurement 1 of at most 1"]


def test_answers_are_learned_and_questions_are_not(tmp_path):
    batch = AnswerBatches([[5, 6, 7]], [[8, 9]], 0, 1, 0).batch(0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[8, 9]]
    batch = AnswerBatches([[5, 6, 7], [4, 5]], [[8], [6, 7, 9]], 0, 2, 0).batch(0)
    rows = dict(zip(map(tuple, batch["input_ids"].tolist()), batch["labels"].tolist()))
    assert rows == {(5, 6, 7, 0): [IGNORED, 8, IGNORED], (4, 5, 6, 7): [6, 7, 9]}
    model = tiny_model("llama")
    whole = model(batch["input_ids"], attention_mask=(batch["input_ids"] != 0).long()).logits[:, -3:]
    learned = batch["labels"] != IGNORED
    torch.testing.assert_close(next_token_logits(model, batch)[learned], whole[learned])
    with pytest.raises(InputError, match=r"text\.answers is for kind: llama"):
        PairConfig(kind="t5", text=PairText(files=("a",), targets=("b",), answers=True))
