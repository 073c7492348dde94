"""What is left of a batch's tokens where its rows' beginning is computed once? `bench/shared_prefix.py --data FOLDER`.

Counts, without training: batches of random rows of each task file, in the model's chat template. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from trivet.data.batch import shared_length
from trivet.data.dataset import load_dataset
from trivet.data.encode import TextEncoder, encode_dataset
from trivet.model import load_base

#: File, its name, and the rows of a batch.
FILES = {
    "d2t_e2e_train.jsonl.gz": ("E2E", 16),
    "extract_snips_train.jsonl": ("SNIPS", 16),
    "mt_multi30k_en_de_train.jsonl": ("Multi30k", 16),
    "d2t_webnlg_train.jsonl.gz": ("WebNLG", 16),
    "mc_boolq_train.jsonl": ("BoolQ", 16),
    "math_gsm8k_train.jsonl.gz": ("GSM8K", 8),
    "code_mbpp_train.jsonl": ("MBPP", 8),
    "sql_geoquery_train.jsonl": ("GeoQuery", 8),
}
ROWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the task files")
    parser.add_argument("--base", default="demo", help="the model whose chat template is used")
    arguments = parser.parse_args()
    encoder = TextEncoder(load_base(arguments.base, task="causal-lm").tokenizer)
    print("| task | rows a batch | tokens of a row | alike | of its tokens a batch keeps |")
    print("| --- | --- | --- | --- | --- |")
    for file, (name, size) in FILES.items():
        rows, summary = encode_dataset(load_dataset(arguments.data / file).shuffled(0).take(ROWS), encoder)
        batches = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        alike = [shared_length(batch) for batch in batches]
        tokens = sum(len(row["input_ids"]) for batch in batches for row in batch)
        kept = 1 - sum(alike) * (size - 1) / tokens
        print(f"| {name} | {size} | {summary.tokens / len(rows):.0f} | {fmean(alike):.0f} | {kept:.0%} |")


if __name__ == "__main__":
    main()
