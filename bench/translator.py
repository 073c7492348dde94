"""A small encoder-decoder for `bench/quality.py` to adapt: `python bench/translator.py --data FOLDER`.

A BART of 2 + 2 layers and 5 million parameters that is trained from scratch, with a vocabulary of its own, to translate
Multi30k's 9,000 training rows from German to English. The task that is measured then is English to German. It is
written to the cache beside the demo models, once (25 minutes on one thread).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

#: What `quality_tasks` calls it.
NAME = "translator"
STEPS, BATCH, RATE = 1200, 64, 1.5e-3
SIZES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (
    ("layers", 2), ("ffn_dim", 1024), ("attention_heads", 4))}  # fmt: skip
VOCABULARY = 4000


def folder() -> Path:
    """Where it is written."""
    from trivet.demo import cache_dir

    return cache_dir() / f"bench-{NAME}"


def made() -> str:
    """The folder, if it is there."""
    if not (folder() / "config.json").exists():
        raise SystemExit(f"no base model in {folder()}; make it with: python bench/translator.py --data FOLDER")
    return str(folder())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the task files")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if (folder() / "config.json").exists():
        raise SystemExit(f"{folder()}: exists already; remove it to make another")
    train(*(pairs(arguments.data / f"mt_multi30k_en_de_{part}.jsonl") for part in ("train", "valid")), arguments.steps)


def pairs(file: Path) -> list[tuple[str, str]]:
    """(German, English) of each row."""
    from trivet.data.dataset import load_dataset

    return [(row.completion, row.prompt) for row in load_dataset(str(file))]


def tokenizer_of(texts: list[str]) -> Any:
    """Byte-level BPE, learned from `texts`, with BART's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def train(rows: list[tuple[str, str]], held_out: list[tuple[str, str]], steps: int) -> None:
    """Train it and write it."""
    import transformers as hf

    tokenizer = tokenizer_of([text for pair in rows for text in pair])
    hf.set_seed(0)
    config = hf.BartConfig(
        vocab_size=len(tokenizer), d_model=256, **SIZES, max_position_embeddings=128, decoder_start_token_id=2,
        forced_eos_token_id=None, dropout=0.2, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config)

    def encoded(pairs: list[tuple[str, str]]) -> list[dict[str, list[int]]]:
        return [dict(tokenizer(german, text_target=english)) for german, english in pairs]

    with tempfile.TemporaryDirectory() as place:
        settings = hf.Seq2SeqTrainingArguments(
            place, max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=200, weight_decay=0.01,
            label_smoothing_factor=0.1, eval_strategy="steps", eval_steps=300, save_strategy="no", logging_steps=100,
            train_sampling_strategy="group_by_length", report_to=[], seed=0,
        )  # fmt: skip
        trainer = hf.Seq2SeqTrainer(
            model, settings, data_collator=hf.DataCollatorForSeq2Seq(tokenizer, model),
            train_dataset=encoded(rows), eval_dataset=encoded(held_out),
        )  # fmt: skip
        trainer.train()
    model.config.dropout = 0.1
    target = folder()
    half_way = target.with_name(f"{target.name}.part")  # a save that is killed leaves none that looks whole
    model.save_pretrained(half_way)
    tokenizer.save_pretrained(half_way)
    half_way.rename(target)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
