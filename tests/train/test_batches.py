"""Which rows go together: token budgets, packing, and going on with fewer rows where memory runs out."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from short_run import ROWS, losses, settings

from conftest import bpe_tokenizer, save_tiny, tiny_model, write_jsonl
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.configio import load
from trivet.data.batch import Collator, halves, rows_in, tokens_in
from trivet.data.encode import IGNORE, Encoded
from trivet.errors import ConfigError
from trivet.kernels import compiled, product
from trivet.kernels.product import few_sizes
from trivet.loss import training_loss
from trivet.prepare import prepare
from trivet.run import train
from trivet.runfolder import RunFolder
from trivet.schedule import planned_steps, token_batches
from trivet.splits import load_splits
from trivet.train.callback import RunLog
from trivet.train.oom import Halver
from trivet.train.sampler import TokenBudgetSampler
from trivet.training import make_trainer

# -- token budgets -------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    budget=st.integers(1, 200),
    packed=st.booleans(),
    seed=st.integers(0, 5),
)
def test_batches_keep_to_the_budget_and_hold_every_row_once(
    lengths: list[int], budget: int, packed: bool, seed: int
) -> None:
    sampler = TokenBudgetSampler(lengths, budget, seed, packed=packed)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            sizes = [lengths[i] for i in batch]
            held = sum(sizes) if packed else max(sizes) * len(sizes)
            assert held <= budget or len(batch) == 1
    first = next(iter(TokenBudgetSampler(lengths, budget, seed, packed=packed)))
    assert max(lengths) in [lengths[i] for i in first]


def test_batches_are_alike_for_a_seed_and_differ_between_epochs() -> None:
    lengths = list(range(1, 60))
    one, other = TokenBudgetSampler(lengths, 100, 3), TokenBudgetSampler(lengths, 100, 3)
    torch.manual_seed(9)
    assert list(one) == list(other)
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first and sorted(map(sorted, one)) == sorted(map(sorted, first))


def test_a_run_with_a_token_budget_is_planned_as_it_goes_and_resumes_bit_for_bit(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "multiplies", lambda dtype: True)
    folder = tiny("gpt2")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    more = {
        "data.train": str(tmp_path / "rows.jsonl"),
        "training.max_tokens_per_batch": 96,
        "training.eval_steps": 3,
        "training.keep_checkpoints": 9,
    }
    values = settings(folder, tmp_path / "whole", **more)
    config = load(values=values)
    ready = prepare(config, load_splits(config), Console(quiet=True))
    batches = token_batches(ready.config, ready.train_rows)
    assert batches is not None and len({len(batch) for batch in batches}) > 1
    for packed, most in ((False, 96), (True, 96), (True, 300)):  # counted as they are padded, or made one of few sizes
        more = {"training.packing": packed, "training.max_tokens_per_batch": most}
        grouped = token_batches(load(values=values | more), ready.train_rows)
        collator = Collator(0, packed=packed, few_sizes=partial(few_sizes, like=torch.empty(0).bfloat16()))
        made = [collator([ready.train_rows[i] for i in batch]) for batch in grouped or ()]
        assert made and all(batch["input_ids"].numel() <= most for batch in made)
    outcome = train(config, console=Console(quiet=True))
    assert outcome.result["steps"] == planned_steps(ready.config, ready.train_rows) == 2 * len(batches)

    again = tmp_path / "again"
    train(load(values=values | {"output_dir": str(again)}), console=Console(quiet=True))
    (again / "result.json").unlink()
    for checkpoint in (again / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > len(batches) + 1:  # in the middle of the second pass
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    train(load(values=values | {"output_dir": str(again)}), resume=True, console=Console(quiet=True))
    weights = "adapter/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


# -- packing -------------------------------------------------------------------------------------------------


def encoded(lengths: list[int]) -> list[Encoded]:
    draw = torch.Generator().manual_seed(0)
    rows = []
    for n in lengths:
        ids = torch.randint(1, 60, (n,), generator=draw).tolist()
        rows.append(Encoded(input_ids=ids, labels=[IGNORE] * (n // 3 + 1) + ids[n // 3 + 1 :]))
    return rows


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(kind: str, fast: bool) -> None:
    rows, got = encoded([5, 17, 3, 9]), []
    for packed in (False, True):
        model = attach(tiny_model(kind, 64), lora_rank=4, fast=fast).eval()
        for layer in adapted_layers(model):
            layer.B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        batch: dict[str, Any] = Collator(0, packed=packed)(rows)
        assert int(tokens_in(batch)) == 34
        loss = training_loss(model, batch, batch.pop("labels"), task="causal-lm")
        loss.backward()
        got.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert got[0][1].abs().max() > 0
    for one, other in zip(*got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_packed_run_learns_what_a_padded_one_learns(tiny: Any, tmp_path: Path) -> None:
    folder = tiny("llama")
    for packing in (False, True):  # all rows in each step: packed ones are not grouped by length
        more = {"training.packing": packing, "training.batch_size": len(ROWS)}
        values = settings(folder, tmp_path / str(packing), **more)
        train(load(values=values), train=ROWS, console=Console(quiet=True))
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-3)


@pytest.mark.parametrize("packed", [True, False])
def test_halves_of_a_batch_have_its_rows_and_losses(packed: bool) -> None:
    model = attach(tiny_model("llama", 64), lora_rank=4).eval()
    batch = Collator(0, packed=packed)(encoded([5, 17, 3, 9, 4]))

    def without_labels(part: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in part.items() if key != "labels"}

    parts = list(halves(batch))
    parts = [parts[0], *halves(parts[1])]  # a half is a batch like any other
    assert [rows_in(part) for part in parts] == [2, 1, 2] and rows_in(batch) == 5
    assert [int(tokens_in(part)) for part in parts] == [22, 3, 13] and int(tokens_in(batch)) == 38
    whole, *losses = (
        training_loss(model, without_labels(part), part["labels"], 1, task="causal-lm") for part in (batch, *parts)
    )
    torch.testing.assert_close(sum(losses), whole)


def test_a_sliding_window_is_kept_in_packed_rows() -> None:
    rows, got = encoded([5, 17, 3, 9]), []
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for window, packed in ((4, False), (4, True), (64, True)):
        torch.manual_seed(0)
        config = hf.MistralConfig(**sizes, vocab_size=64, num_key_value_heads=2, sliding_window=window)
        model = attach(hf.MistralForCausalLM(config), lora_rank=4).eval()
        batch: dict[str, Any] = Collator(0, packed=packed)(rows)
        got.append(float(training_loss(model, batch, batch.pop("labels"), task="causal-lm").detach()))
    assert got[1] == pytest.approx(got[0], rel=1e-5) and got[2] != pytest.approx(got[0], rel=1e-4)


@pytest.mark.parametrize(("kind", "packed"), [("llama", True), ("gpt2", True), ("t5", False)])
def test_rows_are_packed_where_nobody_says_otherwise(tiny: Any, tmp_path: Path, kind: str, packed: bool) -> None:
    out = tmp_path / "run"
    train(load(values=settings(tiny(kind), out, **{"training.max_steps": 2})), train=ROWS, console=Console(quiet=True))
    assert load(out / "config.yaml").training.packing is packed


def test_a_resumed_run_packs_as_it_did(tiny: Any, tmp_path: Path) -> None:
    """Left open, as on another machine where it would be decided anew; the run itself did not pack."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    more = {"data.train": str(tmp_path / "rows.jsonl"), "training.eval_steps": 2, "training.keep_checkpoints": 9}
    folder, adapters = tiny("llama"), []
    for name, packing in (("whole", False), ("again", False), ("packed", True)):
        values = settings(folder, tmp_path / name, **more, **{"training.packing": packing})
        train(load(values=values), console=Console(quiet=True))
        if name == "again":
            (tmp_path / name / "result.json").unlink()
            steps = sorted((tmp_path / name / "checkpoints").iterdir(), key=lambda path: int(path.name[11:]))
            for checkpoint in steps[len(steps) // 2 :]:
                shutil.rmtree(checkpoint)
            open_ = load(values={k: v for k, v in values.items() if k != "training.packing"})
            train(open_, resume=True, console=Console(quiet=True))
        adapters.append((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] != adapters[2]


def test_a_model_without_positions_is_trained_with_padded_rows(tmp_path: Path) -> None:
    tokenizer, sizes = bpe_tokenizer(), {"hidden_size": 32, "n_layer": 2, "n_head": 2}
    config = hf.BloomConfig(**sizes, vocab_size=len(tokenizer), initializer_range=0.3)
    hf.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    values = settings(tmp_path / "bloom", tmp_path / "run", **{"training.max_steps": 2})
    check_padded(values, "BloomForCausalLM gives packed rows other losses")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_long_prompts_are_packed_too(tmp_path: Path, dtype: str) -> None:
    """Of which the check, which reads the beginnings of rows, sees no answer; three such rows exceed the positions."""
    save_tiny("llama", tmp_path / "llama", max_position_embeddings=512)
    rows = [{"prompt": "the cat " * 200, "completion": "ran to the red house"}] * 4
    values = settings(tmp_path / "llama", tmp_path / "run", **{"training.max_steps": 1, "model.dtype": dtype})
    train(load(values=values), train=rows, console=Console(quiet=True))
    assert load(tmp_path / "run" / "config.yaml").training.packing is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_shows_a_little_of_other_rows_is_trained_with_padded_rows(tmp_path: Path, dtype: str) -> None:
    """GPT's positions begin anew with each row, but its attention knows of no borders."""
    tokenizer, sizes = bpe_tokenizer(), {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
    config = hf.OpenAIGPTConfig(**sizes, vocab_size=len(tokenizer), initializer_range=0.2)
    torch.manual_seed(0)
    hf.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    values = settings(tmp_path / "gpt", tmp_path / "run", **{"training.max_steps": 2, "model.dtype": dtype})
    check_padded(values, "OpenAIGPTLMHeadModel gives packed rows other losses")


def test_a_model_that_does_not_know_of_borders_is_trained_with_padded_rows(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose forward pass takes no further arguments."""
    whole = hf.GPT2Model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cu_seq_lens_q" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'cu_seq_lens_q'")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(hf.GPT2Model, "forward", forward)
    values = settings(tiny("gpt2"), tmp_path / "run", **{"training.max_steps": 2})
    check_padded(values, r"GPT2LMHeadModel does not take packed rows \(.*unexpected keyword argument")


def check_padded(values: dict[str, Any], reason: str) -> None:
    """Packing is refused where it is asked for; else rows are padded, and it is said why."""
    with pytest.raises(ConfigError, match=f"training.packing: {reason}.*; set it to false"):
        train(load(values=values | {"training.packing": True}), train=ROWS, console=Console(quiet=True))
    console = Console(file=io.StringIO(), width=999)
    train(load(values=values), train=ROWS, console=console)
    assert re.search(f"rows are padded, not packed: {reason}", console.file.getvalue())  # type: ignore[attr-defined]
    assert load(Path(values["output_dir"]) / "config.yaml").training.packing is False


def test_packing_is_for_causal_models(tiny: Any, tmp_path: Path) -> None:
    values = settings(tiny("t5"), tmp_path / "run", **{"training.packing": True})
    with pytest.raises(ConfigError, match=r"training.packing: is for causal language models, and the task is seq2seq"):
        train(load(values=values), train=ROWS, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_model_whose_packed_rows_would_see_each_other_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that knows nothing of the rows' borders would."""
    whole = Collator._pack

    def borderless(self: Collator, rows: Any) -> dict[str, Any]:
        batch = whole(self, rows)
        return {"input_ids": batch["input_ids"], "labels": batch["labels"], "use_cache": False}

    monkeypatch.setattr(Collator, "_pack", borderless)
    check_padded(settings(tiny("gpt2"), tmp_path / "run"), "GPT2LMHeadModel gives packed rows other losses")


# -- out of memory -------------------------------------------------------------------------------------------


def test_a_micro_batch_that_broke_off_counts_once() -> None:
    model, gave_up, sizes = torch.nn.Linear(3, 1), [], []
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def step(batch: dict[str, Any]) -> torch.Tensor:
        sizes.append(len(batch["input_ids"]))
        loss = (model(batch["input_ids"]) ** 2).sum() / len(x)
        loss.backward()
        if sizes[-1] > 2:  # its gradients are there already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss.detach()

    halver = Halver(model.parameters, lambda: gave_up.append(True))
    model.weight.grad = torch.ones_like(model.weight)  # of an earlier micro-batch
    total = halver.run(step, {"input_ids": x, "length": 3})
    assert sizes == [8, 4, 2, 2, 2, 2] and len(gave_up) == 2
    torch.testing.assert_close(total, (model(x) ** 2).mean().detach())
    wanted = torch.autograd.grad((model(x) ** 2).mean(), list(model.parameters()))
    torch.testing.assert_close(model.weight.grad - 1, wanted[0])
    torch.testing.assert_close(model.bias.grad, wanted[1])
    sizes.clear()
    halver.run(step, {"input_ids": x})
    assert sizes == [2, 2, 2, 2]  # what did not fit is not tried again


def test_one_row_that_does_not_fit_ends_the_run() -> None:
    def step(batch: dict[str, Any]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Halver(torch.nn.Linear(1, 1).parameters, lambda: None).run(step, {"input_ids": torch.zeros(3, 2)})


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def step(batch: dict[str, Any]) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes"):
        Halver(torch.nn.Linear(1, 1).parameters, lambda: None).run(step, {"input_ids": torch.zeros(3, 2)})
    assert len(calls) == 1


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_with_little_memory_ends_where_one_with_much_does(tiny: Any, tmp_path: Path, packing: bool) -> None:
    folder, ends = tiny("llama"), []
    for most in (99, 2):
        more = {"training.gradient_accumulation_steps": 2, "training.max_steps": 4, "method": "trivet"}
        more["training.packing"] = packing
        config = load(values=settings(folder, tmp_path / str(most), **more))
        ready = prepare(config, load_splits(config, train=ROWS), Console(quiet=True))
        run = RunFolder(tmp_path / str(most))
        run.path.mkdir()
        trainer = make_trainer(ready, run, RunLog(run.log, Console(quiet=True)))
        whole = trainer.compute_loss

        def limited(model: Any, inputs: Any, *rest: Any, most: int = most, whole: Any = whole, **more: Any) -> Any:
            loss = whole(model, dict(inputs), *rest, **more)
            if rows_in(inputs) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

        trainer.compute_loss = limited
        trainer.train()
        ends.append({layer.name: layer.delta() for layer in adapted_layers(ready.session.model)})
    assert trainer.halver.too_many is not None
    for name, delta in ends[0].items():
        torch.testing.assert_close(ends[1][name], delta, rtol=1e-2, atol=1e-4)


# -- the allocator -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
@pytest.mark.parametrize("keeps", [False, True])
def test_freed_memory_is_kept(keeps: bool) -> None:
    """As glibc itself counts: free bytes of its heap, once a block of 64 MiB was freed."""
    program = """
import ctypes, sys, torch
from trivet.allocator import keep_freed_memory
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
if not hasattr(ctypes.CDLL(None), "mallinfo2"):
    sys.exit(77)
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
if sys.argv[1] == "True":
    assert keep_freed_memory()
torch.ones(2**24)
print(mallinfo().fordblks)
"""
    done = subprocess.run([sys.executable, "-c", program, str(keeps)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this C library does not say what it holds")
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) > 2**26) == keeps


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_says_that_it_has_no_c_kernels(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(compiled, "missing", lambda: "for a reason")
    values = settings(tiny("llama"), tmp_path / "run", **{"training.max_steps": 1, "training.fast": fast})
    console = Console(file=io.StringIO(), width=999)
    train(load(values=values), train=ROWS, console=console)
    said = "steps take longer than they need to: for a reason" in console.file.getvalue()  # type: ignore[attr-defined]
    assert said == fast
