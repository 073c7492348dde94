"""What a batch's packed rows begin with alike is computed once: with the losses and gradients of rows by themselves."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console
from short_run import logged, settings

from conftest import bpe_tokenizer, save_tiny, slow, tiny_model
from trivet.adapter.attach import attach
from trivet.adapter.layers import adapted_layers
from trivet.configio import load
from trivet.data.batch import Collator, halves, rows_in, seen, shared_length, tokens_in
from trivet.data.encode import IGNORE, Encoded
from trivet.errors import ConfigError
from trivet.loss import token_losses, training_loss
from trivet.packing import _window
from trivet.run import train

PADDED, SHARED = Collator(0), Collator(0, packed=True, share=True)
HEAD = "the red cat ran to the house and the dog "
ROWS = [{"prompt": HEAD * 2 + "ran " * (i % 7), "completion": "to the red house " * (1 + i % 5)} for i in range(24)]


def encoded(beginning: int, lengths: list[int], learned: int = 1) -> list[Encoded]:
    """Rows that begin with so many tokens alike, and the lengths of what is their own; all but its first is learned."""
    draw = torch.Generator().manual_seed(0)
    head = torch.randint(1, 60, (beginning,), generator=draw).tolist()
    rows = []
    for place, n in enumerate(lengths):
        own = [place + 1, *torch.randint(1, 60, (n - 1,), generator=draw).tolist()]
        rows.append(Encoded(input_ids=head + own, labels=[IGNORE] * (beginning + learned) + own[learned:]))
    return rows


def run(values: dict[str, Any]) -> tuple[str, Any]:
    """What a run said, and the training part of its config as it was decided."""
    console = Console(file=io.StringIO(), width=999)
    train(load(values=values), train=ROWS, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    return said, load(Path(values["output_dir"]) / "config.yaml").training


# -- batches -------------------------------------------------------------------------------------------------


@given(
    ids=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=12), min_size=1, max_size=5),
    learned=st.lists(st.integers(0, 12), min_size=5, max_size=5),
)
def test_what_is_shared_is_alike_and_tells_nothing_that_is_learned(ids: list[list[int]], learned: list[int]) -> None:
    rows = []
    for row, first in zip(ids, learned, strict=False):
        rows.append(Encoded(input_ids=row, labels=[IGNORE] * min(first, len(row)) + row[first:]))

    def may_share(count: int) -> bool:
        alike = all(row["input_ids"][:count] == ids[0][:count] and len(row["input_ids"]) > count for row in rows)
        return alike and not any(label != IGNORE for row in rows for label in row["labels"][: count + 1])

    wanted = max((n for n in range(1, 12) if all(may_share(k) for k in range(1, n + 1))), default=0)
    assert shared_length(rows) == (wanted if len(rows) > 1 else 0)


@given(
    beginning=st.integers(0, 20),
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6),
)
@hypothesis_settings(deadline=None)
def test_a_batch_has_the_rows_and_the_mask_that_tells_them_apart(beginning: int, lengths: list[int]) -> None:
    rows = encoded(beginning, lengths)
    batch: dict[str, Any] = SHARED(rows)
    alone = len(rows) == 1
    assert rows_in(batch) == len(rows) and int(tokens_in(batch)) == sum(len(row["input_ids"]) for row in rows)
    size = sum(lengths) + beginning
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape == (1, -(-size // 8) * 8)
    ids, positions, labels = (batch[key][0] for key in ("input_ids", "position_ids", "labels"))
    mask = seen(batch["cu_seq_lens_q"])[0, 0]
    end = 0 if alone else beginning
    for row in rows:
        own = len(row["input_ids"]) - (0 if alone else beginning)
        end += own
        visible = mask[end - 1].nonzero()[:, 0]  # what a row's last token sees is the row
        assert ids[visible].tolist() == row["input_ids"] and positions[visible].tolist() == list(range(len(visible)))
        assert labels[visible].tolist() == row["labels"]
        assert all(mask[end - own + i].nonzero()[:, 0].tolist() == visible[: len(visible) - own + i + 1].tolist()
                   for i in range(own))  # fmt: skip


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_padded_rows(kind: str, fast: bool) -> None:
    rows, got = encoded(20, [5, 17, 3, 40], learned=2), []
    for collator in (PADDED, SHARED):
        model = attach(tiny_model(kind, 64), lora_rank=4, fast=fast).eval()
        for layer in adapted_layers(model):
            layer.B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        batch: dict[str, Any] = collator(rows)
        assert batch["input_ids"].numel() == (88 if collator is SHARED else 256)
        loss = training_loss(model, batch, batch.pop("labels"), task="causal-lm")
        loss.backward()
        got.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert got[0][1].abs().max() > 0
    for one, other in zip(*got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_attention_that_adds_a_mask_gets_one_to_add(fast: bool) -> None:
    rows, got = encoded(20, [5, 17, 3, 40], learned=2), []
    for collator in (PADDED, SHARED):
        model = tiny_model("llama", 64)
        model.set_attn_implementation("eager")
        model = attach(model, lora_rank=4, fast=fast).eval()
        batch: dict[str, Any] = collator(rows)
        got.append(token_losses(model, batch, batch.pop("labels"), shifted=True)[0].detach())
    torch.testing.assert_close(*got, rtol=1e-5, atol=1e-5)


def test_losses_in_16_bits_are_as_near_to_exact_ones_as_those_of_padded_rows() -> None:
    rows, got = encoded(20, [5, 17, 3, 40], learned=2), []
    for dtype, collator in ((torch.float32, PADDED), (torch.bfloat16, PADDED), (torch.bfloat16, SHARED)):
        model = attach(tiny_model("llama", 64).to(dtype), lora_rank=4).eval()
        batch: dict[str, Any] = collator(rows)
        got.append(token_losses(model, batch, batch.pop("labels"), shifted=True)[0].detach())
    exact, padded, shared = got
    assert 0 < (shared - exact).abs().mean() < 2 * (padded - exact).abs().mean()


def test_recomputed_activations_give_the_same_gradients() -> None:
    got = []
    for recomputed in (False, True):
        model = attach(tiny_model("llama", 64), lora_rank=4).train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch: dict[str, Any] = SHARED(encoded(20, [5, 17, 3, 40], learned=2))
        training_loss(model, batch, batch.pop("labels"), task="causal-lm").backward()
        got.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_halves_repeat_what_is_shared() -> None:
    model = attach(tiny_model("llama", 64), lora_rank=4).eval()
    batch = SHARED(encoded(12, [5, 17, 3, 9, 4], learned=2))

    def loss(part: dict[str, Any]) -> torch.Tensor:
        inputs = {key: value for key, value in part.items() if key != "labels"}
        return training_loss(model, inputs, part["labels"], 1, task="causal-lm")

    parts = list(halves(batch))
    parts = [parts[0], *halves(parts[1])]  # a half is a batch like any other
    assert [rows_in(part) for part in parts] == [2, 1, 2] and rows_in(batch) == 5
    assert [int(tokens_in(part)) for part in parts] == [46, 15, 37] and int(tokens_in(batch)) == 98
    torch.testing.assert_close(sum(loss(part) for part in parts), loss(batch))


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_run_learns_what_it_learns_without(tmp_path: Path, kind: str) -> None:
    """Without dropout, which drops other entries where a batch has other tokens."""
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    folder, logs = save_tiny(kind, tmp_path / "model", **off), []
    for share in (None, False):
        changes = {"training.share_prefix": share, "model.dtype": "float32"}
        said, decided = run(settings(folder, tmp_path / str(share), **changes))
        assert ("tokens, computed once a batch" in said) is (share is None)
        assert decided.packing is True and decided.share_prefix is (share is None)
        logs.append([row for row in logged(tmp_path / str(share)) if "loss" in row])
    ours, theirs = logs
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]  # of rows, not what was computed


def test_rows_that_begin_differently_share_nothing(tiny: Any, tmp_path: Path) -> None:
    rows = [
        row | {"prompt": f"{word} {row['prompt']}"}
        for row, word in zip(ROWS, ["the", "cat", "dog", "ran"] * 6, strict=True)
    ]
    console = Console(file=io.StringIO(), width=999)
    train(load(values=settings(tiny("llama"), tmp_path / "run")), train=rows, console=console)
    assert "begin with" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert load(tmp_path / "run" / "config.yaml").training.share_prefix is False


def windowed(folder: Path, kind: str, window: int) -> None:
    """A model whose layers, or some of them, look back so many tokens."""
    tokenizer, sizes = bpe_tokenizer(), {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
    config: Any = {
        "mistral": lambda: hf.MistralConfig(
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, sliding_window=window, **sizes
        ),
        "gpt_neo": lambda: hf.GPTNeoConfig(
            num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=window, **sizes
        ),
    }[kind]()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["mistral", "gpt_neo"])
def test_a_window_is_kept(tmp_path: Path, kind: str) -> None:
    """One that is longer than the trial's rows and shorter than the run's."""
    windowed(tmp_path / kind, kind, 64)
    with pytest.raises(ConfigError, match=r"training.share_prefix: \w+ looks back 64 tokens.*; set it to false"):
        run(settings(tmp_path / kind, tmp_path / "run", **{"training.share_prefix": True}))
    said, decided = run(settings(tmp_path / kind, tmp_path / "run"))
    assert "looks back 64 tokens" in said and decided.packing is True and decided.share_prefix is False


def test_a_window_longer_than_a_batch_hides_nothing(tmp_path: Path) -> None:
    windowed(tmp_path / "mistral", "mistral", 4096)
    assert run(settings(tmp_path / "mistral", tmp_path / "run"))[1].share_prefix is True


def test_windows_are_found_by_the_names_that_transformers_has_for_them() -> None:
    assert _window(hf.LlamaConfig()) is None and _window(hf.GPT2Config()) is None
    assert _window(hf.Qwen2Config()) is None  # its window is off
    assert _window(hf.MistralConfig()) == 4096 and _window(hf.GPTNeoConfig()) == 256
    assert _window(hf.Llama4Config()) == 8192 and _window(hf.Gemma3Config()) == 4096


def test_sharing_is_for_packed_rows(tiny: Any, tmp_path: Path) -> None:
    values = settings(tiny("llama"), tmp_path / "run", **{"training.packing": False, "training.share_prefix": True})
    with pytest.raises(ConfigError, match=r"training.share_prefix: is for packed rows, and these are padded"):
        run(values)
    assert not (tmp_path / "run").exists()


def test_a_model_that_passes_over_the_mask_is_trained_without(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf.LlamaModel.forward
    monkeypatch.setattr(
        hf.LlamaModel, "forward", lambda self, *args, **kwargs: whole(self, *args, **kwargs | {"attention_mask": None})
    )
    said, decided = run(settings(tiny("llama"), tmp_path / "run"))
    assert "not computed once a batch: LlamaForCausalLM gives packed rows other losses" in said
    assert decided.packing is True and decided.share_prefix is False


@pytest.mark.parametrize("share", [True, *slow(False)])
def test_a_resumed_run_shares_as_it_did(tiny: Any, tmp_path: Path, share: bool) -> None:
    """Also where it is left open."""
    folder, adapters = tiny("llama"), []
    more = {"training.eval_steps": 4, "training.keep_checkpoints": 9, "training.share_prefix": share}
    for name in ("whole", "again"):
        values = settings(folder, tmp_path / name, **more)
        run(values)
        if name == "again":
            (tmp_path / name / "result.json").unlink()
            shutil.rmtree(tmp_path / name / "checkpoints" / "checkpoint-12")
            left_open = {key: value for key, value in values.items() if key != "training.share_prefix"}
            train(load(values=left_open), train=ROWS, resume=True, console=Console(quiet=True))
            assert load(tmp_path / name / "config.yaml").training.share_prefix is share
        adapters.append((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
