"""Claims about cost: Figure 2 and Table 2 with a row of our own, and the paper's figures reckoned again."""

from collections.abc import Mapping

from toyworld.paper.claims import Finding, Table, Words
from toyworld.paper.estimates import Verdict
from toyworld.paper.published import (
    A100_DAYS,
    A100_PER_V100,
    DOLLARS,
    FIRST_A100_DAYS,
    FIRST_DOLLARS,
    IMAGES_MILLIONS,
    RAPHAEL_A100_DAYS,
    RAPHAEL_DOLLARS,
    SD15_A100_DAYS,
    SD15_DOLLARS,
    SD15_IMAGES_MILLIONS,
    TABLE_2,
    TABLE_4_V100_DAYS,
    V100_DAYS,
)
from toyworld.paper.readings import DISTANCE, PaperRuns, Trained, read_distance


def cost_arithmetic(runs: PaperRuns, words: Words) -> Finding:
    """Figure 2 and Tables 2 and 4: the paper's figures of cost follow from each other."""
    saved = SD15_DOLLARS - DOLLARS
    checks = (  # what, as printed, as reckoned
        ("V100 days of Table 4, summed", f"{V100_DAYS:,}", f"{sum(TABLE_4_V100_DAYS.values()):,}"),
        ("A100 days, at 2.2 V100 days each", f"{A100_DAYS}", f"{V100_DAYS / A100_PER_V100:.0f}"),
        ("part of SDv1.5's time", "12%", f"{A100_DAYS / SD15_A100_DAYS:.0%}"),
        ("the same, first version", "10.8%", f"{FIRST_A100_DAYS / SD15_A100_DAYS:.1%}"),
        ("part of RAPHAEL's time", "1%", f"{A100_DAYS / RAPHAEL_A100_DAYS:.0%}"),
        ("part of SDv1.5's images", "1.25%", f"{IMAGES_MILLIONS / SD15_IMAGES_MILLIONS:.2%}"),
        ("part of RAPHAEL's dollars", "0.91%", f"{DOLLARS / RAPHAEL_DOLLARS:.2%}"),
        ("saved against SDv1.5, nearly", "$300,000", f"${saved:,}"),
    )
    # A part may be cut, not rounded: 0.922% is printed as 0.91%, of figures before they were rounded themselves.
    wrong = [name for name, printed, reckoned in checks[:-1] if abs(_number(printed) / _number(reckoned) - 1) > 0.02]
    hours = {"printed": DOLLARS / A100_DAYS / 24, "first version": FIRST_DOLLARS / FIRST_A100_DAYS / 24}
    told = ", ".join(f"${value:.2f} ({name})" for name, value in hours.items())
    why = "all agree at their digits or to 2%" if not wrong else f"these do not: {', '.join(wrong)}"
    return Finding(
        verdict=Verdict(not wrong, why),
        measured=f"An A100 hour is then {told}.",
        ours=Table(title="Reckoned again", columns=("", "printed", "reckoned"), rows=checks),
        figures={"dollars_per_a100_hour": round(hours["printed"], 3)},
    )


def _number(text: str) -> float:
    return float(text.replace(",", "").rstrip("%"))


def cost(runs: PaperRuns, words: Words) -> Finding:
    """Table 2 and Figure 2 with our own row; a toy cannot show what a real model costs."""
    trained = runs.trained("main")
    rows = [(name, size, images, f"{fid:g}", f"{days:,} A100") for name, size, images, fid, days in TABLE_2]
    verdict = Verdict(
        None,
        "what a model of photographs costs cannot be seen on a toy, and no SDv1.5 draws this world for ten times more",
    )
    if not trained:
        return Finding(verdict=verdict, ours=_cost_table(rows))
    means = _means(trained)
    distances = runs.by_seed(lambda run: read_distance(run, "main")).values()
    distance = f"{DISTANCE} {sum(distances) / len(distances):.1f}" if distances else "–"
    core_hours = 24 * means["device_days"]
    row = ("main, toy world", "1.5M", "5,000", distance, f"{core_hours:.2f} core hours")
    return Finding(
        verdict=verdict,
        measured=f"These make {means['dollars']:.4f} USD and {1000 * means['co2_kilograms']:.2f} g of CO₂.",
        ours=_cost_table([*rows, row]),
        figures={
            "core_hours": round(core_hours, 3),
            **{name: round(means[name], 6) for name in ("dollars", "co2_kilograms")},
        },
        seeds=sorted(trained),
    )


def _cost_table(rows: list[tuple[str, ...]]) -> Table:
    return Table(
        title="Table 2, and this world", columns=("", "parameters", "images", "FID-30K", "device days"), rows=rows
    )


def _means(trained: Mapping[int, Trained]) -> dict[str, float]:
    names = ("device_days", "dollars", "co2_kilograms")
    return {name: sum(getattr(one, name) for one in trained.values()) / len(trained) for name in names}
