"""Write the log of a greenhouse controller that the scenario long-log-in-short-answer reads.

`python scripts/sensor_log.py` writes efficli/bench/scenarios/sensor-log.txt, the same bytes each time. The log is
made up: two houses, each with a climate node and a pump, one tank, one door; a day of records with what goes wrong.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "efficli" / "bench" / "scenarios" / "sensor-log.txt"
BEGIN = datetime(2026, 3, 14)
MINUTES = 2
RECORDS = 12 * 60 // MINUTES

EVENTS = (
    ("WARN", "pump-{house}", "flow {a:.1f} l/min below the expected 6.0, filter may be clogged"),
    ("ERROR", "pump-{house}", "no flow for 20 s, motor current {b:.2f} A, stopped (fault E17)"),
    ("WARN", "node-{house}", "battery at {d:.2f} V, sending every 10 min instead of every 2"),
    ("WARN", "node-{house}", "soil probe answers out of range (4095), last good value kept"),
    ("ERROR", "node-{house}", "three records lost, radio link rssi {e} dBm"),
    ("INFO", "door", "opened by badge 0{f}"),
    ("INFO", "door", "closed after {g} s"),
    ("WARN", "tank", "level {h:.0f} %, refill not before 18:00"),
    ("INFO", "vent-{house}", "opened to {h:.0f} %, air warmer than the 26.0 C limit"),
    ("WARN", "vent-{house}", "position sensor disagrees by {i} %, moved again"),
    ("INFO", "controller", "clock set by {j:+d} ms from the time server"),
)


def climate(draw: random.Random, house: str, at: datetime) -> str:
    """One record of the climate node of a house; what it measures follows the sun."""
    sun = max(0.0, math.sin((at.hour + at.minute / 60 - 6) / 12 * math.pi))
    air = 15.5 + 13 * sun + 2 * draw.random() + (house == "B")
    humidity = 88 - 30 * sun + 4 * draw.random()
    co2 = 930 - 480 * sun + 40 * draw.random()
    soil = 31 + 6 * draw.random()
    volts = 3.42 + 0.45 * sun + 0.2 * draw.random()
    return (
        f"INFO  node-{house} air={air:.1f}C hum={humidity:.0f}% co2={co2:.0f}ppm soil={soil:.1f}% "
        f"light={sun * 52000 * (0.8 + 0.2 * draw.random()):.0f}lx bat={volts:.2f}V"
    )


def watering(draw: random.Random, house: str) -> str:
    """One run of a pump."""
    seconds = 30 + int(90 * draw.random())
    return (
        f"INFO  pump-{house} ran {seconds} s, {seconds / 60 * (5.6 + 0.8 * draw.random()):.1f} l, valve {house}2 shut"
    )


def event(draw: random.Random) -> str:
    """Something that a gardener might have to look into, or not."""
    level, source, text = EVENTS[int(len(EVENTS) * draw.random())]
    house = "AB"[int(2 * draw.random())]
    values = {
        "a": 2 + 3 * draw.random(), "b": 1.8 + draw.random(), "d": 3.3 + 0.25 * draw.random(),
        "e": -112 + int(15 * draw.random()), "f": 417 + int(9 * draw.random()), "g": 12 + int(400 * draw.random()),
        "h": 5 + 30 * draw.random(), "i": 3 + int(12 * draw.random()), "j": -40 + int(80 * draw.random()),
    }  # fmt: skip
    return f"{level:<5} {source.format(house=house)} {text.format(house=house, **values)}"


def lines() -> Iterator[str]:
    """Twelve hours from midnight, oldest first."""
    draw = random.Random(20260314)  # random() alone: its numbers are the same in every version of Python
    cleared: dict[int, str] = {}
    for record in range(RECORDS):
        at = BEGIN + timedelta(minutes=MINUTES * record)
        found = [climate(draw, house, at) for house in "AB"]
        if draw.random() < 0.12:
            found.append(watering(draw, "AB"[int(2 * draw.random())]))
        if record in cleared:
            found.append(f"INFO  {cleared[record]} fault E17 cleared by restart, flow {5.5 + draw.random():.1f} l/min")
        if draw.random() < 0.3:
            found.append(event(draw))
            if "E17" in found[-1]:
                cleared[record + 2 + int(5 * draw.random())] = found[-1].split()[1]
        for text in found:
            at += timedelta(seconds=1 + int(20 * draw.random()))
            yield f"{at:%Y-%m-%d %H:%M:%S} {text}"


if __name__ == "__main__":
    OUT.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
