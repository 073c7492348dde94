"""The C kernels for CPUs: torch's own operations in float64, and what happens where they can't be compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import both, check_chunks, check_cross_entropy, check_rotation, close, draw
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.kernels import activation, attention, compiled, gate, native, norm
from trivet.kernels.cross_entropy import Head, linear_cross_entropy

BY_TANH = activation.ACTIVATIONS[1]
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="no C compiler is on this machine")
DTYPES = [torch.float32, torch.bfloat16]


@needs_compiler
def test_they_are_there_and_share_torchs_threads() -> None:
    """A second OpenMP would have threads of its own, which torch's wait in the way of."""
    assert compiled.missing() is None and compiled.serves(torch.ones(1))
    if sys.platform == "linux":
        mapped = set(re.findall(r"\S*lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", Path("/proc/self/maps").read_text()))
        assert len({Path(each).resolve() for each in mapped if "scikit" not in each and "sklearn" not in each}) == 1


def test_what_they_do_not_take() -> None:
    others = torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float64), torch.ones(0)
    assert not any(compiled.serves(x) for x in (*others, torch.ones(1, device="meta")))
    with pytest.raises(TypeError, match="float32"):
        native.softmax_(torch.ones(2, 3))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (2, 3, 100), (3, 1500), (40, 1024)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = 1 + draw(shape[-1], seed=2, dtype=dtype) / 2

    def exact(x: torch.Tensor) -> torch.Tensor:
        return weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    both(lambda x: norm.rms_norm(x, weight, 1e-5), exact, draw(*shape, seed=1, dtype=dtype))
    turned = draw(*shape, seed=3, dtype=dtype).transpose(0, -2)
    close(norm.rms_norm(turned, weight, 1e-5), exact(turned.double()))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (4096,), (3, 5, 333), (40, 1024)])
def test_silu_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both(gate.silu_gate, lambda g, u: F.silu(g) * u, *(3 * draw(*shape, seed=s, dtype=dtype) for s in (1, 2)))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (4096,), (3, 5, 333), (40, 1024)])
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 3 * draw(*shape, seed=1, dtype=dtype)
    assert type(activation.activate(x.requires_grad_(), BY_TANH).grad_fn).__name__ == "_GELUBackward"
    both(lambda x: activation.activate(x, BY_TANH), BY_TANH, x.detach())


@needs_compiler
def test_gelu_from_end_to_end() -> None:
    """No further from float64 than torch's, or a few roundings; what is no number stays none."""
    x = torch.linspace(-12, 12, 10_001).requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = BY_TANH(wide)
    wanted = exact.detach(), torch.autograd.grad(exact.sum(), wide)[0]
    errors = []
    for y in (activation.activate(x, BY_TANH), BY_TANH(x)):
        found = y.detach(), torch.autograd.grad(y.sum(), x)[0]
        errors.append([float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True)])
    assert all(ours <= max(theirs, 6e-7) for ours, theirs in zip(*errors, strict=True))
    ends = activation.activate(torch.tensor([torch.inf, 1e30, -1e30, torch.nan]), BY_TANH)
    assert ends[:2].tolist() == [torch.inf, float(torch.tensor(1e30))] and ends[2] == 0 and ends[3].isnan()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_carries_a_recipe_is_made_again(dtype: torch.dtype) -> None:
    x, weight = draw(4, 6, seed=1, dtype=dtype).requires_grad_(), draw(6, seed=2, dtype=dtype)
    for y in (
        norm.rms_norm(x, weight, 1e-5),
        gate.silu_gate(x, 2 * x),
        activation.activate(x, BY_TANH),
    ):
        recipe = y.recipe  # type: ignore[attr-defined]
        assert torch.equal(recipe.maker(*recipe.inputs), y)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 16), ((3, 3), 24), ((9, 1), 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotate(heads: tuple[int, int], width: int, shared: bool, dtype: torch.dtype) -> None:
    check_rotation(heads, width, shared, dtype, "cpu")


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 70),
    before=st.integers(0, 1500),
    heads=st.integers(1, 3),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_softmax(queries: int, before: int, heads: int, causal: bool, seed: int) -> None:
    """Also of rows longer than a piece, and where scores that are not seen are not even numbers."""
    keys = before + queries
    scores = 5 * draw(2, heads * queries, keys, seed=seed, dtype=torch.bfloat16)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu_(before + 1).repeat(heads, 1) & causal
    wanted = torch.softmax(scores.double().masked_fill(hidden, -torch.inf), -1)
    if causal:
        scores.masked_fill_(hidden, torch.nan)
    found = native.softmax_(scores, queries, before) if causal else native.softmax_(scores)
    close(found, wanted)
    assert not found[:, hidden].count_nonzero()


@needs_compiler
@pytest.mark.parametrize("length", [64, 100, 300])
@pytest.mark.parametrize("mask", [None, "padding"])
def test_attention(length: int, mask: str | None) -> None:
    q, k, v = (draw(2, h, length, 16, seed=h, dtype=torch.bfloat16) for h in (4, 2, 2))
    seen = torch.ones(2, 1, length, length, dtype=torch.bool).tril_()
    if mask:
        seen[1, ..., : length // 3] = False
        seen[..., 0] = True  # a row that sees nothing has no softmax
    weights = draw(2, length, 4, 16, seed=7, dtype=torch.bfloat16)
    results = []
    for on in (True, False):
        inputs = [each.clone().requires_grad_() for each in (q, k, v)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "serves", lambda *_: False)  # not by row_attention.py
            if not on:
                patch.setattr(compiled, "serves", lambda x: False)
            y = attention.attention(*inputs, seen if mask else None, causal=mask is None)
            results.append([y, *torch.autograd.grad(y, inputs, weights)])
    wide = [each.double().requires_grad_() for each in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    wanted = [exact, *torch.autograd.grad(exact, wide, weights.double())]
    for ours, plain, true in zip(*results, wanted, strict=True):
        error, usual = ((each.double() - true).square().mean() for each in (ours, plain))
        assert error <= 1.1 * usual


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("head", [{}, {"scale": 0.25}, {"cap": 3.0}, {"scale": 2.5, "cap": 2.0}])
@pytest.mark.parametrize("vocabulary", [23, 5000])
def test_cross_entropy(vocabulary: int, head: dict[str, Any], z_loss: float, dtype: torch.dtype) -> None:
    check_cross_entropy(native.cross_entropy_, vocabulary, head, z_loss, dtype, "cpu")


@needs_compiler
def test_what_is_no_number_stays_none() -> None:
    """A loss that has become NaN must show; words that a model rules out (minus infinity) are no matter."""
    products = draw(3, 3000, seed=1)
    products[0, 2000], products[1, :1500] = torch.nan, -torch.inf
    wanted = F.cross_entropy(products[1:2].double(), torch.tensor([1999]))
    losses, _ = native.cross_entropy_(products, torch.tensor([5, 1999, 3000]))
    assert losses[0].isnan() and losses[2].isnan() and products[0].isnan().all()
    torch.testing.assert_close(losses[1].double(), wanted)
    assert products[1].isfinite().all() and not products[1, :1500].count_nonzero()
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 100.0, -100.0])
    found = gate.silu_gate(x, torch.ones(5))
    assert (
        found[0].isnan() and found[1] == torch.inf and found[3].item() == pytest.approx(100) and abs(found[4]) < 1e-20
    )
    narrow = gate.silu_gate(x.bfloat16(), torch.ones(5).bfloat16())
    assert narrow[0].isnan() and narrow[[1, 3]].tolist() == [torch.inf, 100.0]


@needs_compiler
@pytest.mark.parametrize("n", [1, 16, 17, 50])
def test_a_head_in_chunks(n: int) -> None:
    check_chunks(n, "cpu")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_with_a_bias(dtype: torch.dtype) -> None:
    hidden = draw(50, 8, seed=2, dtype=dtype).requires_grad_()
    weight, bias, targets = draw(23, 8, seed=1, dtype=dtype), draw(23, seed=4, dtype=dtype), torch.arange(50) % 23
    losses, _ = linear_cross_entropy(hidden, targets, Head(weight, bias))
    wide = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(wide @ weight.double().T + bias.double(), targets, reduction="none")
    share = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(losses.double(), exact, rtol=share, atol=share)
    found, wanted = (torch.autograd.grad(each.sum(), x)[0] for each, x in ((losses, hidden), (exact, wide)))
    torch.testing.assert_close(found.double(), wanted, rtol=share, atol=share)


@needs_compiler
def test_threads_change_no_bit() -> None:
    def results() -> list[torch.Tensor]:
        x, weight = draw(60, 1024, seed=1, dtype=torch.bfloat16), draw(1024, seed=2, dtype=torch.bfloat16)
        logits = draw(64, 1024, seed=3, dtype=torch.bfloat16)
        losses, _ = native.cross_entropy_(logits, torch.arange(64))
        return [native.rms_norm(x, weight, 1e-5)[0], native.silu_gate(x, 2 * x), losses, logits]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        assert all(torch.equal(*pair) for pair in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(threads)


REASON = (
    "import torch; from trivet.kernels.compiled import missing, serves; print(missing()); print(serves(torch.ones(1)))"
)


def said(tmp_path: Path, code: str = REASON, **environment: str) -> list[str]:
    """What a new process says, with a cache of its own."""
    given = {**os.environ, "TRIVET_CACHE": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_no_compiler(tmp_path: Path) -> None:
    assert said(tmp_path, CC="") == ["no C compiler was found (install gcc or clang, or name one in CC)", "False"]
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho no licence >&2\nexit 3\n")
    fake.chmod(0o755)
    reason, serves = said(tmp_path, CC=str(fake))
    assert "could not be compiled" in reason and "ended with 3: no licence" in reason and serves == "False"
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files here")
@needs_compiler
def test_a_folder_that_others_can_write_to(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    reason, serves = said(tmp_path)
    assert f"others than you can write to {folder}" in reason and serves == "False" and not list(folder.iterdir())


@needs_compiler
def test_it_is_compiled_once_a_machine(tmp_path: Path) -> None:
    assert said(tmp_path) == ["None", "True"]
    (made,) = (tmp_path / "cache" / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    assert said(tmp_path) == ["None", "True"] and made.stat().st_mtime_ns == before


def test_a_processor_with_amx_has_its_kernels() -> None:
    """A source that no compiler takes with all of the processor's instructions is compiled without them, silently."""
    flags, command = Path("/proc/cpuinfo"), compiled.compiler()
    if not flags.exists() or "amx_bf16" not in flags.read_text().split() or command is None:
        pytest.skip("this processor has no AMX, or no C compiler is here")
    asked = [*command, "-march=native", "-fopenmp", "-dM", "-E", "-x", "c", "/dev/null"]
    known = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    if "__AMX_BF16__" not in known:
        pytest.skip("this compiler knows no AMX")
    assert compiled.multiplies_tiles()
