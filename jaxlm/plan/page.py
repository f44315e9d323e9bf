"""A plan as one HTML page: no network, no library, readable in light and in dark."""

from __future__ import annotations

from html import escape
from typing import Any

from jaxlm.plan.report import head, verdict
from jaxlm.plan.units import duration, number, size

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --bar: #0969da;
  --rest: #eaeef2; --soft: #57606a; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d;
  --bar: #58a6ff; --rest: #21262d; --soft: #8b949e; --bad: #ff7b72 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem }
p { margin: .2rem 0; color: var(--soft) } .bad { color: var(--bad) }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem }
.tile b { display: block; font-size: 1.2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 500 }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem .25rem 0; white-space: nowrap }
td.bar { width: 45%; min-width: 8rem }
td.bar div { height: .75rem; border-radius: .2rem; background: var(--bar) }
td.bar { background: linear-gradient(var(--rest), var(--rest)) center / 100% .75rem no-repeat }
"""


def page(plan: dict[str, Any]) -> str:
    """The page of a plan (plan.to_dict)."""
    title, *details = head(plan)
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in details)]
    body.append(_tiles(plan))
    body += [_memory(plan), _step(plan), _flops(plan), _collectives(plan), _largest(plan)]
    body.append(_lines("Efficiencies", [
        f"{name} {known['value']:.3g}: {known['origin']}"
        for name, known in plan["efficiencies"].items()
    ]))  # fmt: skip
    body.append(_lines("Warnings and notes", [*plan["warnings"], *plan["notes"]]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _tiles(plan: dict[str, Any]) -> str:
    step, run = plan["step"], plan["run"]
    shown = {
        "step": duration(step["seconds"]), "MFU": f"{step['mfu']:.1%}" if step["mfu"] else "",
        "tokens/s": f"{step['tokens_per_second']:,.0f}",
        "tokens/s a chip": f"{step['tokens_per_second_per_chip']:,.0f}",
        "run": duration(run["hours"] * 3600), "tokens": number(run["tokens"]),
        "chip-hours": f"{run['chip_hours']:,.0f}",
        "cost": f"{run['cost']:,.0f}" if run["cost"] else "",
        "checkpoint": size(run["checkpoint_bytes"]),
    }  # fmt: skip
    tiles = (
        f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>'
        for name, value in shown.items() if value
    )  # fmt: skip
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _bars(title: str, note: str, rows: list[tuple[str, str, float]], bad: bool = False) -> str:
    """Rows of (name, value in words, share of the whole)."""
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td>"
        f'<td class="bar"><div style="width:{min(1.0, max(0.0, share)):.2%}"></div></td></tr>'
        for name, value, share in rows
    )
    mark = ' class="bad"' if bad else ""
    return (
        f"<h2>{escape(title)}</h2><p{mark}>{escape(note)}</p>"
        f'<div class="scroll"><table>{cells}</table></div>'
    )


def _memory(plan: dict[str, Any]) -> str:
    memory = plan["memory"]
    whole = memory["limit_bytes"] or memory["peak_bytes"] or 1
    rows = [(name, size(n), n / whole) for name, n in memory["classes"].items() if n]
    return _bars("Memory of a device at its peak", verdict(plan), rows, not memory["fits"])


def _step(plan: dict[str, Any]) -> str:
    step = plan["step"]
    rows = [(n, duration(s), s / step["seconds"]) for n, s in step["parts"].items() if s]
    note = (
        f"{duration(step['seconds'])}, limited by {step['limit']}; device memory "
        f"{size(plan['hbm_bytes'])} read and written, host memory {size(plan['host_bytes'])}"
    )
    return _bars("A step", note, rows)


def _flops(plan: dict[str, Any]) -> str:
    flops = plan["flops"]
    rows = [(n, number(f), f / flops["total"]) for n, f in flops["parts"].items() if f]
    note = f"{number(flops['total'])} a device, {flops['ratio']:.3f} x 6ND + causal attention"
    return _bars("FLOPs", note, rows)


def _collectives(plan: dict[str, Any]) -> str:
    most = max((row["wire"] for row in plan["collectives"]), default=0) or 1
    rows = []
    for row in sorted(plan["collectives"], key=lambda r: -r["wire"]):
        part = row["blocking"] / row["wire"] if row["wire"] else 0
        name = f"{row['kind']} over {' x '.join(row['axes'])} ({row['size']}, {row['network']})"
        value = f"{row['count']:,.0f} x, {size(row['wire'])} sent, {part:.0%} blocking"
        rows.append((name, value, row["wire"] / most))
    return _bars("Collectives", "of a device in a step", rows) if rows else ""


def _largest(plan: dict[str, Any]) -> str:
    if not plan["largest"]:
        return ""
    most = plan["largest"][0]["bytes"] or 1
    rows = [
        (f"{b['name']} {b['shape']}", f"{size(b['bytes'])} {b['kind']} {b['source']}",
         b["bytes"] / most)
        for b in plan["largest"]
    ]  # fmt: skip
    return _bars("The largest buffers at the peak", "by name, and where they are made", rows)


def _lines(title: str, lines: list[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{escape(title)}</h2><ul>{items}</ul>" if lines else ""
