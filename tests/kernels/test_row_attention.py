"""Causal attention within rows, in C: torch's own in float64, what rows share, and where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.kernels import attention, compiled, native, product, row_attention
from trivet.kernels.row_attention import rows_between, serves

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler is on this machine")
DTYPES = [torch.float32, torch.bfloat16]


def inputs(
    tokens: int, heads: int, key_heads: int, width: int, dtype: torch.dtype, batch: int = 1, seed: int = 0
) -> list[torch.Tensor]:
    """Queries laid out by head, keys by token and values as a part of something wider, as models have them."""
    q = draw(batch, heads, tokens, width, seed=seed, dtype=dtype)
    k = draw(batch, tokens, key_heads, width, seed=seed + 1, dtype=dtype).transpose(1, 2)
    v = draw(batch, tokens, key_heads, 2 * width, seed=seed + 2, dtype=dtype)[..., width:].transpose(1, 2)
    return [each.detach().requires_grad_() for each in (q, k, v)]


def rows_of(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, *, causal: bool) -> torch.Tensor | None:
    return row_attention.rows_of(len(q), q.shape[2], k.shape[2], mask, causal=causal)


def seen(rows: torch.Tensor, batch: int, queries: int, keys: int) -> torch.Tensor:
    mask = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    for place, first, length, before, own in rows.tolist():
        mask[place, 0, first : first + length, :before] = True
        mask[place, 0, first : first + own, first : first + own] = torch.ones(own, own, dtype=torch.bool).tril_()
    return mask


def near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Within two roundings of bfloat16's, and what sums of up to 200 float32 numbers have."""
    share = 2 * torch.finfo(torch.bfloat16).eps if found.dtype == torch.bfloat16 else 1e-5
    most = share * max(1.0, float(exact.detach().abs().max()))
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=most)


def agree(qkv: list[torch.Tensor], rows: torch.Tensor, scale: float | None = None) -> None:
    """In vectors; where this machine can, in tiles, too."""
    for tiled in {False, native.tiled(qkv[0])}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "tiled", lambda query, tiled=tiled: tiled)
            agree_one_way(qkv, rows, scale)


def agree_one_way(qkv: list[torch.Tensor], rows: torch.Tensor, scale: float | None) -> None:
    batch, heads, queries, width = qkv[0].shape
    weights = draw(batch, queries, heads, width, seed=7, dtype=qkv[0].dtype)
    y = row_attention.row_attention(*qkv, rows, scale)
    assert y.shape == weights.shape and y.is_contiguous() and y.dtype == weights.dtype
    wide = [each.detach().double().requires_grad_() for each in qkv]
    mask = seen(rows, batch, queries, qkv[1].shape[2])
    exact = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True, scale=scale).transpose(1, 2)
    found = [y, *torch.autograd.grad(y, qkv, weights)]
    for one, other in zip(found, [exact, *torch.autograd.grad(exact, wide, weights.double())], strict=True):
        near(one, other)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any),
    shared=st.sampled_from([0, 0, 1, 20, 40]),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (4, 1)]),
    width=st.sampled_from([4, 16, 32, 40, 64, 96]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.3]),
)
def test_packed_rows(
    lengths: list[int], shared: int, heads: tuple[int, int], width: int, dtype: torch.dtype, scale: float | None
) -> None:
    borders = torch.tensor([shared, *lengths]).cumsum(0).int()
    rows = rows_between(borders)
    assert rows[:, 2].sum() == borders[-1]
    agree(inputs(int(borders[-1]), *heads, width, dtype), rows, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 128, 200, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [16, 64])
def test_rows_of_a_batch(width: int, causal: bool, length: int, dtype: torch.dtype) -> None:
    qkv = inputs(length, 4, 2, width, dtype, batch=3)
    rows = rows_of(qkv[0], qkv[1], None, causal=causal)
    assert rows is not None
    agree(qkv, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (7, 100), (70, 33), (150, 260)])
@pytest.mark.parametrize("width", [16, 32])
def test_padding_on_the_right(width: int, queries: int, keys: int, dtype: torch.dtype) -> None:
    """Padding as queries sees what the others see, and has no gradient as keys."""
    q, (_, k, v) = inputs(queries, 4, 2, width, dtype, batch=3)[0], inputs(keys, 4, 2, width, dtype, batch=3, seed=4)
    counts = torch.tensor([keys, 5, keys - 1])
    mask = (torch.arange(keys) < counts[:, None])[:, None, None]
    for given_mask in (mask, mask.expand(-1, -1, queries, -1)):
        rows = rows_of(q, k, given_mask, causal=False)
        assert rows is not None and rows[:, 3].tolist() == counts.tolist()
        agree([q, k, v], rows)


def test_masks_that_say_more_are_left_alone() -> None:
    q, k, _ = inputs(6, 2, 2, 8, torch.float32, batch=2)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert rows_of(q, k, mask, causal=False) is not None and rows_of(q, k, mask, causal=True) is None
    assert rows_of(q, k[:, :, :4], None, causal=True) is None
    others = [mask.tril(), mask.float(), mask.expand(2, 2, 6, 6), mask[0, 0], mask & (torch.arange(6) > 2)]
    middle = mask.clone()
    middle[1, 0, :, 2] = False
    nothing = mask.clone()
    nothing[1] = False
    assert all(rows_of(q, k, other, causal=False) is None for other in (*others, middle, nothing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 32])
def test_large_scores(width: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(50, 2, 2, width, dtype)
    agree([(40 * q).detach().requires_grad_(), k, v], rows_between(torch.tensor([0, 50])))


@pytest.mark.parametrize("causal", [True, False])
def test_dropout(causal: bool) -> None:
    """One-hot values show the weights; the backward pass draws the same ones, and each call draws anew."""
    q, k, _ = inputs(48, 4, 2, 48, torch.float32, batch=2)
    v = torch.eye(48).expand(2, 2, 48, 48)
    rows = rows_of(q, k, None, causal=causal)
    assert rows is not None

    def weights(dropout: float) -> torch.Tensor:
        return row_attention.row_attention(q, k, v, rows, None, dropout).transpose(1, 2)

    whole = weights(0.0)
    torch.manual_seed(0)
    first, second = weights(0.3), weights(0.3)
    torch.manual_seed(0)
    assert torch.equal(weights(0.3), first) and not torch.equal(first, second)
    able = whole > 0
    kept = (first > 0)[able]
    torch.testing.assert_close(first[able][kept], whole[able][kept] / 0.7)
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.02)
    places = (first > 0).float()
    if not causal:  # neighbours, heads and rows of a batch are drawn apart
        for one, other in ((places[0], places[1]), (places[:, 0], places[:, 1]), (places[..., 1:], places[..., :-1])):
            both = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))
            assert abs(float(both[0, 1])) < 0.05

    v = draw(2, 2, 48, 48, seed=5).requires_grad_()
    torch.manual_seed(0)
    y = row_attention.row_attention(q, k, v, rows, None, 0.3)
    w = draw(*y.shape, seed=6)
    mask = seen(rows, 2, 48, 48)
    wide = [each.detach().double().requires_grad_() for each in (q, k, v)]
    scores = wide[0] @ wide[1].repeat_interleave(2, 1).mT / 48**0.5
    exact = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) * (first > 0) / 0.7
    exact = (exact @ wide[2].repeat_interleave(2, 1)).transpose(1, 2)
    near(y, exact)
    for one, other in zip(
        torch.autograd.grad(y, (q, k, v), w), torch.autograd.grad(exact, wide, w.double()), strict=True
    ):
        near(one, other)


@pytest.mark.skipif(not compiled.multiplies_tiles(), reason="this processor has no AMX")
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_drop_what_vectors_drop(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = inputs(170, 4, 2, 32, torch.bfloat16, batch=2)
    rows = rows_of(qkv[0], qkv[1], None, causal=causal)
    assert rows is not None and native.tiled(qkv[0])
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        y = row_attention.row_attention(*qkv, rows, None, 0.3)
        results.append([y, *torch.autograd.grad(y, qkv, draw(*y.shape, seed=6, dtype=torch.bfloat16))])
        monkeypatch.setattr(native, "tiled", lambda query: False)
    for one, other in zip(*results, strict=True):
        near(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_in_its_row(dtype: torch.dtype) -> None:
    q, k, v = inputs(30, 2, 2, 32, dtype)
    with torch.no_grad():
        k[0, 0, 4, 3] = torch.nan
    y = row_attention.row_attention(q, k, v, rows_between(torch.tensor([0, 10, 30])))
    hurt = y.isnan().any(-1)[0]
    assert hurt[4:10, 0].all() and not hurt[:4].any() and not hurt[10:].any() and not hurt[:, 1].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, rows = inputs(300, 4, 2, 32, torch.bfloat16), rows_between(torch.tensor([20, 90, 91, 160, 300]))
    results = []
    for count in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        torch.manual_seed(0)
        y = row_attention.row_attention(*qkv, rows, None, 0.1)
        results.append([y, *torch.autograd.grad(y, qkv, torch.ones_like(y))])
    assert all(map(torch.equal, *results))


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    q, k, v = inputs(64, 4, 4, 64, torch.float32, batch=2)
    rows = torch.tensor([[place, 0, 64, 0, 64] for place in range(2)])
    assert serves(q, k, v, rows)
    assert not serves(q, k, v, 64 * rows)  # long
    assert not serves(q[:1], k[:1], v[:1], rows[:1])  # too few pieces for two threads
    assert not serves(q, k, v[..., :32], rows) and not serves(q, k, v.bfloat16(), rows)
    assert not serves(*(each.double() for each in (q, k, v)), rows)
    monkeypatch.setattr(native, "tiled", lambda query: True)
    assert serves(q, k, v, 64 * rows) and serves(q[:1], k[:1], v[:1], rows[:1])
    assert not serves(q, k, v, 1024 * rows) and not serves(q[:1], k[:1, :1], v[:1, :1], rows[:1])
    monkeypatch.setattr(native, "tiled", lambda query: False)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert not serves(turned, k, v, rows)

    calls: list[Any] = []
    own = row_attention.row_attention
    monkeypatch.setattr(attention, "row_attention", lambda *args: calls.append(args) or own(*args))
    near(attention.attention(q, k, v, causal=True), attention._Attention.apply(q, k, v, None, True, 1 / 8, 0.0, None))
    attention.attention(q, k, v)
    attention.attention(q, k, v, causal=True, dropout=0.1)
    assert len(calls) == 3 and calls[2][-1] == 0.1
    monkeypatch.setattr(product, "multiplies", lambda dtype: True)
    monkeypatch.setattr(native, "tiled", lambda query: False)
    attention.attention(*(each.bfloat16() for each in (q, k, v)))  # nothing but products
    assert len(calls) == 3
    attention.attention(q[:, :, 32:], k, v, causal=True)
    attention.attention(q, k, v, torch.ones(64, 64, dtype=torch.bool).tril_())
    assert len(calls) == 3


def test_rows_are_found_once_for_all_layers_and_again_where_the_mask_has_changed() -> None:
    q, k = torch.zeros(2, 1, 5, 8), torch.zeros(2, 1, 5, 8)
    mask = (torch.arange(5) < torch.tensor([[3], [5]]))[:, None, None].repeat(1, 1, 1, 1)
    first = rows_of(q, k, mask, causal=False)
    assert first is not None and first is rows_of(q, k, mask, causal=False)
    assert first is not rows_of(q[:, :, :4], k, mask, causal=False)
    mask[0, ..., 3] = True
    changed = rows_of(q, k, mask, causal=False)
    assert changed is not None and changed[:, 3].tolist() == [4, 5] and first[:, 3].tolist() == [3, 5]
    mask[0, ..., 0] = False
    assert rows_of(q, k, mask, causal=False) is None
