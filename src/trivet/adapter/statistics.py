"""What a probe knows of one adapted layer: second moments of inputs and output gradients, sketches of two matrices.

Part of the vocabulary of the legs. Nothing here is as large as W: an out x in layer costs (out + in) x (k + 2) numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from trivet.adapter.layers import AdaptedLayer
from trivet.errors import TrivetError

#: Singular values below this share of the largest are rounding errors of float32 sums.
_RANK_TOLERANCE = 1e-5
#: Likewise for variances, as a share of the largest second moment, from which the mean's was subtracted.
_COVARIANCE_TOLERANCE = 1e-6
#: Smallest C_j and S_i that are divided by, as a share of their mean: a dead input has C_j = 0 (and a gradient of 0).
_FLOOR = 1e-6

#: Numbers that are converted to float32 at a time: what a core's cache holds, or a GPU's memory has room for.
_CHUNK = {"cpu": 2**18}
_LARGE_CHUNK = 2**23
_PER_TOKEN = ("inputs", "input_mean", "input_sketch")
_PER_ITEM = ("outputs", "gradient_right", "gradient_left")


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the probe's tokens, float32 on the model's device. y = W x; g is the gradient of the mean loss at y.

    Attributes:
        inputs: diag C = E[x²] over tokens, (in,).
        outputs: diag S, (out,): items · Σ g² over tokens, so that ½ ‖S^½ ΔW C^½‖² is in nats of the mean loss.
        input_mean: E[x], (in,); gathered beside a sketch, else empty.
        input_sketch: E[x xᵀ] Ω, (in, k).
        gradient_right: G Ω, (out, k), of the mean loss's gradient G = Σ g xᵀ in W.
        gradient_left: Gᵀ Ψ, (in, k).
        omega: the random test matrix Ω, (in, k).
        psi: the random test matrix Ψ, (out, k).
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    input_mean: torch.Tensor
    input_sketch: torch.Tensor
    gradient_right: torch.Tensor
    gradient_left: torch.Tensor
    omega: torch.Tensor
    psi: torch.Tensor

    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(S^½, C^½), (out,) and (in,) float32, with the floor that whitening divides by: never zero."""
        return _floored_root(self.outputs), _floored_root(self.inputs)

    def gradient(self, rank: int, whitened: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The largest singular triplets of G, or of G̃ = S^-½ G C^-½, from the two-sided sketch.

        G ≈ Q (Ψᵀ Q)⁺ (Ψᵀ G), where Q spans the `rank` largest directions of G Ω (Tropp, Yurtsever, Udell & Cevher 2017,
        "Practical sketching algorithms for low-rank matrix approximation", algorithm 4, with the range truncated first:
        the least-squares problem must be tall). G̃ is sketched by the same numbers, with test matrices C^½ Ω and S^½ Ψ.

        Args:
            rank: columns wanted, best at most k / 4 of a sketch of width k: the singular values come out too large, on
                gradients of a language model by 2 to 11% in Σσ² at k = 4 · rank and by 12 to 60% at 2 · rank.
            whitened: of G̃ (C and S with a relative floor, see `scales`) rather than of G.

        Returns:
            U (out, r), σ (r,) descending, V (in, r), float32; U and V have orthonormal columns, in the whitened
            coordinates where `whitened`. r is below `rank` where `rank` exceeds k or G's numerical rank, and 0 for a
            layer that no gradient reached; exact, up to rounding, where G's rank is at most r.

        Raises:
            TrivetError: the layer was measured without a sketch.
        """
        self._check_sketched()
        right, left, psi = (t.double() for t in (self.gradient_right, self.gradient_left, self.psi))
        if whitened:
            out, inner = (t.double()[:, None] for t in self.scales())
            right, left, psi = right / out, left / inner, psi * out
        directions, sizes, _ = torch.linalg.svd(right, full_matrices=False)
        q = directions[:, : min(rank, _numerical_rank(sizes))]
        # by QR, whose last bits are the same in every run (LAPACK's gelsy, behind `lstsq`, differs in them)
        basis, triangle = torch.linalg.qr(psi.T @ q)
        solution = torch.linalg.solve_triangular(triangle, basis.T @ left.T, upper=True)
        u, sigma, vt = torch.linalg.svd(solution, full_matrices=False)
        return (q @ u).float(), sigma.float(), vt.T.float()

    def input_components(self, rank: int) -> torch.Tensor:
        """The principal components of the centred inputs, largest variance first, from the sketch.

        Nyström: E[x xᵀ] − x̄ x̄ᵀ = M ≈ Y (Ωᵀ Y)⁺ Yᵀ with Y = M Ω (Tropp et al. 2017, "Fixed-rank approximation of a
        positive-semidefinite matrix from streaming data").

        Returns:
            V (in, r), float32 with orthonormal columns. r is below `rank` where `rank` exceeds k or the numerical rank
            of the inputs' covariance.

        Raises:
            TrivetError: the layer was measured without a sketch.
        """
        self._check_sketched()
        omega, mean, sketch = self.omega.double(), self.input_mean.double(), self.input_sketch.double()
        y = sketch - mean[:, None] * (mean @ omega)
        core = omega.T @ y
        sizes, basis = torch.linalg.eigh((core + core.T) / 2)
        kept = sizes > _COVARIANCE_TOLERANCE * torch.linalg.matrix_norm(omega.T @ sketch, 2)
        v, _, _ = torch.linalg.svd(y @ (basis[:, kept] / sizes[kept].sqrt()), full_matrices=False)
        return v[:, :rank].float()

    def _check_sketched(self) -> None:
        if not self.omega.shape[1]:
            raise TrivetError(
                "a layer's gradient or input directions were asked for, but only its moments were measured: "
                "measure with a sketch, of about four times the rank that is wanted"
            )


def _floored_root(moments: torch.Tensor) -> torch.Tensor:
    smallest = torch.finfo(moments.dtype).tiny  # for a layer that nothing reached
    return moments.clamp(min=max(_FLOOR * moments.mean().item(), smallest)).sqrt()


def _numerical_rank(sizes: torch.Tensor) -> int:
    """How many of the descending `sizes` are above rounding."""
    return int((sizes > _RANK_TOLERANCE * sizes[:1]).sum())


class Reading:
    """One tensor x that layers read (q, k and v, say): the sums over it are made once for all of them."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}

    def sums(self, x: torch.Tensor, counts: torch.Tensor, mean: bool) -> dict[str, torch.Tensor]:
        """`inputs` Σ x² and, with `mean`, `input_mean` Σ x, (in,) float32, over the positions of x (n, in) that count.

        Made anew where a layer counts other positions than the one before it.
        """
        if self._counts is None or not torch.equal(self._counts, counts):
            names = ("inputs", "input_mean") if mean else ("inputs",)
            self._counts, self._sums = counts, {name: counts.new_zeros(x.shape[1]) for name in names}
            for xs, weights in zip(_pieces(x), counts.split(_rows(x)), strict=True):
                if mean:
                    self._sums["input_mean"].addmv_(xs.T, weights)
                self._sums["inputs"].addmv_(xs.square_().T, weights)
        return self._sums


def _rows(x: torch.Tensor) -> int:
    """How many rows of x (n, m) are a piece."""
    return max(1, _CHUNK.get(x.device.type, _LARGE_CHUNK) // x.shape[1])


def _pieces(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows of x at a time, in float32; what comes next is written over what came before."""
    rows = _rows(x)
    scratch = torch.empty(min(rows, len(x)), x.shape[1], device=x.device)
    for piece in x.split(rows):
        yield scratch[: len(piece)].copy_(piece)


class _Sums:
    """Sums by name, as views of one tensor (`flat`), so that what is done to all of them is done once."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self.shapes = shapes
        self._view(torch.zeros(sum(math.prod(shape) for shape in shapes.values()), device=device))

    def _view(self, flat: torch.Tensor) -> None:
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()])
        self.flat = flat
        self.named = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def to(self, device: torch.device) -> None:
        self._view(self.flat.to(device))


class LayerSums:
    """One layer's sums, float32: of the measurement under way (`now`), and of those that were folded (`total`)."""

    def __init__(self, layer: AdaptedLayer, k: int, seed: int) -> None:
        # by name: the same test matrices whatever other layers there are, now or after resuming
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer.name}".encode()))
        (out, inner), device = layer.shape, layer.A.device
        self.embedding = layer.embedding
        self.omega = torch.randn(inner, k, generator=generator).to(device)
        self.psi = torch.randn(out, k, generator=generator).to(device)
        shapes: dict[str, tuple[int, ...]] = {"tokens": (), "items": (), "inputs": (inner,), "outputs": (out,)}
        if k:
            shapes |= {"input_mean": (inner,)}
            shapes |= {"input_sketch": (inner, k), "gradient_right": (out, k), "gradient_left": (inner, k)}
        self.now, self.total = _Sums(shapes, device), _Sums(shapes, device)

    @torch.no_grad()
    def add(self, x: torch.Tensor, g: torch.Tensor, reading: Reading) -> None:
        """Count the positions of x (…, in), or ids (…), and g (…, out); `reading` is shared by all that read x."""
        if g.device != self.omega.device:  # the model was moved
            self.omega, self.psi = self.omega.to(g.device), self.psi.to(g.device)
            self.now.to(g.device)
            self.total.to(g.device)
        g = g.reshape(-1, g.shape[-1])
        x = x.reshape(-1) if self.embedding else x.reshape(-1, x.shape[-1])
        now, sizes, sketched = self.now.named, [], self.omega.shape[1] > 0
        for gs in _pieces(g):
            squares = gs.square_()
            sizes.append(squares.sum(1))
            now["outputs"].add_(squares.sum(0))
        counts = (torch.cat(sizes) != 0).float()
        now["tokens"].add_(counts.sum())
        if self.embedding:  # x is one-hot, so x² = x
            for name in ("inputs", "input_mean")[: 1 + sketched]:
                now[name].index_add_(0, x, counts)
        else:
            for name, sums in reading.sums(x, counts, mean=sketched).items():
                now[name].add_(sums)
        if sketched:
            self._sketch(x, g, counts)

    def _sketch(self, x: torch.Tensor, g: torch.Tensor, counts: torch.Tensor) -> None:
        now, rows = self.now.named, _rows(g)
        for xs, gs, weights in zip(x.split(rows), _pieces(g), counts.split(rows), strict=True):
            xs = xs if self.embedding else xs.float()
            projected = self.omega[xs] if self.embedding else xs @ self.omega
            now["gradient_right"].addmm_(gs.T, projected)
            for name, values in (("gradient_left", gs @ self.psi), ("input_sketch", projected * weights[:, None])):
                if self.embedding:
                    now[name].index_add_(0, xs, values)
                else:
                    now[name].addmm_(xs.T, values)

    def fold(self, items: float | None, loss_scale: float, decay: float) -> None:
        """Add the measurement to the total, weighted by its tokens and items; `now` is used up."""
        now = self.now.named
        count = now["tokens"].clone() if items is None else items
        now["items"].fill_(count)
        now["outputs"].mul_((count / loss_scale) ** 2)
        for name in ("gradient_right", "gradient_left"):
            if name in now:
                now[name].mul_(count / loss_scale)
        self.total.flat.mul_(decay).add_(self.now.flat)

    def statistics(self) -> LayerStatistics:
        fields, total = {"omega": self.omega, "psi": self.psi}, self.total.named
        absent = {"gradient_right": self.psi, "input_mean": self.omega.flatten()}  # empty where there is no sketch
        for names, count in ((_PER_TOKEN, "tokens"), (_PER_ITEM, "items")):
            divisor = total[count].clamp(min=torch.finfo(torch.float32).tiny)
            for name in names:
                fields[name] = total.get(name, absent.get(name, self.omega)) / divisor
        return LayerStatistics(**fields)
