"""One contender of `bench/speed.py`, in a process of its own; what it says and hears is in `speed_child`.

Here are the plain training loops and the arithmetic floor; sides that go through a Trainer are in `speed_trainers`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch
from speed_child import Turns, loop, lora
from speed_models import causal_model, llama, numbers, random_ids, random_model, save_llama
from torch import nn

#: The sides' types; the others have trivet's own choice, bfloat16 where the processor computes in it.
DTYPES = {
    f"{side}-{short}": long
    for side in ("peft", "trivet")
    for short, long in (("bf16", "bfloat16"), ("fp32", "float32"))
}
RATE = 1e-4


def trainer_loop(turns: Turns, model: Any, optimizer: Any, loss: Callable[[int], tuple[Any, dict[str, int]]]) -> None:
    """forward, backward, optimizer step; nothing else."""
    model.train()

    def work(step: int) -> dict[str, int]:
        value, counts = loss(step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return counts

    turns.facts |= numbers(model)
    loop(turns, work)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def ours(
    turns: Turns, base: Any, task: str, batch: Callable[[int], Any], counts: dict[str, int], *, records: bool = True
) -> None:
    """trivet's side: `batch(step)` gives the model's inputs, and the labels. On GPUs it `records` its passes."""
    from trivet import attach, optimizer
    from trivet.allocator import keep_freed_memory
    from trivet.graphs import Recorder
    from trivet.head import directly
    from trivet.loss import training_loss

    keep_freed_memory()  # as `trivet train` does
    model = attach(base, lora_rank=16, task=task)
    learned = [p for p in model.parameters() if p.requires_grad]
    call = Recorder(lambda: learned) if records else directly

    def loss(step: int) -> tuple[Any, dict[str, int]]:
        return training_loss(model, *batch(step), task=task, call=call), counts

    trainer_loop(turns, model, optimizer(model, learning_rate=RATE), loss)


def dense(turns: Turns, spec: dict[str, Any]) -> None:
    """Random tokens, every one of them a label: the same work for all sides."""
    side, rows, length = spec["side"], spec["rows"], spec["length"]
    counts = {"rows": rows, "tokens": rows * length, "supervised": rows * (length - 1)}
    if side == "unsloth":
        model, made = unsloth_model(turns, spec)
    else:
        made = four_bits(spec) if side.endswith("-4bit") else causal_model(spec, DTYPES.get(side, "auto"))
        turns.loaded(made)
        if side == "peft-4bit":
            turns.facts["versions"] = {name: version(name) for name in ("bitsandbytes", "peft")}
    if side == "floor":
        return loop(turns, floor(made, rows, length, counts))
    vocabulary = made.config.vocab_size

    def ids(step: int) -> torch.Tensor:
        return random_ids(step, rows, length, vocabulary, spec["device"])

    def labelled(step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = ids(step)
        return {"input_ids": batch, "attention_mask": torch.ones_like(batch)}, batch

    if side == "trivet-uncompiled":
        os.environ["CC"] = ""
    if side.startswith("trivet"):
        return ours(turns, made, "causal-lm", labelled, counts, records=side != "trivet-unrecorded")
    if side != "unsloth":
        model = lora(made, "CAUSAL_LM", 16, autocast_adapter_dtype=side != "peft-best")

    def theirs(step: int) -> tuple[Any, dict[str, int]]:
        batch = ids(step)
        return model(input_ids=batch, labels=batch).loss, counts

    return trainer_loop(turns, model, adamw(model), theirs)


def four_bits(spec: dict[str, Any]) -> Any:
    """The language model with its frozen weights in NF4: trivet's way, or bitsandbytes' with QLoRA's settings."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from trivet.demo import DEMO_MODELS, demo_path
    from trivet.four_bit import to_four_bit
    from trivet.model import pick_dtype

    options = {"dtype": pick_dtype("auto", torch.device(spec["device"])), "device_map": spec["device"]}
    if spec["side"] == "peft-4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    with tempfile.TemporaryDirectory() as folder:
        where = demo_path(spec["base"]) if spec["base"] in DEMO_MODELS else spec["base"]
        if spec["size"]:  # in another process, as freed memory that a training uses again counts as the training's
            where = folder
            maker = get_context("spawn").Process(target=save_llama, args=(spec, options["dtype"], folder))
            maker.start()
            maker.join()
        model = AutoModelForCausalLM.from_pretrained(where, **options)
        if spec["side"] == "trivet-4bit":
            to_four_bit(model)
        return model


def floor(model: Any, rows: int, length: int, counts: dict[str, int]) -> Callable[[int], dict[str, int]]:
    """The matrix products that no such step can do without, alone: x Wᵀ and g W of every frozen layer and the head.

    The first layer's query, key and value need no g W, as the embeddings below them are frozen; the head sees the
    positions that have a label. Inputs and outputs are there before the clock starts.
    """
    head = model.get_output_embeddings()
    jobs = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            count = counts["supervised"] if module is head else rows * length
            jobs.append((module.weight.detach(), count, not re.search(r"layers\.0\..*\b[qkv]_proj$", name)))
    made: dict[tuple[str, int, int], torch.Tensor] = {}

    def buffer(what: str, count: int, width: int, like: torch.Tensor) -> torch.Tensor:
        if (what, count, width) not in made:
            made[what, count, width] = torch.randn(count, width).to(like)
        return made[what, count, width]

    forward = [(buffer("x", n, w.shape[1], w), w.T, buffer("y", n, w.shape[0], w)) for w, n, _ in jobs]
    backward = [(buffer("g", n, w.shape[0], w), w, buffer("dx", n, w.shape[1], w)) for w, n, back in jobs if back]

    def work(step: int) -> dict[str, int]:
        for left, right, out in [*forward, *reversed(backward)]:
            torch.mm(left, right, out=out)
        return counts

    return work


def unsloth_model(turns: Turns, spec: dict[str, Any]) -> tuple[Any, Any]:
    """unsloth reads its model from a folder with a tokenizer: the same random weights, saved and read again."""
    from transformers import AutoTokenizer
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        llama(spec, torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(spec["tokenizer"]).save_pretrained(folder)
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=spec["length"], dtype=torch.bfloat16, load_in_4bit=False
        )
    turns.loaded(model, versions={name: version(name) for name in ("unsloth", "transformers", "torch", "triton")})
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False,
    )
    return FastLanguageModel.for_training(adapted) or adapted, model


def seq2seq(turns: Turns, spec: dict[str, Any]) -> None:
    """An encoder-decoder of BART base's size with random weights: 8 rows of 128 tokens to 64."""
    from transformers import BartConfig, BartForConditionalGeneration

    from trivet.model import pick_dtype

    side, rows, device = spec["side"], spec["rows"], spec["device"]
    layers = {f"{part}_layers": 2 if spec["size"] == "tiny" else 6 for part in ("encoder", "decoder")}
    width = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 512}
    width |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    if spec["size"] != "tiny":
        width = {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "vocab_size": 50265}
        width |= {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    config = BartConfig(**layers, **width, use_cache=False)
    base = random_model(
        BartForConditionalGeneration, config, pick_dtype(DTYPES.get(side, "auto"), torch.device(device)), device
    )
    turns.loaded(base)
    length, answer = spec["length"], spec["length"] // 2
    counts = {"rows": rows, "tokens": rows * (length + answer), "supervised": rows * answer}

    def pair(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = random_ids(step, rows, length + answer, config.vocab_size, device)
        return ids[:, :length].contiguous(), ids[:, length:].contiguous()

    def labelled(step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        source, labels = pair(step)
        shifted = base.prepare_decoder_input_ids_from_labels(labels)
        return {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": shifted}, labels

    if side == "trivet":
        return ours(turns, base, "seq2seq", labelled, counts)
    model = lora(base, "SEQ_2_SEQ_LM", 16)

    def theirs(step: int) -> tuple[Any, dict[str, int]]:
        source, labels = pair(step)
        return model(input_ids=source, attention_mask=torch.ones_like(source), labels=labels).loss, counts

    return trainer_loop(turns, model, adamw(model), theirs)


def main() -> None:
    spec = json.loads(sys.argv[1])
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    package = {"unsloth": "unsloth", "trl": "trl"}.get(spec["side"].partition("-")[0])
    package = "bitsandbytes" if spec["side"] == "peft-4bit" else package
    if package and find_spec(package) is None:
        raise SystemExit(f"{package} is not installed here")
    if spec["device"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device that torch can use")
    turns = Turns(spec["device"])  # first: what libraries print when they are imported is no answer
    ours = ("trivet.adapter.attach", "trivet.adapter.plan", "trivet.loss")
    for name in ours if spec["side"].startswith("trivet") else (*([package] if package else []), "peft"):
        import_module(name)  # now, so that code is not taken for the training's memory; unsloth wants to be first
    if spec["kind"] in ("dense", "seq2seq") and not spec["side"].startswith("trl"):
        (dense if spec["kind"] == "dense" else seq2seq)(turns, spec)
    else:
        import speed_trainers

        speed_trainers.run(turns, spec)


if __name__ == "__main__":
    main()
