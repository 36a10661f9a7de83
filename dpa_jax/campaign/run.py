"""A slice of a campaign: what it trains until its minutes are over, from one bundle to the next."""

from __future__ import annotations

import importlib.metadata
import math
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpa_jax.campaign import bundle
from dpa_jax.campaign.plan import Plan, Step, Table
from dpa_jax.campaign.report import write_tables
from dpa_jax.compare.report import Histories
from dpa_jax.compare.run import group_folder, seeds_that_fit, train_entry, train_group
from dpa_jax.training.checkpoint import Checkpoints, flatten
from dpa_jax.training.continuation import check_unchanged
from dpa_jax.training.folder import locked
from dpa_jax.training.header import describe
from dpa_jax.training.loop import NonFiniteError, Preempted
from dpa_jax.training.record import finished, read_history
from dpa_jax.training.run import Run

_SAVE_SECONDS = 180.0  # between bundles, while one group is trained
_WORTH = 1.1  # as many times faster must twice as many seeds be, to be trained together


class _TimeIsUp(Exception):
    """The minutes are over, and the bundle is written."""


def continue_campaign(
    plan: Plan,
    folder: str | pathlib.Path,
    minutes: float,
    *,
    vmap: int = 0,
    clock: Callable[[], float] = time.monotonic,
    begun: float | None = None,
) -> bool:
    """Trains what is next in a campaign until the minutes are over or nothing is left; whether nothing is left.

    Args:
        plan: the campaign.
        folder: of its bundle, which is continued and replaced: ``campaign.json``, ``table.md``, ``table.png`` and the
            pieces of an archive. Nothing else of it is needed.
        minutes: the time there is, the bundle's writing included.
        vmap: how many seeds are trained at a time in one program; 0: all on CPUs, elsewhere as many as make it faster.
        clock: seconds, from any moment on.
        begun: when the minutes began, by this clock; None: now.

    Raises:
        DamagedBundleError: for files that are not those that were written.
        ValueError: for a run of another configuration than the bundle's.
        InUseError: if another program writes to the folder.
        Preempted: after SIGTERM or SIGINT, when the bundle is written.
    """
    folder = pathlib.Path(folder)
    deadline = (clock() if begun is None else begun) + 60 * minutes
    with locked(folder), tempfile.TemporaryDirectory(prefix="dpa_jax-campaign-") as workdir:
        return _Slice(plan, folder, pathlib.Path(workdir), deadline, vmap, clock).train()


class _Slice:
    """What one call trains."""

    def __init__(
        self,
        plan: Plan,
        folder: pathlib.Path,
        workdir: pathlib.Path,
        deadline: float,
        vmap: int,
        clock: Callable[[], float],
    ):
        self.plan, self.folder, self.workdir, self.deadline, self.vmap = plan, folder, workdir, deadline, vmap
        self.clock = clock
        self.index, self.packed = bundle.read(folder, workdir)
        self.device = describe(jax.devices())
        self.trained: list[str] = []
        self.call = {
            "device": self.device,
            "versions": {name: importlib.metadata.version(name) for name in ("dpa_jax", "jax", "flax")},
            "utc": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "trained": self.trained,
        }

    def train(self) -> bool:
        """Whether nothing is left to do."""
        self._check()
        try:
            for step in self.plan.steps:
                for entry in step.entries:
                    try:
                        self._train(step, entry)
                    except FileNotFoundError as error:  # the data of one table need not be here
                        print(f"note: {self._name(step.table, entry)} waits: {error}", file=sys.stderr)
        except _TimeIsUp:
            pass
        self._write()
        unfinished = self._unfinished()
        if unfinished and not self.trained:
            print("note: nothing was trained: the minutes are too few", file=sys.stderr)
        return not unfinished

    # ---------------- Which runs there are ----------------

    def _folder(self, table: Table, entry: Any) -> pathlib.Path:
        return self.workdir / table.name / entry.name.replace(":", ",")

    def _seeds(self, step: Step, entry: Any) -> list[int]:
        """Those of a step that have not failed."""
        first, failed = step.table.config.seed, self.index.get("failed", {})
        name = self._name(step.table, entry)
        return [s for s in range(first, first + step.seeds) if f"{name}, seed {s}" not in failed]

    def _name(self, table: Table, entry: Any) -> str:
        return f"{table.name}: {entry.name}"

    def _unfinished(self) -> list[str]:
        """The runs that are not finished, those that failed left out."""
        names = {
            f"{self._name(step.table, entry)}, seed {seed}": self._folder(step.table, entry) / f"seed-{seed}"
            for step in self.plan.steps
            for entry in step.entries
            for seed in self._seeds(step, entry)
        }
        configs = {table.name: table.config for table in self.plan.tables}
        return [
            name for name, path in names.items() if not finished(read_history(path), configs[name.partition(":")[0]])
        ]

    def _check(self) -> None:
        """ValueError where the bundle's runs are of another configuration than the campaign's."""
        for step in self.plan.steps:
            for entry in step.entries:
                for seed in self._seeds(step, entry):
                    path = self._folder(step.table, entry) / f"seed-{seed}"
                    if path.exists():
                        check_unchanged(entry.configure(step.table.config, seed), path)

    # ---------------- Training ----------------

    def _train(self, step: Step, entry: Any) -> None:
        name, config = self._name(step.table, entry), entry.configure(step.table.config, step.table.config.seed)

        def size(run: Run, wanted: int) -> int:
            return self._size(run, wanted, name)

        def train(run: Run, _: str, seeds: range, folder: pathlib.Path) -> None:
            self._train_group(run, name, seeds, folder)

        train_entry(name, config, self._seeds(step, entry), self._folder(step.table, entry), size, train)

    def _train_group(self, run: Run, name: str, seeds: range, folder: pathlib.Path) -> None:
        group = run.with_seeds(seeds)
        reserve = 5 + _bytes(group) / 20e6  # for the last checkpoint and the bundle
        others = [
            known.get("compile_seconds", 0.0) for known in self.index.get("speeds", {}).get(self.device, {}).values()
        ]
        compiles = self._known("compile_seconds", name, len(seeds)) or max(others, default=0.0)
        last = self.deadline - reserve
        while True:
            # The first of a call is tried in any case: what is known may be of a busier hour.
            if (now := self.clock()) + (compiles if self.trained else 0.0) > last:
                raise _TimeIsUp
            end = min(last, now + compiles + _SAVE_SECONDS)
            pace = _Pace(self.clock, end)
            before = len(read_history(folder / f"seed-{seeds[0]}"))
            try:
                records = train_group(run, name, seeds, folder, pace)
            except NonFiniteError as error:
                self._fail(name, seeds, folder, str(error))
                return
            except Preempted:
                self._hold(group, seeds, folder)
                self._write()
                raise
            if (trained := f"{name}, seeds {seeds[0]} to {seeds[-1]}") not in self.trained:
                self.trained.append(trained)
                self._learn("compile_seconds", name, len(seeds), pace.begin)
            compiles = 0.0
            if len(records[0]) > before:
                self._learn("images_per_second", name, len(seeds), records[0][-1]["images_per_second"])
            if finished(records[0], run.config):
                self._release(seeds, folder)
                self._write()
                return
            self._hold(group, seeds, folder)
            if end == last:
                raise _TimeIsUp
            self._write()

    def _fail(self, name: str, seeds: range, folder: pathlib.Path, why: str) -> None:
        print(f"note: {why} It is left out from now on.", file=sys.stderr)
        self.index.setdefault("failed", {}).update({f"{name}, seed {seed}": why for seed in seeds})
        self._release(seeds, folder)
        for seed in seeds:
            shutil.rmtree(folder / f"seed-{seed}", ignore_errors=True)

    # ---------------- How many seeds at a time ----------------

    def _size(self, run: Run, wanted: int, name: str) -> int:
        if self.vmap:
            return min(self.vmap, wanted)
        most = seeds_that_fit(run, wanted)
        if run.devices[0].platform != "cpu":
            most = members_that_pay(lambda members: self._speed(run, members, name), most)
        # A group that is not finished in this call must leave a checkpoint that the bundle has room for.
        while (
            most > 1 and most * _bytes(run) * bundle.PACKED > bundle.ARCHIVE_BYTES and not self._ends(run, most, name)
        ):
            most -= 1
        return most

    def _ends(self, run: Run, members: int, name: str) -> bool:
        """Whether so many seeds, by the speed that is known, are trained to their end in the time left."""
        if not (speed := self._known("images_per_second", name, members)):
            return False
        images = run.total_steps * run.config.batch_size * members
        seconds = images / speed + (self._known("compile_seconds", name, members) or 0.0)
        return self.clock() + 1.1 * seconds < self.deadline

    def _speed(self, run: Run, members: int, name: str) -> float:
        """Images a second of so many seeds together, as known or measured now."""
        if known := self._known("images_per_second", name, members):
            return known
        group = run.with_seeds(range(members))
        group.load()
        state, count, times = group.init(), group.steps_per_dispatch, [self.clock()]
        calls = math.ceil(64 / count)
        for number in range(calls + 1):  # the first compiles
            state, metrics = group.steps(state, number * count, count)
            if number in (0, calls):
                jax.block_until_ready(metrics)
                times.append(self.clock())
        speed = calls * count * members * run.config.batch_size / max(times[2] - times[1], 1e-9)
        self._learn("images_per_second", name, members, speed)
        return speed

    def _known(self, what: str, name: str, members: int) -> float | None:
        return self.index.get("speeds", {}).get(self.device, {}).get(f"{name}, {members} at a time", {}).get(what)

    def _learn(self, what: str, name: str, members: int, value: float) -> None:
        speeds = self.index.setdefault("speeds", {}).setdefault(self.device, {})
        speeds.setdefault(f"{name}, {members} at a time", {})[what] = value

    # ---------------- The bundle ----------------

    def _hold(self, group: Run, seeds: range, folder: pathlib.Path) -> None:
        """Packs the newest checkpoint of a group."""
        self._forget(seeds, folder)
        path = group_folder(folder, seeds)
        with Checkpoints(path / "checkpoints", keep=1, read_only=True) as checkpoints:
            if restored := checkpoints.restore(group.abstract_state):
                arrays = {name: np.asarray(array) for name, array in flatten(jax.device_get(restored[1])).items()}
                name = f"{path.relative_to(self.workdir).as_posix()}/checkpoint-{restored[0]}"
                self.packed = {name: bundle.pack(arrays), **self.packed}

    def _release(self, seeds: range, folder: pathlib.Path) -> None:
        """Lets go of the checkpoints of a group that needs them no more."""
        self._forget(seeds, folder)
        shutil.rmtree(group_folder(folder, seeds), ignore_errors=True)

    def _forget(self, seeds: range, folder: pathlib.Path) -> None:
        prefix = f"{group_folder(folder, seeds).relative_to(self.workdir).as_posix()}/"
        self.packed = {name: content for name, content in self.packed.items() if not name.startswith(prefix)}

    def _histories(self, table: Table) -> Histories:
        """The records of a table's finished runs."""
        found: Histories = {}
        for entry in table.entries:
            folder = self._folder(table, entry)
            for path in sorted(folder.glob("seed-*"), key=lambda path: int(path.name[5:])):
                if finished(history := read_history(path), table.config):
                    found.setdefault(entry.name, {})[int(path.name[5:])] = history
        return found

    def _write(self) -> None:
        unfinished = self._unfinished()
        index = self.index | {"calls": [*self.index.get("calls", []), self.call], "unfinished": unfinished}
        figures = write_tables(
            self.folder, self.plan, {table.name: self._histories(table) for table in self.plan.tables}, index
        )
        left_out = bundle.write(self.folder, self.workdir, self.packed, index | {"results": figures})
        for name in left_out:
            print(
                f"note: the bundle has no room for the checkpoint of {name.rpartition('/')[0]}, "
                f"{len(self.packed[name]) / 2**20:.1f} MiB packed: what it has trained is lost with this machine",
                file=sys.stderr,
            )


class _Pace:
    """Says when to stop: when what comes next would not be done before the end, judged by how long such took before."""

    def __init__(self, clock: Callable[[], float], end: float):
        self.begin = 0.0  # seconds up to the first answer: compiling, for the most part
        self._clock, self._end, self._last, self._evaluates = clock, end, clock(), False
        self._took: dict[bool, float] = {}  # {whether an evaluation was in it: seconds from one answer to the next}

    def __call__(self, evaluates: bool, next_evaluates: bool) -> bool:
        now = self._clock()
        if self.begin:
            self._took[self._evaluates] = now - self._last
        else:
            self.begin = now - self._last
        self._last, self._evaluates = now, evaluates
        step = self._took.get(False, 0.0)
        evaluation = self._took.get(True, self.begin)  # the first one compiles, too
        ahead = (evaluation if evaluates else step) + (evaluation if next_evaluates else 0.0)
        return now + ahead > self._end


def members_that_pay(speed: Callable[[int], float], most: int) -> int:
    """How many members to train together, at most ``most``: twice as many as long as that is faster by a tenth.

    ``speed`` says the images a second of so many members together.
    """
    members, best = 1, speed(1) if most > 1 else 0.0
    while members < most:
        more = min(2 * members, most)
        if (faster := speed(more)) < _WORTH * best:
            break
        members, best = more, faster
    return members


def _bytes(run: Run) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state))
