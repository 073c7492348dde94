"""Carries out runs, each `trivet train` in a process of its own: on this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from trivet.errors import ConfigError
from trivet.sweep.plan import Run

#: Runs -> each with None, or why it failed, as they end.
Start = Callable[[Sequence[Run]], Iterator[tuple[Run, "str | None"]]]


def command(run: Run) -> list[str]:
    """`trivet train` for a run; it goes on where an earlier one was interrupted."""
    words = [sys.executable, "-m", "trivet", "train", str(run.config_file)]
    return [*words, "--resume"] if run.folder.config.exists() else words


def execute(words: Sequence[str], folder: str, log_file: str, environment: dict[str, str]) -> str | None:
    """Run a command in `folder` with its output in `log_file`, a path from there; None, or why it failed."""
    path = Path(folder, log_file)
    with path.open("w", encoding="utf-8") as log:
        done = subprocess.run(  # noqa: S603 - our own command
            words, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}, check=False
        )
    if done.returncode == 0:
        return None
    errors = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
    reason = errors[-1].removeprefix("error: ") if errors else f"it ended with {done.returncode}"
    return f"{reason} (see {log_file})"


def local(jobs: int) -> Start:
    """So many at a time on this machine; they share out its processors, and its GPUs if it has several."""

    def start(runs: Sequence[Run]) -> Iterator[tuple[Run, str | None]]:
        places = [_environment(place, jobs) for place in range(jobs)]

        def one(run: Run) -> str | None:
            environment = places.pop()
            try:
                return execute(command(run), str(Path.cwd()), str(run.log_file), environment)
            finally:
                places.append(environment)

        with ThreadPoolExecutor(jobs) as pool:
            under_way = {pool.submit(one, run): run for run in runs}
            try:
                for future in as_completed(under_way):
                    yield under_way[future], future.result()
            except BaseException:  # Ctrl-C reached the runs as well: each finishes its step and keeps it
                pool.shutdown(cancel_futures=True)
                raise

    return start


def _environment(place: int, jobs: int) -> dict[str, str]:
    if jobs == 1:
        return {}
    import torch

    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))}
    gpus = torch.cuda.device_count()
    if gpus > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = seen[place % gpus]
    return environment


def on_ray() -> Start:
    """On a Ray cluster that sees the same files at the same paths; a GPU a run where it has any."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "RAY_ADDRESS is set, but ray is not installed here; pip install 'trivet[ray]', or unset it to use this "
            "machine alone"
        ) from error

    def start(runs: Sequence[Run]) -> Iterator[tuple[Run, str | None]]:
        ray.init(log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_gpus=gpus, max_retries=0)(execute)
        here = str(Path.cwd())
        under_way = {remote.remote(command(run), here, str(run.log_file), {}): run for run in runs}
        while under_way:
            ended, _ = ray.wait(list(under_way))
            run = under_way.pop(ended[0])
            try:
                yield run, ray.get(ended[0])
            except ray.exceptions.RayError as error:
                yield run, f"Ray: {error}"

    return start
