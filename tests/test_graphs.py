"""Recorded passes: gradients are the same to the bit; what can't be recorded is computed as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conftest import colour_rows, tiny_model
from trivet.adapter.attach import attach
from trivet.configio import load
from trivet.data.encode import IGNORE
from trivet.fast_attention import idle_masks
from trivet.graphs import SEEN, Recorder
from trivet.loss import training_loss
from trivet.run import train

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
VOCABULARY = 64


def adapted(kind: str, **options: Any) -> Any:
    made = attach(tiny_model(kind, VOCABULARY), lora_rank=4, **options).train()
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1, generator=torch.Generator().manual_seed(1))
    return made


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def batch_of(rows: int, length: int, seed: int, device: str = "cuda") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)
    mask = torch.ones_like(ids)
    mask[-1, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, IGNORE)


def gradients(model: Any, batches: list[Any], task: str = "causal-lm", **options: Any) -> list[torch.Tensor]:
    """Losses, and gradients of all batches together."""
    for p in trained(model):
        p.grad = None
    losses = []
    for inputs, labels in batches:
        if task == "seq2seq":
            base = model.get_base_model()
            inputs = inputs | {"decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=labels)}
        loss = training_loss(model, inputs, labels, task=task, **options)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in trained(model))]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


# -- masks -------------------------------------------------------------------------------------------------


def test_masks_that_are_none_are_noted_and_not_made_again() -> None:
    model = adapted("llama")
    inputs, _ = batch_of(2, 12, 0, "cpu")
    with idle_masks() as plain:
        alone = model(input_ids=inputs["input_ids"]).logits
    with idle_masks() as masked:
        model(**inputs)
    assert plain == [True] and masked == [False]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)  # as of packed rows
    with idle_masks() as packed:
        apart = model(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False).logits
    assert packed == [False]
    with idle_masks(plain):  # one that was known as none is not looked for in the positions
        together = model(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False).logits
    assert torch.equal(alone[:, :5], together[:, :5]) and not torch.equal(apart, together)


def test_nothing_is_recorded_on_a_cpu() -> None:
    model = adapted("llama")
    recorder, batches = Recorder(lambda: trained(model)), [batch_of(2, 12, i, "cpu") for i in range(SEEN + 2)]
    same(gradients(model, batches, call=recorder), gradients(model, batches))
    assert not recorder._recordings


# -- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bart", "seq2seq"), ("t5", "seq2seq")])
def test_gradients_are_the_same_to_the_bit(kind: str, task: str, dtype: torch.dtype) -> None:
    model = adapted(kind).to("cuda", dtype)
    for module in model.modules():  # torch's dropout would draw
        for name in ("dropout", "activation_dropout", "attention_dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    recorder = Recorder(lambda: trained(model))
    for turn in range(SEEN + 3):
        for rows, length in ((3, 16), (2, 24)):
            batches = [batch_of(rows, length, turn)]
            ours, theirs = gradients(model, batches, task, call=recorder), gradients(model, batches, task)
            if kind == "llama":
                same(
                    ours, theirs
                )  # others get masks that are none where nothing is padded, and other kernels with them
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
    assert recorder.on and len(recorder._recordings) == 2


@pytest.mark.gpu
@on_gpu
def test_gradients_of_several_batches_add_up() -> None:
    model = adapted("llama").cuda()
    recorder = Recorder(lambda: trained(model))
    for _ in range(SEEN):
        gradients(model, [batch_of(3, 16, 0)], call=recorder)
    for shapes in ([(3, 16)] * 3, [(2, 8), (3, 16), (3, 16)], [(3, 16), (2, 9)]):  # recorded ones and others
        batches = [batch_of(*shape, seed) for seed, shape in enumerate(shapes)]
        for ours, theirs in zip(gradients(model, batches, call=recorder), gradients(model, batches), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert recorder._recordings


@pytest.mark.gpu
@on_gpu
def test_factors_are_read_as_they_are_and_others_are_recorded_anew() -> None:
    model = adapted("llama").cuda()
    recorder = Recorder(lambda: trained(model))
    for turn in range(12):
        if turn == 5:
            for p in trained(model):
                p.data.mul_(1.5)  # the same memory
        if turn == 8:
            for p in trained(model):
                p.data = p.data.clone() * 0.5  # another
        batches = [batch_of(3, 16, turn)]
        same(gradients(model, batches, call=recorder), gradients(model, batches))
    assert len(recorder._recordings) == 1


@pytest.mark.gpu
@on_gpu
def test_dropout_draws_anew() -> None:
    model = adapted("gpt2").cuda()
    recorder = Recorder(lambda: trained(model))
    losses = [float(gradients(model, [batch_of(3, 16, 0)], call=recorder)[0]) for _ in range(SEEN + 6)]
    assert len(recorder._recordings) == 1 and len(set(losses)) == len(losses)


@pytest.mark.gpu
@on_gpu
def test_a_backward_pass_that_comes_too_late_is_refused() -> None:
    model = adapted("llama").cuda()
    recorder = Recorder(lambda: trained(model))
    for turn in range(SEEN + 1):
        gradients(model, [batch_of(3, 16, turn)], call=recorder)
    (inputs, labels), (others, _) = batch_of(3, 16, 0), batch_of(3, 16, 1)
    first = training_loss(model, inputs, labels, task="causal-lm", call=recorder)
    training_loss(model, others, labels, task="causal-lm", call=recorder)
    with pytest.raises(RuntimeError, match="comes after the next one's forward pass"):
        first.backward()


#: A function that looks at a number can't be recorded, and what torch keeps of the attempt stays with the process.
LOOKS = """
import sys
sys.path.insert(0, "tests")
import torch
from test_graphs import SEEN, Recorder, adapted, batch_of, gradients, same, trained

model = adapted("llama").cuda()
weight = trained(model)[0]

def looks(batch):
    y = weight.sum() * batch["x"]
    return y * 2 if float(y.sum()) > 1e30 else y

recorder = Recorder(lambda: [weight])
for _ in range(SEEN + 3):
    weight.grad = None
    recorder(looks, {"x": torch.ones(3, device="cuda")}).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))
assert not recorder.on and torch.cuda.current_stream() == torch.cuda.default_stream()
batches = [batch_of(3, 16, 0)]
same(gradients(model, batches, call=recorder), gradients(model, batches))
print("as ever")
"""


@pytest.mark.gpu
@on_gpu
def test_what_cannot_be_recorded_is_computed_as_ever() -> None:
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", LOOKS], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "as ever" in done.stdout, done.stderr[-2000:]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("method", ["trivet", "auto"])
def test_a_run_is_the_same_with_and_without(method: str, tmp_path: Path, tiny: Any, caplog: Any) -> None:
    losses = {}
    for graphs in (True, False):
        settings = {"training.max_steps": 24, "training.learning_rate": 1e-2, "training.batch_size": 8}
        settings |= {"training.cuda_graphs": graphs, "method": method, "evaluation.generate": False}
        folder = tmp_path / str(graphs)
        config = load(
            values={"model.name": str(tiny("llama")), "model.device": "cuda", "output_dir": str(folder), **settings}
        )
        rows = colour_rows(24)
        done = train(config, console=Console(quiet=True), train=rows[:16], validation=rows[16:], test=rows[16:])
        losses[graphs] = done.result["metrics"]["tuned"]["loss"], done.result["metrics"]["base"]["loss"]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-3)
    assert losses[True][0] < losses[True][1]
