"""Writes benchmarks/results/README.md from the results beside it; `--check` fails where the two differ.

    python benchmarks/page.py [--check]

Each results/NAME.json is shown by the script that made it: its `rows` and `COLUMNS`, and what `about` says of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = """# What was measured

Written by `python benchmarks/page.py` from the JSON files in this folder, which have every run; `make lint` fails where
the two differ. How: [benchmarks](../README.md).
"""


def page(results: Path) -> str:
    """The text of the page."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    return "\n".join([HEAD, *(section(result, importlib.import_module(result["benchmark"])) for result in found)])


def section(result: dict[str, Any], script: ModuleType) -> str:
    """One benchmark: question, conditions, table, limits."""
    numbers = [all(number(row[i]) for row in script.rows(result)) for i in range(len(script.COLUMNS))]
    lines = [
        f"## {result['benchmark']}",
        "",
        result["question"],
        "",
        f"`{result['command']}` on {result['date']}: {conditions(result)}.",
        "",
        row(script.COLUMNS),
        "|" + "|".join("--:" if right else "---" for right in numbers) + "|",
        *(row(cells) for cells in script.rows(result)),
        "",
        script.about(result),
        "",
        *limits(result["limits"]),
    ]
    return "\n".join(lines)


def conditions(result: dict[str, Any]) -> str:
    """Machine class and versions in one line."""
    machine, versions = result["machine"], result["versions"]
    told = [
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['features'])})",
        f"{machine['memory_gib']} GiB",
        machine["system"],
        *(f"{name} {version}" for name, version in versions.items()),
    ]
    return "; ".join(told)


def limits(found: list[dict[str, Any]]) -> list[str]:
    """What is promised, and whether it holds."""
    if not found:
        return ["No limit is set.", ""]
    broken = [limit for limit in found if not limit["holds"]]
    doubtful = sum(limit["holds"] and not limit["sure"] for limit in found)
    lines = [f"{len(found) - len(broken)} of {len(found)} limits hold."]
    if doubtful:
        lines[0] += f" Of {doubtful} the interval reaches beyond the limit."
    for limit in broken:
        asked = " and ".join(
            f"{word} {limit[key]:g}"
            for word, key in (("at least", "least"), ("at most", "most"))
            if limit[key] is not None
        )
        lines.append(
            f"Not met: {limit['name']}, {limit['median']:.3f} ({limit['low']:.3f} - {limit['high']:.3f}), {asked}."
        )
    return [*lines, ""]


def row(cells: Any) -> str:
    """A line of a Markdown table."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def number(cell: str) -> bool:
    """Whether a cell belongs to the right."""
    return cell[:1].isdigit()


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the results say")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path, text = options.results / "README.md", page(options.results)
    if not options.check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{path} is not what the results say: python benchmarks/page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
