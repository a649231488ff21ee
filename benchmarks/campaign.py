"""A campaign against the toolkit: kills, full disks, damaged files, hostile files.

    python -m benchmarks.campaign [--quick] [--only kills full mutations hostile] [--just TEXT]
                                  [--rounds X] [--seed S] [--at K] [--out docs/results]

Every part draws its trials from the seed, target by target. A trial is a command of `ldm` in a
small world of its own:

kills      it is killed at a file operation, then run again: the files must be those of a run that
           was never killed
full       the disk is full from a file operation on, or (where mounting is allowed) a small tmpfs
           is: it must end with one line, and run again with room, or finish all the same, give the
           same files
mutations  a file that it reads is damaged: it must give the same files, or refuse in one line;
           files that nobody can check (foreign images and weights, records for people) may also
           give other results, as may a corrupt image that is named and left out
hostile    a file is made to run code, to fill the memory, to hang, to write elsewhere, or to write
           to the terminal

Prints a table and every fault; writes campaign.md and campaign.json to --out. To look at one trial,
name it by --only, --just and --at: its folder is kept.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from benchmarks import hostile, mutations, trials, world
from benchmarks.comparison import add_out, describe_machine, make_parser
from benchmarks.trials import Fault, Outcome, changed, contents, copy, run, seeded
from benchmarks.world import JOBS, Job, reference
from ldm.tables import markdown_table, text_table

GOOD = ("same", "refused", "accepted")
FAULTS = ("wrong", "blocked", "unexpected", "hung", "memory", "code", "escape")
"""Kinds of faults: other data were accepted; a command cannot go on; a traceback or an
"unexpected" line; no end within a minute; too much memory; foreign code ran or a file elsewhere
changed; raw escape sequences on the terminal."""
PARTS = {"kills": 12, "full": 6, "mutations": 20, "hostile": 1}
"""Trials of each target at --rounds 1."""
TOO_MUCH = 3 << 29
LEFT_OUT = "skipped a corrupt image: "


@dataclass(frozen=True)
class Trial:
    """One command, what befell it, and the verdict."""

    part: str
    target: str
    number: int
    what: str
    verdict: str
    text: str = ""


@dataclass
class Campaign:
    """The settings, and the trials so far."""

    folder: Path
    seed: int = 0
    rounds: float = 1.0
    just: str = ""
    at: int | None = None
    trials: list[Trial] = field(default_factory=list)
    progress: Callable[[str], object] = print

    def numbers(self, part: str, target: str) -> list[int]:
        """Return the numbers of a target's trials, none if it was not asked for."""
        if self.just not in target:
            return []
        count = max(1, round(PARTS[part] * self.rounds))
        return list(range(count)) if self.at is None else [self.at]

    def add(self, trial: Trial) -> None:
        """Keep a trial; report a fault at once."""
        self.trials.append(trial)
        if trial.verdict in FAULTS:
            name = f"{trial.part} {trial.target} --at {trial.number}"
            self.progress(f"{trial.verdict}: {name}: {trial.what}: {trial.text}")

    def faults(self) -> list[Trial]:
        """List the trials that failed."""
        return [trial for trial in self.trials if trial.verdict in FAULTS]


def judge(outcome: Outcome, folder: Path) -> str:
    """Return the fault of a command that was not to be accepted blindly, or how it ended."""
    if (folder / trials.CANARY).exists():
        return "code"
    if outcome.code is None:
        return "hung"
    if outcome.peak > TOO_MUCH or "MemoryError" in outcome.text:
        return "memory"
    if outcome.unexpected:
        return "unexpected"
    return "done" if outcome.code == 0 else "refused" if outcome.refused else "unexpected"


# --------------------------------------------------------------------------- kills, full disks
def kills(campaign: Campaign, world_folder: Path) -> None:
    """Kill every job at operations drawn evenly over a whole run; run it again; compare."""
    for name, job in JOBS.items():
        if not (numbers := campaign.numbers("kills", name)):
            continue
        trial = campaign.folder / "trial"
        expected, operations, _ = reference(name, world_folder, trial)
        for number in numbers:
            random = seeded(campaign.seed, "kills", name, number)
            fault = Fault(
                random.randint(1, operations), torn=random.choice((0, 1, random.random()))
            )
            copy(world_folder, job.needs, trial)
            first = run(job.words, trial, fault)
            what = f"killed at operation {fault.at} of {operations}"
            campaign.add(_again("kills", name, number, what, job, trial, expected, first))


def _again(
    part: str,
    name: str,
    number: int,
    what: str,
    job: Job,
    trial: Path,
    expected: dict[str, str],
    first: Outcome,
) -> Trial:
    """Run a job again that a fault has ended; compare its files with those of a whole run."""
    outcome = first if first.code == 0 else run(job.words, trial)
    if outcome.refused and job.again and "--force" in outcome.text:
        outcome = run((*job.words, *job.again), trial)
    verdict, text = judge(outcome, trial), outcome.last
    if verdict == "refused":
        verdict = "blocked"
    if verdict == "done":
        different = changed(expected, contents(trial))
        verdict, text = ("wrong" if different else "same"), ", ".join(different[:6])
    return Trial(part, name, number, what, verdict, text)


def full(campaign: Campaign, world_folder: Path) -> None:
    """Fill the disk under every job, then run it again with room."""
    mountable = _can_mount(campaign.folder / "disk")
    for name, job in JOBS.items():
        if not (numbers := campaign.numbers("full", name)):
            continue
        trial = campaign.folder / "trial"
        expected, operations, size = reference(name, world_folder, trial)
        for number in numbers:
            random = seeded(campaign.seed, "full", name, number)
            if mountable and number % 2:
                room = random.randint(1, max(1, size // 1024 - 8))
                what = f"a disk with {room} KiB free, of {size // 1024}"
                with _disk(campaign.folder / "disk", world_folder, job.needs, room) as (disk, grow):
                    first = run(job.words, disk)
                    grow()
                    found = _again("full", name, number, what, job, disk, expected, first)
            else:
                fault = Fault(random.randint(1, operations), full=True)
                what = f"the disk full at operation {fault.at} of {operations}"
                first = run(job.words, copy(world_folder, job.needs, trial), fault)
                found = _again("full", name, number, what, job, trial, expected, first)
            end = judge(first, trial)
            if end in FAULTS:
                found = Trial("full", name, number, what, end, first.last)
            campaign.add(found)


def _can_mount(point: Path) -> bool:
    point.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(point)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(point)], check=True)
    return True


@contextmanager
def _disk(
    point: Path, world_folder: Path, needs: Sequence[str], room: int
) -> Iterator[tuple[Path, Callable[[], object]]]:
    """Yield a copy of the needed files on a tmpfs with `room` KiB free, and a way to grow it."""

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)], check=True)

    mount("size=1g")
    try:
        trial = copy(world_folder, needs, point / "trial")
        shutil.copytree(point.with_name("tools"), point / "tools")
        (point / "trial.log").write_bytes(b"x" * 65536)  # room for the command's lines
        used = shutil.disk_usage(point).used // 1024
        mount(f"remount,size={used + room}k")
        yield trial, lambda: mount("remount,size=1g")
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


# ------------------------------------------------------------------------- damaged and hostile
def mutate(campaign: Campaign, world_folder: Path) -> None:
    """Damage every kind of file, and run a command that reads it."""
    for name, subject in mutations.SUBJECTS.items():
        if not (numbers := campaign.numbers("mutations", name)):
            continue
        trial = campaign.folder / "trial"
        world.provide(world_folder, subject.needs)
        outcome = run(subject.words, copy(world_folder, subject.needs, trial))
        assert outcome.code == 0, f"{name}: {outcome.text[-800:]}"
        expected = subject.results(contents(trial))
        for number in numbers:
            copy(world_folder, subject.needs, trial)
            random = seeded(campaign.seed, "mutations", name, number)
            what = mutations.damage(subject, trial, random)
            outcome = run(subject.words, trial)
            verdict, text = judge(outcome, trial), outcome.last
            if verdict == "done":
                different = changed(expected, subject.results(contents(trial)))
                strict = subject.strict and LEFT_OUT not in outcome.text
                verdict = "same" if not different else "wrong" if strict else "accepted"
                text = ", ".join(different[:6])
            campaign.add(Trial("mutations", name, number, what, verdict, text))


def attack(campaign: Campaign, world_folder: Path) -> None:
    """Give every command the hostile files meant for it."""
    for name, case in hostile.cases().items():
        for number in campaign.numbers("hostile", name)[:1]:
            world.provide(world_folder, case.needs)
            trial = copy(world_folder, case.needs, campaign.folder / "trial")
            precious = campaign.folder / "precious.txt"
            precious.write_text("precious\n")
            case.prepare(trial)
            outcome = run(case.words, trial, terminal=True, seconds=25)
            verdict, text = judge(outcome, trial), outcome.last
            if precious.read_text() != "precious\n":
                verdict, text = "code", "a file elsewhere was changed"
            elif any(mark in outcome.text for mark in hostile.RAW):
                verdict = "escape"
            elif verdict == "done":
                verdict = "accepted"
            campaign.add(Trial("hostile", name, number, case.what, verdict, text))


# ---------------------------------------------------------------------------------- the table
HEADER = ("part", "target", "trials", *GOOD, *FAULTS)


def table(found: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Count verdicts by target, with a sum for each part; hostile cases have one row."""
    rows = []
    for part in PARTS:
        counts: dict[str, Counter[str]] = {}
        for trial in found:
            if trial.part == part:
                counts.setdefault(trial.target, Counter())[trial.verdict] += 1
        if part != "hostile":
            rows += [_row(part, target, count) for target, count in counts.items()]
        if counts:
            rows.append(_row(part, "all", sum(counts.values(), Counter())))
    return rows


def _row(part: str, target: str, count: Counter[str]) -> tuple[str, ...]:
    return (part, target, str(count.total()), *(str(count[name]) for name in (*GOOD, *FAULTS)))


def write(folder: Path, campaign: Campaign, seconds: float) -> None:
    """Write `campaign.json` and `campaign.md`."""
    import torch

    facts = describe_machine(torch.device("cpu"), "fp32")
    facts |= {"seed": str(campaign.seed), "rounds": f"{campaign.rounds:g}"}
    facts |= {"minutes": f"{seconds / 60:.1f}"}
    faults = campaign.faults()
    rows = table(campaign.trials)
    folder.mkdir(parents=True, exist_ok=True)
    tree = {**facts, "header": HEADER, "rows": rows, "faults": [asdict(fault) for fault in faults]}
    text = json.dumps(tree, indent=1, ensure_ascii=True)
    (folder / "campaign.json").write_text(text + "\n", "utf-8")
    lines = ["# Kills, full disks, damaged and hostile files", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", f"{len(campaign.trials):,} trials, {len(faults)} faults.", ""]
    lines += markdown_table(HEADER, rows, left=2)
    if faults:
        lines += ["", "## Faults", ""]
        lines += [f"- {f.verdict}: {f.part} `{f.target}` --at {f.number}: {f.what!r}: {f.text!r}"
                  for f in faults]  # fmt: skip
    (folder / "campaign.md").write_text("\n".join(lines) + "\n", "utf-8")


def conduct(campaign: Campaign, parts: Sequence[str]) -> None:
    """Make the world, and go through the parts."""
    trials.import_everything()
    world_folder = world.make(campaign.folder)
    runs = {"kills": kills, "full": full, "mutations": mutate, "hostile": attack}
    for part in parts:
        runs[part](campaign, world_folder)


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the exit status is 1 if there are faults."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial run: --rounds 0.1")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--just", default="", help="targets whose name contains this")
    parser.add_argument("--rounds", type=float, help="scale of the numbers of trials; default: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, help="only this trial; its folder is kept")
    add_out(parser)
    given: argparse.Namespace = parser.parse_args(words)
    rounds = given.rounds or (0.1 if given.quick else 1.0)
    begun, folder = time.monotonic(), Path(mkdtemp(prefix="campaign-"))
    campaign = Campaign(folder, given.seed, rounds, given.just, given.at)
    try:
        conduct(campaign, given.only)
    except KeyboardInterrupt:  # the table so far
        print("interrupted")
    finally:
        if given.at is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"kept: {folder / 'trial'}")
    for line in text_table(HEADER, table(campaign.trials)):
        print(line)
    write(given.out, campaign, time.monotonic() - begun)
    faults = campaign.faults()
    print(f"{len(campaign.trials):,} trials, {len(faults)} faults: {given.out / 'campaign.md'}")
    print(f"again: python -m benchmarks.campaign {shlex.join(words or sys.argv[1:])}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
