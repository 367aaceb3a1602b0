"""Workers that measure and workers that train, on machines whose clocks differ, share a study; both are killed.

    python tests/chaos/steps.py --kills 12 --rounds 3

A training is a ledger of epochs in a folder that all see. Workers that train are killed in the middle of a training;
all that measure are gone for a while, as where a board reboots; connections are cut, and the proxy is killed and
started again. At the end those that measure want final trainings, and both are killed in the middle of one. Exits with
1 if a network was measured, an epoch trained or a final made twice, a measurement or a training was lost, a trial is
left RUNNING, nothing was trained while nobody measured, or a living worker's trial was taken; with 77 where there is no
PostgreSQL.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from cluster import BEAT_S, LEASE_S, MACHINES, on_each
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState
from postgres import Server
from proxy import Proxy
from workers import LATENCY_S, Witness, Workers, moment, survivors, taken_for_dead, verdict

from nas.intervals import Interval
from nas.measure.budget import Limits
from nas.measure.runtime import Settings
from nas.networks import counts as network_counts
from nas.quality.candidate import Candidate
from nas.quality.tier import Estimate
from nas.search import trial as search_trial
from nas.search.latency import TrialLatency
from nas.search.log import SearchLog
from nas.search.tasks import Task, Tasks, What
from nas.search.trial import TrialRunner
from nas.search.trial_training import Stage, TrainStep
from nas.study import jobs, leases
from nas.study import trials as study_trials
from nas.study.jobs import MEASURES, RESULT, TRAINS, at_work
from nas.study.trials import MEASURED, sweep, waiting_for_training
from nas.version import version
from search_spaces import get_arch

STUDY = "steps"
EPOCHS, EPOCH_S = 5, 0.3
FINAL = 1_000_000
"""With its seed, the number of a final training in the ledger."""
AHEAD = 6
"""Trials that wait for their training at most."""
PAUSE_S = 0.5


class Steps:
    """What the workers do. Every measurement and every epoch is a line of `ledger`, with who made it."""

    def __init__(self, out: Path, storage: str, finals: int) -> None:
        self.storage, self.ledger, self.enough = storage, out / "ledger", out / "enough"
        trainer = SimpleNamespace(alone=nullcontext)
        self.tier: Any = SimpleNamespace(
            name="train", trained=True, trainer=trainer, estimate=self._train, predict=self._train, surrogate=None
        )
        self.request: Any = SimpleNamespace(
            settings=Settings(threads=1), budget_ms=2.0, limits=Limits(), folder=out, trials=1_000_000
        )
        self._arch = get_arch("efficientvit_m0").at(64)
        counts = network_counts.counts_of(self._arch)
        network_counts.counts_of = lambda _: counts  # once, before the forks, as the version
        version()
        self._measured = 0
        search_trial.suggest = self._suggest
        network = Candidate(self._arch)
        self.finals = [Task(What.FINAL, network, EPOCHS, f"final {seed}", seed) for seed in range(finals)]

    def open(self) -> optuna.Study:
        return study_trials.open_study(STUDY, self.storage, {"of": "steps"}, RandomSampler())

    def measure(self) -> None:
        """Measure networks, and hand them over, until there are enough; then have final trainings made."""
        study = self.open()
        with at_work(study, [MEASURES]):
            self._measure(study, SearchLog("now"))
            tasks = self._tasks(study, trains=False)
            tasks.post(self.finals)
            for task in self.finals:
                tasks.result(task)

    def _measure(self, study: optuna.Study, log: SearchLog) -> None:
        runner: Any = TrialRunner(self.request, study, self.tier, hands_over=True)
        runner._known = self._latency
        while not self.enough.exists():
            sweep(study)
            if len(waiting_for_training(study)) < AHEAD:
                runner.trial(log)
            else:
                time.sleep(PAUSE_S)

    def train(self) -> None:
        """Train what was measured, until there are enough and nothing is left."""
        study = self.open()
        with at_work(study, [TRAINS]):
            step, log = TrainStep(self.request, study, self.tier, Stage(lambda *_: None)), SearchLog("now")
            tasks = self._tasks(study, trains=True)
            while not self._all_done(study):
                sweep(study)
                if not step.claimed(log) and not tasks.help():
                    time.sleep(PAUSE_S)

    def _tasks(self, study: optuna.Study, trains: bool) -> Tasks:
        def work(task: Task) -> None:
            self._train_from_ledger(FINAL + task.seed)
            self._note(FINAL + task.seed, "made")

        return Tasks(study, work, trains, print)

    def _all_done(self, study: optuna.Study) -> bool:
        if not self.enough.exists() or study.get_trials(False, [TrialState.RUNNING, TrialState.WAITING]):
            return False
        return all(study.user_attrs.get(RESULT + task.name) for task in self.finals)

    def lines(self) -> list[tuple[int, str, int]]:
        """Trial, what was done, and the process."""
        rows = [line.split() for line in self.ledger.read_text().splitlines()] if self.ledger.exists() else []
        return [(int(trial), what, int(pid)) for trial, what, pid in rows]

    def _note(self, trial: int | str, what: object) -> None:
        file = os.open(self.ledger, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.write(file, f"{trial} {what} {os.getpid()}\n".encode())
        os.close(file)

    def _suggest(self, trial: optuna.Trial, *_: Any) -> Candidate:
        trial.suggest_int("width", 0, 6)
        self._measured = trial.number
        return Candidate(self._arch, name=f"{trial.number}")

    def _latency(self, _: str) -> TrialLatency:
        time.sleep(LATENCY_S)
        self._note(self._measured, "measured")
        return TrialLatency.read({"latency_ms": 1.0, "throughput": 800.0, "source": "measured"})

    def _train(self, candidate: Candidate, *_: Any) -> Estimate:
        self._train_from_ledger(int(candidate.name))
        return Estimate(50.0, Interval(48.0, 52.0), 49.0)

    def _train_from_ledger(self, number: int) -> None:
        done = sum(trial == number and what.isdecimal() for trial, what, _ in self.lines())
        for epoch in range(done, EPOCHS):
            time.sleep(EPOCH_S)
            self._note(number, epoch)

    def faults(self, trials: list[FrozenTrial], killed: dict[int, Any]) -> dict[str, int]:
        lines = self.lines()
        done = Counter((trial, what) for trial, what, _ in lines)
        kept = [trial for trial in trials if MEASURED in trial.user_attrs]
        epochs = Counter(trial for trial, what in done if what.isdecimal())
        whose: dict[int, list[int]] = {}
        for trial, what, pid in lines:
            if what.isdecimal() and pid not in whose.setdefault(trial, []):
                whose[trial].append(pid)
        return {
            "measured twice": sum(n - 1 for (_, what), n in done.items() if what == "measured"),
            "epochs trained twice": sum(n - 1 for (_, what), n in done.items() if what.isdecimal()),
            "finals made twice": sum(n - 1 for (_, what), n in done.items() if what == "made"),
            "finals lost": sum(not done[FINAL + task.seed, "made"] for task in self.finals),
            "measurements lost": sum(trial.state != TrialState.COMPLETE for trial in kept),
            "trainings cut short": sum(epochs[trial.number] != EPOCHS for trial in kept),
            "taken from the living": sum(pid not in killed for pids in whose.values() for pid in pids[:-1]),
        }


def run(
    folder: Path, server: Server, proxied: bool, size: int, kills: int, rounds: int, away_s: float, finals: int
) -> bool:
    """Every round kills its part of those that train, takes the connections away, and then those that measure.

    Args:
        size: number of workers; a quarter of them measure.
        away_s: seconds in which there is no connection, and then nobody measures.
        finals: number of final trainings; half as many times workers are killed in one.
    """
    begun, database, stack = time.monotonic(), server.new_database(), ExitStack()
    proxy = stack.enter_context(Proxy(database)) if proxied else None
    storage = proxy.url if proxy else database
    team, witness = Workers(folder / "steps", storage, database), Witness()
    steps = Steps(team.out, storage, finals)
    measuring: list[int] = []
    quit_by_themselves = started = idle = 0

    def refill() -> None:
        nonlocal started
        while len(team.pids) < size:
            measures = len(measuring) < max(1, size // 4)
            pid = team.fork(steps.measure if measures else steps.train, MACHINES[started % len(MACHINES)])
            if measures:
                measuring.append(pid)
            started += 1

    def in_epochs(of: int = 0) -> list[int]:
        """Processes in the middle of a training. of: the least number."""
        last = {pid: (trial, what) for trial, what, pid in steps.lines() if what != "measured"}
        busy = {pid for pid, (trial, what) in last.items() if trial >= of and what not in ("made", str(EPOCHS - 1))}
        return [pid for pid in team.pids if pid in busy]

    def kill_in_a_final() -> bool:
        """Whether there was one."""
        deadline = time.monotonic() + 60
        while not (busy := in_epochs(FINAL)):
            if time.monotonic() > deadline:
                return False
            time.sleep(EPOCH_S / 10)
        return team.kill(random.choice(busy))

    with stack:
        refill()
        for part in range(rounds):
            while len(team.killed) < kills * (part + 1) // rounds + part * max(1, size // 4):
                moment(1.0)
                quit_by_themselves += len(team.quitters())
                if busy := in_epochs():
                    team.kill(random.choice(busy))
                refill()
            team.wait_until_open()
            witness.see(team.trials(STUDY))
            if proxy:
                proxy.kill()
                time.sleep(away_s)
                proxy.start()
            with server.full():
                time.sleep(away_s)
            moment(1.0)
            while measuring:
                team.kill(measuring.pop())
            before = len(steps.lines())
            time.sleep(away_s)
            idle += len(steps.lines()) == before
            refill()
            team.wait_until_open()
            moment(2.0)
            witness.see(team.trials(STUDY))
        steps.enough.touch()
        in_finals = 0
        for _ in range(finals // 2):
            in_finals += kill_in_a_final()
            team.kill(measuring.pop())
            refill()
        codes = team.finish()
        trials = team.trials(STUDY)
        servers = [*server.pids(), *(proxy.pids if proxy else [])]
        faults = witness.faults(trials) | steps.faults(trials, team.killed)
        faults |= {
            "taken for dead": taken_for_dead(trials, team.killed),
            "times that nothing was trained while nobody measured": idle,
            "processes": len(survivors(known=servers)),
            "finals that nobody was killed in": finals // 2 - in_finals,
            "workers that quit": quit_by_themselves + sum(code != 0 for code in codes),
        }
    trained = [(trial, pid) for trial, what, pid in steps.lines() if what.isdecimal()]
    resumed = len(set(trained)) - len({trial for trial, _ in trained})
    told = (
        f"{size} workers, {len(team.killed)} kills, {rounds} times no connection and nobody who measures in "
        f"{time.monotonic() - begun:.0f} s, {resumed} trainings went on elsewhere, {witness.count} finished trials "
        f"seen of {len(trials)}, "
        f"{in_finals} kills in {len(steps.finals)} finals"
    )
    return verdict("gRPC" if proxy else "PostgreSQL", faults, told, lambda: team.log.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=12, help="of those that train")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--away", type=float, default=5.0, help="seconds of each outage")
    parser.add_argument("--finals", type=int, default=4)
    parser.add_argument("--only", choices=("postgresql", "grpc"))
    args = parser.parse_args()
    study_trials.BEAT_S, lease = BEAT_S, study_trials.lease
    study_trials.lease = lambda trial: lease(trial, LEASE_S)
    jobs.beating = partial(leases.beating, every_s=BEAT_S)
    mine = leases.Lease.mine
    leases.Lease.mine = lambda seconds=LEASE_S: mine(seconds)
    study_trials.DEATHS = args.kills + 1  # the same trial may be hit again and again
    counts = args.workers, args.kills, args.rounds, args.away, args.finals
    return on_each(args.only, lambda folder, server, proxy: run(folder, server, proxy, *counts))


if __name__ == "__main__":
    sys.exit(main())
