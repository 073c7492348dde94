"""Products with frozen weights by AMX: float64's."""

from __future__ import annotations

import pytest
import torch
from exact import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.kernels import compiled, product, tile_product

pytestmark = pytest.mark.skipif(
    not compiled.multiplies_tiles(), reason="this processor has no AMX, or no C compiler is here"
)


@settings(max_examples=60, deadline=None)
@given(
    n=st.one_of(st.integers(16, 300), st.sampled_from([513, 1000])),
    k=st.sampled_from([32, 64, 160, 2048, 2080, 5024]),
    m=st.sampled_from([32, 64, 224, 608]),
    threads=st.sampled_from([1, 2, 3, 4]),
    by_column=st.booleans(),
    biased=st.booleans(),
)
def test_products(n: int, k: int, m: int, threads: int, by_column: bool, biased: bool) -> None:
    x, w = draw(n, k, seed=1, dtype=torch.bfloat16), draw(k, m, seed=2, dtype=torch.bfloat16)
    w = w.T.contiguous().T if by_column else w
    bias = draw(m, seed=3, dtype=torch.bfloat16) if biased else None
    assert tile_product.serves(x, w, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = tile_product.product(x, w, bias)
    finally:
        torch.set_num_threads(before)
    exact = x.double() @ w.double() + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=2e-4 * k**0.5)


def test_nothing_is_written_beyond_the_rows() -> None:
    x, w = draw(77, 64, seed=1, dtype=torch.bfloat16), draw(64, 96, seed=2, dtype=torch.bfloat16)
    around = torch.full((117, 96), torch.nan, dtype=torch.bfloat16)
    tile_product.product(x, w, out=around[20:-20])
    assert around[:20].isnan().all() and around[-20:].isnan().all() and around[20:-20].isfinite().all()


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = draw(128, 64, seed=1, dtype=torch.bfloat16), draw(64, 96, seed=2, dtype=torch.bfloat16)
    assert tile_product.serves(x, w) and tile_product.serves(x, w.T.contiguous().T)
    assert not tile_product.serves(x.float(), w) and not tile_product.serves(x, w.float())
    assert not tile_product.serves(x, w, w[0].float()) and not tile_product.serves(x[:15], w)
    assert not tile_product.serves(x[:, :40].contiguous(), w[:40])  # no whole tiles
    assert not tile_product.serves(x[:, :32], w[:32]) and not tile_product.serves(x, w[:, :64])  # not in one piece
    calls: list[torch.Size] = []
    own = tile_product.product
    monkeypatch.setattr(tile_product, "product", lambda a, *rest: calls.append(a.shape) or own(a, *rest))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    place = torch.empty(128, 96, dtype=torch.bfloat16)
    assert product.mm(x, w, w[0], out=place) is place and calls == [x.shape]
    torch.testing.assert_close(place, torch.addmm(w[0], x, w), rtol=2**-7, atol=2e-3)
    product.mm(x[:100], w)
    product.mm(x, w.repeat(1, 9))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    product.mm(x, w)
    assert calls == [x.shape]
