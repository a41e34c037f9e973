"""How often to save, and what failures cost, at many GPUs: formulas alone, so that everything here is *modelled*.

python -m benchmarks.cpu.failures              # the table of docs/scaling.md
"""

from __future__ import annotations

import math

GPU_HOURS = 419 / (54 * 24 * 16384)  # failures a GPU-hour of Llama 3's training (arXiv:2407.21783, section 3.3.4)
SAVE, RECOVERY = 0.15, 60.0  # seconds: what a save blocks (measured: ResNet-50 with AdamW on a CPU); assumed
DEVICES = (64, 1024, 16384)


def best_interval(save: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least: sqrt(2 save MTBF) (Young 1974)."""
    return math.sqrt(2 * save * between_failures)


def goodput(interval: float, save: float, recovery: float, between_failures: float) -> float:
    """Share of the time that trains: without saves (`save`: what one blocks), lost steps, and recoveries."""
    lost = save / interval + (interval / 2 + recovery) / between_failures
    return max(0.0, 1 - lost)


def table() -> str:
    """Markdown."""
    lines = [
        "| GPUs | MTBF | best interval | time that trains | with a save an hour |",
        "|--|--|--|--|--|",
    ]
    for devices in DEVICES:
        between = 3600 / (GPU_HOURS * devices)
        interval = best_interval(SAVE, between)
        shares = " | ".join(f"{100 * goodput(each, SAVE, RECOVERY, between):.2f} %" for each in (interval, 3600.0))
        lines.append(f"| {devices:,} | {between / 3600:.1f} h | {interval / 60:.1f} min | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
