"""A plan as a table for people, and as plain values for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from difftune.plan.stages import GIB, StagePlan


def print_plan(plan: StagePlan, console: Console) -> None:
    """Print a plan: what it is for, a table of moments, whether it fits, what to change."""
    machine, peak, parameters = plan.machine, plan.peak, plan.parameters
    what = "GPU" if machine.is_gpu else "CPU"
    ranks = f"{machine.devices} {what}" + (f"s by {machine.strategy}" if machine.devices > 1 else "")

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    console.rule(f"stage {plan.stage}", align="left")
    line(
        f"{parameters['total']:,} parameters, {parameters['trainable']:,} of them trained, "
        f"{parameters['lambda']:,} lambda; {ranks}, {gib(machine.memory)} GiB each"
    )
    shown = [moment for moment in plan.moments if not moment.cache]
    evaluations = [moment for moment in plan.moments if moment.cache]
    if evaluations:
        shown.append(max(evaluations, key=lambda moment: moment.total))
    names = [name for name in _PARTS if any(getattr(moment, name) for moment in shown)]
    table = Table("GiB of one rank", *[_PARTS[name] for name in names], "sum", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    for moment in shown:
        cells = [gib(getattr(moment, name)) if getattr(moment, name) else "" for name in names]
        table.add_row(moment.where, *cells, gib(moment.total), style="bold" if moment is peak else None)
    console.print(table, highlight=False)
    if len(evaluations) > 1:
        line(f"of {len(evaluations)} evaluations the largest; they come one after another")
    margin = plan.available - peak.total
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    room = f"{gib(margin)} GiB to spare" if plan.fits else f"{gib(-margin)} GiB too many"
    line(f"peak {gib(peak.total)} GiB in {peak.where}: {verdict} in {gib(plan.available)} GiB, {room}")
    line(
        f"a block keeps {mib(plan.kept_without_checkpointing)} MiB of activations for its backward, "
        f"{mib(plan.kept_with_checkpointing)} MiB with gradient checkpointing; this recipe {mib(plan.kept_a_block)} MiB"
    )
    line(
        f"logits are held for a chunk of tokens, {mib(plan.logits)} MiB; those of all would take "
        f"{gib(plan.all_logits)} GiB"
    )
    line(
        f"{plan.flops_per_token / 1e9:,.3g} GFLOP a token, forward and backward; {plan.tokens_a_step:,} tokens an "
        "optimiser step" + (f", so {plan.step_flops / 1e15:,.3g} PFLOP" if machine.is_gpu else "")
    )
    line(_hours(plan))
    if not plan.fits:
        line("one change at a time:")
        _print_suggestions(plan, console)
    line("[dim]assumed: " + "; ".join(plan.assumptions) + "[/]")


def plan_values(plan: StagePlan) -> dict[str, Any]:
    """A plan as plain JSON values: its fields in bytes, with `peak_bytes`, `peak_where` and `fits`."""
    values = dataclasses.asdict(plan)
    for moment, made in zip(values["moments"], plan.moments, strict=True):
        moment["total"] = made.total
    return {**values, "peak_bytes": plan.peak.total, "peak_where": plan.peak.where, "fits": plan.fits}


_PARTS = {
    "weights": "weights",
    "gathered": "gathered",
    "optimizer": "AdamW",
    "gradients": "grads",
    "activations": "activ.",
    "cache": "cache",
}


def _print_suggestions(plan: StagePlan, console: Console) -> None:
    if not plan.suggestions:
        console.print("no setting that this command knows saves memory: more or larger devices", highlight=False)
    for suggestion in plan.suggestions:
        verdict = "[green]fits[/]" if suggestion.peak <= plan.available else "[red]does not fit[/]"
        console.print(
            f"  {suggestion.change}  saves {gib(suggestion.saves)} GiB, peak {gib(suggestion.peak)}: {verdict} "
            f"(the price: {suggestion.cost})",
            highlight=False,
            soft_wrap=True,
        )


def _hours(plan: StagePlan) -> str:
    machine = plan.machine
    if not machine.is_gpu:
        return "hours on a CPU are not planned: difftune prepare --check measures them"
    share = f"at {machine.mfu:.0%} of the peak of {machine.gpu} (assumed; --mfu says otherwise)"
    if plan.hours is None:
        return f"{plan.tokens_per_hour / 1e6:,.1f} million tokens an hour {share}; hours need trainer.max_steps"
    return f"{plan.hours:,.1f} hours of training {share}, evaluations apart"


def gib(count: int) -> str:
    """Bytes in GiB, with the digits that matter."""
    value = count / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def mib(count: int) -> str:
    """Bytes in MiB, as :func:`gib`."""
    return gib(count * 1024)
