"""Cross-entropy of a frozen head by AMX: float64's losses and gradients, and that it is in use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from exact import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.kernels import compiled, tile_head
from trivet.kernels.cross_entropy import Head, linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not compiled.multiplies_tiles(), reason="this processor has no AMX, or no C compiler is here"
)
BF16 = torch.bfloat16


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def exact(hidden: torch.Tensor, targets: torch.Tensor, head: Head, z_loss: float) -> list[torch.Tensor]:
    h = hidden.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    z = torch.nn.functional.linear(h, head.weight.double(), bias) * head.scale
    z = z if head.cap is None else head.cap * torch.tanh(z / head.cap)
    log_z = z.logsumexp(1)
    losses = log_z - z.gather(1, targets[:, None])[:, 0] + z_loss * log_z * log_z
    return [losses.detach(), z.argmax(1) == targets, torch.autograd.grad(losses.sum(), h)[0]]


def agrees(hidden: torch.Tensor, targets: torch.Tensor, head: Head, z_loss: float = 0.0) -> None:
    assert tile_head.serves(hidden, head.weight, head.bias)
    losses, right, grad = tile_head.cross_entropy(hidden, targets, head.weight, head.bias, head.scale, head.cap, z_loss)
    loss, likeliest, gradient = exact(hidden, targets, head, z_loss)
    torch.testing.assert_close(losses.double(), loss, rtol=1e-5, atol=2e-5)
    assert torch.equal(right, likeliest)
    size = gradient.norm(dim=1)
    assert float(((grad.double() - gradient).norm(dim=1) / size.clamp_min(1e-3 * float(size.max()))).max()) < 6e-3


def head_of(vocabulary: int, features: int, bias: bool = False, scale: float = 1.0, cap: float | None = None) -> Head:
    weight = draw(vocabulary, features, seed=1, dtype=BF16) / 8
    return Head(weight, draw(vocabulary, seed=2, dtype=BF16) if bias else None, scale, cap)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(16, 80),
    features=st.sampled_from([32, 64, 160]),
    vocabulary=st.integers(32, 2300),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    cap=st.sampled_from([None, 5.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_losses_gradients_and_what_was_likeliest(
    n: int, features: int, vocabulary: int, bias: bool, scale: float, cap: float | None, z_loss: float
) -> None:
    head = head_of(vocabulary, features, bias, scale, cap)
    hidden = draw(n, features, seed=3, dtype=BF16)
    targets = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(4))
    targets[::3] = torch.nn.functional.linear(hidden.double(), head.weight.double())[::3].argmax(1)
    agrees(hidden, targets, head, z_loss)


@pytest.mark.parametrize("size", [20.0, 300.0])
def test_logits_that_are_far_apart(size: float) -> None:
    """e^(a logit less the target's) is more than a number can be: losses are up to 2,000 nats."""
    hidden = draw(40, 64, seed=3, dtype=BF16) * size
    targets = torch.randint(700, (40,), generator=torch.Generator().manual_seed(4))
    head = head_of(700, 64)
    losses = tile_head.cross_entropy(hidden, targets, head.weight, None, 1.0, None, 0.0)[0]
    assert float(losses.max()) > (80 if size > 100 else 20)
    agrees(hidden, targets, head)


def test_a_likely_target_leaves_a_small_gradient() -> None:
    """Which is the difference of two that are alike."""
    head, hidden = head_of(100, 64), draw(32, 64, seed=3, dtype=BF16)
    targets = torch.nn.functional.linear(hidden.double(), head.weight.double()).argmax(1)
    hidden = hidden * 16
    losses = exact(hidden, targets, head, 0.0)[0]
    assert float(losses.median()) < 0.02
    agrees(hidden, targets, head)


def test_sums_in_pieces_and_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_head, "_ROWS", 48)
    monkeypatch.setattr(tile_head, "_WORDS", 64)
    monkeypatch.setattr(tile_head, "_PACKED", 64 * 32)
    hidden = draw(101, 2080, seed=3, dtype=BF16) / 4
    agrees(hidden, torch.arange(101), head_of(333, 2080))


def test_it_is_in_use_where_there_is_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, own = [], tile_head.cross_entropy
    monkeypatch.setattr(tile_head, "cross_entropy", lambda *given: calls.append(len(given[0])) or own(*given))
    head, targets = head_of(333, 64), torch.arange(50)
    hidden = draw(50, 64, seed=3, dtype=BF16).requires_grad_()
    losses, right = linear_cross_entropy(hidden, targets, head)
    assert calls == [50] and losses.requires_grad and not right.requires_grad
    weights = torch.rand(50, generator=torch.Generator().manual_seed(5))
    (grad,) = torch.autograd.grad(losses @ weights, hidden)
    gradient = exact(hidden, targets, head, 0.0)[2] * weights[:, None].double()
    assert float((grad.double() - gradient).norm() / gradient.norm()) < 5e-3
    for other in (hidden.detach(), hidden.detach().float().requires_grad_()):
        linear_cross_entropy(other, targets, Head(head.weight.to(other.dtype)))
    linear_cross_entropy(hidden[:15], targets[:15], head)  # few rows are not worth packing weights for
    assert calls == [50]


def test_what_is_no_number_stays_none() -> None:
    head, hidden = head_of(100, 64), draw(32, 64, seed=3, dtype=BF16)
    hidden[3, 5] = torch.nan
    losses, _, grad = tile_head.cross_entropy(hidden, torch.arange(32), head.weight, None, 1.0, None, 0.0)
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_a_target_that_is_no_word_has_no_loss() -> None:
    head, hidden = head_of(100, 64), draw(32, 64, seed=3, dtype=BF16)
    targets = torch.arange(32)
    targets[4], targets[6] = -100, 100
    losses, right, _ = tile_head.cross_entropy(hidden, targets, head.weight, None, 1.0, None, 0.0)
    assert losses.isnan().nonzero().flatten().tolist() == [4, 6] and not right[[4, 6]].any()


def test_it_is_the_same_from_run_to_run() -> None:
    head, hidden = head_of(700, 64), draw(70, 64, seed=3, dtype=BF16)
    first, second = (
        tile_head.cross_entropy(hidden, torch.arange(70), head.weight, None, 1.0, None, 0.0) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
