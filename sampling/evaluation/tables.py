"""Scores as Markdown: one table to compare, and below it every input of every number."""

from collections.abc import Mapping, Sequence
from typing import Any

from sampling.evaluation.sizes import describe_sizes

ARROWS = {"lower": "↓", "higher": "↑"}


def render_scores(rows: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any]) -> str:
    """Return the table of checkpoints, then reference, networks, samples and packages."""
    heads = {number["metric"]: ARROWS[number["better"]] for row in rows for number in row["numbers"]}
    lines = [
        "# Scores",
        "",
        table_line(["checkpoint", "images", *(f"{name} {arrow}" for name, arrow in heads.items())]),
    ]
    lines.append(table_line(["---", *("---:" for _ in range(len(heads) + 1))]))
    for row in rows:
        values = {number["metric"]: number["value"] for number in row["numbers"]}
        cells = [_value(values[name]) if name in values else "–" for name in heads]
        lines.append(table_line([row["title"], f"{row['inputs']['num_images']:,}", *cells]))
    lines += ["", *_remarks(rows), "## What each number was taken of and with", ""]
    lines.append(table_line(["checkpoint", "number", "value", "images", "reference", "unusable", "network", "resizer"]))
    lines.append(table_line(["---", "---", "---:", "---:", "---:", "---", "---", "---"]))
    lines += [_number_line(row["title"], number) for row in rows for number in row["numbers"]]
    lines += ["", *_cuts(rows)]
    lines += ["", "## Samples", ""]
    for row in rows:
        lines += [f"**{row['title']}**", "", *(f"- {name}: {value}" for name, value in row["inputs"].items()), ""]
    lines += ["## Reference and packages", "", f"- reference: {_reference(inputs['reference'])}"]
    lines += [f"- {name}: {version}" for name, version in inputs["packages"].items()]
    return "\n".join(lines) + "\n"


def table_line(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _number_line(title: str, number: Mapping[str, Any]) -> str:
    unusable = _unusable(number)
    fingerprint = number["network_fingerprint"].removeprefix("sha256:")[:12]
    reference = f"{number['num_reference']:,}" if number["num_reference"] else "–"
    return table_line(
        [
            title,
            number["metric"],
            _value(number["value"]),
            f"{number['num_images']:,}",
            reference,
            unusable,
            f"{number['network']} ({fingerprint})",
            number["resizer"],
        ]
    )


def _unusable(number: Mapping[str, Any]) -> str:
    """Return the unusable images by reason, those of samples and reference apart."""
    sets = {"samples": number["rejected_samples"], "reference": number["rejected_reference"]}
    parts = [
        f"{name}: {', '.join(f'{reason} {count:,}' for reason, count in reasons.items())}"
        for name, reasons in sets.items()
        if reasons
    ]
    return "; ".join(parts) or "0"


def _cuts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was resized, cropped or cut to get the numbers; a judge says of itself how it looks."""
    lines = {}
    for row in rows:
        for number in (number for number in row["numbers"] if number["network_key"]):
            sets = ["samples"] + (["reference"] if number["num_reference"] else [])
            for name in sets:
                of = row["title"] if name == "samples" else "reference"
                said = f"- evaluation.{number['network_key']}, {of}: {describe_sizes(number['sizes'].get(name))}"
                lines[said] = None
    return ["What was resized or cropped:", "", *lines] if lines else []


def _remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {
        f"{row['title']}, {number['metric']}: {number['remark']}"
        for row in rows
        for number in row["numbers"]
        if number["remark"]
    }
    return [*(f"- {remark}" for remark in sorted(found)), ""] if found else []


def _reference(reference: Mapping[str, Any] | None) -> str:
    if reference is None:
        return "none"
    if "statistics" in reference:
        return f"statistics given in {reference['statistics']}, {reference['fingerprint']}"
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in reference["left_out"].items()) or "none"
    return (
        f"{reference['images']}, {reference['num_images']:,} images (files left out: {left_out}), "
        f"{reference['fingerprint']}"
    )
