"""Times each case in each mode with all providers, and measures their memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import agreement, machine, memory
from benchmarks.cases import LONG_CASE, LONG_STEPS, Case
from benchmarks.kernel_times import KernelTime, kernel_times
from benchmarks.providers import BASELINE, Provider, Setting, Unavailable
from benchmarks.providers.base import Runner
from benchmarks.report import case_block
from benchmarks.rows import Row
from benchmarks.timing import Budget, Quantiles, time_interleaved, warm_up

PROFILED = (BASELINE, "snnlstm")
WEIGHED_LONG = (BASELINE, "hoisted", "snnlstm", "snnlstm-checkpoint")


@dataclass(frozen=True)
class Plan:
    """A plan says what the suite measures.

    memory: "all" (each case, and memory against T), "long" (memory against T alone) or "off".
    deadline: no case is begun after this time (of time.monotonic()).
    kernels: whether our kernels and the baseline's are timed one by one, too.
    """

    cases: list[Any]
    providers: list[type[Provider]]
    modes: list[str]
    setting: Setting
    threads: int
    budget: Budget
    memory: str = "all"
    long_steps: tuple[int, ...] = LONG_STEPS
    deadline: float = math.inf
    kernels: bool = False


class Suite:
    """Runs a plan, prints tables as they come, and shows the progress in a bar.

    `rows`, `kernels` and `peaks` hold the measurements so far. `disagreements` names the providers
    that compute something else than the baseline.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.origin = machine.describe(plan.setting)
        self.rows: list[Row] = []
        self.kernels: list[KernelTime] = []
        self.peaks: list[machine.Peak] = []
        self.disagreements: list[str] = []
        self.skipped: set[tuple[str, str]] = set()
        self.bar = tqdm(disable=True)

    def run(self) -> None:
        """Measures everything, in the order of the plan."""
        plan = self.plan
        torch.set_num_threads(plan.threads)
        parts = len(plan.cases) * (len(plan.modes) + (plan.memory == "all"))
        form = "{desc} |{bar}| {percentage:3.0f} %  {elapsed}, {remaining} left"
        # With disable=None there is no bar without a terminal.
        with tqdm(
            total=parts + (plan.memory != "off"),
            disable=None,
            leave=False,
            dynamic_ncols=True,
            bar_format=form,
        ) as self.bar:
            self.tell("measuring the machine's peak")
            self.peaks.append(machine.measure_peak(plan.setting))
            for index, case in enumerate(plan.cases):
                if time.monotonic() > plan.deadline:
                    left = ", ".join(case.name for case in plan.cases[index:])
                    tqdm.write(f"No time left for {left} ({plan.setting.dtype}).\n")
                    break
                self.run_case(case)
            if plan.memory != "off" and time.monotonic() <= plan.deadline:
                self.run_long()
            self.tell("measuring the machine's peak again")
            self.peaks.append(machine.measure_peak(plan.setting))

    def tell(self, what: str) -> None:
        """Shows a text beside the bar."""
        self.bar.set_description_str(f"{what:<28.28}")

    def part(self, what: str) -> Callable[[float], None]:
        """Begins a part of the bar; returns a function that moves the bar to a share of it."""
        self.tell(what)
        bar, begin = self.bar, self.bar.n

        def tick(share: float) -> None:
            bar.n = max(bar.n, begin + share)
            bar.refresh()

        return tick

    def run_case(self, case: Any) -> None:
        """Checks, weighs and times one case, and prints its tables."""
        plan, device = self.plan, self.plan.setting.device
        self.tell(f"{case.name}: checking")
        providers = self.checked(case)
        weighed: dict[memory.Job, memory.Found] = {}
        if plan.memory == "all" and isinstance(case, Case):
            modes = [mode for mode in plan.modes if mode != "backward"]
            jobs = [memory.Job(case, mode, name) for mode in modes for name in providers]
            weighed = self.weigh(f"{case.name}: memory", jobs)
        for mode in plan.modes:
            runners = self.runners(case, mode, providers)
            tick = self.part(f"{case.name} {mode}: timing")
            times = time_interleaved(runners, device, plan.budget, tick, plan.setting.seed)
            rows = []
            for name, found in times.items():
                job = memory.Job(case, mode, name)
                path, baseline = providers[name].path, times.get(BASELINE)
                rows.append(self.row(job, weighed.get(job), path, found, baseline))
                if not isinstance(case, Case) and name != BASELINE:
                    share = providers[name].not_cell(runners[name])
                    rows[-1] = dataclasses.replace(rows[-1], not_cell=share)
            self.rows += rows
            if rows:
                tqdm.write(case_block(case, mode, rows))
            for row in rows if plan.kernels else ():
                if row.provider in PROFILED:
                    self.kernels += kernel_times(row, runners[row.provider], device)

    def checked(self, case: Any) -> dict[str, Any]:
        """Returns the providers that can run the case and compute what the baseline computes."""
        plan, setting = self.plan, self.plan.setting
        if not isinstance(case, Case):
            return self.checked_network(case)
        built: dict[str, Provider] = {}
        expected = potential = None
        mode = "both" if set(plan.modes) - {"forward"} else "forward"
        for kind in plan.providers:
            reason = kind.why_not(case, setting) or memory.shortage(kind, case, setting, mode)
            if reason:
                self.skip(kind.name, case, reason)
                continue
            try:
                provider = kind(case, setting)
                got = agreement.compute(provider)
                if kind.name == BASELINE:
                    expected, potential = got, agreement.potentials(provider)
                elif expected is not None and potential is not None:
                    agreement.compare(case, setting.dtype, expected, got, potential)
            except agreement.Disagreement as error:
                self.disagreements.append(f"{case.name}: {kind.name}: {error}")
                tqdm.write(f"NOT TIMED: {self.disagreements[-1]}\n")
            except Exception as error:  # a provider that fails must not end the run
                self.skip(kind.name, case, f"{type(error).__name__}: {error}")
            else:
                built[kind.name] = provider
        return built

    def checked_network(self, case: Any) -> dict[str, Any]:
        """Returns what :meth:`checked` returns, for a network."""
        try:
            return case.providers([kind.name for kind in self.plan.providers], self.plan.setting)
        except agreement.Disagreement as error:
            self.disagreements.append(f"{case.name}: {error}")
            tqdm.write(f"NOT TIMED: {self.disagreements[-1]}\n")
        except Unavailable as error:
            self.skip("networks", case, str(error))
        return {}

    def skip(self, name: str, case: Any, reason: str) -> None:
        """Says once why a provider is left out."""
        reason = reason.strip().splitlines()[0] if reason.strip() else "no message"
        if (name, reason) not in self.skipped:
            self.skipped.add((name, reason))
            tqdm.write(f"skipped {name} ({case.name}): {reason}\n")

    def runners(self, case: Any, mode: str, providers: dict[str, Any]) -> dict[str, Runner]:
        """Returns all providers that can run the mode, warmed up."""
        runners: dict[str, Runner] = {}
        self.tell(f"{case.name} {mode}: warming up")
        for name, provider in providers.items():
            try:
                runner = provider.prepare(mode)
                warm_up(runner, self.plan.setting.device, self.plan.budget)
                runners[name] = runner
            except Unavailable as error:
                self.skip(name, case, str(error))
            except (MemoryError, RuntimeError) as error:
                self.skip(name, case, f"{type(error).__name__}: {error}")
        return runners

    def weigh(self, what: str, jobs: list[memory.Job]) -> dict[memory.Job, memory.Found]:
        """Returns the peak memory of each job."""
        tick = self.part(what)
        found = memory.measure(jobs, self.plan.setting, self.plan.threads, tick)
        tick(1.0)
        return dict(zip(jobs, found, strict=True))

    def run_long(self) -> None:
        """Measures the peak memory of a long sequence against its length."""
        plan = self.plan
        jobs = [
            memory.Job(dataclasses.replace(LONG_CASE, steps=steps), mode, kind.name)
            for steps in plan.long_steps
            for mode in ("forward", "both")
            for kind in plan.providers
            if kind.name in WEIGHED_LONG and kind.why_not(LONG_CASE, plan.setting) is None
        ]
        weighed = self.weigh("memory of long sequences", jobs)
        self.rows += [self.row(job, peak) for job, peak in weighed.items()]

    def row(
        self,
        job: memory.Job,
        weighed: memory.Found | None,
        path: str = "",
        times: Quantiles | None = None,
        baseline: Quantiles | None = None,
    ) -> Row:
        """Makes one row of the table."""
        case, mode, peak = job.case, job.mode, self.peaks[0]
        millis = 1000 / case.steps
        layer = isinstance(case, Case)  # of a network the operations are not counted
        flops = case.flops(mode) if layer else None
        element = self.plan.setting.torch_dtype.itemsize
        weighed = weighed or memory.Found()
        row = Row(
            **self.origin,
            **case.columns(),
            threads=self.plan.threads,
            dtype=self.plan.setting.dtype,
            mode=mode,
            provider=job.provider,
            path=path,
            goal=case.goal(mode) if job.provider == case.goals_of else None,
            peak_gflops=peak.gflops,
            peak_gbytes=peak.gbytes,
            intensity=flops / case.fewest_bytes(mode, element) if flops else None,
            live_mib=weighed.live,
            resident_mib=weighed.resident,
            note=f"memory: {weighed.note}" if weighed.note else "",
        )
        if times is None:
            return row
        return dataclasses.replace(
            row,
            rounds=times.rounds,
            p20_ms=times.p20 * millis,
            p50_ms=times.p50 * millis,
            p80_ms=times.p80 * millis,
            speedup=baseline.p50 / times.p50 if baseline else None,
            gflops=flops * case.steps / times.p50 / 1e9 if flops else None,
        )
