"""What does rounding cost in 16 bits? `python bench/rounding.py --data FOLDER` on E2E with SmolLM2-135M, three seeds.

Three sides train on the same rows from the same start: PEFT's layers and transformers' own code in float32, the same
in bfloat16, and trivet in bfloat16. PEFT adds what an adapter gives to a result that was rounded already, and rounds
again: less than half a unit in the last place is lost. With AMX trivet rounds the sum, once (`low_rank.c`); elsewhere
it does as PEFT. One JSON line a seed in bench/results/rounding.jsonl: how far a side's training losses are from
float32's, on average over the steps, and what it has learned: the loss of other rows, by PEFT's layers in float32.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality_table import append, lines
from versions import processor, versions

from trivet import attach, optimizer
from trivet.data.batch import Collator
from trivet.data.dataset import load_dataset
from trivet.data.encode import IGNORE, Encoded, TextEncoder, encode_dataset
from trivet.kernels.compiled import multiplies_tiles
from trivet.loss import training_loss
from trivet.model import load_base

RESULTS = Path(__file__).resolve().parent / "results" / "rounding.jsonl"
SIZE, OTHERS = 4, 128
#: Each side's type, and whether trivet's fast path is on. The first one is what the others are compared with.
SIDES = {"exact": ("float32", False), "peft": ("bfloat16", False), "trivet": ("bfloat16", True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the task files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there, as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(lines(arguments.results)))
        return
    if arguments.data is None:
        parser.error("--data is needed: the folder of the task files")
    for seed in arguments.seeds:
        rows, held = rows_of(arguments.data, seed)
        found = {"seed": seed, "steps": arguments.steps, "rate": arguments.rate, "tiles": multiplies_tiles()}
        exact: list[float] = []
        for side, (dtype, fast) in SIDES.items():
            losses, model = trained(arguments, seed, rows, dtype, fast=fast)
            exact = exact or losses
            apart = torch.tensor(losses) - torch.tensor(exact)
            found |= {f"{side}_apart": float(apart.abs().mean()), f"{side}_after": after(model, held)}
        append(arguments.results, found | {"processor": processor(), "versions": versions()})
        print(json.dumps(found), flush=True)
    print(table(lines(arguments.results)))


def rows_of(data: Path, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Rows to learn from, and others."""
    tokenizer = start("float32").tokenizer
    encoder = TextEncoder(tokenizer, "causal-lm", max_length=256, chat_template="none", loss_on="responses")
    rows: list[Encoded] = encode_dataset(load_dataset(str(data / "d2t_e2e_train.jsonl.gz")), encoder)[0]
    random.Random(seed).shuffle(rows)
    return rows[OTHERS:], rows[:OTHERS]


def start(dtype: str) -> Any:
    return load_base("demo", task="causal-lm", data_format="prompt-completion", dtype=dtype, device="cpu")


def trained(arguments: Any, seed: int, rows: list[Encoded], dtype: str, *, fast: bool) -> tuple[list[float], Any]:
    """The losses of training, and the model."""
    torch.manual_seed(seed)
    base = start(dtype)
    model: Any = attach(base.model, lora_rank=8, fast=fast).train()
    step, losses = optimizer(model, learning_rate=arguments.rate), []
    for first in range(0, arguments.steps * SIZE, SIZE):
        batch = Collator(base.tokenizer.pad_token_id)(rows[first : first + SIZE])
        labels = batch.pop("labels")
        loss = training_loss(model, batch, labels, task="causal-lm") if fast else plain_loss(model, batch, labels)
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return losses, model


@torch.no_grad()
def after(model: Any, held: list[Encoded]) -> float:
    """The loss of other rows with what was learned, by PEFT's layers in float32 for all sides."""
    base = start("float32")
    exact: Any = attach(base.model, lora_rank=8, fast=False).eval()
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    total, count = 0.0, 0
    for first in range(0, len(held), SIZE):
        batch = Collator(base.tokenizer.pad_token_id)(held[first : first + SIZE])
        labels = batch.pop("labels")
        known = int((labels[:, 1:] != IGNORE).sum())
        total, count = total + plain_loss(exact, batch, labels).item() * known, count + known
    return total / count


def plain_loss(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def table(rows: list[dict[str, Any]]) -> str:
    head = "| seed | losses in training: PEFT | trivet | loss afterwards: float32 | PEFT | trivet |"
    body = [
        f"| {row['seed']} | {row['peft_apart']:.4f} | {row['trivet_apart']:.4f} | {row['exact_after']:.4f} "
        f"| {row['peft_after'] - row['exact_after']:+.4f} | {row['trivet_after'] - row['exact_after']:+.4f} |"
        for row in rows
    ]
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *body])


if __name__ == "__main__":
    main()
