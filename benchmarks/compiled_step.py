"""Cost of a compiled training step over the eager one, one thread, in one run.

    python -m benchmarks.compiled_step [--seconds 4] [--only MLP] [--json FILE] [--write docs/compiled_step.md]

The *gradient* is forward and backward, eagerly and without curvature. A *compiled step* is forward, backward and
curvature as `compile_step` runs it, with what it does around its program; the *compiled gradient* is the same with
`method=None`. A *training step* is all of that and the update: eagerly with Adam, and compiled with AdaHesScale in the
program. *Making it* is the first step of a process, which captures and compiles it: with Inductor's cache empty, and
once more, in a later process, with what that left there. *Guards* is what a step costs apart from its program and from
handing out the results. The second table is `train()` and
`learn()` of Stable-Baselines3's algorithms over the same with its own policy and Adam.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from torch import nn

import sb3_integration as policies
from benchmarks.curvature import WORKLOADS as ALL
from benchmarks.curvature import Workload
from benchmarks.sb3_train import CASES, Case, models
from benchmarks.timing import Ratio, peak_bytes, ratios, write_table
from hesscale_lightning import AdaHesScale, attach, compile_step
from hesscale_lightning.compiled_step import Step


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 15 * 15, 10))


#: Networks, and what the compiled step is to cost over the eager gradient; NaN where nothing was asked.
WORKLOADS: list[tuple[Workload, float]] = [
    (ALL[0], 0.55),
    (ALL[2], 0.85),
    (Workload("CNN 3x32x32, one convolution, batch 16", small_cnn, lambda: torch.randn(16, 3, 32, 32), 10, 0.0), 0.85),
    (ALL[4], float("nan")),
    (ALL[7], 1.2),
    (ALL[6], 1.3),
]


def make(workload: Workload) -> float:
    """Seconds to capture and compile the step, and to run it once."""
    torch.manual_seed(0)
    model, x = workload.model(), workload.inputs()
    y = torch.randint(workload.classes, (len(x),))
    start = time.perf_counter()
    compile_step(model, F.cross_entropy, silent=True, on_failure="raise")(x, y)
    return time.perf_counter() - start


def make_in_new_processes(workload: Workload) -> list[float]:
    """The same in two processes, the second of which finds what the first has left in Inductor's cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.compiled_step", "--make", workload.name]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        return [
            float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        ]


def guard_time(step: Step, clear: Callable[[], None], *batch: Any) -> float:
    """Microseconds of a step in which neither the program nor what hands out its results does anything."""
    run, step._run = step._run, lambda *_, **__: None  # type: ignore[method-assign]
    try:
        return ratios([clear, lambda: step(*batch)], 1.0)[1].variant_us
    finally:
        step._run = run  # type: ignore[method-assign]


def measure(workload: Workload, target: float, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = workload.model()
    x, y = workload.inputs(), torch.randint(workload.classes, (workload.inputs().shape[0],))
    params = list(model.parameters())
    trained = workload.model()  # of its own, so that the optimizers' hooks cost the others nothing
    adam, adahesscale = torch.optim.Adam(trained.parameters(), lr=1e-5), AdaHesScale(trained.parameters(), lr=1e-5)
    curvature = compile_step(model, F.cross_entropy, silent=True, on_failure="raise")
    gradient = compile_step(model, F.cross_entropy, method=None, silent=True, on_failure="raise")
    training = compile_step(trained, F.cross_entropy, optimizer=adahesscale, silent=True, on_failure="raise")

    def clear() -> None:
        for p in params:
            p.grad = p.hess_diag = None  # type: ignore[attr-defined]

    def eager() -> None:
        clear()
        F.cross_entropy(model(x), y).backward()

    def eager_curvature() -> None:
        clear()
        loss = F.cross_entropy(model(x), y)
        attach(loss, params)
        loss.backward()

    def compiled(step: Step) -> Callable[[], None]:
        def run() -> None:
            clear()
            step(x, y)

        return run

    def eager_training() -> None:
        adam.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        adam.step()

    cold, warm = make_in_new_processes(workload)
    steps = {
        "gradient": eager,
        "eager curvature": eager_curvature,
        "compiled": compiled(curvature),
        "compiled gradient": compiled(gradient),
    }
    timed = dict(zip(steps, ratios(list(steps.values()), seconds), strict=True))
    over_compiled = ratios([steps["compiled gradient"], steps["compiled"]], seconds / 2)[1]
    whole = ratios([eager_training, lambda: training(x, y)], seconds / 2)[1]
    guards = guard_time(curvature, clear, x, y)
    memory = {name: peak_bytes(step) for name, step in steps.items()}
    return {
        "workload": workload.name,
        "target": target,
        "time": timed,
        "over compiled": over_compiled,
        "training": whole,
        "cold": cold,
        "warm": warm,
        "memory": memory,
        "guards": guards,
    }


COMPILED: dict[Any, Any] = {
    PPO: policies.CompiledPPO,
    A2C: policies.CompiledA2C,
    DQN: policies.CompiledDQN,
    SAC: policies.CompiledSAC,
    TD3: policies.CompiledTD3,
}
#: `learn()`: steps of one, what to reach.
LEARNT: list[tuple[Case, float]] = [
    (Case(PPO, policies.HesScaleActorCriticPolicy, "CartPole-v1", float("nan"), collect=2048), 0.85),
    (Case(PPO, policies.HesScaleActorCriticPolicy, "InvertedPendulum-v5", float("nan"), collect=2048), 0.85),
    (Case(A2C, policies.HesScaleActorCriticPolicy, "CartPole-v1", float("nan"), collect=500), 0.85),
    (
        Case(SAC, policies.HesScaleSACPolicy, "Pendulum-v1", float("nan"), {"learning_starts": 100}, collect=200),
        float("nan"),
    ),
]


def measure_training(case: Case, seconds: float, call: str, run: Callable[[Any], Any], target: float) -> str:
    """A row: Stable-Baselines3's with Adam, the same with AdaHesScale, and the compiled algorithm."""
    compiled_class = COMPILED[case.algorithm]
    compiled_class.compile_step_options = {"silent": True, "on_failure": "raise"}
    plain, _, hesscale = models(case)
    compiled = compiled_class(case.policy, case.environment, seed=0, device="cpu", **case.kwargs)
    compiled.learn(case.collect)
    timed = ratios([lambda m=m: run(m) for m in (plain, hesscale, compiled)], seconds, warm_up=1)
    bonus = " with entropy bonus" if "ent_coef" in case.kwargs else ""
    return (
        f"| {case.algorithm.__name__} on {case.environment}{bonus}: `{call}` | {timed[0].baseline_us / 1000:.1f} ms "
        f"| {timed[1]} | {timed[2]} | {f'{target:.2f}' if target == target else ''} |"
    )


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| network | gradient | eager step over gradient | compiled step over gradient | to reach "
        "| over compiled gradient | training step with AdaHesScale over eager one with Adam "
        "| peak memory over gradient | making it, empty cache | later | guards |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        timed: dict[str, Ratio] = result["time"]
        memory = result["memory"]
        target = f"{result['target']:.2f}" if result["target"] == result["target"] else ""
        lines.append(
            f"| {result['workload']} | {timed['gradient'].baseline_us / 1000:.2f} ms "
            f"| {timed['eager curvature'].median:.2f} "
            f"| {timed['compiled']} | {target} | {result['over compiled']} | {result['training']} "
            f"| {memory['compiled'] / memory['gradient']:.2f} | {result['cold']:.0f} s | {result['warm']:.1f} s "
            f"| {result['guards']:.0f} µs |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each network")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--write", type=Path, help="also replace the table in this page")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.make:
        print(make(next(w for w, _ in WORKLOADS if w.name == args.make)))
        return
    print("Median (quartiles) of interleaved rounds, one thread.\n")
    rows = ["| | plain, Adam | AdaHesScale | AdaHesScale, compiled | to reach |", "|---|---|---|---|---|"]
    asked = {PPO: 0.70, A2C: 0.70}
    jobs = [(case, "train()", case.train, asked.get(case.algorithm, float("nan"))) for case in CASES]
    jobs += [
        (case, "learn()", lambda m, case=case: m.learn(case.collect, reset_num_timesteps=False), target)
        for case, target in LEARNT
    ]
    for case, call, run, target in jobs:
        if args.only in f"{case.algorithm.__name__} {case.environment} {call}":
            rows.append(measure_training(case, args.seconds, call, run, target))
            print(rows[-1], flush=True)
    results = []
    for workload, target in WORKLOADS:
        if args.only in workload.name:
            results.append(measure(workload, target, args.seconds))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(results))
    if args.write:
        write_table(args.write, "compiled_step", table(results))
        write_table(args.write, "compiled_train", "\n".join(rows))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=vars) + "\n")


if __name__ == "__main__":
    main()
