"""Fine-tune a real language model on real data, and see what it learned. Run it with `make quickstart`.

The model is `demo` (SmolLM2-135M-Instruct, fetched once and cached). The data is on every machine: functions of the
installed Python packages, whose docstrings the model learns to write. Training, validation and test rows come from
different packages, so the test shows what carries over to code that was never seen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trivet import LoRAModel, load_dataset

SHOWN = ("loss", "perplexity", "rougeL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/quickstart", help="the run folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of 8 rows (default: %(default)s)")
    parser.add_argument("--test-rows", type=int, default=200, help="rows of unseen packages (default: %(default)s)")
    arguments = parser.parse_args()

    model = LoRAModel(base_model="demo", lora_rank=8)
    result = model.finetune(
        load_dataset("docstrings"),
        validation=load_dataset("docstrings", split="validation"),
        test=load_dataset("docstrings", split="test").shuffled(seed=0),
        output_dir=arguments.output_dir,
        overwrite=True,
        max_steps=arguments.steps,
        learning_rate=1e-3,
        max_length=384,
        max_validation_rows=64,
        max_test_rows=arguments.test_rows,
        eval_steps=max(1, arguments.steps // 4),
        max_new_tokens=40,
        max_generate_rows=96,
        **{"evaluation.batch_size": 32},
    )

    folder = Path(arguments.output_dir)
    print(f"\nOn {result['n']['loss']} functions of packages that were never trained on:")
    print(f"{'':<12}{'base':>8}{'tuned':>8}   95% interval of the difference")
    for name in SHOWN:
        base, tuned = result["metrics"]["base"][name], result["metrics"]["tuned"][name]
        low, high = result["intervals"]["difference"][name]
        print(f"{name:<12}{base:>8.3f}{tuned:>8.3f}   [{low:+.3f}, {high:+.3f}]")
    for row in read_jsonl(folder / "predictions.jsonl")[:3]:
        print(f"\n{function_of(row['prompt'])}")
        for who in ("base", "tuned"):
            print(f"  {who + ':':<9}{' '.join(row[who].split())}")
        print(f"  {'written:':<9}{row['references'][0]}")

    picture = plot(folder)
    print(f"\nrun folder {folder}: adapter/ (plain PEFT), result.json, log.jsonl, {picture.name}, report.html")
    print(f"try: trivet chat {folder}   or: trivet merge {folder} merged/")


def function_of(prompt: str) -> str:
    """The `def` line of the function that a prompt asks about."""
    return next(line.strip() for line in prompt.splitlines() if line.lstrip().startswith(("def ", "async def ")))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot(folder: Path) -> Path:
    """Training and validation loss against steps, as loss.png in the run folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_jsonl(folder / "log.jsonl")
    train = [(row["step"], row["loss"]) for row in log if "loss" in row]
    held = [(row["step"], row["validation_loss"]) for row in log if "validation_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#8fb4d9", linewidth=1.2, label="training, each step")
    axes.plot(*zip(*held, strict=True), color="#c1440e", marker="o", linewidth=2, label="validation, other packages")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Learning to write docstrings")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
