"""Attention in blocks: torch's own scaled dot-product attention, forward and backward, with every kind of mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.kernels.attention import _Attention, attention

pytestmark = pytest.mark.usefixtures("without_a_compiler")  # test_row_attention.py has the C function


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    queries: int, keys: int | None = None, heads: tuple[int, int] = (4, 4), batch: int = 2, width: int = 8,
    value_width: int | None = None, dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:  # fmt: skip
    """Random q, k, v that want gradients."""
    keys = queries if keys is None else keys
    q = draw(batch, heads[0], queries, width, seed=1, dtype=dtype)
    k = draw(batch, heads[1], keys, width, seed=2, dtype=dtype)
    v = draw(batch, heads[1], keys, value_width or width, seed=3, dtype=dtype)
    return [t.requires_grad_() for t in (q, k, v)]


def results(attend: Any, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """(output, gradients in q, k and v) for a fixed gradient of the output; outputs have heads before positions."""
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, draw(*out.shape, seed=4, dtype=out.dtype))]


def ours(mask: torch.Tensor | None = None, **options: Any) -> Any:
    return lambda q, k, v: attention(q, k, v, mask, **options).transpose(1, 2)


def torchs(mask: torch.Tensor | None = None, causal: bool = False, **options: Any) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1], **options
    )


def agree(qkv: list[torch.Tensor], mask: torch.Tensor | None = None, **options: Any) -> None:
    tolerance = 1e-10 if qkv[0].dtype == torch.float64 else 2e-5
    for found, wanted in zip(results(ours(mask, **options), qkv), results(torchs(mask, **options), qkv), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def padding(rows: list[int], keys: int) -> torch.Tensor:
    """(rows, 1, 1, keys): the first so many keys of each row may be seen."""
    return (torch.arange(keys) < torch.tensor(rows)[:, None])[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 200, 1030])
def test_lengths(length: int, causal: bool, dtype: torch.dtype) -> None:
    heads = (2, 1) if length > 1000 else (4, 2)
    agree(inputs(length, heads=heads, batch=1 if length > 1000 else 2, dtype=dtype), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(9, 3), (4, 1), (3, 3)])
def test_query_heads_that_share_a_key_head(heads: tuple[int, int], causal: bool) -> None:
    agree(inputs(70, heads=heads), causal=causal)


@pytest.mark.parametrize("scale", [None, 0.07])
def test_values_of_another_width_and_another_scale(scale: float | None) -> None:
    agree(inputs(70, value_width=5, heads=(4, 2)), causal=True, scale=scale)


@pytest.mark.parametrize("queries", [1, 40, 300])
def test_more_keys_than_queries(queries: int) -> None:
    agree(inputs(queries, 333, heads=(4, 2)))


@pytest.mark.parametrize("queries", [1, 40, 64, 100, 300])
def test_the_last_of_more_keys_than_queries(queries: int) -> None:
    """Causal from the end: every query sees what comes before all of them."""
    qkv, mask = inputs(queries, 333, heads=(4, 2)), torch.ones(queries, 333, dtype=torch.bool).tril(333 - queries)
    for found, wanted in zip(results(ours(causal=True), qkv), results(torchs(mask), qkv), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("shape", [(2, 1, 1, 290), (2, 1, 290, 290), (2, 4, 290, 290), (1, 4, 1, 290), (290, 290)])
def test_masks_of_every_shape(shape: tuple[int, ...], heads: tuple[int, int]) -> None:
    """More than one block of queries, which is what a mask's rows have to follow."""
    qkv = inputs(290, heads=heads)
    seen = draw(*shape, seed=5) > 0
    agree(qkv, seen | torch.eye(290, dtype=torch.bool) if shape[-2] > 1 else seen)
    agree(qkv, draw(*shape, seed=6))


def test_a_float_mask_that_forbids() -> None:
    forbidden = draw(2, 1, 70, 70, seed=5) > 0.5
    forbidden[..., 0] = False
    agree(inputs(70), torch.zeros(2, 1, 70, 70, dtype=torch.float64).masked_fill(forbidden, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding(dtype: torch.dtype) -> None:
    agree(inputs(80, heads=(4, 2), dtype=dtype), padding([80, 33], 80))


def test_a_row_that_sees_nothing_is_finite_and_disturbs_no_other() -> None:
    qkv = inputs(20)
    mask = padding([20, 0], 20).expand(2, 1, 20, 20).clone()
    mask[0, :, 3] = False  # one query of the first row, too
    found = results(ours(mask), qkv)
    assert all(bool(t.isfinite().all()) for t in found)
    alone = results(torchs(mask[:1]), [t[:1].detach().requires_grad_() for t in qkv])
    others = [i for i in range(20) if i != 3]
    torch.testing.assert_close(found[0][0][:, others], alone[0][0][:, others])
    torch.testing.assert_close(found[1][0][:, others], alone[1][0][:, others])


def test_inputs_and_gradients_that_are_transposed_views() -> None:
    """As models give them: (batch, length, heads, width) with heads and length swapped."""
    flat = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs(70, heads=(4, 2))]
    assert not any(t.is_contiguous() for t in flat)
    agree(flat, causal=True)
    agree(flat, padding([70, 41], 70))


def test_the_output_is_contiguous_by_position() -> None:
    out = attention(*inputs(7, heads=(4, 2), value_width=5))
    assert out.shape == (2, 7, 4, 5) and out.is_contiguous()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), shared=st.integers(1, 3), key_heads=st.integers(1, 3), queries=st.integers(1, 140),
    more=st.integers(0, 70), width=st.integers(1, 9), value_width=st.integers(1, 9), causal=st.booleans(),
    masked=st.booleans(),
)  # fmt: skip
def test_any_shape(
    batch: int, shared: int, key_heads: int, queries: int, more: int, width: int, value_width: int, causal: bool,
    masked: bool,
) -> None:  # fmt: skip
    keys = queries if causal else queries + more
    qkv = inputs(queries, keys, (shared * key_heads, key_heads), batch, width, value_width)
    if masked and not causal:
        agree(qkv, padding([1 + (7 * row) % keys for row in range(batch)], keys))
    else:
        agree(qkv, causal=causal)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_is_that_of_finite_differences(causal: bool, dropout: float) -> None:
    mask = None if causal else draw(1, 1, 5, 5, seed=7)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _Attention.apply(q, k, v, mask, causal, 0.4, dropout, 11 if dropout else None)

    assert torch.autograd.gradcheck(attend, inputs(5, heads=(4, 2), width=3, value_width=2))


def test_dropout_follows_torchs_seed_and_differs_between_blocks() -> None:
    qkv = inputs(150, heads=(1, 1), batch=1)

    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return attention(*qkv, causal=True, dropout=0.5)

    assert torch.equal(seeded(3), seeded(3))
    assert not torch.equal(seeded(3), seeded(4))
    weights = _Attention.apply(*(t.detach() for t in inputs(256, heads=(1, 1), batch=1)[:2]),
                               torch.eye(256, dtype=torch.float64)[None, None], None, False, 0.3, 0.5, 1)  # fmt: skip
    blocks = (weights[0, :, 0] == 0).split(64)  # with V the identity the output is the dropped probabilities
    assert all(not torch.equal(blocks[0], other) for other in blocks[1:])


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    q, k, _ = (t.detach() for t in inputs(40, heads=(2, 2), batch=1))
    v = torch.eye(40, dtype=torch.float64).expand(1, 2, 40, 40)
    plain = attention(q, k, v)
    drawn = torch.stack([_Attention.apply(q, k, v, None, False, 8**-0.5, 0.25, seed) for seed in range(400)])
    assert (drawn == 0).double().mean().item() == pytest.approx(0.25, abs=0.005)
    assert ((drawn == 0) | torch.isclose(drawn, plain / 0.75)).all()
    torch.testing.assert_close(drawn.mean(0), plain, rtol=0.2, atol=0)  # a standard error is 3 %


def test_without_dropout_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    attention(*inputs(5))
    assert torch.equal(torch.get_rng_state(), before)


def eager(mask: torch.Tensor | None = None, causal: bool = False) -> Any:
    """As models of transformers write it out: scores in the inputs' type, softmax in float32."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        seen = seen.tril() if causal else seen if mask is None else mask
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    return attend


def errors_of_16_bits(other: Any, spread: float, options: dict[str, Any]) -> list[tuple[float, float]]:
    """For the output and each gradient, our error and that of `other`, relative to the norm in 64 bits."""
    half = [t.detach() for t in inputs(200, heads=(6, 6), width=32, dtype=torch.bfloat16)]
    half = [half[0] * spread, half[1], half[2]]
    exact = [t.double().requires_grad_() for t in half]  # the same numbers
    half = [t.requires_grad_() for t in half]
    wanted = results(torchs(**options), exact)
    found, others = results(ours(**options), half), results(other(**options), half)
    assert {t.dtype for t in found} == {torch.bfloat16}
    pairs = [(found[i].double() - w, others[i].double() - w, w) for i, w in enumerate(wanted)]
    return [(float(mine.norm() / w.norm()), float(theirs.norm() / w.norm())) for mine, theirs, w in pairs]


SIXTEEN = pytest.mark.parametrize(
    "options", [{"mask": padding([200, 90], 200)}, {"causal": True}], ids=["mask", "causal"]
)


@SIXTEEN
@pytest.mark.parametrize("spread", [1.0, 8.0])  # of the scores: about what new and trained models have
def test_the_error_of_16_bits_is_no_larger_than_that_of_eager_attention(spread: float, options: dict[str, Any]) -> None:
    for mine, theirs in errors_of_16_bits(eager, spread, options):
        assert mine <= 1.5 * theirs
        assert mine < 0.05
