"""`tensor_cur` against a direct evaluation of the t-product with numpy's FFT."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.linalg import qr
from started import adapted, begin, fit, observe

from trivet.adapter.layers import AdaptedLayer, adapted_layers
from trivet.decompose.tensor_cur import stacks
from trivet.errors import ConfigError

kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def stacked(layers: list[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    found = stacks(layers)
    assert all(len(stack) == 2 for stack in found)
    return found


def t_product(*tensors: np.ndarray) -> np.ndarray:
    """The product of (rows, columns, p) tensors: slice by slice in the Fourier domain."""
    first, *others = (np.fft.fft(t, axis=2) for t in tensors)
    for other in others:
        first = np.einsum("ijk,jlk->ilk", first, other)
    product = np.fft.ifft(first, axis=2)
    assert np.abs(product.imag).max() < 1e-6
    return product.real


def weights(stack: list[AdaptedLayer]) -> np.ndarray:
    """(out, in, p)."""
    return np.stack([layer.weight.double().numpy() for layer in stack], 2)


def chosen(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns, and rows within these columns, of the largest norms summed over Fourier slices."""
    slices = np.fft.fft(w, axis=2)
    columns = np.argsort(-np.linalg.norm(slices, axis=0).sum(1))[:rank]
    rows = np.argsort(-np.linalg.norm(slices[:, columns], axis=1).sum(1))[:rank]
    return columns, rows


def bases(stack: list[AdaptedLayer], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The frozen C (out, r, p) and R (r, in, p) of a stack."""
    p = len(stack)
    left, right = stack[0].basis.double().numpy(), stack[0].A.double().numpy()
    c = left.reshape(len(left), p, rank).transpose(0, 2, 1)
    return c, right.reshape(p, rank, -1).transpose(1, 2, 0)


def scalar(part: np.ndarray, whole: np.ndarray) -> float:
    """The constant with part = constant · whole."""
    constant = float((part * whole).sum() / (whole * whole).sum())
    np.testing.assert_allclose(part, constant * whole, atol=1e-6 * np.abs(part).max())
    return constant


@kinds
def test_columns_and_rows_are_those_of_a_direct_evaluation(kind: str) -> None:
    for stack in stacked(begin("tensor_cur", adapted(kind))):
        w = weights(stack)
        columns, rows = chosen(w, 4)
        c, r = bases(stack, 4)
        assert scalar(c, w[:, columns]) > 0
        assert scalar(r, w[rows]) > 0
        assert (c**2).sum() == pytest.approx(4)  # the size of an orthonormal basis


@kinds
def test_columns_and_rows_by_gradients(kind: str) -> None:
    model = adapted(kind)
    seen = observe(model)
    for stack in stacked(begin("tensor_cur", model, choose="gradient")):
        w = weights(stack)
        gradients = [(seen[layer.name].g.T @ seen[layer.name].x).numpy() for layer in stack]
        columns = qr(np.concatenate(gradients, 0), mode="r", pivoting=True)[1][:4]
        rows = qr(np.concatenate(gradients, 1).T, mode="r", pivoting=True)[1][:4]
        c, r = bases(stack, 4)
        scalar(c, w[:, columns])
        scalar(r, w[rows])


@kinds
def test_forward_is_the_t_product(kind: str) -> None:
    model = adapted(kind)
    generator = torch.Generator().manual_seed(0)
    for stack in stacked(begin("tensor_cur", model)):
        core = stack[0].core
        assert core is not None and core.shape == (2, 4, 4) and all(layer.core is core for layer in stack)
        core.data.copy_(torch.randn(core.shape, generator=generator))
        c, r = bases(stack, 4)
        delta = t_product(c, core.detach().double().numpy().transpose(1, 2, 0), r)
        for index, layer in enumerate(stack):
            expected = layer.scale * delta[:, :, index]
            np.testing.assert_allclose(layer.delta().numpy(), expected, atol=1e-5 * np.abs(expected).max())
            x = torch.randn(5, layer.shape[1], generator=generator)
            with torch.no_grad():
                moved = layer.module(x) - layer.module.get_base_layer()(x)
            np.testing.assert_allclose(moved.numpy(), x.numpy() @ expected.T, rtol=1e-3, atol=1e-4)


def test_a_stack_of_many_layers() -> None:
    """With more than two slices the Fourier transform is complex, and a + b + c wraps around."""
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=True))
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = stacks(begin("tensor_cur", model))
    assert [len(stack) for stack in found] == [5] * 7
    for stack in found:
        w = weights(stack)
        columns, rows = chosen(w, 3)
        c, r = bases(stack, 3)
        scalar(c, w[:, columns])
        scalar(r, w[rows])
        stack[0].core.data.normal_(generator=torch.Generator().manual_seed(0))
        delta = t_product(c, stack[0].core.detach().double().numpy().transpose(1, 2, 0), r)
        for index, layer in enumerate(stack):
            np.testing.assert_allclose(layer.delta().numpy(), layer.scale * delta[:, :, index], rtol=1e-4, atol=1e-4)


def test_stacks_are_of_one_name_and_shape() -> None:
    found = stacks(adapted_layers(adapted("llama")))
    names = [{layer.name.rpartition(".")[2] for layer in stack} for stack in found]
    assert names == [{n} for n in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    assert all(len({layer.shape for layer in stack}) == 1 for stack in found)
    kinds_of_c_proj = [stack for stack in stacks(adapted_layers(adapted("gpt2"))) if stack[0].name.endswith("c_proj")]
    assert len(kinds_of_c_proj) == 2  # attention's and the MLP's are of different shapes


def test_the_bases_of_a_stack_are_stored_once() -> None:
    for stack in stacked(begin("tensor_cur", adapted("llama"))):
        first, second = stack
        assert first.basis.data_ptr() == second.basis.data_ptr()
        assert first.A.data_ptr() == second.A.data_ptr()


def test_a_copy_keeps_its_cores_shared() -> None:
    model = adapted("llama")
    begin("tensor_cur", model)
    twin = copy.deepcopy(model)
    fit(twin, 3, 1e-2)
    for stack in stacked(adapted_layers(twin)):
        assert stack[0].core is stack[1].core
    assert all(not layer.delta().any() for layer in adapted_layers(model))


def test_weights_of_zero_are_refused() -> None:
    model = adapted("llama")
    for layer in adapted_layers(model):
        if layer.name.endswith("o_proj"):
            layer.module.get_base_layer().weight.data.zero_()
    with pytest.raises(ConfigError, match=r"o_proj and of the layers like it are 0; leave them out of target_modules"):
        begin("tensor_cur", model)
