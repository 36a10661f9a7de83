"""What came of hostile cases, by area: the table that a campaign ends with."""

from tests.faults.harness import OUTCOMES

# The name of what a report carries: (area, outcome, inputs, seconds).
FAULT = "fault"


def table(reports):
    """Lines of Markdown; none where no report is of a hostile case."""
    rows = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == FAULT and report.when == "call":
                area, outcome, inputs, seconds = value
                row = rows.setdefault(area, dict.fromkeys(("tried", "inputs", *OUTCOMES, "seconds"), 0))
                for column, more in (("tried", 1), ("inputs", inputs), (outcome, 1), ("seconds", seconds)):
                    row[column] += more
    if not rows:
        return []
    rows = dict(sorted(rows.items()))
    rows["all"] = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
    lines = [["", *rows["all"]], ["---"] * (1 + len(rows["all"]))]
    lines += [[area, *map(round, row.values())] for area, row in rows.items()]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
