"""How far off is `trivet plan`? `python bench/plan.py` compares its predictions with what real steps and runs take.

Each measurement is a process of its own. Compared, and appended to bench/results/plan.jsonl:

- counts: matrix products (torch's FLOP counter), bytes that autograd keeps, bytes of factors, gradients and optimizer,
  and the process's peak beyond the loaded model, of a training step, with freed memory given back and kept;
- run: a short `trivet train`: what its adapter and its checkpoint hold;
- times: steps of several sizes in turns; one size says how many FLOP/s are reached, the others are predicted from it;
- pair: two processes (gloo, on this machine): bytes sent in a step, with and without FSDP2, and an all-reduce's time;
- scale: no measurement, but what is said of 8B to 405B parameters on up to 1,024 GPUs.

`--table` prints what docs/scale.md shows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from versions import versions

RESULTS = Path(__file__).resolve().parent / "results" / "plan.jsonl"
#: base model, rows, length, rank, checkpointing, method
CASES = (
    ("demo", 2, 128, 8, False, "lora"),
    ("demo", 2, 256, 8, False, "lora"),
    ("demo", 2, 256, 32, False, "lora"),
    ("demo", 2, 256, 8, True, "lora"),
    ("demo", 4, 256, 8, False, "lora_fa"),
    ("demo", 2, 256, 8, False, "pissa"),
    ("demo", 8, 512, 8, False, "lora"),
    ("demo-encoder", 16, 64, 8, False, "lora"),
)
#: rows, length of the timed steps; the first one calibrates.
TIMED = ((2, 256), (1, 256), (4, 256), (1, 512), (2, 512))
STEPS = 7
#: glibc's allocator gives every larger tensor's memory back at once, so that the peak is what tensors take.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


# -- the children ----------------------------------------------------------------------------------------------


def loaded(name: str, rank: int, method: str) -> tuple[Any, str]:
    """(adapted model, task), ready to train."""
    from trivet.adapter.attach import attach
    from trivet.allocator import keep_freed_memory
    from trivet.model import load_base

    if not EXACT.keys() <= os.environ.keys():
        keep_freed_memory()
    encoder = name == "demo-encoder"
    base = load_base(name, task="classification" if encoder else "causal-lm", labels=["a", "b"] if encoder else None)
    return attach(base.model, lora_rank=rank, method=method, task=base.task), base.task


def batch_of(model: Any, task: str, rows: int, length: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 2, (rows,)) if task == "classification" else ids.clone()
    return {"input_ids": ids, "labels": labels}


def step(model: Any, optimizer: Any, task: str, batch: dict[str, Any]) -> None:
    from trivet.loss import training_loss

    inputs = {k: v for k, v in batch.items() if k != "labels"}
    training_loss(model, inputs, batch["labels"], None, task=task).backward()
    optimizer.step()
    optimizer.zero_grad()


def resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def child_counts(name: str, rows: int, length: int, rank: int, checkpointing: bool, method: str) -> dict[str, Any]:
    import torch

    from trivet.adapter.plan import optimizer as make
    from trivet.kernels import attention, tile_product
    from trivet.loss import training_loss
    from trivet.scale.adapter import state_bytes
    from trivet.scale.trace import Kept, flop_counter

    model, task = loaded(name, rank, method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    with torch.no_grad():
        for p in model.parameters():
            p.sum()  # pages of a mapped file become resident
    batch = batch_of(model, task, rows, length)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(model, learning_rate=1e-4)
    for _ in range(2):
        step(model, optimizer, task, batch)
    peak = resident("VmHWM") - before
    attention.serves = tile_product.serves = lambda *_: False  # torch counts its own products alone, not C's
    counter, kept = flop_counter(), Kept(model)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
            loss = training_loss(model, inputs, batch["labels"], None, task=task)
        loss.backward()
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "flops": counter.get_total_flops(),
        "kept_bytes": kept.bytes,
        "trained": sum(p.numel() for p in stepped),
        "gradient_bytes": sum(p.grad.numel() * 4 for p in trained if p.grad is not None),
        "optimizer_bytes": state_bytes(optimizer),
        "weights_bytes": sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())
                             if not t.requires_grad),
        "peak_beyond_model": peak,
    }  # fmt: skip


def child_times() -> dict[str, Any]:
    import torch

    from trivet.adapter.plan import optimizer as make

    model, task = loaded("demo", 8, "lora")
    model.train()
    optimizer = make(model, learning_rate=1e-4)
    seconds: dict[str, list[float]] = {}
    for turn in range(STEPS + 1):
        for rows, length in TIMED:
            batch = batch_of(model, task, rows, length)
            began = time.process_time(), time.perf_counter()
            step(model, optimizer, task, batch)
            if turn:  # the first meets new shapes
                seconds.setdefault(f"{rows}x{length}", []).append(time.process_time() - began[0])
    return {"cpu_seconds": seconds, "threads": torch.get_num_threads()}


def child_run(method: str, rank: int) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from safetensors import safe_open

    from trivet.configio import load
    from trivet.run import train

    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(40)]
    with tempfile.TemporaryDirectory() as place:
        values = {
            "model.name": "demo", "model.lora_rank": rank, "method": method, "training.max_steps": 4,
            "training.eval_steps": 4, "training.batch_size": 4, "evaluation.generate": False,
            "evaluation.resamples": 10, "output_dir": f"{place}/run",
        }  # fmt: skip
        config = load(values=values)
        result = train(config, train=rows, console=Console(quiet=True)).result
        folder = Path(place) / "run"
        checkpoint = folder / "checkpoints" / "checkpoint-4"
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
            saved = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        files = {f.name: f.stat().st_size for f in checkpoint.iterdir()}
        return {
            "saved_numbers": saved,
            "adapter_file_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
            "trainable": result["trainable_parameters"],
            "optimizer_bytes": sum(
                t.numel() * t.element_size() for s in state.values() for t in s.values() if torch.is_tensor(t)
            ),
            "optimizer_file_bytes": files["optimizer.pt"],
            "checkpoint_bytes": sum(files.values()),
        }


def loopback() -> int:
    """Bytes that the loopback interface has carried."""
    line = next(row for row in Path("/proc/net/dev").read_text().splitlines() if row.strip().startswith("lo:"))
    return int(line.split()[1])


def child_pair(rank: int, port: int, out: str) -> None:
    """One of two processes."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from trivet.adapter.attach import attach, trainable_parameters

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}

    def fresh() -> Any:
        return attach(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=8192)), lora_rank=64)

    def measured(work: Any, times: int = 3) -> list[int]:
        found = []
        for _ in range(times):
            dist.barrier()
            before = loopback()
            work()
            dist.barrier()
            found.append(loopback() - before)
        return found

    model = fresh()
    ids = torch.randint(0, 8192, (1, 16))
    facts: dict[str, Any] = {"sizes": sizes, "trained": trainable_parameters(model)}
    inside = [p for layer in model.base_model.model.model.layers for p in layer.parameters() if not p.requires_grad]
    facts["block_bytes"] = sum(p.numel() * 4 for p in inside)

    def work(adapted: Any) -> None:  # as trivet's Trainer: gradients are summed in one piece, after the backward pass
        adapted(input_ids=ids, labels=ids).loss.backward()
        dist.all_reduce(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad]))

    facts["data_parallel_sent"] = measured(lambda: work(model))
    mesh, sharded = init_device_mesh("cpu", (2,)), fresh()
    learned = {p for p in sharded.parameters() if p.requires_grad}
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=learned)
    facts["fsdp_sent"] = measured(lambda: work(sharded))

    seconds: dict[int, float] = {}
    for mega in (1, 4, 16, 64):
        tensor, taken = torch.zeros(mega * 2**18), []
        for _ in range(7):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            taken.append(time.perf_counter() - began)
        seconds[mega * 2**20] = statistics.median(taken)
    facts["all_reduce_seconds"] = seconds
    if rank == 0:
        Path(out).write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


# -- the parent ------------------------------------------------------------------------------------------------


def call(*arguments: Any, **environment: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"{arguments}: failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def predicted(name: str, rows: int, length: int, rank: int, method: str) -> tuple[Any, Any]:
    """The trace and the adapter's size, for this machine's kind of processor."""
    from trivet.demo import demo_path
    from trivet.methods import find_method
    from trivet.model import pick_device, pick_dtype
    from trivet.scale.adapter import adapter_size
    from trivet.scale.shapes import model_config
    from trivet.scale.trace import build, trace

    demo_path(name)
    task = "classification" if name == "demo-encoder" else "causal-lm"
    base = build(model_config(name), task, pick_dtype("auto", pick_device("cpu")))
    found = trace(base, find_method(method), task=task, rows=rows, length=length, cpu=True, lora_rank=rank)
    shapes, ranks = zip(*((x.shape, x.rank) for x in found.adapted), strict=True)
    return found, adapter_size(find_method(method), shapes, ranks, found.whole)


def counts() -> None:
    for name, rows, length, rank, checkpointing, method in CASES:
        trace, adapter = predicted(name, rows, length, rank, method)
        kept = trace.kept_with_checkpointing if checkpointing else trace.kept
        said = {
            "flops": trace.flops(checkpointing),
            "kept_bytes": kept,
            "trained": adapter.trained,
            "gradient_bytes": adapter.gradients,
            "optimizer_bytes": adapter.optimizer,
            "weights_bytes": trace.weights + 4 * adapter.frozen,
            "peak_beyond_model": adapter.gradients + adapter.optimizer + kept + trace.working,
        }
        said["peak_with_freed_memory_kept"] = said["peak_beyond_model"]
        case = {"base": name, "rows": rows, "length": length, "rank": rank, "checkpointing": checkpointing}
        asked = "counts", name, rows, length, rank, checkpointing, method
        measured = call(*asked, **EXACT)
        measured["peak_with_freed_memory_kept"] = call(*asked)["peak_beyond_model"]
        if checkpointing:  # blocks' inputs are held by the blocks' own frames, which no hook sees
            said["kept_bytes"] = measured["kept_bytes"] = None
        write({"kind": "counts", **case, "method": method, "predicted": said, "measured": measured})


def times() -> None:
    measured = call("times")
    middle = {key: statistics.median(values) for key, values in measured["cpu_seconds"].items()}
    flops = {f"{r}x{n}": predicted("demo", r, n, 8, "lora")[0].flops(False) for r, n in TIMED}
    first = "{}x{}".format(*TIMED[0])
    reached = flops[first] / middle[first]
    said = {key: count / reached for key, count in flops.items()}
    write({"kind": "times", "calibrated_at": first, "flops_per_second": reached, "predicted": said, "measured": middle,
           "quartiles": {k: statistics.quantiles(v) for k, v in measured["cpu_seconds"].items()},
           "threads": measured["threads"]})  # fmt: skip


def run() -> None:
    for method, rank in (("lora", 8), ("lora", 32), ("lora_fa", 8), ("muon", 8)):
        chosen = {"update": "muon"} if method == "muon" else method
        _, adapter = predicted("demo", 1, 16, rank, chosen)
        said = {
            "saved_numbers": adapter.saved,
            "adapter_file_bytes": 4 * adapter.saved,
            "trainable": adapter.trained,
            "optimizer_bytes": adapter.optimizer,
            "optimizer_file_bytes": adapter.optimizer,
            "checkpoint_bytes": 4 * adapter.saved + adapter.optimizer,
        }
        write({"kind": "run", "base": "demo", "rank": rank, "method": method, "predicted": said,
               "measured": call("run", chosen, rank)})  # fmt: skip


def pair() -> None:
    from types import SimpleNamespace

    from trivet.scale.engines import Setting, traffic

    with socket.socket() as free, tempfile.TemporaryDirectory() as place:
        free.bind(("127.0.0.1", 0))
        port, out = free.getsockname()[1], f"{place}/facts.json"
        free.close()
        both = [
            subprocess.Popen([sys.executable, __file__, "--child", json.dumps(("pair", i, port, out))]) for i in (0, 1)
        ]
        if any(child.wait(600) for child in both):
            raise SystemExit("pair: a process failed")
        found = json.loads(Path(out).read_text())
    trace: Any = SimpleNamespace(weights=found["block_bytes"], outer_weights=0)
    adapter: Any = SimpleNamespace(gradients=4 * found["trained"])
    sent = {
        name: 2 * sum(traffic(Setting(2, sharded, False), trace, adapter, 1).values())
        for name, sharded in (("data_parallel_sent", False), ("fsdp_sent", True))
    }
    seconds = {int(k): v for k, v in found["all_reduce_seconds"].items()}
    small, large = 2**20, 2**26
    slope = (seconds[large] - seconds[small]) / (large - small)
    write({
        "kind": "pair",
        "predicted": sent | {"all_reduce_seconds": {k: seconds[small] + slope * (k - small) for k in seconds}},
        "measured": {k: min(found[k]) for k in sent} | {"all_reduce_seconds": seconds},
        "trained": found["trained"],
        "block_bytes": found["block_bytes"],
    })  # fmt: skip


def scale() -> None:
    """No measurement: what is said of large models."""
    from trivet.configio import load
    from trivet.scale.plan import plan

    for model, counted in (("llama-3.1-8b", (1, 8, 64, 1024)), ("llama-3.1-70b", (1, 8, 64, 1024)),
                           ("llama-3.1-405b", (8, 64, 256, 1024))):  # fmt: skip
        values = {"model.name": model, "method": "trivet", "data.max_length": 2048, "training.batch_size": 2,
                  "training.max_steps": 1000}  # fmt: skip
        for gpus in counted:
            found = plan(load(values=values), gpus=gpus)
            c = found.chosen
            chosen = c and {
                "setting": c.setting.name, "checkpointing": c.setting.checkpointing, "gb": c.total / 1e9,
                "compute": c.compute, "gathering": c.gathering, "reducing": c.reducing, "rate": c.rate,
                "sent_gb": sum(c.sent.values()) / 1e9, "held": c.held, "sent": c.sent,
            }  # fmt: skip
            write({
                "kind": "scale", "model": model, "gpus": gpus, "gpu": found.gpu, "rows": found.rows,
                "length": found.length, "mfu": found.mfu, "parameters": found.trace.parameters, "chosen": chosen,
                "least_gb": min(x.total for x in found.costs) / 1e9, "fewest": found.fewest,
                "ranks": found.ranks and vars(found.ranks),
            })  # fmt: skip


def write(row: dict[str, Any]) -> None:
    row |= {"command": f"python bench/plan.py {row['kind']}", "versions": versions(), "cores": os.cpu_count()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(*(f"{key}: {value}" for key, value in row.items() if key != "versions"), sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["counts", "run", "times", "pair", "scale"])
    parser.add_argument("--table", action="store_true", help="print what was recorded")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, *rest = json.loads(arguments.child)
        found = globals()[f"child_{kind}"](*rest)
        if found is not None:
            print(json.dumps(found))
        return
    if arguments.table:
        from plan_table import figures

        print(figures())
        return
    for kind in arguments.kinds:
        {"counts": counts, "run": run, "times": times, "pair": pair, "scale": scale}[kind]()


if __name__ == "__main__":
    main()
