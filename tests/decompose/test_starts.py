"""What every decomposition promises: the base model at the start, one seed one adapter, and that it learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from started import STARTS, adapted, begin, fit, logits
from torch import nn

from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.errors import ConfigError
from trivet.parts import PARTS

starts = pytest.mark.parametrize(
    ("name", "options"), STARTS, ids=lambda v: v if isinstance(v, str) else "-".join(v.values())
)
kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])

#: Decompositions of which only a core is trained.
CORES = ("core", "cur", "tensor_cur")
NEED_STATISTICS = [
    ("gradient", {}),
    ("activation", {}),
    ("core", {"bases": "gradient"}),
    ("tensor_cur", {"choose": "gradient"}),
]


def factors(layers: list[AdaptedLayer]) -> list[torch.Tensor]:
    """All that a start decides."""
    return [
        t.clone() for layer in layers for t in (*layer.factors(), layer.basis if layer.core is not None else layer.A)
    ]


@starts
@kinds
def test_the_base_model_is_unchanged(name: str, options: dict[str, Any], kind: str) -> None:
    model = adapted(kind)
    with model.disable_adapter():
        base = logits(model)
    layers = begin(name, model, **options)
    for layer in layers:
        size = layer.weight.norm() if name == "principal" else 0  # B A − B0 A0 is a difference, so 0 but for rounding
        assert layer.delta().norm() <= 1e-6 * size
        assert layer.delta().shape == layer.weight.shape
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6 if name == "principal" else 0)


@starts
def test_a_seed_gives_one_adapter_whatever_torchs_global_state(name: str, options: dict[str, Any]) -> None:
    model = adapted("llama")
    torch.manual_seed(0)
    first = factors(begin(name, copy.deepcopy(model), seed=5, **options))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = factors(begin(name, copy.deepcopy(model), seed=5, **options))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["zero", "orthogonal", "dora"])
def test_another_seed_gives_another_adapter(name: str) -> None:
    model = adapted("llama")
    first, second = (begin(name, copy.deepcopy(model), seed=seed)[0].A for seed in (5, 6))
    assert not torch.allclose(first, second)


@starts
@kinds
def test_it_learns_and_is_merged_as_it_is(name: str, options: dict[str, Any], kind: str) -> None:
    model = adapted(kind)
    layers = begin(name, model, **options)
    before, after = fit(model, steps=30, lr=1e-2)
    assert after < before - 0.05
    assert all(layer.delta().norm() > 0 for layer in layers)
    live = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert (logits(model) - live).abs().max() > 1e-2


@starts
def test_only_what_it_says_is_trained(name: str, options: dict[str, Any]) -> None:
    model = adapted("llama")
    layers = begin(name, model, **options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if name in CORES:
        assert trained == len(layers) * 4 * 4  # also where cores are shared: r² p for the p layers of a stack
        assert all(p.requires_grad for layer in layers for p in [layer.core])
    else:
        assert trained == sum(4 * sum(layer.shape) for layer in layers)


@pytest.mark.parametrize(("name", "options"), NEED_STATISTICS)
def test_without_statistics_it_says_what_to_do(name: str, options: dict[str, Any]) -> None:
    layers = adapted_layers(adapted("llama"))
    start = PARTS["decompose"][name].load()
    with pytest.raises(ConfigError, match=rf"{name}.* needs statistics of the training data"):
        start(layers, torch.Generator(), None, **options)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj has none"):
        start(layers, torch.Generator(), {}, **options)


@pytest.mark.parametrize("name", ["core", "cur", "tensor_cur", "principal", "gradient", "activation"])
def test_embeddings_start_as_zero_does(name: str) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(50, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.tokens(ids)

    def made() -> AdaptedLayer:
        (layer,) = adapted_layers(get_peft_model(Body(), LoraConfig(r=4, target_modules=["tokens"])))
        return layer

    layer, plain = made(), made()
    PARTS["decompose"][name].load()([layer], torch.Generator().manual_seed(1))
    PARTS["decompose"]["zero"].load()([plain], torch.Generator().manual_seed(1))
    assert layer.embedding and layer.form == "plain"
    assert torch.equal(layer.A, plain.A) and not layer.B.any()


@starts
def test_a_rank_above_the_layers_size_is_no_error(name: str, options: dict[str, Any]) -> None:
    model = adapted("llama", rank=40)  # of 32 and 64 features
    with model.disable_adapter():
        base = logits(model)
    layers = begin(name, model, **options)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)
    assert all(torch.isfinite(factor).all() for layer in layers for factor in layer.factors())
    before, after = fit(model, steps=5, lr=1e-2)
    assert after < before
