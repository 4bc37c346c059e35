"""The report's charts as Plotly figures in plain data, so that no plotting code runs here."""

from __future__ import annotations

from typing import Any

import bevel.reporting.sections as sections
from bevel.core.records import RunRecord
from bevel.reporting.summary import ordered

Figure = dict[str, Any]

BEFORE, AFTER = "#9aa5b1", "#0b7285"
"""Colours of the original and of the compressed network."""


def charts(record: RunRecord) -> dict[str, Figure]:
    """All charts that the record has numbers for, by a name that is unique on the page."""
    found: dict[str, Figure] = {}
    if any(measurement.latency for measurement in record.measurements):
        found["latency"] = latency(record)
    for position, (title, history) in enumerate(sections.histories(record)):
        found[f"training-{position}"] = training(title, history)
    for position, (title, rounds) in enumerate(sections.rounds(record)):
        found[f"rounds-{position}"] = frontier(title, rounds)
    for position, (title, groups) in enumerate(sections.groups(record)):
        if groups:
            found[f"widths-{position}"] = widths(title, groups)
    for position, (title, points) in enumerate(sections.sensitivities(record)):
        found[f"sensitivity-{position}"] = sensitivity(title, points)
    return found


def latency(record: RunRecord) -> Figure:
    """Box plots of the raw samples of every measured file."""
    data = [
        {
            "type": "box",
            "name": sections.name(measurement),
            "x": measurement.latency.samples_ms,
            "boxpoints": "outliers",
            "marker": {"color": BEFORE if measurement.label == "original" else AFTER},
            "showlegend": False,
        }
        for measurement in reversed(ordered(record.measurements))
        if measurement.latency
    ]
    return figure(data, "Latency of one image", x="ms", y="", height=140 + 60 * len(data))


def training(title: str, history: list[dict[str, Any]]) -> Figure:
    """Loss (left axis) and validation accuracy (right axis) over the epochs."""
    epochs = [epoch.get("epoch", position) for position, epoch in enumerate(history, start=1)]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "training loss",
            "x": epochs,
            "y": [epoch.get("loss") for epoch in history],
            "line": {"color": BEFORE},
        },
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "validation accuracy",
            "x": epochs,
            "y": [epoch.get("validation_top1") for epoch in history],
            "yaxis": "y2",
            "line": {"color": AFTER},
        },
    ]
    chart = figure(data, f"Training, {title}", x="epoch", y="loss", height=340)
    chart["layout"]["yaxis2"] = {
        "title": {"text": "accuracy"},
        "overlaying": "y",
        "side": "right",
        "tickformat": ".1%",
        "showgrid": False,
    }
    return chart


def frontier(title: str, rounds: list[dict[str, Any]]) -> Figure:
    """Accuracy of every round over its MACs; those that were taken back in another colour."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if accepted else "markers",
            "name": name,
            "x": [each["macs"] for each in rounds if each["accepted"] == accepted],
            "y": [each["accuracy"] for each in rounds if each["accepted"] == accepted],
            "text": [f"round {each['number']}" for each in rounds if each["accepted"] == accepted],
            "marker": {"color": colour, "size": 9},
        }
        for name, accepted, colour in (("kept", True, AFTER), ("taken back", False, BEFORE))
    ]
    chart = figure(data, f"Rounds, {title}", x="MACs", y="validation accuracy", height=340)
    chart["layout"]["yaxis"]["tickformat"] = ".1%"
    return chart


def widths(title: str, groups: list[dict[str, Any]]) -> Figure:
    """Channels of every group before and after."""
    names = [str(group["name"]) for group in groups]
    data = [
        {
            "type": "bar",
            "name": when,
            "x": names,
            "y": [group[when] for group in groups],
            "marker": {"color": colour},
        }
        for when, colour in (("before", BEFORE), ("after", AFTER))
    ]
    return figure(data, f"Channels per group, {title}", x="", y="channels", height=420)


def sensitivity(title: str, points: list[dict[str, Any]]) -> Figure:
    """Rise of the loss of every group over the share of it that is kept."""
    data = []
    for group in dict.fromkeys(str(point["group"]) for point in points):
        own = [point for point in points if point["group"] == group]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": group,
                "x": [point["kept"] / point["rows"] for point in own],
                "y": [point["loss"] for point in own],
                "text": [f"accuracy lost: {point['accuracy']:.2%}" for point in own],
            }
        )
    return figure(data, f"Sensitivity, {title}", x="kept", y="rise of the loss", height=420)


def figure(data: list[dict[str, Any]], title: str, *, x: str, y: str, height: int) -> Figure:
    """A figure in the report's style."""
    layout = {
        "title": {"text": title, "font": {"size": 16}},
        "height": height,
        "margin": {"l": 60, "r": 60, "t": 50, "b": 50},
        "xaxis": {"title": {"text": x}, "automargin": True, "gridcolor": "#e4e7eb"},
        "yaxis": {"title": {"text": y}, "automargin": True, "gridcolor": "#e4e7eb"},
        "legend": {"orientation": "h", "y": 1.1, "x": 1, "xanchor": "right"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
    }
    return {"data": data, "layout": layout}
