"""Ratios of what the emulator has counted, 1 at best, and their table."""

from __future__ import annotations

from collections import Counter

Counters = Counter[str]


def ratio(cost: int, fewest: int) -> float:
    return cost / fewest if fewest else 1.0


def read_sectors(c: Counters) -> float:
    """Sectors of 32 bytes that reads of global memory fetch, over the fewest that suffice."""
    return ratio(c["global_read_sectors"], c["global_read_fewest"])


def write_sectors(c: Counters) -> float:
    return ratio(c["global_write_sectors"], c["global_write_fewest"])


def sectors(c: Counters) -> float:
    """Reads and writes together."""
    return ratio(
        c["global_read_sectors"] + c["global_write_sectors"],
        c["global_read_fewest"] + c["global_write_fewest"],
    )


def bank_conflicts(c: Counters) -> float:
    """Wavefronts of shared memory over those without conflicts."""
    return ratio(c["shared_wavefronts"], c["shared_fewest"])


def mma(c: Counters) -> int:
    """Tensor core instructions, of a warp each."""
    return c["mma_fp16"] + c["mma_bf16"] + c["mma_tf32"]


def barriers(c: Counters, mma_of_step: int) -> float:
    """Barriers that a warp waits at, for each k-step of so many tensor core instructions."""
    return ratio(c["barriers"] * mma_of_step, mma(c))


def total(counters: dict[str, Counters]) -> Counters:
    """The sum over all kernels."""
    joint: Counters = Counter()
    for c in counters.values():
        joint.update(c)
    return joint


def table(counters: dict[str, Counters]) -> str:
    """One line a kernel."""
    head = (
        f"{'kernel':<28}{'launches':>9}{'blocks':>8}{'KiB read':>10}{'KiB written':>12}"
        f"{'L2 KiB':>9}{'sectors':>9}{'banks':>7}{'mma':>9}{'per barrier':>12}"
    )
    lines = [head, "-" * len(head)]
    for name, c in counters.items():
        fetched = (c["global_read_sectors"] + c["global_write_sectors"]) * 32
        lines.append(
            f"{name:<28}{c['launches']:>9}{c['blocks']:>8}{c['bytes_read'] / 1024:>10.1f}"
            f"{c['bytes_written'] / 1024:>12.1f}{fetched / 1024:>9.1f}{sectors(c):>9.2f}"
            f"{bank_conflicts(c):>7.2f}{mma(c):>9}{ratio(mma(c), c['barriers']):>12.1f}"
        )
    return "\n".join(lines)
