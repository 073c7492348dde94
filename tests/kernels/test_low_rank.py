"""An adapted layer's products by AMX: float64's, and torch's where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.adapter.fast import _AdaptedLinear
from trivet.kernels import compiled, low_rank

pytestmark = pytest.mark.skipif(
    not compiled.multiplies_tiles(), reason="this processor has no AMX, or no C compiler is here"
)
SCALE = 1.5


def inputs(n: int, k: int, m: int, rank: int) -> list[torch.Tensor]:
    """x, w, A, B and the gradient of y: w's part is about as large as the factors'."""
    x, grad = (draw(n, width, seed=width, dtype=torch.bfloat16) for width in (k, m))
    return [x, draw(k, m, seed=4, dtype=torch.bfloat16), draw(rank, k, seed=1), draw(m, rank, seed=2), grad]


def product(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **more: Any) -> tuple[Any, ...]:
    """y, and what `backward` is given of it."""
    y = torch.full((len(x), w.shape[1]), torch.nan, dtype=x.dtype)
    return y, low_rank.product(x, more.get("low", x), w, a, b, SCALE, more.get("bias"), y)


def near(found: torch.Tensor | None, exact: torch.Tensor) -> None:
    """In the middle within a rounding of each 16-bit factor, of what lies between and of the result."""
    assert found is not None and found.isfinite().all()
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 4e-3 * (1 if found.dtype == torch.float32 else 1.5)


@settings(max_examples=60, deadline=None)
@given(
    n=st.one_of(st.integers(16, 300), st.sampled_from([513, 1000])),
    k=st.sampled_from([32, 64, 96, 160]),
    m=st.sampled_from([32, 64, 224]),
    rank=st.sampled_from([1, 2, 8, 16, 17, 32, 40, 128]),
    threads=st.sampled_from([1, 2, 3]),
    biased=st.booleans(),
    by_column=st.booleans(),
    dropped=st.booleans(),
)
def test_sums_and_gradients(
    n: int, k: int, m: int, rank: int, threads: int, biased: bool, by_column: bool, dropped: bool
) -> None:
    x, w, a, b, grad = inputs(n, k, m, rank)
    w = w.T.contiguous().T if by_column else w
    assert low_rank.serves(x, w, a, b)
    low = draw(n, k, seed=6, dtype=torch.bfloat16) if dropped else x
    wide_x, wide_low, wide_w, wide_a, wide_b, wide_grad = (each.double() for each in (x, low, w, a, b, grad))
    dx, dlow = (torch.full_like(x, torch.nan) for _ in range(2))
    bias = draw(m, seed=3, dtype=torch.bfloat16) if biased else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, turned = product(x, w, a, b, low=low, bias=bias)
        da, db = low_rank.backward(grad, low, w, turned, a, b, SCALE, dx, dlow if dropped else None)
    finally:
        torch.set_num_threads(before)
    inner = wide_low @ wide_a.T
    near(y, wide_x @ wide_w + SCALE * inner @ wide_b.T + (0 if bias is None else bias.double()))
    own, of_low = wide_grad @ wide_w.T, SCALE * wide_grad @ wide_b @ wide_a
    near(dx, own if dropped else own + of_low)
    if dropped:
        near(dlow, of_low)
    near(da, SCALE * (wide_grad @ wide_b).T @ wide_low)
    near(db, SCALE * wide_grad.T @ inner)


def test_nothing_is_read_or_written_beyond_the_rows() -> None:
    """Rows that are not a multiple of a tile's lie between others, which stay as they are and may be anything."""
    x, w, a, b, grad = inputs(77, 64, 96, 9)
    around = [torch.full((len(each) + 40, each.shape[1]), torch.nan, dtype=each.dtype) for each in (x, grad, x, grad)]
    inside = [each[20:-20] for each in around]
    for part, given_ in zip(inside, (x, grad, 0 * x, 0 * grad), strict=True):
        part.copy_(given_)
    x, grad, dx, y = inside
    turned = low_rank.product(x, x, w, a, b, SCALE, None, y)
    da, db = low_rank.backward(grad, x, w, turned, a, b, SCALE, dx)
    assert all(each[:20].isnan().all() and each[-20:].isnan().all() for each in around)
    assert all(each.isfinite().all() for each in (y, dx, turned, *(each for each in (da, db) if each is not None)))


def test_a_row_depends_on_itself_alone_and_not_on_threads() -> None:
    x, w, a, b, _ = inputs(300, 64, 96, 9)
    found = []
    for rows, threads in ((x, 2), (x[:70], 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(product(rows, w, a, b)[0])
        torch.set_num_threads(before)
    assert torch.equal(found[0][:70], found[1])


def test_what_is_not_finite_stays_so_in_its_row() -> None:
    x, w, a, b, _ = inputs(64, 64, 96, 9)
    x[3, 5], x[40, 7] = torch.inf, torch.nan
    y, _ = product(x, w, a, b)
    broken = torch.zeros(64, dtype=torch.bool).index_fill_(0, torch.tensor([3, 40]), True)
    assert torch.equal(~y.isfinite().any(1), broken) and y[~broken].isfinite().all()


@pytest.mark.parametrize("without", ["x", "a", "b"])
def test_what_does_not_learn_has_no_gradient(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, a, b, grad = inputs(70, 64, 96, 9)
    weight = w.T.contiguous()
    named: dict[str, Any] = {"x": x, "a": a, "b": b}
    learn = [each.requires_grad_() for name, each in named.items() if name != without]
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(low_rank, "serves", lambda *_: False)
        y = _AdaptedLinear.apply(x, a, b, weight, None, SCALE, False, 0.0, 0)
        results.append(torch.autograd.grad(y, learn, grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.02 * float(torchs.abs().max()))


def test_dropout_before_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, a, b, grad = inputs(70, 64, 96, 9)
    weight = w.T.contiguous()
    learn = [each.requires_grad_() for each in (x, a, b)]
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(low_rank, "serves", lambda *_: False)
        y = _AdaptedLinear.apply(x, a, b, weight, None, SCALE, False, 0.3, 17)
        results.append([y.detach(), *torch.autograd.grad(y, learn, grad)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.02 * float(torchs.abs().max()))


def test_torch_s_products_stay_as_they_were() -> None:
    """Both set up the processor's tiles, and oneDNN may remember how."""
    x, w, a, b, _ = inputs(256, 64, 96, 9)
    weight = draw(200, 64, seed=3, dtype=torch.bfloat16)
    wanted = x @ weight.T
    product(x, w, a, b)
    assert torch.equal(x @ weight.T, wanted)


def test_where_it_is_used() -> None:
    x, w, a, b, _ = inputs(64, 64, 96, 9)
    assert low_rank.serves(x, w, a, b)
    assert not low_rank.serves(x.float(), w, a, b) and not low_rank.serves(x, w.float(), a, b)
    assert not low_rank.serves(x, w, a.bfloat16(), b) and not low_rank.serves(x[:15], w, a, b)
    assert not low_rank.serves(x, w, a.repeat(20, 1), b.repeat(1, 20))
    assert low_rank.serves(x, w, a, b, b[:, 0].bfloat16()) and not low_rank.serves(x, w, a, b, b[:, 0])


def test_without_a_compiler_torch_s_products_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, a, b, _ = inputs(64, 64, 96, 9)
    monkeypatch.setattr(compiled, "serves", lambda x: False)
    assert not low_rank.serves(x, w, a, b)
