"""The probe and its collector against sums over activations and gradients that were captured whole."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import tiny_model
from trivet.adapter import statistics
from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.adapter.statistics import LayerStatistics
from trivet.errors import TrivetError
from trivet.probe import Collector, probe

FIELDS = ("inputs", "outputs", "input_mean", "input_sketch", "gradient_right", "gradient_left")


def adapt(model: nn.Module, targets: Any = "all-linear", task: str | None = "CAUSAL_LM") -> Any:
    """With B random, so that the adapter is not idle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(p, std=0.1)
    return model


def causal_batch(lengths: tuple[int, ...] = (12, 7, 9), width: int = 12, prompt: int = 3, seed: int = 0) -> Any:
    """Right-padded rows, their prompts not learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (len(lengths), 100), generator=generator)[:, :width].clone()
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def class_batch() -> Any:
    batch = causal_batch()
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": torch.tensor([0, 2, 1]),
    }


def llama() -> tuple[Any, Any]:
    return adapt(tiny_model("llama", 64)), causal_batch()


def gpt2() -> tuple[Any, Any]:
    return adapt(tiny_model("gpt2", 64)), causal_batch()


def gpt2_embedding() -> tuple[Any, Any]:
    return adapt(tiny_model("gpt2", 64), ["wte", "wpe", "c_proj"]), causal_batch()


def bert() -> tuple[Any, Any]:
    model = hf.BertForSequenceClassification(tiny_model("bert", 64, num_labels=3).config)
    return adapt(model, task="SEQ_CLS"), class_batch()


def capture(model: Any, layers: list[AdaptedLayer], run: Callable[[], Any]) -> dict[str, tuple[Any, Any]]:
    """What went into every layer (one-hot where ids did), and the gradient of what came out, float64."""
    seen: dict[str, list[tuple[Any, Any]]] = {layer.name: [] for layer in layers}

    def watch(layer: AdaptedLayer) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            x = args[0].detach().clone()
            x = nn.functional.one_hot(x, layer.shape[1]) if layer.embedding else x
            keep = seen[layer.name].append
            output.register_hook(lambda g: keep((x.double().flatten(0, -2), g.double().flatten(0, -2))))

        return layer.module.register_forward_hook(hook)

    handles = [watch(layer) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in seen.items()}


def assert_statistics(found: LayerStatistics, x: torch.Tensor, g: torch.Tensor, items: int, rtol: float = 1e-4) -> None:
    """The definitions, over the positions that a gradient reached."""
    x = x[(g != 0).any(1)]
    g = g[(g != 0).any(1)]
    gradient, omega, psi = g.T @ x, found.omega.double(), found.psi.double()
    expected = {
        "inputs": x.square().mean(0), "outputs": items * g.square().sum(0), "input_mean": x.mean(0),
        "input_sketch": x.T @ (x @ omega) / len(x), "gradient_right": gradient @ omega,
        "gradient_left": gradient.T @ psi,
    }  # fmt: skip
    for field, value in expected.items():
        got = getattr(found, field)
        assert got.dtype == torch.float32
        atol = rtol * float(value.abs().max()) if value.numel() else 0
        torch.testing.assert_close(got.double(), value, rtol=rtol, atol=atol, msg=lambda m, f=field: f"{f}: {m}")


def assert_same(a: dict[str, LayerStatistics], b: dict[str, LayerStatistics], rtol: float = 1e-4) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        for field in FIELDS:
            left, right = getattr(a[name], field), getattr(b[name], field)
            atol = rtol * float(right.abs().max()) if right.numel() else 0
            torch.testing.assert_close(
                left, right, rtol=rtol, atol=atol, msg=lambda m, n=name, f=field: f"{n}.{f}: {m}"
            )


@pytest.mark.parametrize("make", [llama, gpt2, gpt2_embedding, bert])
def test_the_statistics_are_those_of_the_captured_activations(make: Any) -> None:
    model, batch = make()
    layers = adapted_layers(model)
    labels = batch["labels"]
    items = len(labels) if labels.dim() == 1 else int((labels != -100).sum())
    seen = capture(model, layers, lambda: model.eval()(**batch).loss.backward())
    found = probe(model, layers, [batch], sketch=5)
    assert list(found) == [layer.name for layer in layers] and len(layers) > 3
    for name, (x, g) in seen.items():
        assert_statistics(found[name], x, g, items)
    padded = [name for name, (_, g) in seen.items() if (g == 0).all(1).any()]
    assert padded  # else the mask was not put to the test
    assert any(layer.embedding for layer in layers) == (make is gpt2_embedding)


class Line(nn.Module):
    """loss = mean over positions of v · W x, so that g = v / positions."""

    def __init__(self, times: int = 1, in_place: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4, bias=False)
        self.v = torch.tensor([1.0, -2.0, 3.0, 0.5])
        self.times, self.in_place = times, in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.new_zeros(())
        for i in range(self.times):
            y = self.fc(x + i)
            if self.in_place:
                y *= 2
            total = total + (y @ self.v.to(y)).mean()
        return total


def line(**settings: Any) -> tuple[Any, list[AdaptedLayer], torch.Tensor]:
    torch.manual_seed(0)
    model = adapt(Line(**settings), ["fc"], None)
    return model, adapted_layers(model), torch.randn(2, 5, 6) + 1


def measure(model: Any, layers: list[AdaptedLayer], *xs: torch.Tensor, **settings: Any) -> LayerStatistics:
    collector = Collector(layers, sketch=3, **settings)
    collector.on()
    for x in xs:
        model(x).backward()
        assert collector.fold()
    collector.off()
    return collector.statistics()["fc"]


def test_closed_form_of_a_linear_layer() -> None:
    model, layers, x = line()
    found, v, flat = measure(model, layers, x), Line().v, x.reshape(-1, 6)
    torch.testing.assert_close(found.outputs, v.square())  # 10 · Σ over 10 positions of (v / 10)²
    torch.testing.assert_close(found.inputs, flat.square().mean(0))
    torch.testing.assert_close(found.input_mean, flat.mean(0))
    gradient = torch.outer(v, flat.mean(0))
    torch.testing.assert_close(found.gradient_right, gradient @ found.omega)
    torch.testing.assert_close(found.gradient_left, gradient.T @ found.psi)
    u, sigma, w = found.gradient(3, whitened=False)
    torch.testing.assert_close(u @ sigma.diag() @ w.T, gradient)


def test_an_output_may_be_changed_in_place() -> None:
    model, layers, x = line(in_place=True)
    torch.testing.assert_close(measure(model, layers, x).outputs, 4 * Line().v.square())


def test_calls_of_a_shared_layer_are_summed() -> None:
    model, layers, x = line(times=2)
    found, both = measure(model, layers, x), torch.cat([x, x + 1]).reshape(-1, 6)
    torch.testing.assert_close(found.inputs, both.square().mean(0))
    torch.testing.assert_close(found.outputs, 4 * Line().v.square())  # 20 positions with g = v / 10
    torch.testing.assert_close(found.gradient_right, torch.outer(Line().v, both.sum(0) / 10) @ found.omega)


class Branches(nn.Module):
    """Two layers that read one x; the loss depends on the first at some positions alone."""

    def __init__(self, learned: slice) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.learned = learned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)[:, self.learned].square().sum() + self.second(x).square().sum()


@pytest.mark.parametrize(("learned", "passes"), [(slice(None), 1), (slice(2, 4), 2)])
def test_layers_that_read_one_tensor_share_its_sums(
    learned: slice, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    pieces = statistics._pieces
    monkeypatch.setattr(statistics, "_pieces", lambda t: read.append(t.shape[1]) or pieces(t))
    torch.manual_seed(0)
    model = adapt(Branches(learned), ["first", "second"], None)
    x = torch.randn(2, 5, 6)
    collector = Collector(adapted_layers(model))
    collector.on()
    model(x).backward()
    assert collector.fold() and read.count(6) == passes and read.count(4) == 2
    found = collector.statistics()
    torch.testing.assert_close(found["first"].inputs, x[:, learned].square().mean((0, 1)))
    torch.testing.assert_close(found["second"].inputs, x.square().mean((0, 1)))


def test_a_tensor_with_new_values_is_another_one() -> None:
    model, layers, x = line()
    expected = x.square().mean((0, 1))
    collector = Collector(layers)
    collector.on()
    for factor in (1, 2):
        model.base_model.model.forward(x.mul_(factor)).backward()
        collector.fold()
    torch.testing.assert_close(collector.statistics()["fc"].inputs, (expected + 4 * expected) / 2)


def test_long_inputs_are_summed_in_pieces() -> None:
    model, layers, _ = line()
    x = torch.randn(1, 1300, 6)
    found = measure(model, layers, x)
    torch.testing.assert_close(found.inputs, x[0].square().mean(0))
    torch.testing.assert_close(found.outputs, Line().v.square(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.input_sketch, x[0].T @ (x[0] @ found.omega) / 1300, rtol=1e-4, atol=1e-4)


def test_micro_batches_are_one_batch() -> None:
    model, batch = llama()
    layers, items = adapted_layers(model), int((batch["labels"] != -100).sum())
    collector = Collector(layers, sketch=4)
    collector.on()
    for row in range(3):
        model.eval()(**{k: v[row : row + 1] for k, v in batch.items()}, num_items_in_batch=items).loss.backward()
    assert collector.fold(items)
    collector.off()
    assert_same(collector.statistics(), probe(model, layers, [batch], sketch=4))


def test_batches_are_weighted_by_their_items_and_tokens() -> None:
    model, batch = llama()
    layers = adapted_layers(model)
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    assert_same(probe(model, layers, parts, sketch=4), probe(model, layers, [batch], sketch=4))


@pytest.mark.parametrize("make", [llama, bert])
def test_padding_changes_no_statistic(make: Any) -> None:
    model, batch = make()
    layers = adapted_layers(model)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wider = {k: nn.functional.pad(v, (0, 6), value=fill[k]) if v.dim() == 2 else v for k, v in batch.items()}
    assert_same(probe(model, layers, [wider], sketch=4), probe(model, layers, [batch], sketch=4))


def test_a_moving_average_is_unbiased_from_its_first_measurement() -> None:
    model, layers, x = line()
    steps = [x, 3 * x, -x + 2, x.flip(0) * 0.5]
    alone = [measure(model, layers, s) for s in steps]
    beta = 0.8
    for n in (1, 2, 4):
        found = measure(model, layers, *steps[:n], decay=beta)
        for field in FIELDS:
            average = 0.0
            for s in alone[:n]:
                average = beta * average + (1 - beta) * getattr(s, field)
            torch.testing.assert_close(getattr(found, field), average / (1 - beta**n), rtol=1e-4, atol=1e-5)
    plain = measure(model, layers, *steps)
    torch.testing.assert_close(plain.inputs, torch.stack([s.inputs for s in alone]).mean(0))


def test_what_the_loss_was_multiplied_by_is_divided_out() -> None:
    model, layers, x = line()
    collector = Collector(layers, sketch=3)
    collector.on()
    (model(x) * 1024).backward()
    collector.fold(10, loss_scale=1024)
    assert_same(collector.statistics(), {"fc": measure(model, layers, x)})


def test_without_a_sketch_only_moments_are_gathered() -> None:
    model, batch = llama()
    layers = adapted_layers(model)
    sketched, plain = probe(model, layers, [batch], sketch=4), probe(model, layers, [batch], sketch=0)
    for name, found in plain.items():
        for field in ("inputs", "outputs"):
            assert torch.equal(getattr(found, field), getattr(sketched[name], field))
        assert not found.input_mean.numel()
        widths = {f: tuple(getattr(found, f).shape) for f in ("input_sketch", "gradient_right", "gradient_left")}
        (out, inner), shape = next(layer.shape for layer in layers if layer.name == name), found.psi.shape
        assert widths == {"input_sketch": (inner, 0), "gradient_right": (out, 0), "gradient_left": (inner, 0)}
        assert shape == (out, 0)


def test_directions_of_a_layers_gradient() -> None:
    model, batch = llama()
    layers = adapted_layers(model)
    seen = capture(model, layers, lambda: model.eval()(**batch).loss.backward())
    found = probe(model, layers, [batch], sketch=24)
    for name, (x, g) in seen.items():
        sigma0 = torch.linalg.svdvals(g.T @ x)
        u, sigma, v = found[name].gradient(2, whitened=False)
        torch.testing.assert_close(sigma[:1].double(), sigma0[:1], rtol=0.1, atol=0)
        captured = torch.linalg.norm(u.double().T @ (g.T @ x)), torch.linalg.norm((g.T @ x) @ v.double())
        assert min(captured) > 0.95 * torch.linalg.norm(sigma0[:2])


def test_the_state_resumes_where_it_was(tmp_path: Path) -> None:
    model, layers, x = line()

    def step(collector: Collector, x: torch.Tensor) -> None:
        collector.on()
        model(x).backward()
        collector.fold()
        collector.off()

    whole, first, second = (Collector(layers, sketch=3, seed=7, decay=0.9) for _ in range(3))
    step(whole, x)
    step(whole, 2 * x)
    step(first, x)
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    step(second, 2 * x)
    for field in (*FIELDS, "omega", "psi"):
        assert torch.equal(getattr(second.statistics()["fc"], field), getattr(whole.statistics()["fc"], field))
    state = first.state_dict()
    before = state["fc.inputs"].clone()
    step(first, x)
    assert torch.equal(state["fc.inputs"], before)  # a copy
    for other, words in (
        (Collector(layers, sketch=3, seed=8), "seed"),
        (Collector(layers, sketch=4, seed=7), "gradient_left"),
        (Collector(layers, seed=7), "gradient_left"),
        (Collector([], sketch=3, seed=7), "fc.gradient_left"),
    ):
        with pytest.raises(TrivetError, match=words):
            other.load_state_dict(state)


def test_test_matrices_depend_on_the_seed_and_the_layers_name_alone() -> None:
    model, _ = llama()
    layers = adapted_layers(model)
    a, b = (c.statistics() for c in (Collector(layers, sketch=4), Collector(layers[::-2], sketch=4)))
    assert all(torch.equal(a[n].omega, b[n].omega) and torch.equal(a[n].psi, b[n].psi) for n in b)
    other = Collector(layers, sketch=4, seed=1).statistics()
    assert not torch.equal(a[layers[0].name].omega, other[layers[0].name].omega)
    assert not torch.equal(a[layers[0].name].omega, a[layers[1].name].omega)


def test_the_model_is_left_as_it_was() -> None:
    model, batch = llama()
    model.train()
    model.base_model.model.model.layers[0].eval()
    parameters = dict(model.named_parameters())
    kept = next(p for p in parameters.values() if p.requires_grad)
    kept.grad = torch.ones_like(kept)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    trainable = {n: p.requires_grad for n, p in parameters.items()}
    random, hooks = torch.get_rng_state(), sum(len(m._forward_hooks) for m in model.modules())
    probe(model, adapted_layers(model), [batch], sketch=4, seed=3)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
    assert torch.equal(torch.get_rng_state(), random)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in parameters.values() if p is not kept)


def test_the_model_is_left_as_it_was_by_a_failure() -> None:
    model, batch = llama()
    model.train()

    def broken(model: Any, batch: Any) -> Any:
        model(**batch).loss.backward()
        raise KeyError("the user's mistake")

    with pytest.raises(KeyError):
        probe(model, adapted_layers(model), [batch], sketch=4, loss=broken)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for layer in adapted_layers(model) for m in [layer.module])


def test_dropout_is_off() -> None:
    model = adapt(tiny_model("gpt2", 64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    layers = adapted_layers(model)
    a, b = (probe(model, layers, [causal_batch()], sketch=2, seed=0) for _ in range(2))
    assert_same(a, b, rtol=0)
    model.eval()
    assert_same(a, probe(model, layers, [causal_batch()], sketch=2), rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_everything_once(reentrant: bool) -> None:
    model, batch = llama()
    layers = adapted_layers(model)
    plain = probe(model, layers, [batch], sketch=4)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    layers[0].module.register_forward_hook(lambda *_: calls.append(1))
    assert_same(probe(model, layers, [batch], sketch=4), plain, rtol=1e-5)
    assert len(calls) == 2  # the layer was really computed anew
    model.train()
    collector = Collector(layers, sketch=4)
    collector.on()
    model(**batch).loss.backward()
    collector.fold(int((batch["labels"] != -100).sum()))
    assert len(calls) == 4
    assert_same(collector.statistics(), plain, rtol=1e-5)


def test_checkpointed_activations_are_not_kept() -> None:
    model, batch = llama()
    model.train().enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers, alive = adapted_layers(model), []
    down = next(layer for layer in layers if layer.name.endswith("layers.0.mlp.down_proj"))
    down.module.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    collector = Collector(layers)
    collector.on()
    loss = model(**batch).loss
    gc.collect()
    assert len(alive) == 1 and alive[0]() is None
    loss.backward()
    assert collector.fold()


def test_nothing_is_kept_of_passes_without_gradient_or_after_the_backward_pass() -> None:
    model, layers, _ = line()
    collector = Collector(layers, sketch=3)
    collector.on()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            x = torch.randn(2, 5, 6)
            dead = weakref.ref(x)
            loss = model(x)
            assert not loss.requires_grad
        del x
        gc.collect()
        assert dead() is None
        assert not collector.fold()
    x = torch.randn(2, 5, 6)
    dead = weakref.ref(x)
    loss = model(x)
    loss.backward()
    del x, loss
    gc.collect()
    assert dead() is None
    assert collector.fold()


def test_only_what_happens_while_it_is_on_is_recorded() -> None:
    model, layers, x = line()
    collector = Collector(layers, sketch=3)
    model(x).backward()
    assert not collector.fold()
    collector.on()
    collector.on()
    model(x).backward()
    collector.off()
    model(5 * x).backward()
    assert collector.fold()
    assert_same(collector.statistics(), {"fc": measure(model, layers, x)})
    collector.on()
    assert layers[0].module._forward_hooks
    collector.remove()
    assert not layers[0].module._forward_hooks


def test_dropped_layers_are_forgotten() -> None:
    model, batch = llama()
    layers = adapted_layers(model)
    collector = Collector(layers)
    collector.on()
    gone = [layers[0].name, layers[3].name]
    collector.drop([*gone, "never.there"])
    assert not layers[0].module._forward_hooks and layers[1].module._forward_hooks
    model(**batch).loss.backward()
    assert collector.fold(10)
    assert list(collector.statistics()) == [layer.name for layer in layers if layer.name not in gone]
    assert not any(key.startswith(tuple(f"{n}." for n in gone)) for key in collector.state_dict())


def test_a_measurement_with_gradients_that_are_not_finite_does_not_count() -> None:
    model, layers, x = line()
    collector = Collector(layers, sketch=3)
    collector.on()
    model(x).backward()
    assert collector.fold()
    (model(x) * torch.inf).backward()
    assert not collector.fold()
    assert_same(collector.statistics(), {"fc": measure(model, layers, x)})


def test_sums_over_processes() -> None:
    model, batch = llama()
    layers, items = adapted_layers(model), int((batch["labels"] != -100).sum())
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 1), slice(1, 3))]
    sent: list[torch.Tensor] = []

    def measure_half(half: Any, reduce: Any) -> dict[str, LayerStatistics]:
        collector = Collector(layers, sketch=4, reduce=reduce)
        collector.on()
        model.eval()(**half, num_items_in_batch=items).loss.backward()
        assert collector.fold(items)
        collector.off()
        return collector.statistics()

    measure_half(halves[0], lambda sums: sent.append(sums.clone()) or sums)
    assert len(sent) == 1  # one message, not one a layer
    assert_same(measure_half(halves[1], lambda sums: sums + sent[0]), probe(model, layers, [batch], sketch=4))


def test_a_model_in_bfloat16() -> None:
    model, batch = llama()
    model = model.to(torch.bfloat16)
    layers = adapted_layers(model)
    seen = capture(model, layers, lambda: model.eval()(**batch).loss.backward())
    found = probe(model, layers, [batch], sketch=4)
    for name, (x, g) in seen.items():
        assert_statistics(found[name], x, g, int((batch["labels"] != -100).sum()))  # sums have float32's precision


def test_a_loss_of_ones_own() -> None:
    model, batch = llama()
    layers = adapted_layers(model)
    rows = len(batch["labels"])

    def last_token(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
        logits = model(input_ids=batch["input_ids"]).logits[:, -1]
        return nn.functional.cross_entropy(logits, batch["labels"][:, 4]), rows

    seen = capture(model, layers, lambda: last_token(model.eval(), batch)[0].backward())
    found = probe(model, layers, [batch], sketch=4, loss=last_token)
    for name, (x, g) in seen.items():
        assert_statistics(found[name], x, g, rows)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model, batch = llama()
    unlearned = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(TrivetError, match=r"loss on batch 2 is nan; a batch needs at least one label"):
        probe(model, adapted_layers(model), [batch, unlearned], sketch=2)


def test_a_gradient_that_reaches_no_layer_is_an_error() -> None:
    model, batch = llama()
    layers = adapted_layers(model)
    model.requires_grad_(False)
    with pytest.raises(TrivetError, match="no adapted layer received a finite gradient.*requires_grad"):
        probe(model, layers, [batch], sketch=2)
    assert not any(p.requires_grad for p in model.parameters())


def test_no_batches_and_no_labels_are_errors() -> None:
    model, batch = llama()
    with pytest.raises(TrivetError, match="no batches"):
        probe(model, adapted_layers(model), [], sketch=2)
    del batch["labels"]
    with pytest.raises(TrivetError, match="no labels, only input_ids, attention_mask"):
        probe(model, adapted_layers(model), [batch], sketch=2)
