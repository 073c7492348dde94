"""All of transformers' text models that a tiny one can be made of: the fast path computes what PEFT's and transformers'
own code does, and the check of packed rows says the same in 16 bits as in float32."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.auto import modeling_auto

from trivet import attach
from trivet.data.batch import Collator
from trivet.data.encode import Encoded
from trivet.loss import token_losses
from trivet.packing import why_not_packed, why_not_shared

pytestmark = pytest.mark.slow

TASKS = {
    "causal-lm": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, hf.AutoModelForCausalLM),
    "seq2seq": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, hf.AutoModelForSeq2SeqLM),
    "classification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        hf.AutoModelForSequenceClassification,
    ),
}
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers",
)  # fmt: skip
HEADS = ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads")
KEY_HEADS = ("num_key_value_heads",)
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width")
INNER = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
    "d_ff", "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
POSITIONS = ("max_position_embeddings", "n_positions")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SIZES = {
    **dict.fromkeys(LAYERS, 2), **dict.fromkeys((*HEADS, *KEY_HEADS, *EXPERTS), 4),
    **dict.fromkeys((*WIDTHS, *INNER), 64), **dict.fromkeys(POSITIONS, 128),
    "vocab_size": 96, "num_experts_per_tok": 2, "d_kv": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "n_group": 1,
    "topk_group": 1, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "rotary_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Of these at least there is a tiny model.
COMMON = (
    "gpt2",
    "llama",
    "qwen2",
    "gemma2",
    "mistral",
    "mixtral",
    "bart",
    "t5",
    "bert",
    "roberta",
    "longformer",
    "led",
)
#: What has no answer in both types.
NOT_JUDGED = {
    "inkling2_text": "transformers' own code fails in bfloat16",
    "prophetnet": "its hidden states have a dimension more, which the loss at supervised positions does not take",
}


def tiny(kind: str, task: str) -> Any:
    """A model of that architecture with random weights; skips where these sizes don't make one, and says why."""
    try:
        known = hf.AutoConfig.for_model(kind).to_dict()
        config = hf.AutoConfig.for_model(kind, **{name: size for name, size in SIZES.items() if name in known})
        config.num_labels, config.use_cache, config.decoder_start_token_id = 3, False, 1
        with torch.device("meta"):
            size = sum(p.numel() for p in TASKS[task][1].from_config(config).parameters())
        if size > 2e7:
            pytest.skip(f"{size / 1e6:.0f} million parameters: its parts have sizes of their own")
        torch.manual_seed(0)
        model = TASKS[task][1].from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() > 1 else 1)  # so that tokens tell of each other
            model(**inputs(task))
    except Exception as error:  # noqa: BLE001 - what a hundred architectures say to sizes that don't fit together
        assert kind not in COMMON, f"{kind}: {error}"
        pytest.skip(f"{type(error).__name__}: {str(error)[:200]}")
    return model


def inputs(task: str) -> dict[str, torch.Tensor]:
    """Three rows with padding on the right."""
    ids = torch.randint(5, 90, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((14, 9, 11)):
        ids[row, length - 1] = 2
        ids[row, length:] = mask[row, length:] = 0
    labels = torch.tensor([0, 2, 1]) if task == "classification" else torch.where(mask.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(model: Any, task: str, *, fast: bool) -> Any:
    peft = attach(copy.deepcopy(model), lora_rank=2, task=task, fast=fast).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=draw) / 10)
    return peft


@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task, (kinds, _) in TASKS.items() for kind in kinds])
def test_the_fast_path_computes_the_same(task: str, kind: str) -> None:
    if kind == "ibert":
        pytest.skip("has no linear layers, but quantised ones of its own")
    model = tiny(kind, task)
    found = []
    for fast in (True, False):
        peft = adapted(model, task, fast=fast)
        out = peft(**inputs(task))
        out.loss.backward()
        found.append((out.loss.detach(), {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    largest = max((float(g.abs().max()) for g in their_gradients.values() if g is not None), default=0.0)
    for name, gradient in their_gradients.items():
        other = our_gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("kind", TASKS["causal-lm"][0])
def test_packed_rows_are_judged_alike_in_16_bits(kind: str) -> None:
    """And what they share: a model that may share rows' beginnings computes what it does with single rows."""
    if kind in NOT_JUDGED:
        pytest.skip(NOT_JUDGED[kind])
    model = tiny(kind, "causal-lm")
    draw = torch.Generator().manual_seed(3)
    head, *own = (torch.randint(5, 90, (n,), generator=draw).tolist() for n in (20, 9, 12, 7))
    rows = [Encoded(input_ids=head + ids, labels=[-100] * 22 + ids[2:]) for ids in own]
    packed, shared, losses = [], [], {}
    for dtype in (torch.float32, torch.bfloat16):
        base = SimpleNamespace(task="causal-lm", dtype=dtype, device=torch.device("cpu"), model=model.to(dtype))
        peft = adapted(base.model, "causal-lm", fast=True)
        session: Any = SimpleNamespace(base=base, model=peft, tokenizer=range(96), collator=Collator(0))
        packed.append(why_not_packed(session, rows))
        shared.append(why_not_shared(session, rows, 20, tokens=48))
        if dtype == torch.float32 and packed[0] is shared[0] is None:
            long = [Encoded(input_ids=head + ids * 3, labels=[-100] * 22 + (ids * 3)[2:]) for ids in own]
            for share in (False, True):
                batch = Collator(0, packed=share, share=share)(long)
                losses[share] = token_losses(peft, batch, batch.pop("labels"), shifted=True)[0].detach()
    assert (packed[0] is None) == (packed[1] is None), packed
    assert (shared[0] is None) == (shared[1] is None), shared
    if losses:
        torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-4)
