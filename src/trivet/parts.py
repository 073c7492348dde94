"""The tables of the three legs: what each part does, who found it, what it costs, what it can't be combined with."""

from __future__ import annotations

from trivet.legs import Option, Part

_NO_MAGNITUDE = {
    "magnitude": "DoRA normalises W + ΔW as a whole, so no direction of ΔW has a worth of its own; use rank fixed",
    "coupled": "its core is shared by a stack of layers, so one layer's rank can't change alone; use rank fixed",
}
_SCHEDULE = (
    Option(
        "budget",
        None,
        "what is kept: 500k, 0.5%, r4-equivalent, or a number; default r{lora_rank}-equivalent",
        "budget",
    ),
    Option(
        "start_rank",
        None,
        "rank to train wide with; default 4 times the budget's rank, at most 1/8 of the width",
        "whole",
    ),
    Option("begin", 0.1, "share of the steps that are trained wide", "share"),
    Option("end", 0.6, "share of the steps after which the ranks are settled", "share"),
    Option("rank_aware_step", True, "each layer's step is scaled by √(8 / r)", "switch"),
)
_STEP = Option(
    "rank_aware_step", False, "each layer's step is scaled by √(8 / r): one learning rate for all ranks", "switch"
)
_METRIC = Option(
    "metric", "whitened", "what a direction is worth: loss (whitened) or plain singular values", "whitened|plain"
)

PARTS: dict[str, dict[str, Part]] = {
    "decompose": {
        "zero": Part(
            "A Kaiming-uniform, B zero: training starts at the base model",
            "Hu et al. 2021, arXiv 2106.09685",
            "nothing",
            "trivet.decompose.zero:start",
        ),
        "orthogonal": Part(
            "A has orthonormal rows of Kaiming's size, B zero",
            "Saxe et al. 2014, arXiv 1312.6120; Büyükakyüz 2024 (OLoRA), arXiv 2406.01775",
            "one QR of an r x in matrix a layer",
            "trivet.decompose.orthogonal:start",
        ),
        "gradient": Part(
            "A spans the loss gradient's largest directions, whitened by the inputs' and gradients' size; B zero",
            "Wang et al. 2024 (LoRA-GA), arXiv 2407.05000; Zhang et al. 2025 (LoRA-One), arXiv 2502.01235",
            "a probe of a few batches",
            "trivet.decompose.gradient:start",
            traits=("probe",),
        ),
        "activation": Part(
            "A spans the principal directions of the layer's inputs, B zero",
            "Paischer et al. 2024 (EVA), arXiv 2410.07170",
            "a probe of a few batches",
            "trivet.decompose.activation:start",
            traits=("probe",),
        ),
        "principal": Part(
            "starts from W's largest singular directions, in the offset form B A − B0 A0; saved at rank 2 r",
            "Meng et al. 2024 (PiSSA), arXiv 2404.02948",
            "one randomised SVD a layer; the forward pass of rank 2 r",
            "trivet.decompose.principal:start",
            traits=("offset",),
        ),
        "cur": Part(
            "a trained r x r core between columns and rows of W, chosen by pivoted QR",
            "Fawi 2024 (CURLoRA), arXiv 2408.14572",
            "two pivoted QRs of a sketch a layer; r² trained numbers a layer",
            "trivet.decompose.cur:start",
            traits=("core",),
        ),
        "tensor_cur": Part(
            "same-shape layers stacked into a tensor, frozen tensor columns and rows, one trained core",
            "He et al. 2025 (tCURLoRA), arXiv 2501.02227",
            "an FFT along the stack; forward and saved rank are r times the layers of a stack",
            "trivet.decompose.tensor_cur:start",
            options=(
                Option(
                    "choose",
                    "norms",
                    "columns and rows by their norms over Fourier slices, or by pivoted gradients",
                    "norms|gradient",
                ),
            ),
            traits=("core", "coupled", "probe:choose=gradient"),
        ),
        "core": Part(
            "a trained r x r core between frozen singular vectors, of W or of the gradient",
            "Bałazy et al. 2024 (LoRA-XS), arXiv 2405.17604; Ponkshe et al. 2024 (LoRA-SB), arXiv 2411.19557",
            "one randomised SVD a layer, or a probe; r² trained numbers a layer",
            "trivet.decompose.core:start",
            options=(Option("bases", "weight", "whose singular vectors the bases are", "weight|gradient"),),
            traits=("core", "probe:bases=gradient"),
        ),
        "dora": Part(
            "the direction of W + ΔW is low-rank, its magnitude trained apart; saved as DoRA or merged, never plain",
            "Liu et al. 2024, arXiv 2402.09353",
            "a norm of W + ΔW a layer and step",
            "trivet.decompose.zero:start",
            traits=("magnitude",),
        ),
    },
    "rank": {
        "fixed": Part(
            "the same rank for every layer, from start to end",
            "Hu et al. 2021, arXiv 2106.09685",
            "nothing",
            "trivet.rank.fixed:Fixed",
            options=(_STEP,),
        ),
        "pattern": Part(
            "ranks given by the user, by patterns of layer names; lora_rank elsewhere",
            "PEFT's rank_pattern",
            "nothing",
            "trivet.rank.pattern:Pattern",
            options=(Option("ranks", None, "layer-name pattern -> rank, e.g. {q_proj: 4, mlp: 0}", "ranks"), _STEP),
            refuses={"coupled": _NO_MAGNITUDE["coupled"]},
        ),
        "planned": Part(
            "ranks allotted before training, by the gradient's worth of each direction under a parameter budget",
            "trivet; cf. Zhang et al. 2025 (GoRA), arXiv 2502.12171",
            "a probe of a few batches",
            "trivet.rank.planned:Planned",
            options=(
                _SCHEDULE[0],
                Option("largest", None, "no layer gets more; default 4 times the budget's rank", "whole"),
                _SCHEDULE[4],
            ),
            traits=("probe", "varying"),
            refuses=_NO_MAGNITUDE,
        ),
        "squeeze": Part(
            "trained wide, every direction priced in nats per parameter, squeezed to the budget, settled",
            "trivet, docs/methods.md",
            "moments on every 10th step, an r x r eigenproblem a layer and squeeze",
            "trivet.rank.squeeze:Squeeze",
            options=(*_SCHEDULE, _METRIC),
            traits=("varying",),
            refuses=_NO_MAGNITUDE,
        ),
        "grow": Part(
            "squeeze, and layers whose gradient asks for it get a direction back",
            "trivet, docs/methods.md",
            "as squeeze, and a sketch of the gradient",
            "trivet.rank.grow:Grow",
            options=(
                *_SCHEDULE,
                _METRIC,
                Option("hysteresis", 2.0, "a new direction must promise so many times the price"),
            ),
            traits=("varying",),
            refuses={**_NO_MAGNITUDE, "core": "a new direction needs trained A and B; a core's bases are frozen"},
        ),
        "auto": Part(
            "trained wide, then cut to the smallest budget whose validation loss is as good as the best",
            "trivet, docs/methods.md",
            "moments on every 10th step, wide to the end, and at most 8 forward passes over the validation rows",
            "trivet.rank.auto:Auto",
            options=(
                Option("start_rank", None, "rank to train wide with; default twice lora_rank", "whole"),
                _SCHEDULE[4],
                _METRIC,
                Option("tolerance", 0.005, "share of the gain over the base that may be lost, with its error", "share"),
            ),
            traits=("varying",),
            refuses=_NO_MAGNITUDE,
        ),
        "uniform_squeeze": Part(
            "squeezed to the budget with the same rank in every layer: what squeeze has to beat",
            "trivet",
            "an r x r eigenproblem a layer and squeeze",
            "trivet.rank.uniform_squeeze:UniformSqueeze",
            options=(*_SCHEDULE, _METRIC),
            traits=("varying",),
            refuses=_NO_MAGNITUDE,
        ),
        "adalora": Part(
            "directions scored by smoothed sensitivity and uncertainty, the least go",
            "Zhang et al. 2023, arXiv 2303.10512, section 3.2",
            "two fp32 numbers per adapter parameter",
            "trivet.rank.adalora:AdaLora",
            options=(
                *_SCHEDULE,
                Option("beta1", 0.85, "smoothing of the sensitivity", "share"),
                Option("beta2", 0.85, "smoothing of the uncertainty", "share"),
            ),
            traits=("varying",),
            refuses={
                **_NO_MAGNITUDE,
                "core": "its scores are of the pairs of A and B, which are frozen",
                "offset": "half of an offset's directions are frozen and have no gradient to score; use squeeze",
            },
        ),
    },
    "update": {
        "adamw": Part(
            "Adam with decoupled weight decay",
            "Loshchilov & Hutter 2019, arXiv 1711.05101",
            "two fp32 numbers per trained parameter",
            "trivet.update.adamw:optimizer",
        ),
        "lora_plus": Part(
            "AdamW with a larger step for B",
            "Hayou et al. 2024, arXiv 2402.12354",
            "as adamw",
            "trivet.update.lora_plus:optimizer",
            options=(Option("ratio", 16.0, "B's learning rate over A's"),),
        ),
        "frozen_a": Part(
            "A stays as it started, B by AdamW: the least memory",
            "Zhang et al. 2023 (LoRA-FA), arXiv 2308.03303",
            "about half of adamw",
            "trivet.update.frozen_a:optimizer",
        ),
        "preconditioned": Part(
            "each factor's gradient divided by the other's Gram matrix, then AdamW",
            "Zhang & Pilanci 2024 (Riemannian preconditioned LoRA), arXiv 2402.02347",
            "as adamw, and two r x r solves a layer",
            "trivet.update.preconditioned:optimizer",
            options=(Option("damping", 1e-6, "δ, added to the Gram matrices, as a share of their mean eigenvalue"),),
        ),
        "equivariant": Part(
            "matrix second moments: the path does not depend on how B A is split",
            "Yen et al. 2024 (LoRA-RITE), arXiv 2410.20625",
            "one fp32 number per parameter and r x r a factor; r x r eigenproblems",
            "trivet.update.equivariant:optimizer",
        ),
        "pro": Part(
            "gradients whose product is closest to full fine-tuning's gradient, then AdamW",
            "Wang et al. 2024 (LoRA-Pro), arXiv 2407.18242, theorem 2.1",
            "as adamw, and three r x r solves a layer",
            "trivet.update.pro:optimizer",
            options=(Option("damping", 1e-6, "δ, added to the Gram matrices, as a share of their mean eigenvalue"),),
        ),
        "muon": Part(
            "orthogonalised momentum of each factor",
            "Jordan et al. 2024, kellerjordan.github.io/posts/muon",
            "one fp32 number per parameter; five r x r iterations",
            "trivet.update.muon:optimizer",
            options=(Option("momentum", 0.95, "β of the momentum", "share"),),
        ),
    },
}
