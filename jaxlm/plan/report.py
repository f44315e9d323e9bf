"""A plan and a search, for people at a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxlm.plan.search import Candidate, Search, distinct, mesh_text, pareto, remat_text
from jaxlm.plan.units import duration, number, size

BAR = 28  # characters
SHOWN = 12  # candidates of a search


def show(console: Console, plan: dict[str, Any]) -> None:
    """Print a plan (plan.to_dict)."""
    for line in head(plan):
        console.print(escape(line), soft_wrap=True)
    tables = [
        _memory(plan),
        _flops(plan),
        _collectives(plan),
        _step(plan),
        _outer(plan),
        _run(plan),
    ]
    for table in tables:
        if table.row_count:
            show_table(console, table)
    if plan["largest"]:
        show_table(console, largest(plan["largest"]))
    console.print()
    for name, known in plan["efficiencies"].items():
        console.print(escape(f"{name} {known['value']:.3g}: {known['origin']}"), soft_wrap=True)
    for line in plan["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(line)}", soft_wrap=True)
    for line in plan["notes"]:
        console.print(f"note: {escape(line)}", soft_wrap=True)


def show_table(console: Console, table: Table) -> None:
    """Print a table under its title, which may be wider than it is."""
    console.print(f"\n[bold]{escape(str(table.title))}[/]", soft_wrap=True)
    table.title = None
    console.print(table)


def head(plan: dict[str, Any]) -> list[str]:
    """What was planned, and how."""
    target, settings = plan["target"], plan["settings"]
    mesh = mesh_text(plan["mesh"], plan["dcn"])
    how = "from the trace of the step, nothing compiled"
    if plan["method"] == "compiled":
        how = f"compiled in {plan['compile_seconds']:.0f} s" + ", from the cache" * plan["cached"]
    lines = [
        f"{plan['name']}: {number(plan['parameters'])} parameters on {target['text']} "
        f"({target['chips']} x {target['kind']}), {how}",
        f"mesh {mesh}; remat {settings['remat']}; {settings['sequences']} x "
        f"{settings['sequence_length']} tokens in {settings['microbatches']} microbatches; "
        f"loss in {settings['loss_chunks']} chunks",
        f"attention {settings['attention']}: {settings['attention_reason']}",
    ]
    if outer := plan["outer"]:
        lines[0] = f"one of {outer['islands']} islands, " + lines[0]
    if plan["memory"]["refused"]:
        lines.append(refusal(plan["memory"]))
    return lines


def refusal(memory: dict[str, Any]) -> str:
    """What a compiler says of a program that does not fit, beside what its trace says."""
    refused = memory["refused"]
    return (
        f"the compiler refuses the program: it needs {size(refused['needed_bytes'])} of "
        f"{size(refused['available_bytes'])} that it may use; the trace says "
        f"{size(memory['traced_bytes'])}"
    )


def verdict(plan: dict[str, Any]) -> str:
    """Whether it fits, in words."""
    memory = plan["memory"]
    if not memory["limit_bytes"]:
        return f"{size(memory['peak_bytes'])} (the device's memory is not known)"
    share = memory["peak_bytes"] / memory["limit_bytes"]
    word = "fits" if memory["fits"] else "DOES NOT FIT"
    return (
        f"{size(memory['peak_bytes'])} of {size(memory['limit_bytes'])} ({share:.0%}): {word} "
        f"(plan.memory allows {size(memory['usable_bytes'])})"
    )


def _bar(part: float) -> str:
    return "#" * max(0, min(BAR, round(BAR * part)))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return table


def _memory(plan: dict[str, Any]) -> Table:
    table = _table(
        f"memory of a device at its peak: {verdict(plan)}", "class", "bytes", "share", ""
    )
    table.columns[3].justify = "left"
    whole = plan["memory"]["limit_bytes"] or plan["memory"]["peak_bytes"] or 1
    for name, count in plan["memory"]["classes"].items():
        if count:
            table.add_row(name, size(count), f"{count / whole:.1%}", _bar(count / whole))
    if code := plan["memory"]["code_bytes"]:
        table.add_row("code, beside the peak", size(code), f"{code / whole:.1%}", "")
    return table


def _flops(plan: dict[str, Any]) -> Table:
    flops = plan["flops"]
    table = _table(
        f"FLOPs of a device in a step: {number(flops['total'])}, {flops['ratio']:.3f} x ideal "
        "(6ND + causal attention)", "part", "forward", "backward", "recompute",
    )  # fmt: skip
    for part in dict.fromkeys(name.split("/")[0] for name in flops["parts"]):
        row = [flops["parts"].get(f"{part}/{which}", 0) for which in ("forward", "backward")]
        row.append(flops["parts"].get(f"{part}/recompute", 0))
        if any(row):
            table.add_row(part, *(number(count) if count else "" for count in row))
    return table


def _collectives(plan: dict[str, Any]) -> Table:
    table = _table(
        "collectives of a device in a step", "kind", "axes", "over", "of", "count", "results",
        "sent", "blocking",
    )  # fmt: skip
    for row in sorted(plan["collectives"], key=lambda r: -r["wire"]):
        part = row["blocking"] / row["wire"] if row["wire"] else 0
        table.add_row(
            row["kind"], " x ".join(row["axes"]), row["network"], str(row["size"]),
            f"{row['count']:,.0f}", size(row["bytes"]), size(row["wire"]), f"{part:.0%}",
        )  # fmt: skip
    return table


def _outer(plan: dict[str, Any]) -> Table:
    outer = plan["outer"] or {"collectives": [], "networks": {}}
    table = _table("", "kind", "axes", "over", "of", "count", "results", "sent", "time")
    for row in sorted(outer["collectives"], key=lambda r: -r["wire"]):
        seconds = row["wire"] / row["bandwidth"] if row["bandwidth"] else 0.0
        table.add_row(
            row["kind"], " x ".join(row["axes"]), row["network"], str(row["size"]),
            f"{row['count']:,.0f}", size(row["bytes"]), size(row["wire"]), duration(seconds),
        )  # fmt: skip
    if plan["outer"]:
        sent = ", ".join(
            f"{size(each['bytes'])} over {name} in {duration(each['seconds'])}"
            for name, each in outer["networks"].items()
        )
        between = outer["every"] * plan["step"]["seconds"]
        what = f"{outer['rule']}, {' and '.join(outer['wire'])}"
        if outer["fragments"] > 1:
            what += f", each time one of {outer['fragments']} fragments"
        table.title = (
            f"a merge of {outer['islands']} islands after {outer['every']} steps ({what}): "
            f"{duration(outer['seconds'])}, {outer['seconds'] / between:.1%} of these; a device "
            f"sends {sent or 'nothing'}"
        )
    return table


def _step(plan: dict[str, Any]) -> Table:
    step = plan["step"]
    mfu = f", MFU {step['mfu']:.1%}" if step["mfu"] else ""
    table = _table(
        f"a step: {duration(step['seconds'])}{mfu}, {step['tokens_per_second']:,.0f} tokens/s, "
        f"{step['tokens_per_second_per_chip']:,.0f} a chip; limited by {step['limit']}",
        "part", "time", "share", "",
    )  # fmt: skip
    table.columns[3].justify = "left"
    for name, seconds in step["parts"].items():
        if seconds:
            share = seconds / step["seconds"]
            table.add_row(name, duration(seconds), f"{share:.1%}", _bar(share))
    table.add_row("device memory", f"{size(plan['hbm_bytes'])} read and written", "", "")
    if plan["host_bytes"]:
        table.add_row("host memory", f"{size(plan['host_bytes'])} moved", "", "")
    return table


def _run(plan: dict[str, Any]) -> Table:
    run = plan["run"]
    table = _table("the whole run", "steps", "tokens", "time", "chip-hours", "cost", "checkpoint")
    table.add_row(
        f"{run['steps']:,}", number(run["tokens"]), duration(run["hours"] * 3600),
        f"{run['chip_hours']:,.1f}", f"{run['cost']:,.0f}" if run["cost"] else "(plan.price)",
        size(run["checkpoint_bytes"]),
    )  # fmt: skip
    return table


def largest(buffers: list[dict[str, Any]]) -> Table:
    """The largest buffers at the peak."""
    table = _table("the largest buffers at the peak", "bytes", "class", "name", "shape", "made at")
    for row in buffers:
        table.add_row(
            size(row["bytes"]), row["kind"], escape(row["name"]), escape(row["shape"]),
            escape(row["source"]),
        )  # fmt: skip
    return table


def show_search(console: Console, search: Search) -> None:
    """Print a search: the best candidates, and the front of time against memory."""
    console.print(
        f"{search.looked:,} of {search.space:,} candidates estimated, "
        f"{sum(c.compiled is not None for c in search.ranked)} compiled"
    )
    best = [c for c in search.ranked if c.compiled or c.failure]
    best += [c for c in distinct(search.ranked) if c not in best]
    show_table(console, candidates("the best, by time of a step", best[:SHOWN]))
    front = [one._replace(compiled=None) for one in pareto(search.ranked)]
    show_table(
        console,
        candidates("time against memory, by traces: none is better in both", front[:SHOWN]),
    )


def candidates(title: str, rows: list[Candidate]) -> Table:
    """A table of candidates."""
    table = _table(
        title, "mesh", "remat", "microbatches", "chunks", "step", "memory", "by", "trace", ""
    )
    for one in rows:
        config, compiled = one.config, one.compiled is not None
        state = one.failure[:60] or ("" if one.fits else "does not fit")
        table.add_row(
            mesh_text(one.sizes, config.mesh.dcn), remat_text(config.remat),
            str(config.batch.microbatches), str(config.loss.chunks), duration(one.seconds),
            size(one.peak), "compiler" if compiled else "trace",
            f"{duration(one.guess.time.seconds)} {size(one.guess.cost.peak)}" * compiled,
            escape(state),
        )  # fmt: skip
    return table
