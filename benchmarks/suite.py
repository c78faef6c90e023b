"""Runs the suite: each case in each mode, all providers against each other, then memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks import agreement, machine, memory
from benchmarks.cases import LONG_CASE, LONG_STEPS, Case
from benchmarks.kernel_times import KernelTime, kernel_times
from benchmarks.providers import BASELINE, Provider, Setting, Unavailable
from benchmarks.report import case_block
from benchmarks.rows import Row
from benchmarks.timing import Budget, Quantiles, Runner, time_interleaved, warm_up


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    memory: "all" (each case, and memory against T), "long" (memory against T alone) or "off".
    deadline: no case is begun after this time (of time.monotonic()).
    kernels: whether our kernels and the baseline's are timed one by one, too.
    """

    cases: list[Case]
    providers: list[type[Provider]]
    modes: list[str]
    setting: Setting
    threads: int
    budget: Budget
    memory: str = "all"
    long_steps: tuple[int, ...] = LONG_STEPS
    deadline: float = math.inf
    kernels: bool = False


@dataclass
class Outcome:
    """What was measured, and what went wrong: providers that compute something else."""

    rows: list[Row] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    peaks: list[machine.Peak] = field(default_factory=list)
    kernels: list[KernelTime] = field(default_factory=list)


class Suite:
    """One run of a plan. Tables are written as they come; the bar shows what is being done."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.outcome = Outcome()
        self.origin = machine.describe(plan.setting)
        self.skipped: set[tuple[str, str]] = set()
        self.bar: tqdm | None = None

    def run(self) -> Outcome:
        """Measure everything; returns the rows in the order of the plan."""
        plan = self.plan
        torch.set_num_threads(plan.threads)
        parts = len(plan.cases) * (len(plan.modes) + (plan.memory == "all"))
        parts += plan.memory != "off"
        # Where nobody watches, the bar stays away: the tables come one by one.
        with tqdm(
            total=100 * parts,
            unit="%",
            disable=None,
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {percentage:3.0f} %  {elapsed}, {remaining} left",
        ) as self.bar:
            self.tell("measuring the machine's peak")
            self.outcome.peaks.append(machine.measure_peak(plan.setting))
            for index, case in enumerate(plan.cases):
                if time.monotonic() > plan.deadline:
                    left = ", ".join(case.name for case in plan.cases[index:])
                    self.write(f"No time left for {left} ({plan.setting.dtype}).\n")
                    break
                self.run_case(case)
            if plan.memory != "off" and time.monotonic() <= plan.deadline:
                self.run_long()
            self.tell("measuring the machine's peak again")
            self.outcome.peaks.append(machine.measure_peak(plan.setting))
        return self.outcome

    def tell(self, what: str) -> None:
        """Show what is being done."""
        assert self.bar is not None
        self.bar.set_description_str(f"{what:<28.28}")

    def write(self, text: str) -> None:
        """Print above the bar."""
        tqdm.write(text)

    def progress(self) -> Callable[[float], None]:
        """A function that moves the bar through one part, told the share that is done."""
        assert self.bar is not None
        bar, begin = self.bar, self.bar.n

        def tick(share: float) -> None:
            # One part of the bar is 100 wide; never backwards.
            bar.n = max(bar.n, begin + round(100 * share))
            bar.refresh()

        return tick

    def run_case(self, case: Case) -> None:
        """Check, weigh and time one case, and print its tables."""
        plan = self.plan
        self.tell(f"{case.name}: checking")
        providers = self.checked(case)
        weighed = self.weigh(case, list(providers)) if plan.memory == "all" else {}
        for mode in plan.modes:
            runners = self.runners(case, mode, providers)
            times = self.time(case, mode, runners)
            rows = [
                self.row(case, mode, name, times[name], times.get(BASELINE), providers[name])
                for name in providers
                if name in times
            ]
            rows = [_with_memory(row, weighed.get((row.provider, mode))) for row in rows]
            self.outcome.rows += rows
            if rows:
                self.write(case_block(case, mode, rows))
            for row in rows if plan.kernels else ():
                if row.provider in _PROFILED:
                    runner = runners[row.provider]
                    self.outcome.kernels += kernel_times(row, runner, plan.setting.device)

    def checked(self, case: Case) -> dict[str, Provider]:
        """The providers that can run the case and compute what the baseline computes."""
        plan = self.plan
        built: dict[str, Provider] = {}
        expected = potential = None
        for kind in plan.providers:
            mode = "both" if set(plan.modes) - {"forward"} else "forward"
            reason = kind.why_not(case, plan.setting) or memory.shortage(
                kind, case, plan.setting, mode
            )
            if reason:
                self.skip(kind.name, case, reason)
                continue
            try:
                provider = kind(case, plan.setting)
                got = agreement.compute(provider)
                if kind.name == BASELINE:
                    expected, potential = got, agreement.potentials(provider)
                elif expected is not None and potential is not None:
                    agreement.compare(case, plan.setting.dtype, expected, got, potential)
            except agreement.Disagreement as error:
                self.outcome.disagreements.append(f"{case.name}: {kind.name}: {error}")
                self.write(f"NOT TIMED: {self.outcome.disagreements[-1]}\n")
                continue
            except Exception as error:  # a provider that fails must not end the run
                self.skip(kind.name, case, f"{type(error).__name__}: {error}")
                continue
            built[kind.name] = provider
        return built

    def skip(self, name: str, case: Case, reason: str) -> None:
        """Say once that and why a provider is left out."""
        reason = reason.strip().splitlines()[0] if reason.strip() else "no message"
        if (name, reason) not in self.skipped:
            self.skipped.add((name, reason))
            self.write(f"skipped {name} ({case.name}): {reason}\n")

    def runners(self, case: Case, mode: str, providers: dict[str, Provider]) -> dict[str, Runner]:
        """All providers that can run the mode, warmed up."""
        plan = self.plan
        runners: dict[str, Runner] = {}
        for name, provider in providers.items():
            self.tell(f"{case.name} {mode}: warming up")
            try:
                runner = provider.prepare(mode)
                warm_up(runner, plan.setting.device, plan.budget)
                runners[name] = runner
            except Unavailable as error:
                self.skip(name, case, str(error))
            except (MemoryError, RuntimeError) as error:
                self.skip(name, case, f"{type(error).__name__}: {error}")
        return runners

    def time(self, case: Case, mode: str, runners: dict[str, Runner]) -> dict[str, Quantiles]:
        """Their interleaved times."""
        plan, tick = self.plan, self.progress()
        self.tell(f"{case.name} {mode}: timing")
        if not runners:
            tick(1.0)
            return {}
        return time_interleaved(runners, plan.setting.device, plan.budget, tick, plan.setting.seed)

    def weigh(self, case: Case, names: list[str]) -> dict[tuple[str, str], memory.Found]:
        """Peak memory of the case's providers in inference and in training."""
        plan, tick = self.plan, self.progress()
        self.tell(f"{case.name}: memory")
        modes = [mode for mode in plan.modes if mode != "backward"]
        jobs = [memory.Job(case, mode, name) for mode in modes for name in names]
        found = memory.measure(jobs, plan.setting, plan.threads, tick)
        tick(1.0)
        return {(job.provider, job.mode): peak for job, peak in zip(jobs, found, strict=True)}

    def run_long(self) -> None:
        """Peak memory of a long sequence against its length."""
        plan, tick = self.plan, self.progress()
        self.tell("memory of long sequences")
        kinds = [kind for kind in plan.providers if kind.name in _WEIGHED_LONG]
        jobs = [
            memory.Job(dataclasses.replace(LONG_CASE, steps=steps), mode, kind.name)
            for steps in plan.long_steps
            for mode in ("forward", "both")
            for kind in kinds
            if kind.why_not(LONG_CASE, plan.setting) is None
        ]
        found = memory.measure(jobs, plan.setting, plan.threads, tick)
        for job, peak in zip(jobs, found, strict=True):
            row = self.row(job.case, job.mode, job.provider, None, None, None)
            self.outcome.rows.append(_with_memory(row, peak))

    def row(
        self,
        case: Case,
        mode: str,
        name: str,
        times: Quantiles | None,
        baseline: Quantiles | None,
        provider: Provider | None,
    ) -> Row:
        """One row of the table, without its peak memory."""
        plan = self.plan
        peak = self.outcome.peaks[0]
        flops = case.flops(mode)
        millis = 1000 / case.steps
        return Row(
            **self.origin,
            threads=plan.threads,
            dtype=plan.setting.dtype,
            case=case.name,
            steps=case.steps,
            batch=case.batch,
            cin=case.cin,
            cout=case.cout,
            height=case.height,
            width=case.width,
            kernel="x".join(map(str, case.kernel)),
            options=case.options,
            density=case.density,
            mode=mode,
            provider=name,
            path=provider.path if provider else "",
            rounds=times.rounds if times else 0,
            p20_ms=times.p20 * millis if times else None,
            p50_ms=times.p50 * millis if times else None,
            p80_ms=times.p80 * millis if times else None,
            speedup=baseline.p50 / times.p50 if times and baseline else None,
            goal=case.goal(mode) if name == case.goals_of else None,
            gflops=flops * case.steps / times.p50 / 1e9 if times else None,
            peak_gflops=peak.gflops,
            peak_gbytes=peak.gbytes,
            intensity=flops / case.fewest_bytes(mode, plan.setting.torch_dtype.itemsize),
        )


_PROFILED = (BASELINE, "snnlstm")
_WEIGHED_LONG = (BASELINE, "hoisted", "snnlstm", "snnlstm-checkpoint")


def _with_memory(row: Row, found: memory.Found | None) -> Row:
    if found is None:
        return row
    note = f"memory: {found.note}" if found.note else row.note
    return dataclasses.replace(row, live_mib=found.live, resident_mib=found.resident, note=note)
