"""Rows into a padded batch and back: torch's own indexing, and its gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.kernels.gather import Padded, Unpadded


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), shared=st.integers(0, 3))
def test_values_and_gradients_are_those_of_indexing(lengths: list[int], shared: int) -> None:
    """Of what lies behind a common beginning of `shared` tokens; the padding gets no gradient."""
    starts = torch.tensor([shared, *lengths]).cumsum(0)[:-1]
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    places = torch.where(inside, starts[:, None] + torch.arange(max(lengths)), 0)
    kept = inside.flatten().nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, shared + sum(lengths), 3, generator=generator).requires_grad_()
    padded, wanted = Padded.apply(x, places, kept), x[:, places]
    assert torch.equal(padded, wanted)
    weights = torch.randn(padded.shape, generator=generator) * inside[:, :, None]
    (found,), (exact,) = (torch.autograd.grad(y, x, weights) for y in (padded, wanted))
    torch.testing.assert_close(found, exact)

    y = torch.randn(*places.shape, 2, 3, generator=generator).requires_grad_()
    tokens, wanted = Unpadded.apply(y, kept), y[inside]
    assert torch.equal(tokens, wanted)
    weights = torch.randn(tokens.shape, generator=generator)
    (found,), (exact,) = (torch.autograd.grad(t, y, weights) for t in (tokens, wanted))
    assert torch.equal(found, exact)
