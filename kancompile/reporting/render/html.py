"""Write a report as one HTML page that needs nothing else: no script, no network, no font."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from kancompile.reporting.render.drawings import bits_text
from kancompile.reporting.render.html_allocation import allocation_section
from kancompile.reporting.render.html_diagnosis import diagnosis_section
from kancompile.reporting.render.html_layers import layer_tables, weight_maps
from kancompile.reporting.render.html_parts import MISSING, data_size, decibels, number, table
from kancompile.reporting.render.plots import edge_plot, front_plot
from kancompile.validation import number_of, title

_SECTIONS = (
    ("findings", "What to know first"),
    ("diagnosis", "Why it is not better"),
    ("layers", "Layers and branches"),
    ("functions", "Edge functions"),
    ("weights", "Rounding error of the weights"),
    ("bits", "Bits against accuracy"),
    ("allocation", "Bytes, time and error of the allocation"),
    ("pipeline", "What each pass changed"),
    ("facts", "How it was made"),
)


_ORIGINS = {
    "bit allocation": "Entries of the bit allocation's Pareto front",
    "one width for all layers": "The same width for all integer layers",
}


def render(report: Mapping[str, Any]) -> str:
    """Render report data as a page; equal data give equal bytes."""
    css = resources.files("kancompile.reporting").joinpath("report.css").read_text(encoding="utf-8")
    name = escape(str(report["model"]["name"]))
    sections = {
        "findings": _findings(report),
        "layers": layer_tables(report),
        "functions": _functions(report),
        "weights": weight_maps(report),
        "bits": _front(report),
        "pipeline": _pipeline(report),
        "facts": _facts(report),
    }
    if report["diagnosis"] is not None:
        sections["diagnosis"] = diagnosis_section(report["diagnosis"], report["layers"])
    if report["allocation"] is not None:
        sections["allocation"] = allocation_section(report["allocation"])
    shown = [(key, title) for key, title in _SECTIONS if key in sections]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title in shown)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{sections[key]}</section>' for key, title in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # an empty icon: browsers would ask a server for one
        '<link rel="icon" href="data:,">'
        f"<title>{name}: kancompile report</title><style>{css}</style></head><body><main>"
        f'<h1>{name}</h1><p class="lead">Compiled by kancompile {escape(report["model"]["versions"]["kancompile"])} for '
        f"{escape(report['model']['target'])}, {escape(report['counted'])}, measured on {escape(report['measured_on'])}.</p>"
        f"{_cards(report)}<nav>{links}</nav>{body}</main></body></html>\n"
    )


def _cards(report: Mapping[str, Any]) -> str:
    summary, size = report["summary"], report["summary"]["size"]
    cards = []
    task = summary["task"]
    if task is not None:
        interval = "" if task["paired"] is None else f"95 % interval {_interval(task['paired']['accuracy_interval'])}; "
        small = f"{interval}before {number_of(task['name'], task['float'])}"
        small += f"; {task['text']}" if task["text"] else f", {-task['drop'] / 100:+.4f}" if task["drop"] else ""
        cards.append((title(task["name"]), number_of(task["name"], task["compiled"]), small))
    agreement = summary["top1_agreement"]
    equal = "" if agreement is None else f"top-1 agreement {agreement:.2f} %"
    worst = summary["worst"]
    parts = [summary["worst_text"] or f"largest error {number(summary['max_abs'])}", equal]
    ratio = summary["sqnr_db"] if worst is None else worst["sqnr_db"]
    cards.append(("signal to error (SQNR), worst output", decibels(ratio), "; ".join(filter(None, parts))))
    before = size["float_export_bytes"] or size["parameter_bytes"]
    what = "float ONNX file" if size["float_export_bytes"] else "parameters"
    text = (
        ""
        if before is None
        else f"before {data_size(before)} ({what}), {before / size['compiled_bytes']:.1f} times the size of this file"
    )
    cards.append(("size of the file", data_size(size["compiled_bytes"]), text))
    if summary["latency"]:
        times = summary["latency"]
        ratios = ", ".join(f"{row['ratio']:.2g} times as fast at batch {row['batch_size']}" for row in times[1:])
        first = times[0]
        before_us, after_us = first["float_seconds"] * 1e6, first["compiled_seconds"] * 1e6
        micro = f"{after_us:.0f} \N{MICRO SIGN}s, before {before_us:.0f} \N{MICRO SIGN}s"
        text = f"batch {first['batch_size']}: {micro}, one thread, this machine" + (f"; {ratios}" if ratios else "")
        faster = first["ratio"] >= 1
        factor = first["ratio"] if faster else 1 / first["ratio"]
        cards.append((f"{'faster' if faster else 'slower'} than {summary['latency_of']}", f"{factor:.1f} times", text))
    else:
        cards.append(("latency", "\N{EN DASH}", summary["latency_note"]))
    inner = "".join(
        f'<div class="card"><h3>{escape(head)}</h3><div class="big">{escape(big)}</div><small>{escape(small)}</small></div>'
        for head, big, small in cards
    )
    return f'<div class="cards">{inner}</div>'


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.2f} \N{HORIZONTAL ELLIPSIS} {ends[1]:.2f}"


def _findings(report: Mapping[str, Any]) -> str:
    if not report["findings"]:
        return "<p>Nothing stands out.</p>"
    items = "".join(
        f'<li class="{escape(f["severity"])}"><b>{escape(f["severity"])}</b> '
        f"<code>{escape(f['where'])}</code> {escape(f['text'])}</li>"
        for f in report["findings"]
    )
    return f'<ul class="findings">{items}</ul>'


def _functions(report: Mapping[str, Any]) -> str:
    if not report["edges"]:
        return "<p>No layer has curved functions whose inputs were seen.</p>"
    legend = (
        '<div class="legend"><span><i style="background:var(--float)"></i>float</span>'
        '<span><i style="background:var(--table)"></i>lookup table, float weights</span>'
        '<span><i style="background:var(--compiled)"></i>compiled (dashed)</span>'
        '<span><i class="block" style="background:var(--bars)"></i>calibration inputs</span></div>'
    )
    figures = []
    for edge in report["edges"]:
        tap = f", tap {edge['tap']}" if edge["tap"] or _is_convolution(report, edge["layer"]) else ""
        rows = "" if edge["rows_within_inputs"] is None else f", {edge['rows_within_inputs']:,} rows"
        caption = (
            f"<b>{escape(edge['layer'])}</b> input {edge['input']} \N{RIGHTWARDS ARROW} output {edge['output']}{tap}"
            f'<br><span class="soft">{decibels(edge["sqnr_db"])}{rows}</span>'
        )
        figures.append(f"<figure><figcaption>{caption}</figcaption>{edge_plot(edge)}</figure>")
    return (
        "<p>What single inputs contribute to single outputs: the edges whose values vary most over the calibration inputs, "
        "and those that were asked for. A constant of an edge belongs to the layer's bias, so curves are aligned to their mean "
        f'over the calibration inputs.</p>{legend}<div class="plots">{"".join(figures)}</div>'
    )


def _is_convolution(report: Mapping[str, Any], name: str) -> bool:
    return any(layer["name"] == name and layer["kind"] == "convolution" for layer in report["layers"])


def _front(report: Mapping[str, Any]) -> str:
    front = report["bit_front"]
    if not front["points"]:
        return (
            f"<p>{'Other widths were not tried.' if front['origin'] == 'off' else 'No layer has integer weights.'}</p>"
        )
    task = report["summary"]["task"]
    name = "accuracy" if task is None else title(task["name"])
    percent_sign = "" if name == "R2" else " %"
    baseline = front["float_metric"] if isinstance(front["float_metric"], int | float) else None
    head = ["bits", "weights", "SQNR", *([f"{name}{percent_sign}"] if task is not None else []), "predicted loss"]
    if all(point["sensitivity"] is None for point in front["points"]):
        head.pop()
    rows = []
    for point in front["points"]:
        label = escape(bits_text(point["bits"])) + (" <b>(this file)</b>" if point["shipped"] else "")
        row = [label, data_size(point["weight_bytes"]), decibels(point["sqnr_db"])]
        interval = "" if point["interval"] is None else f' <span class="soft">[{_interval(point["interval"])}]</span>'
        row += [number(point["metric"]) + interval] if task is not None else []
        row += (
            ["" if point["sensitivity"] is None else f"{point['sensitivity']:.3g}"]
            if head[-1] == "predicted loss"
            else []
        )
        rows.append(row)
    if baseline is not None:
        rows.append(["float", MISSING, MISSING, number(baseline), *[""] * (len(head) - 4)])
    return (
        f"<p>{_ORIGINS.get(front['origin'], '')}, measured on {front['samples']} samples. All but this file "
        "have nearest rounding and a part of the calibration data: with few bits, methods that compensate their errors do "
        "better.</p>"
        f'<div class="plots"><figure>{front_plot(front["points"], name, baseline)}</figure></div>{table(head, rows)}'
    )


def _pipeline(report: Mapping[str, Any]) -> str:
    items = []
    for step in report["pipeline"]:
        lines = [_change(change) for change in step["changes"]]
        lines += [f'<li class="soft">{escape(note)}</li>' for note in step["notes"]]
        inner = f"<ul>{''.join(lines)}</ul>" if lines else ' <span class="soft">nothing to do</span>'
        items.append(f"<li><b>{escape(step['name'])}</b>{inner}</li>")
    return (
        "<p>Layers have the names of the model's own modules; functions are evaluated in float until they are tabulated.</p>"
        f'<ol class="passes">{"".join(items)}</ol>'
    )


def _change(change: Mapping[str, Any]) -> str:
    before, after = change["before"], change["after"]
    arrow = " \N{RIGHTWARDS ARROW} " if before is not None and after is not None else " "
    old = "" if before is None else f"<del>{escape(before)}</del>"
    new = "" if after is None else escape(after)
    return f"<li><code>{escape(change['node'])}</code> {old}{arrow}{new}{' taken out' if after is None else ''}</li>"


def _facts(report: Mapping[str, Any]) -> str:
    model = report["model"]
    recipe = {key: value for key, value in model["recipe"].items() if key != "layers" and value is not None}
    rows: list[tuple[str, Any]] = [
        ("SHA-256 of the file", model["sha256"] or "not known"),
        ("seed", model["seed"]),
        *((_named("input", entry["name"]), _input_text(entry)) for entry in model["inputs"]),
        *((_named("output", t["name"]), _output_text(t)) for t in report["summary"]["tensors"]),
        ("calibration", f"{model['calibration']['samples']} samples, SHA-256 {model['calibration']['sha256']}"),
        ("recipe", ", ".join(f"{key} = {value}" for key, value in recipe.items())),
    ]
    for pattern, overrides in model["recipe"].get("layers", {}).items():
        rows.append((f"recipe of {pattern}", ", ".join(f"{key} = {value}" for key, value in overrides.items())))
    rows += [("kernels", f"{report['kernels']['runtime']}: {_counted(report['kernels']['operators'])}")]
    rows += [("versions", ", ".join(f"{key} {value}" for key, value in model["versions"].items()))]
    if report["summary"]["machine"]:
        rows.append(("times measured on", ", ".join(f"{k} {v}" for k, v in report["summary"]["machine"].items())))
    body = [[escape(str(key)), _wrapped(value)] for key, value in rows]
    return table(["", ""], body, wrap={1})


def _named(kind: str, name: str) -> str:
    return kind if name == kind else f"{kind} {name}"


def _input_text(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']}, {' x '.join(map(str, ['batch', *entry['shape']]))}"


def _output_text(tensor: Mapping[str, Any]) -> str:
    return f"SQNR {decibels(tensor['sqnr_db'])}, worst output {decibels(tensor['worst_db'])}"


def _wrapped(value: Any) -> str:
    return f"<code>{escape(str(value))}</code>"


def _counted(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in operators.items())
