"""`trivet plan`: what a config would need on other machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trivet.cli.app import split_arguments, verb
from trivet.cli.inspect import table
from trivet.garbage import uncollected

if TYPE_CHECKING:
    from trivet.scale.engines import Cost
    from trivet.scale.plan import Plan


def register(app: typer.Typer) -> None:
    @app.command(epilog="Example: trivet plan config.yaml model.name=llama-3.1-70b --gpus 64")
    @verb
    def plan(
        arguments: Annotated[list[str], typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="config and overrides")],
        gpus: Annotated[int, typer.Option(min=1, max=65536, help="how many")] = 1,
        gpu: Annotated[str, typer.Option(help="kind, such as h100-80gb or a100-80gb")] = "h100-80gb",
        length: Annotated[int, typer.Option(min=0, help="tokens in a row; 0 takes data.max_length")] = 0,
        learned: Annotated[float, typer.Option(help="share of the tokens that are learned")] = 1.0,
        mfu: Annotated[float, typer.Option(help="share of the GPU's peak that matrix products reach")] = 0.4,
    ) -> None:
        """Say what fits, which setting to use and how long a step takes. Loads no weights and no data."""
        from trivet.configio import load

        path, overrides = split_arguments(arguments)
        config = load(path, overrides)
        with uncollected():
            from trivet.scale.plan import plan as work_out  # imports torch: not before the config is right

        show(work_out(config, gpus=gpus, gpu=gpu, length=length or None, learned=learned, mfu=mfu))


def show(found: Plan) -> None:
    """The table and what follows from it."""
    trace, adapter = found.trace, found.adapter
    typer.echo(
        f"{found.model}: {trace.parameters / 1e9:,.3g}B parameters, weights {size(trace.weights)}; adapter "
        f"{adapter.trained:,} trained numbers, {size(adapter.saved * 4)} saved, optimizer {size(adapter.optimizer)}"
    )
    micro = f"{found.accumulation} x " if found.accumulation > 1 else ""
    typer.echo(
        f"a step: {micro}{found.rows:,} rows of {found.length:,} tokens on each of {found.gpus:,} {found.gpu}, "
        f"{found.costs[0].tokens:,} tokens in all\n"
    )
    head = ("setting", "checkpointing", "GB a GPU", "fits", "computing", "sending", "tokens/s", "sent")
    table([head, *map(_row, found.costs)])
    typer.echo("")
    for line in [*advice(found), *traffic(found)]:
        typer.echo(line)
    typer.echo(
        f"Assumed: products at {found.mfu:.0%} of the GPU's peak, 90% of its memory, links at 80%; docs/scale.md has "
        "the formulas, and how far off they were where they could be measured."
    )


def _row(c: Cost) -> tuple[str, ...]:
    return (
        c.setting.name,
        "yes" if c.setting.checkpointing else "no",
        f"{c.total / 1e9:,.1f}",
        "yes" if c.fits else "no",
        f"{c.compute:,.3g} s",
        f"{c.gathering + c.reducing:,.2g} s",
        f"{c.rate:,.0f}" if c.fits else "",
        size(sum(c.sent.values())),
    )


def advice(found: Plan) -> list[str]:
    """Which setting to use, and how long it takes."""
    if found.chosen is None:
        least = min(found.costs, key=lambda c: c.total)
        lines = [f"Nothing fits: the least is {least.total / 1e9:,.1f} GB a GPU ({least.setting.name}, checkpointing)."]
        if least.room:
            lines.append(f"With training.batch_size: {least.room} it would.")
        if found.fewest:
            lines.append(f"{found.fewest:,} GPUs would do.")
        return lines
    c = found.chosen
    switch = f"training.gradient_checkpointing: {str(c.setting.checkpointing).lower()}"
    how = f" ({found.gpus:,} GPUs share one copy of the weights)" if c.setting.sharded else " (a copy on each GPU)"
    how = how if found.gpus > 1 else ""
    room = f"room for {c.room:,} rows in place of {found.rows:,}"
    lines = [f"Use {c.setting.name}{how} with {switch}: {c.total / 1e9:,.1f} GB a GPU, {room}."]
    hidden = " (gathering hidden behind computing, or not)" if c.longest > 1.01 * c.step else ""
    spread = f"{c.step:,.3g} to {c.longest:,.3g} s{hidden}" if hidden else f"{c.step:,.3g} s"
    hours = f"; {found.steps:,} steps in {found.steps * c.step / 3600:,.3g} hours" if found.steps else ""
    lines.append(f"A step takes {spread}, {c.rate:,.0f} tokens/s{hours}.")
    plain = max((x for x in found.costs if not x.setting.checkpointing), key=lambda x: x.room)
    if c.setting.checkpointing and plain.room:
        lines.append(
            f"Without checkpointing batch_size {plain.room} fits ({plain.setting.name}): with more "
            f"gradient_accumulation_steps the same rows take {plain.compute / c.compute:.0%} of the computing"
            f"{', and weights are gathered as many times more' if plain.setting.sharded else ''}."
        )
    return lines


def traffic(found: Plan) -> list[str]:
    """What is sent and stored beside the steps, and what changing ranks do to it."""
    adapter = found.adapter
    lines = [
        f"A checkpoint: {size(adapter.saved * 4 + adapter.optimizer)}, from one process; the base model is never "
        "written."
    ]
    if found.gpus > 1:
        lines.append(
            f"Every process reads the base model at the start: {size(found.trace.weights * found.gpus)} in all from "
            "wherever it is kept."
        )
    ranks = found.ranks
    if ranks is None:
        return lines
    if ranks.end is None:
        ends = "how far is found out in the run"
    else:
        ends = f"to {size(4 * ranks.end)}, {size(4 * (ranks.mean or 0))} on average over the run"
    lines.append(
        f"Ranks change at most {ranks.resizes:,} times: the adapter's gradients shrink from {size(4 * ranks.start)} a "
        f"step {ends}. What it costs: {ranks.measured:,} steps sum {size(ranks.moments)} of second moments over the "
        f"processes, and a decision is {size(ranks.decision)}."
    )
    return lines


def size(count: float) -> str:
    """Bytes in a few characters: 12,340,000 is 12.3 MB."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:,.3g} {unit}"
    return f"{count:.0f} B"
