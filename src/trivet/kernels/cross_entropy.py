"""Cross-entropy of a frozen output head, in chunks of positions: never all logits at once, and no second pass.

The gradient in the hidden states is computed together with the loss, while a chunk's logits are in cache (the idea of
Liger's fused linear cross-entropy: Hsu et al. 2024, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trivet.kernels import compiled, fused, native, tile_head
from trivet.kernels.product import few_sizes, mm

#: Logits that are held at a time in 16 bits, and in 32 beside them; in float32 alone twice as many. Large enough for
#: good matrix products (each reads the whole head), small enough to be a small part of a step's memory.
CHUNK = 3 * 2**22
#: A GPU reads the whole head for every chunk, so that small ones would slow it down.
GPU_CHUNK = 2**27


@dataclass(frozen=True)
class Head:
    """logits = cap · tanh(scale · (h Wᵀ + bias) / cap), or without cap and tanh where `cap` is None.

    Attributes:
        weight: W, (vocabulary, features), without gradient.
        bias: (vocabulary,), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: torch.Tensor, into: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """(n, vocabulary) of hidden (n, features), in float32.

        Args:
            into: where to put the products h Wᵀ, in hidden's type, and the logits; new tensors where it is None.
        """
        if into is None:
            out = mm(hidden, self.weight.T).float()
        else:
            products, out = into
            out.copy_(mm(hidden, self.weight.T, out=products))
        if self.bias is not None:
            out += self.bias
        if self.scale != 1.0:
            out *= self.scale
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)


def linear_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(head(h))[target] of every position.

    Args:
        hidden: (n, features).
        targets: (n,), each a token's id.
        z_loss: adds this times log² Z to each loss, Z the softmax's denominator (PaLM: Chowdhery et al. 2022, arXiv
            2204.02311, section 5); it keeps logits from drifting.

    Returns:
        losses in nats (n,) float32, and whether the target was the likeliest token (n,) bool; of tokens that are
        equally likely it is the first, or in training, where finding that one would take time, any. The gradient
        reaches `hidden` alone.
    """
    n = len(hidden)
    if hidden.requires_grad and torch.is_grad_enabled() and tile_head.serves(hidden, head.weight, head.bias):
        return _LinearCrossEntropy.apply(hidden, targets, head, z_loss)
    more = few_sizes(n, like=hidden) - n
    if more == 0:
        return _LinearCrossEntropy.apply(hidden, targets, head, z_loss)
    enlarged = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
    losses, right = _LinearCrossEntropy.apply(*enlarged, head, z_loss)
    return losses[:n], right[:n]


def held_at_once(size: int) -> int:
    """Logits of a CPU's chunk, for hidden states of `size` bytes a number."""
    return CHUNK * (1 if size < 4 else 2)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, targets: Any, head: Head, z_loss: float) -> Any:
        n, targets = len(hidden), targets.contiguous()
        if ctx.needs_input_grad[0] and tile_head.serves(hidden, head.weight, head.bias):
            settings = head.scale, head.cap, z_loss
            losses, right, gradient = tile_head.cross_entropy(hidden, targets, head.weight, head.bias, *settings)
            ctx.mark_non_differentiable(right)
            ctx.save_for_backward(gradient)
            return losses, right
        losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
        right = torch.empty(n, dtype=torch.bool, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wanted else None
        held = GPU_CHUNK if hidden.is_cuda else held_at_once(hidden.element_size())
        size = -(-n // max(1, -(-n * len(head.weight) // held)))  # equal chunks
        short = hidden.new_empty(size, len(head.weight))  # the same memory for every chunk
        kernels = fused if fused.fuses(hidden) else native
        plain = head.bias is None or head.bias.dtype == hidden.dtype
        at_once = grad is not None and plain and (kernels is fused or compiled.serves(hidden))
        wide = short if at_once or short.dtype == torch.float32 else short.new_empty(short.shape, dtype=torch.float32)
        for start in range(0, n, max(size, 1)):
            rows = slice(start, start + size)
            target = targets[rows, None]
            products, p = short[: len(target)], wide[: len(target)]
            if grad is not None and at_once:
                mm(hidden[rows], head.weight.T, head.bias, out=products)
                losses[rows], right[rows] = kernels.cross_entropy_(
                    products, target, scale=head.scale, cap=head.cap, z_loss=z_loss
                )
                mm(products, head.weight, out=grad[rows])
                continue
            head.logits(hidden[rows], (products, p))
            chosen = p.gather(1, target)
            if head.cap is not None and wanted:
                slope = 1 - (p / head.cap).square_()
            if wanted:
                largest = p.amax(1, keepdim=True)
                right[rows] = (chosen >= largest)[:, 0]
            else:
                largest, first = p.max(1, keepdim=True)
                right[rows] = (first == target)[:, 0]
            total = p.sub_(largest).exp_().sum(1, keepdim=True)
            log_z = total.log().add_(largest)
            losses[rows] = (log_z - chosen + z_loss * log_z * log_z)[:, 0]
            if grad is None:
                continue
            p.mul_(head.scale * (1 + 2 * z_loss * log_z) / total)
            p.scatter_add_(1, target, torch.full_like(chosen, -head.scale))
            if head.cap is not None:
                p.mul_(slope)
            mm(products.copy_(p), head.weight, out=grad[rows])
        ctx.mark_non_differentiable(right)
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses, right

    @staticmethod
    def backward(ctx: Any, grad_losses: Any, _: Any) -> Any:
        (grad,) = ctx.saved_tensors
        return (grad * grad_losses[:, None]).to(grad.dtype), None, None, None  # 1 / items is not rounded to 16 bits
