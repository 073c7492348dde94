"""Evidence for comparing methods: task x method x learning rate x seed. `python bench/quality.py --data FOLDER`.

Appends one JSON line a run to bench/results/quality.jsonl and skips what is there, so it can be interrupted and resumed
at will; several processes may share the work with --shard 0/2 and --shard 1/2. `--table` prints what is there as
Markdown, `--check` lists what is missing.

A method's learning rate is the one with the lowest validation loss of seed 0, from as many trials as every other method
has; further seeds run at that rate alone. The test rows are looked at only by a run that is the best of its trials
so far, and of those only the chosen rate's figures are ever read. All methods see the same rows in the same order, and
start from the same classification head, for the same seed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from quality_adalora import attach_peft_adalora, follow_adalora, is_adalora, masked_parameters
from quality_full import attach_full, restore
from quality_table import append, best_loss, check, next_run, read, table
from quality_tasks import (
    CANDIDATES,
    DEFAULT_TASKS,
    TASKS,
    Candidate,
    Loaded,
    Task,
    heads,
    load_task,
    targets,
)
from versions import processor, versions

RESULTS = Path(__file__).resolve().parent / "results" / "quality.jsonl"
#: Metrics that are kept of each split.
KEPT = ("loss", "accuracy", "macro_f1", "matthews", "pearson", "spearman", "token_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the task files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(DEFAULT_TASKS))
    parser.add_argument("--methods", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seed 0 tunes, always")
    parser.add_argument("--hours", type=float, default=math.inf, help="start no run after so many hours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shard", default="0/1", help="this process's part of the work, e.g. 0/2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there, as Markdown")
    parser.add_argument("--check", action="store_true", help="only list what is missing")
    arguments = parser.parse_args()
    tasks, candidates = [TASKS[t] for t in arguments.tasks], [CANDIDATES[m] for m in arguments.methods]
    if arguments.table:
        print(table(read(arguments.results), tasks, candidates, arguments.seeds))
        return
    if arguments.check:
        missing = check(read(arguments.results), tasks, candidates, arguments.seeds)
        print("\n".join(missing) or "nothing is missing")
        sys.exit(bool(missing))
    if arguments.data is None:
        parser.error("--data is needed: the folder of the task files")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when torch is imported
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no such device on this machine")
    deadline = time.monotonic() + 3600 * arguments.hours
    failures = 0
    for task in tasks:
        failures += compare(
            task,
            shard(candidates, arguments.shard),
            arguments.seeds,
            arguments.data,
            arguments.results,
            deadline,
            arguments.device,
        )
    sys.exit(bool(failures))


def shard(candidates: list[Candidate], share: str) -> list[Candidate]:
    """Every n-th candidate from the i-th on, for "i/n"."""
    part, parts = (int(n) for n in share.split("/"))
    if not 0 <= part < parts:
        raise SystemExit(f"--shard {share}: the first number counts from 0 and is below the second, e.g. 0/2 and 1/2")
    return candidates[part::parts]


def compare(
    task: Task,
    candidates: list[Candidate],
    seeds: list[int],
    data: Path,
    results: Path,
    deadline: float = math.inf,
    device: str = "cpu",
) -> int:
    """All missing runs of `task`; the number of candidates that failed."""
    failed, loaded = 0, None
    for candidate in candidates:
        try:
            while time.monotonic() < deadline and (todo := next_run(read(results), task, candidate, seeds)):
                loaded = loaded or load_task(task, data, device)
                row = run(loaded, candidate, *todo, best=best_loss(read(results), task, candidate, todo[0]))
                append(results, row)
                loss = "failed" if row["failed"] else f"validation loss {row['validation']['loss']:.4f}"
                print(f"{task.name} {candidate.name} {todo}: {loss}, {row['wall_seconds']:.0f} s", flush=True)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # must not cost the other methods
            traceback.print_exc()
            failed, loaded = failed + 1, None  # nobody knows what it has left on the base model
    return failed


def run(
    loaded: Loaded, candidate: Candidate, seed: int, rate: float | str, scale: float, best: float = math.inf
) -> dict:
    """Train one fresh adapter on the shared base and measure it; the test rows only if it beats `best` on validation.

    Raises `RuntimeError` where the run has changed the base model, which the next run would start from.
    """
    from trivet.errors import TrivetError
    from trivet.session import Session

    began = time.perf_counter()
    start_heads(loaded, seed)
    before, names = fingerprint(loaded), targets(loaded)
    config = configured(loaded.task, candidate, seed, rate)
    model = attach(loaded, candidate, config, scale)
    session = Session(loaded.base, model, loaded.encoder, loaded.data)
    failed = validation = test = None
    took: dict[str, Any] = {}
    try:
        try:
            took = fit(session, loaded, config)
            if candidate.cut_to is not None:
                truncate(model, candidate.cut_to)
            validation = figures(session, loaded.splits.validation)
            if not math.isfinite(validation["loss"]):
                raise TrivetError(f"the validation loss is {validation['loss']}")
            if validation["loss"] < best:
                test = figures(session, loaded.splits.test)
        except TrivetError as error:  # a rate that diverges is a result
            failed, validation = str(error), None
        ranks = dict.fromkeys(names, 0) | ranks_of(model)  # 0: the layer is not adapted any more
        sizes = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
        trained = sum(size for _, size in sizes) - masked_parameters(model)
        whole = sum(size for name, size in sizes if "modules_to_save" in name)
    finally:
        model.unload()
        restore(loaded, model)
    start_heads(loaded, seed)
    if fingerprint(loaded) != before:
        raise RuntimeError(f"{candidate.name} changed the base model of {loaded.task.name}")
    return {
        "task": loaded.task.name, "method": candidate.name, "written": candidate.method, "rank": candidate.rank,
        "seed": seed, "learning_rate": rate, "scale": scale, "steps": loaded.task.steps,
        "head_rate": loaded.task.head_rate,
        "trainable_parameters": trained, "adapter_parameters": trained - whole,
        "ranks": summary(ranks) if candidate.varying else None,
        "validation": validation, "test": test, "failed": failed,
        "wall_seconds": round(time.perf_counter() - began, 2), **took,
        "dtype": loaded.task.dtype, "device": str(loaded.base.device),
        "machine": platform.machine(), "processor": processor(loaded.base.device.type),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")), "versions": versions(),
    }  # fmt: skip


def configured(task: Task, candidate: Candidate, seed: int, rate: float | str) -> Any:
    """The settings of a run, as `trivet train` would take them."""
    from trivet.configio import load

    return load(
        values={
            "model.name": task.base,
            "model.lora_rank": candidate.rank,
            "method": candidate.method or "lora",
            "training.max_steps": task.steps,
            "training.batch_size": task.batch_size,
            "training.learning_rate": rate,
            "training.head_learning_rate": task.head_rate,
            "training.seed": seed,
        }
    )


def fit(session: Any, loaded: Loaded, config: Any) -> dict[str, Any]:
    """Train as a run does, but for checkpoints and validation on the way; what it took, and the rate that was found."""
    from rich.console import Console

    from trivet.learning_rate import with_rate
    from trivet.prepare import Prepared
    from trivet.training import passing_trainer

    ready = Prepared(config, loaded.splits, session, loaded.train_rows, loaded.validation_rows, loaded.summary)
    found: dict[str, Any] = {}
    if config.training.learning_rate == "auto":
        began = time.perf_counter()
        ready = with_rate(ready, Console(quiet=True))
        found = {
            "learning_rate": ready.config.training.learning_rate, "trials": ready.trials,
            "trial_seconds": round(time.perf_counter() - began, 2),
        }  # fmt: skip
    with passing_trainer(ready) as trainer:
        follow_adalora(trainer, session.model, config.training)
        began, used = time.perf_counter(), time.process_time()
        trainer.train()
        seconds = {"train_seconds": time.perf_counter() - began, "train_cpu_seconds": time.process_time() - used}
    seconds["rank_seconds"] = trainer.ranks.seconds  # of train_seconds: measuring, deciding and resizing
    took = {name: round(value, 2) for name, value in seconds.items()}
    return {"steps_done": trainer.state.global_step, **took, **found}


def figures(session: Any, rows: Any) -> dict[str, float]:
    """The kept metrics of the model as it is now."""
    from trivet.evaluate.measure import Settings

    side = session.evaluator(rows, Settings(generate=False)).measure(session.model)
    found = {metric.name: metric.score for group in side.groups for metric in group}
    found.setdefault("loss", found.get("mse"))  # what regression trains on
    return {name: found[name] for name in KEPT if name in found}


def truncate(model: Any, rank: int) -> None:
    """Leave every layer the `rank` largest singular values of its update, and what a file of that rank holds."""
    from trivet.adapter.layers import adapted_layers
    from trivet.adapter.resize import resize
    from trivet.rank.score import cut, directions

    layers = list(adapted_layers(model))
    resize(model, cut(layers, directions(layers, None), [rank] * len(layers)))


# -- one base for all runs -------------------------------------------------------------------------------------


def attach(loaded: Loaded, candidate: Candidate, config: Any, scale: float) -> Any:
    """A fresh adapter, as a run attaches it."""
    if candidate.full:
        return attach_full(loaded, config.training.seed)
    if candidate.method is None:
        return attach_peft_adalora(loaded, candidate, config.training.seed, scale)
    from functools import partial

    from trivet.adapter.attach import attach as attach_adapter
    from trivet.session import probe_batches, probe_loss

    return attach_adapter(
        loaded.base.model,
        lora_rank=candidate.rank,
        lora_alpha=scale * candidate.rank,
        modules_to_save=loaded.base.fresh,
        task=loaded.base.task,
        method=candidate.method,
        batches=probe_batches(loaded.base, loaded.encoder, loaded.splits.train, config.training),
        loss=partial(probe_loss, task=loaded.base.task),
        seed=config.training.seed,
    )


def start_heads(loaded: Loaded, seed: int) -> None:
    """Draw them anew, so that no run starts from what another one learned and each seed has a start of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    deviation = loaded.base.model.config.initializer_range if heads(loaded) else 0.0
    with torch.no_grad():
        for name in heads(loaded):
            for parameter in loaded.base.model.get_submodule(name).parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.empty(parameter.shape).normal_(0, deviation, generator=generator))
                else:
                    parameter.zero_()


def fingerprint(loaded: Loaded) -> dict[str, int]:
    """Every parameter of the base as the sum of its bits."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    named = loaded.base.model.named_parameters()
    return {name: int(p.detach().view(kinds[p.element_size()]).sum(dtype=torch.int64)) for name, p in named}


def ranks_of(model: Any) -> dict[str, int]:
    """Every adapted layer's rank now."""
    from trivet.adapter.layers import adapted_layers

    config = model.peft_config["default"]
    if is_adalora(model) and config.rank_pattern:  # it masks what it drops
        return {name.rpartition(".lora_E")[0]: sum(mask) for name, mask in config.rank_pattern.items()}
    return {layer.name: layer.module.r["default"] for layer in adapted_layers(model)}


def summary(ranks: dict[str, int]) -> dict[str, Any]:
    """Ranks by the kind of layer, and over all."""
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(re.split(r"\.\d+\.", name)[-1], []).append(rank)
    values = list(ranks.values())
    return {
        "layers": len(values), "left": values.count(0), "least": min(values), "most": max(values),
        "mean": sum(values) / len(values), "by_kind": {kind: sum(r) / len(r) for kind, r in kinds.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
