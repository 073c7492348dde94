"""The head's cross-entropy in chunks: torch's cross-entropy of the logits written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from trivet.kernels import cross_entropy
from trivet.kernels.cross_entropy import Head, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("without_a_compiler")  # test_native.py has the C kernels


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(
    n: int = 37, features: int = 8, vocabulary: int = 23, bias: bool = False, **head: Any
) -> tuple[torch.Tensor, torch.Tensor, Head]:
    """Hidden states that want gradients, targets, and a head."""
    hidden = draw(n, features, seed=1).requires_grad_()
    targets = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(2))
    weight = draw(vocabulary, features, seed=3)
    return hidden, targets, Head(weight, draw(vocabulary, seed=4) if bias else None, **head)


def written_out(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Autograd's: every step of the definition, in float32 from the products on (or in float64)."""
    logits = F.linear(hidden, head.weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    log_z = torch.log(torch.exp(logits - logits.max(1, keepdim=True).values.detach()).sum(1))
    log_z = log_z + logits.max(1).values.detach()
    losses = F.cross_entropy(logits, targets, reduction="none") + z_loss * log_z**2
    return losses, logits.argmax(1) == targets


def agree(hidden: torch.Tensor, targets: torch.Tensor, head: Head, z_loss: float = 0.0) -> None:
    weights = 1 + torch.arange(len(hidden)) / 3 * (-1) ** torch.arange(len(hidden))  # each position counts differently
    found, right = linear_cross_entropy(hidden, targets, head, z_loss=z_loss)
    wanted, wanted_right = written_out(hidden, targets, head, z_loss)
    assert found.dtype == torch.float32 and right.dtype == torch.bool
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    evaluated = linear_cross_entropy(hidden.detach(), targets, head)[1]
    assert torch.equal(evaluated, wanted_right)
    scores = head.logits(hidden.detach())
    assert torch.equal(right, scores.gather(1, targets[:, None])[:, 0] >= scores.amax(1))  # in training a tie is right
    ours, theirs = (torch.autograd.grad(t @ weights, hidden)[0] for t in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"scale": 0.125},
    {"cap": 3.0},
    {"bias": True, "scale": 2.5, "cap": 2.0},
]


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("head", HEADS)
def test_losses_hits_and_gradients(head: dict[str, Any], z_loss: float) -> None:
    agree(*case(**head), z_loss=z_loss)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("n", [1, 16, 17, 32, 50])
def test_chunk_borders(monkeypatch: pytest.MonkeyPatch, n: int, head: dict[str, Any]) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 8 * 23)
    agree(*case(n, **head), z_loss=0.01)


def test_the_chunks_are_as_large_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    own = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden, into: sizes.append(len(hidden)) or own(self, hidden, into))
    monkeypatch.setattr(cross_entropy, "CHUNK", 23 * 20)
    hidden, targets, head = case(50)
    linear_cross_entropy(hidden.bfloat16(), targets, Head(head.weight.bfloat16()))
    assert sizes == [17, 17, 16]  # no more than 20, and alike
    sizes.clear()
    linear_cross_entropy(hidden, targets, head)
    assert sizes == [25, 25]  # no more than 40


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 70), features=st.integers(1, 9), vocabulary=st.integers(1, 40), bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, -2.0]), cap=st.sampled_from([None, 1.5, 30.0]), z_loss=st.sampled_from([0, 1e-2]),
)  # fmt: skip
def test_any_shape(
    n: int, features: int, vocabulary: int, bias: bool, scale: float, cap: float | None, z_loss: float
) -> None:
    agree(*case(n, features, vocabulary, bias, scale=scale, cap=cap), z_loss=z_loss)


@pytest.mark.parametrize("biased", [False, True])
def test_a_few_positions_more_change_nothing(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    results, sizes = [], []
    own = cross_entropy.mm
    monkeypatch.setattr(cross_entropy, "mm", lambda a, *args, **more: sizes.append(len(a)) or own(a, *args, **more))
    for more in (0, 5):
        monkeypatch.setattr(cross_entropy, "few_sizes", lambda n, like, more=more: n + more)
        hidden, targets, head = case(50, bias=biased)
        losses, right = linear_cross_entropy(hidden, targets, head, z_loss=0.01)
        losses.sum().backward()
        results.append((losses, right.float(), hidden.grad))
    assert sizes == [50, 50, 55, 55]
    torch.testing.assert_close(*results)


def test_no_position_at_all() -> None:
    hidden, targets, head = case(0)
    losses, right = linear_cross_entropy(hidden, targets, head)
    assert losses.shape == right.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_large_logits_do_not_overflow() -> None:
    hidden, targets, head = case()
    hidden = (hidden.detach() * 1e4).requires_grad_()
    losses, _ = linear_cross_entropy(hidden, targets, head)
    losses.sum().backward()
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ head.weight.T, targets, reduction="none"))
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    hidden, targets, head = case()
    with torch.no_grad():
        quiet, _ = linear_cross_entropy(hidden, targets, head)
    frozen, _ = linear_cross_entropy(hidden.detach(), targets, head)
    wanted, right = linear_cross_entropy(hidden, targets, head)
    assert quiet.grad_fn is frozen.grad_fn is None and torch.equal(quiet, wanted) and torch.equal(frozen, wanted)
    assert [t.shape for t in wanted.grad_fn.saved_tensors] == [hidden.shape]  # no logits
    assert not right.requires_grad


def test_the_gradients_product_is_made_only_where_it_is_wanted() -> None:
    hidden, targets, head = case(n=37, features=8, vocabulary=23)
    for wanted in (False, True):
        with FlopCounterMode(display=False) as counted:
            linear_cross_entropy(hidden.detach().requires_grad_(wanted), targets, head)
        assert counted.get_total_flops() == 2 * 37 * 8 * 23 * (1 + wanted)


@pytest.mark.parametrize("head", HEADS)
def test_the_error_of_16_bits_is_no_larger_than_that_of_logits_written_out(head: dict[str, Any]) -> None:
    hidden, targets, wide = case(200, 32, 300, **head)
    half = Head(wide.weight.bfloat16(), None if wide.bias is None else wide.bias.bfloat16(), wide.scale, wide.cap)
    exact = Head(half.weight.double(), None if half.bias is None else half.bias.double(), wide.scale, wide.cap)
    start = hidden.detach().bfloat16()
    weights = draw(200, seed=9)

    def results(compute: Any, hidden: torch.Tensor, head: Head) -> list[torch.Tensor]:
        losses, _ = compute(hidden.requires_grad_(), targets, head)
        return [losses.detach().double(), torch.autograd.grad((losses * weights).sum(), hidden)[0].double()]

    wanted = results(written_out, start.double(), exact)
    found = results(linear_cross_entropy, start.clone(), half)
    plain = results(written_out, start.clone(), half)
    for ours, theirs, w in zip(found, plain, wanted, strict=True):
        assert float((ours - w).norm()) <= 1.5 * float((theirs - w).norm())
        assert float((ours - w).norm()) < 0.01 * float(w.norm())
