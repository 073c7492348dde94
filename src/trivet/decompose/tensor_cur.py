"""`tensor_cur`: a tensor CUR update of the same-shape layers together; they share one trained core.

He, Cheng, Zhu, Cai & Yu 2025 (tCURLoRA, arXiv 2501.02227): the p weights of one shape are stacked into a tensor 𝒲
(out, in, p), and 𝒲 ≈ 𝒞 * 𝒰 * ℛ by the t-product: a matrix product in each of the p slices of the Fourier transform
along the stack. 𝒞 (out, r, p) and ℛ (r, in, p) are columns and rows of 𝒲: those r columns whose norms, summed over the
Fourier slices, are largest, and the r rows that are largest so within the chosen columns, as in the authors' code.

Frozen 𝒞 and ℛ and a trained 𝒰 (r, r, p) make ΔW_l = s Σ C_a U_b R_c over a + b + c = l (mod p); see
`trivet.adapter.forms.TensorCore`. The authors train a complex 𝒰 per Fourier slice from the pseudo-inverse on, subtract
its start and take the real part; here the change of 𝒰 is trained, real and from 0, which is the same family of updates.

Columns and rows of W have no unit size, and large ones may be alike in all layers, so that one Fourier slice holds most
of them. 𝒞 is divided by one constant that gives it the Frobenius norm √r of an orthonormal basis, and ℛ by one that
makes a step on 𝒰 move the layers as far as plain LoRA's does (`bases.core_step`): for 𝒰 of random signs the mean square
of ‖ΔW_l / s‖ over the stack is the mean over Fourier slices k of ‖Ĉ_k‖² ‖R̂_k‖² (Parseval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trivet.adapter.layers import AdaptedLayer
from trivet.adapter.statistics import LayerStatistics
from trivet.decompose.bases import core_step, known, pivots
from trivet.decompose.zero import start_embeddings
from trivet.errors import ConfigError


def start(
    layers: Sequence[AdaptedLayer],
    generator: torch.Generator,
    statistics: Mapping[str, LayerStatistics] | None = None,
    *,
    choose: str = "norms",
) -> None:
    """Set bases and shared cores, of rank min(r, out, in), for every stack; embeddings start as `zero`'s do.

    A stack is the layers of one shape whose names end alike, such as every q_proj. The forward pass and the plain LoRA
    that is saved are of rank r p.

    Args:
        choose: "norms" as above, or "gradient": columns and rows by pivoted QR of the gradients' sketches, those inputs
            and outputs that the loss of all the layers asks most for.

    Raises:
        ConfigError: choose="gradient" and there are no statistics; or a stack's weights are all 0.
    """
    for stack in stacks(start_embeddings(layers, generator)):
        weights = [layer.weight for layer in stack]
        rank = min(stack[0].rank, *weights[0].shape)
        if choose == "gradient":
            probes = [known(statistics, layer, "decompose tensor_cur with choose: gradient") for layer in stack]
            columns = pivots(torch.cat([probe.gradient_left for probe in probes], 1).T, rank, generator)
            rows = pivots(torch.cat([probe.gradient_right for probe in probes], 1).T, rank, generator)
        else:
            columns, rows = largest(weights, rank)
        c = torch.stack([w[:, columns].float() for w in weights])  # (p, out, r)
        r = torch.stack([w[rows].float() for w in weights])  # (p, r, in)
        _set_stack(stack, *_scaled(c, r, stack[0]))


def stacks(layers: Sequence[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """The layers by shape, last name and device, each in the model's order."""
    found: dict[tuple, list[AdaptedLayer]] = {}
    for layer in layers:
        found.setdefault((layer.shape, layer.name.rpartition(".")[2], layer.A.device), []).append(layer)
    return list(found.values())


def largest(weights: Sequence[torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen columns and rows of the stack of `weights`, each (rank,), by norms summed over Fourier slices."""
    columns = _norms(weights).topk(rank).indices
    return columns, _norms([w[:, columns].T for w in weights]).topk(rank).indices


def _norms(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ_k ‖Ŵ[:, j, k]‖ for every column j, (in,); by blocks of rows, since the whole stack may not fit in memory."""
    squares = weights[0].new_zeros(weights[0].shape[1], len(weights), dtype=torch.float32)
    for at in range(0, weights[0].shape[0], 256):
        block = torch.stack([w[at : at + 256].float() for w in weights], -1)
        squares += torch.fft.fft(block, dim=-1).abs().square().sum(0)
    return squares.sqrt().sum(-1)


def _scaled(c: torch.Tensor, r: torch.Tensor, layer: AdaptedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """𝒞 and ℛ in the sizes that the module's docstring gives."""
    c_slices, r_slices = (torch.fft.fft(t, dim=0).abs().square().sum((1, 2)) for t in (c, r))
    size, moved = c_slices.mean(), (c_slices * r_slices).mean()
    if moved == 0:
        raise ConfigError(
            "starting the adapter: decompose tensor_cur takes columns and rows of the weights, and those of "
            f"{layer.name} and of the layers like it are 0; leave them out of target_modules"
        )
    rank = c.shape[2]
    left = (rank / size).sqrt()
    return c * left, r * (core_step(c.shape[1], rank) / (left * moved.sqrt()))


def _set_stack(stack: Sequence[AdaptedLayer], c: torch.Tensor, r: torch.Tensor) -> None:
    """Give the layers of a stack one left basis, one right basis and one core."""
    p, out, rank = c.shape
    like = stack[0].A
    left = c.permute(1, 0, 2).reshape(out, p * rank).to(like)
    right = r.reshape(p * rank, -1).to(like)
    core = nn.Parameter(like.new_zeros(p, rank, rank))
    for index, layer in enumerate(stack):
        layer.share_core(left, right, core, index)
