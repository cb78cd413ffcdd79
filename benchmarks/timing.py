"""Ratios that hold on a noisy machine: variants take turns, each compared with the first of its round."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a variant's time over the baseline's, and both medians in microseconds."""

    median: float
    low: float
    high: float
    baseline_us: float
    variant_us: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratios(variants: Sequence[Callable[[], None]], seconds: float, warm_up: int = 5) -> list[Ratio]:
    """Time of each variant over the first's, interleaved for about ``seconds``.

    Args:
        variants: Functions without arguments; the first is the baseline.
        seconds: How long to measure; at least eleven rounds are run.
        warm_up: Rounds that are not counted.
    """
    for _ in range(warm_up):
        for variant in variants:
            variant()
    times: list[list[float]] = [[] for _ in variants]
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < 11:
            for variant, series in zip(variants, times, strict=True):
                start = time.perf_counter()
                variant()
                series.append(time.perf_counter() - start)
            if len(times[0]) % 100 == 0:
                gc.collect(0)
    finally:
        gc.enable()
    results = []
    for series in times:
        rounds = sorted(t / base for t, base in zip(series, times[0], strict=True))
        count = len(rounds)
        results.append(
            Ratio(
                statistics.median(rounds),
                rounds[count // 4],
                rounds[(3 * count) // 4],
                statistics.median(times[0]) * 1e6,
                statistics.median(series) * 1e6,
            )
        )
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler writes to the process's standard error, past Python's."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def with_progress(items: Iterable[Item]) -> Iterable[Item]:
    """The items, with a bar on standard error that counts them; on terminals only."""
    shown: Iterable[Item] = tqdm(list(items), unit="network", disable=None)
    return shown


def write_table(page: Path, name: str, table: str) -> None:
    """Replaces the table between ``<!-- benchmark: name -->`` and ``<!-- end -->`` in a page."""
    start, end = f"<!-- benchmark: {name} -->\n", "<!-- end -->"
    before, rest = page.read_text().split(start)
    page.write_text(before + start + table + "\n" + end + rest.split(end, 1)[1])


def peak_bytes(function: Callable[[], None]) -> int:
    """Most memory that torch's CPU allocator held at once while ``function`` ran, of what it allocated."""
    function()
    with (
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held = max(0, held + event.nbytes())  # a step begins by freeing what the last one kept
        peak = max(peak, held)
    return peak
