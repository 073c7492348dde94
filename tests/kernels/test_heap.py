"""Memory for large results: torch.empty's tensors, of blocks that glibc gives out again."""

from __future__ import annotations

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.kernels.heap import empty, workspace

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 700), max_size=3).map(tuple).filter(lambda s: torch.Size(s).numel() < 2**21),
    dtype=st.sampled_from(TYPES),
)
def test_any_shape_and_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.zeros(2, dtype=dtype)
    made = empty(*shape, like=like)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous() and not made.requires_grad
    assert not made._is_view()  # what a function of autograd returns could not be changed in place
    assert made.data_ptr() % 64 == 0 or not made.numel()
    made.fill_(3)  # all of it is writable
    assert bool((made == 3).all()) and not bool(like.any())


def test_it_stays_while_any_view_of_it_does() -> None:
    view = empty(1024, 512, like=torch.zeros(1)).fill_(7)[5:, ::3]
    others = [empty(1024, 512, like=torch.zeros(1)).zero_() for _ in range(4)]
    assert bool((view == 7).all()) and not any(bool(other.any()) for other in others)


def test_without_numbers_there_is_no_memory() -> None:
    assert empty(1000, 1000, like=torch.zeros(1, device="meta")).is_meta


def test_a_workspace_is_a_threads_own_and_grows() -> None:
    first = workspace(100, torch.bfloat16)
    assert len(first) >= 100 and first.dtype == torch.bfloat16 and first.data_ptr() % 64 == 0
    assert workspace(50, torch.bfloat16) is first
    assert workspace(100, torch.float32).dtype == torch.float32
    assert workspace(len(first) + 1, torch.bfloat16) is not first
    with ThreadPoolExecutor(1) as other:
        assert other.submit(workspace, 50, torch.float32).result() is not workspace(50, torch.float32)


def test_too_little_memory_is_torchs_error() -> None:
    """Which halves a micro-batch; numpy's would end the run."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        empty(2**24, 2**22, like=torch.zeros(1))


GROWTH = """
import sys, psutil, torch
from trivet.allocator import keep_freed_memory
from trivet.kernels.heap import empty
keep_freed_memory()
like, stays = torch.ones(()), []
for turn in range(103):
    if turn == 3:
        before = psutil.Process().memory_info().rss
    large = empty(2**20, like=like) if sys.argv[1] == "ours" else torch.empty(2**20)
    large.fill_(1)
    stays.append(torch.ones(4).requires_grad_() * 2)  # small things that stay, as a forward pass leaves behind
    del large
print((psutil.Process().memory_info().rss - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's heap")
def test_a_freed_block_is_given_out_again() -> None:
    """100 tensors of 4 MiB one after the other, and something small that stays between them."""

    def growth(whose: str) -> int:
        found = subprocess.run([sys.executable, "-c", GROWTH, whose], capture_output=True, text=True, check=True)
        return int(found.stdout)

    assert growth("ours") < 20
    assert growth("torch's") > 200, "torch's own blocks are reused now: trivet.kernels.heap has no reason left"
