"""The arithmetic of `bench/speed.py`: rates, paired ratios, quartiles, the share of a GPU's peak, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNITS = ("rows", "tokens", "supervised")
#: Dense bfloat16 FLOP/s of the makers' data sheets, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles, by linear interpolation between the sorted values (as numpy.percentile does)."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"median": at(0.5), "q1": at(0.25), "q3": at(0.75)}


def summary(steps: list[dict[str, Any]], warmup: int, ready: dict[str, Any], ready_seconds: float) -> dict[str, Any]:
    """What one side did.

    Args:
        steps: its answers in order, with seconds, rows, tokens, supervised and peak_extra_bytes.
        warmup: how many of the first are not measured.
        ready: what it said when its model was loaded.
        ready_seconds: from the start of the process until it was ready for the first step.
    """
    measured = steps[warmup:]
    seconds = [step["seconds"] for step in measured]
    counts = {unit: [step[unit] for step in measured] for unit in UNITS}
    return {
        **ready,
        "seconds": seconds,
        "warmup_seconds": [step["seconds"] for step in steps[:warmup]],
        **counts,
        "step_seconds": quartiles(seconds),
        **{f"{unit}_per_second": sum(counts[unit]) / sum(seconds) for unit in UNITS},
        "peak_extra_bytes": max(step["peak_extra_bytes"] for step in steps),
        "ready_seconds": ready_seconds,
        "first_step_seconds": ready_seconds + steps[0]["seconds"],
    }


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many times as fast the first side is as each other one, by rows, tokens and supervised tokens a second.

    Each is taken round by round (steps of one round were taken right after each other), then the median and the
    quartiles of the rounds; `overall` is the ratio of the rates of all measured steps together.
    """
    first, *others = sides
    if "failed" in sides[first]:
        return {}
    ours, out = sides[first], {}
    for name in others:
        theirs = sides[name]
        if "failed" in theirs:
            continue
        out[name] = {}
        for unit in UNITS:
            paired = [
                (a / s) / (b / t)
                for a, s, b, t in zip(ours[unit], ours["seconds"], theirs[unit], theirs["seconds"], strict=True)
            ]
            rate = f"{unit}_per_second"
            out[name][unit] = {**quartiles(paired), "paired": paired, "overall": ours[rate] / theirs[rate]}
    return out


def utilisation(side: dict[str, Any], peak: float) -> float:
    """Model FLOPs utilisation, a share: (4 N_frozen + 6 N_trained) tokens a second over the device's peak.

    A frozen weight costs a multiplication and an addition in the forward pass and in that of the gradient below it; a
    trained one two more for its own gradient. N counts what multiplies every token (the head, not the embeddings);
    attention's own products and recomputed ones are left out.
    """
    return (4 * side["frozen"] + 6 * side["trained"]) * side["tokens_per_second"] / peak


def peak_flops(device: str) -> float | None:
    """By name; None for a device that is not listed."""
    return next((peak for part, peak in PEAKS.items() if part in device), None)


def table(lines: list[dict[str, Any]]) -> str:
    """The newest line of each workload, model and shape as Markdown."""
    newest = {(line["workload"], line["model"], line["shape"]): line for line in lines}
    used = any("utilisation" in side for line in newest.values() for side in line["sides"].values())
    heads = [
        "workload",
        "side",
        "step, s",
        "rows/s",
        "tokens/s",
        "rows/s, ratio",
        "tokens/s, ratio",
        "loaded",
        "memory",
        "start, s",
    ]
    heads += ["utilisation"] if used else []
    out = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    failures = []
    for (workload, *_), line in newest.items():
        model = f"{line['model']}, " if line.get("device") == "cuda" else ""
        title, first = f"{workload} ({model}{line['shape']})", next(iter(line["sides"]))
        for name, side in line["sides"].items():
            if "failed" in side:
                failures.append(f"{workload}, {name}: did not run: {side['failed']}")
                continue
            ratio, none = line["ratios"].get(name), "1" if name == first else ""
            cells = [
                title,
                f"{name} ({side['dtype']})",
                spread(side["step_seconds"]),
                figure(side["rows_per_second"]),
                figure(side["tokens_per_second"]),
                spread(ratio["rows"]) if ratio else none,
                spread(ratio["tokens"]) if ratio else none,
                f"{side['resident_bytes'] / 2**20:,.0f} MiB",
                f"{side['peak_extra_bytes'] / 2**20:,.0f} MiB",
                f"{side['first_step_seconds']:.1f}",
            ]
            if used:
                cells.append(f"{side['utilisation']:.1%}" if "utilisation" in side else "")
            out.append(f"| {' | '.join(cells)} |")
            title = ""
    note = (
        "\nMedian [quartiles] of the measured rounds. A ratio is how many times as fast a workload's first side is as "
        "this one, round by round. Loaded is what the process held with its model in memory, and memory the most that "
        "was held beyond that; start is from the start of the process to the end of its first step."
    )
    machines = {f"{n['machine']}, {n['threads']} threads" for n in newest.values()}
    return "\n".join([*out, note, *(f"Measured on {m}." for m in sorted(machines)), *failures])


#: What the README calls the workloads and sides that it shows.
SHOWN = {
    "dense": "SmolLM2-135M, 4 x 256 tokens",
    "e2e": "SmolLM2-135M, 16 rows of E2E",
    "snips": "SmolLM2-135M, 16 rows of SNIPS",
    "gsm8k": "SmolLM2-135M, 8 rows of GSM8K",
    "e2e-chat": "SmolLM2-135M, 16 rows of E2E as chats",
    "snips-chat": "SmolLM2-135M, 16 rows of SNIPS as chats",
    "gsm8k-chat": "SmolLM2-135M, 8 rows of GSM8K as chats",
    "trec": "MiniLM-L6, 16 rows of TREC",
    "seq2seq": "BART-base's size, 8 x (128 + 64) tokens",
    "dense, llama-1b (random), 8 rows of 1024 tokens": "Llama of 1B parameters, 8 x 1,024 tokens, on a GPU",
    "dense, llama-1b (random), 4 rows of 1024 tokens": "Llama of 1B parameters, 4 x 1,024 tokens, on a GPU",
    "dense, llama-0.1b (random), 4 rows of 256 tokens": "Llama of SmolLM2-135M's size, 4 x 256 tokens, on a GPU",
    "e2e, llama-0.1b-random, 16 rows": "Llama of SmolLM2-135M's size, 16 rows of E2E, on a GPU",
}
NAMES = {
    "trivet-padded": "trivet, rows padded and grouped by length",
    "trivet-unshared": "trivet, nothing shared by the rows",
    "trivet-unrecorded": "trivet, without CUDA graphs",
    "peft-bf16": "PEFT, bfloat16",
    "peft-fp32": "PEFT, float32",
    "peft-best": "PEFT at its best settings",
    "peft": "PEFT and transformers.Trainer",
    "trl": "TRL's SFTTrainer",
    "trl-grouped": "TRL, rows grouped by length, best settings",
    "trl-packed": "TRL, rows packed, best settings",
    "trl-best": "TRL without checkpointing, all in bfloat16",
    "trl-liger": "TRL likewise, with Liger's kernels",
    "unsloth": "Unsloth",
    "floor": "the matrix products alone",
}


#: What `brief` says, for README.zh-CN.md.
CHINESE = {
    "| one step of | against | times as fast, tokens/s | memory, of theirs |": (
        "| 单步内容 | 对比对象 | 速度倍数（按 tokens/s） | 内存（与对方之比） |"
    ),
    "SmolLM2-135M, 4 x 256 tokens": "SmolLM2-135M，4 x 256 个 token",
    "SmolLM2-135M, 16 rows of E2E": "SmolLM2-135M，16 条 E2E 样本",
    "SmolLM2-135M, 16 rows of SNIPS": "SmolLM2-135M，16 条 SNIPS 样本",
    "SmolLM2-135M, 8 rows of GSM8K": "SmolLM2-135M，8 条 GSM8K 样本",
    "SmolLM2-135M, 16 rows of E2E as chats": "SmolLM2-135M，16 条对话形式的 E2E 样本",
    "SmolLM2-135M, 16 rows of SNIPS as chats": "SmolLM2-135M，16 条对话形式的 SNIPS 样本",
    "SmolLM2-135M, 8 rows of GSM8K as chats": "SmolLM2-135M，8 条对话形式的 GSM8K 样本",
    "MiniLM-L6, 16 rows of TREC": "MiniLM-L6，16 条 TREC 样本",
    "BART-base's size, 8 x (128 + 64) tokens": "BART-base 规模的模型，8 x (128 + 64) 个 token",
    "Llama of 1B parameters, 8 x 1,024 tokens, on a GPU": "1B 参数的 Llama，8 x 1,024 个 token，在 GPU 上",
    "Llama of 1B parameters, 4 x 1,024 tokens, on a GPU": "1B 参数的 Llama，4 x 1,024 个 token，在 GPU 上",
    "Llama of SmolLM2-135M's size, 4 x 256 tokens, on a GPU": "SmolLM2-135M 规模的 Llama，4 x 256 个 token，在 GPU 上",
    "Llama of SmolLM2-135M's size, 16 rows of E2E, on a GPU": "SmolLM2-135M 规模的 Llama，16 条 E2E 样本，在 GPU 上",
    "trivet, rows padded and grouped by length": "trivet，样本填充并按长度分组",
    "trivet, nothing shared by the rows": "trivet，样本之间不共享前缀",
    "trivet, without CUDA graphs": "trivet，不用 CUDA graphs",
    "PEFT, bfloat16": "PEFT，bfloat16",
    "PEFT, float32": "PEFT，float32",
    "PEFT at its best settings": "PEFT，最佳设置",
    "PEFT and transformers.Trainer": "PEFT 和 transformers.Trainer",
    "TRL's SFTTrainer": "TRL 的 SFTTrainer",
    "TRL, rows grouped by length, best settings": "TRL，样本按长度分组，最佳设置",
    "TRL, rows packed, best settings": "TRL，样本打包（packing），最佳设置",
    "TRL without checkpointing, all in bfloat16": "TRL，不用 checkpointing，全部 bfloat16",
    "TRL likewise, with Liger's kernels": "TRL，同上，加 Liger 的算子",
    "Unsloth": "Unsloth",
    "the matrix products alone": "仅矩阵乘法",
    "{}, {} threads": "{}，{} 个线程",
    "Medians [quartiles] of paired steps on {}.": "成对训练步之比的中位数 [四分位数]，测于 {}。",
}


def brief(lines: list[dict[str, Any]], words: Mapping[str, str] | None = None) -> str:
    """The newest line of each workload that the README shows: how many times as fast, at what memory.

    `words` are its phrases in another language, as in `CHINESE`.
    """

    def said(phrase: str) -> str:
        return phrase if words is None else words[phrase]

    newest = {
        line["workload"] if line["device"] == "cpu" else f"{line['workload']}, {line['model']}, {line['shape']}": line
        for line in lines
    }
    out = [said("| one step of | against | times as fast, tokens/s | memory, of theirs |"), "| --- | --- | --- | --- |"]
    for workload, title in SHOWN.items():
        sides = newest[workload]["sides"] if workload in newest else {}
        ours = next(iter(sides.values()), {})
        title = said(title)
        for name, ratio in newest[workload]["ratios"].items() if sides else ():
            memory = ours["peak_extra_bytes"] / sides[name]["peak_extra_bytes"]
            share = "" if name == "floor" else f"{memory:.2f}"
            against = said(NAMES[name]) if name in NAMES else name
            out.append(f"| {title} | {against} | {spread(ratio['tokens'])} | {share} |")
            title = ""
    where = said("{}, {} threads")
    machines = sorted({where.format(line["machine"], line["threads"]) for line in newest.values()})
    return "\n".join([*out, "", said("Medians [quartiles] of paired steps on {}.").format("; ".join(machines))])


def spread(figures: dict[str, float]) -> str:
    """1.23 [1.20, 1.30]"""
    return f"{figure(figures['median'])} [{figure(figures['q1'])}, {figure(figures['q3'])}]"


def figure(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
