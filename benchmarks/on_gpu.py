"""A quarter of an hour on a borrowed GPU: checks first (stage A), then runs of presets until the deadline.

    python benchmarks/on_gpu.py [--out FOLDER] [--deadline SECONDS] [--resume FOLDER] [--runs-at-once R]
                                [--checks SECONDS | --no-checks] [--any-commit] PRESET.yaml ...
    python benchmarks/on_gpu.py unpack FOLDER [--any-commit]
    python benchmarks/on_gpu.py --rehearse     # all of it on the CPU, on the digits, in minutes

Every check is a process of its own with a limit of its own: a hang or a crash never ends the others. What has
to be compiled is compiled meanwhile, each structure of a network in a process of its own. Runs are trained in
the order of the presets, R at once where they are equally long, with a checkpoint after an epoch, every ten seconds at most; every
minute what they left is packed into the output folder (gpu_packing.py says how). `unpack` takes it up at
home, `--resume` in the next visit. The tree over there has no .git: give BAS_COMMIT=$(git rev-parse HEAD).
CIFAR-10 travels as data/cifar10.tar.xz, a tree {train,test}/<class>/*, which git ignores; it is unpacked
there, into memory:

    mkdir -p /dev/shm/data/cifar10 && tar xf data/cifar10.tar.xz -C /dev/shm/data/cifar10 &&
    BAS_DATA=/dev/shm/data BAS_COMMIT=… python3 benchmarks/on_gpu.py params/04_cifar10/length.yaml
"""
import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("BAS_SAVE_EVERY", "10")  # seconds; bas_repro.train reads it when it is imported
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # in each of the processes that compile

import torch

from bas_repro import core, runs, train
from benchmarks import gpu_checks, gpu_packing

PROCESSES = multiprocessing.get_context("forkserver")
PACKING = 20.0  # seconds before the deadline at which training stops: to end an epoch, to evaluate, to pack
GRACE = 8.0  # seconds before the deadline at which training that has not stopped is killed
LEAST = 20.0  # seconds of training without which a visit is not begun
REPACK = 60.0  # seconds between packings
LANES = 12  # processes that compile
COMPILING = 90.0  # seconds for which training waits at most for what is compiled
FAILED = 3  # exit code: some runs failed, all others were trained
NEEDED = 64 * 2**20  # bytes that the output folder must have room for


class Visit(NamedTuple):
    "What all of a visit is told."
    out: Path  # where everything goes that is to come back
    end: float  # time.monotonic() of its deadline
    device: str  # cpu in a rehearsal
    checks: float = 240.0  # seconds of all checks together

    @property
    def log(self) -> Path:
        return self.out/"log.txt"

    def left(self) -> float:
        "Seconds to the deadline."
        return self.end - time.monotonic()

    def say(self, line: str) -> None:
        "Print a line, and keep it in the log."
        print(line, flush=True)
        try:
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(line + "\n")
        except OSError as error:
            print(f"log.txt: {error}", flush=True)


# Processes


def _orphaned() -> None:
    "Wait for the parent's end, and end with it: nothing goes on computing after a visit."
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def _enter(visit: Visit, root: Path) -> None:
    "Make a child a group of its own in a folder, its errors in the log."
    os.setpgrp()
    threading.Thread(target=_orphaned, daemon=True).start()
    os.chdir(root)
    try:
        log = os.open(visit.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError:
        return
    os.dup2(log, 2)


def _stop(process) -> None:
    "Kill a child and what it started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def serve() -> None:
    "Start the server that children are forked from, everything imported there."
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    PROCESSES.set_forkserver_preload(["bas_repro.train", "benchmarks.gpu_checks"])


# What has to be compiled


def structures(queue: list[runs.Run]) -> list[runs.Run]:
    "Of each structure of a network that is compiled, one run."
    free = ["seed", "epochs", "lr", "weight_decay", "gamma", "lam", "gate_bias"]
    one = {}
    for run in queue:
        if run.compile == "yes" and not run.record():
            unlike = free + ["weights"] if run.method.fixed else free
            one[str({name: value for name, value in run.identity.items() if name not in unlike})] = run
    return list(one.values())


def _compile(lane: list[runs.Run], visit: Visit, root: Path) -> None:
    "In a child: compile the steps of some runs; all processes share what is left on disk."
    _enter(visit, root)
    torch.set_num_threads(1)
    pictures = gpu_checks.noise_pictures(visit.device, 32, 1000)
    for run in lane:
        [trainee] = gpu_checks.at_start([run], visit.device, pictures)
        train.begin(trainee)
        train.step(trainee)


def compile_ahead(queue: list[runs.Run], visit: Visit) -> list:
    "Start processes that compile what a queue needs, each some of it, in its order."
    needed = structures(queue)
    lanes = [needed[i::LANES] for i in range(min(LANES, len(needed)))]
    found = [PROCESSES.Process(target=_compile, args=(lane, visit, core.root())) for lane in lanes]
    for process in found:
        process.start()
    return found


def await_all(compiling: list, visit: Visit) -> None:
    "Wait a while for what compiles; what is late goes on beside the training, which may come to it later."
    began = time.monotonic()
    for process in compiling:
        process.join(max(0.0, min(began + COMPILING, visit.end - PACKING) - time.monotonic()))
    if compiling:
        ended = [process.exitcode for process in compiling if process.exitcode is not None]
        words = f"{len(ended)} of {len(compiling)} that compile have ended, {sum(map(bool, ended))} badly"
        visit.say(f"{words}; {time.monotonic() - began:.0f} s awaited")


# Stage A


def _check(number: int, visit: Visit, root: Path, file: Path) -> None:
    "In a child: carry out a check; its results go to a file."
    _enter(visit, root)

    def left(results):
        found[:] = results
        core.write_json(file, {"results": results})

    found = []
    try:
        gpu_checks.carry_out(number, visit.device, left)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error) or 'without words').splitlines()[0]}"
        failed = gpu_checks.Result(gpu_checks.CHECKS[number].name, False, reason)
        left([*found, failed._asdict() | {"seconds": 0.0}])


def run_check(
    number: int,  # in gpu_checks.CHECKS
    visit: Visit,
    limit: float,  # seconds
    target=_check,
) -> list[dict]:
    "A check's results, from a process of its own; what became of it if it did not end by itself."
    name, began = gpu_checks.CHECKS[number].name, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"results.json"
        process = PROCESSES.Process(target=target, args=(number, visit, core.root(), file))
        process.start()
        process.join(limit)
        late = process.exitcode is None
        _stop(process)
        found = core.read_json(file)["results"] if file.exists() else []
    if late or process.exitcode:
        how = f"ran past its {limit:.0f} s" if late else f"died with exit code {process.exitcode}"
        failed = gpu_checks.Result(name, False, how)
        found.append(failed._asdict() | {"seconds": time.monotonic() - began})
    return found


def _line(found: dict) -> str:
    "A result as a line."
    result = gpu_checks.Result(**{name: found[name] for name in gpu_checks.Result._fields})
    return f"{gpu_checks.word(result)} {result.name}: {result.figure} [{found['seconds']:.1f} s]"


def stage_a(visit: Visit) -> list[dict]:
    "Carry out all checks; bench.json has what is known after each."
    lines, table = [], []
    end = min(time.monotonic() + visit.checks, visit.end - PACKING - LEAST)
    for number, check in enumerate(gpu_checks.CHECKS):
        limit = min(check.seconds, end - time.monotonic())
        if limit > 1:
            found = run_check(number, visit, limit)
        else:
            found = [gpu_checks.skipped(check.name, "more time")._asdict() | {"seconds": 0.0}]
        for one in found:
            visit.say(_line(one))
            table += one.pop("table")
        lines += found
        _try(visit, lambda: _write_bench(visit, lines, table))
    return lines


def _write_bench(visit: Visit, lines: list[dict], table: list[dict]) -> None:
    "bench.json, whole."
    made = core.environment(visit.device)
    core.write_json(visit.out/"bench.json", {"made": made, "lines": lines, "table1": table})


def _try(visit: Visit, write) -> bool:
    "Whether something could be written; if not, a line says so and what was there stays."
    try:
        write()
        return True
    except OSError as error:
        visit.say(f"error: {visit.out} takes no more ({error}): what was packed before stays")
        return False


# Stage B


def queue_of(presets: list[str]) -> list[runs.Run]:
    "The runs of some presets in their order, each once."
    return list(dict.fromkeys(run for path in presets for run in runs.preset(path).runs))


def _train(groups: list, at, end: float, visit: Visit, root: Path, ready) -> None:
    "In a child: train group after group, from number `at` on; an error of a run's own ends its group alone."
    _enter(visit, root)
    failed = False
    first = groups[at.value][0]
    with contextlib.suppress(ValueError, OSError):  # the sweep says so
        first.work.read(first, train.device_of(first))
    ready.wait()
    for number in range(at.value, len(groups)):
        at.value = number
        if time.monotonic() >= end:
            break
        try:
            train.sweep(groups[number], runs_at_once=len(groups[number]), deadline=end)
        except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError) as error:
            if "CUDA error" in str(error):
                raise  # nothing more can be computed in this process
            visit.say(f"FAILED {error}")
            failed = True
        visit.say(f"group {number + 1} of {len(groups)}: {', '.join(map(_state, groups[number]))}")
    sys.exit(FAILED if failed else 0)


def _state(run: runs.Run) -> str:
    "How far a run is, in words."
    return f"{run.name} {run.progress():.0%}"


def _pack(visit: Visit, packer: gpu_packing.Packer) -> bool:
    "Pack what there is; whether that worked."
    return _try(visit, packer.pack)


def _follow(process, visit: Visit, packer: gpu_packing.Packer) -> None:
    "Pack every minute while a child trains; kill it where it would outlast the deadline."
    while process.exitcode is None:
        process.join(max(0.0, min(REPACK, visit.left() - GRACE)))
        if process.exitcode is None and visit.left() <= GRACE:
            visit.say("training did not stop in time and was killed: its last checkpoints come back")
            _stop(process)
        elif process.exitcode is None:
            _pack(visit, packer)


def stage_b(visit: Visit, queue: list[runs.Run], at_once: int, compiling: list) -> bool:
    "Train until the deadline and pack. Whether all went well."
    packer = gpu_packing.Packer(queue, visit.out)
    groups, end = train.groups(packer.queue, at_once), visit.end - PACKING
    before = {run.name: run.progress() for run in packer.queue}
    at, code, ready = PROCESSES.Value("i", 0), 0, PROCESSES.Event()
    while at.value < len(groups) and time.monotonic() < end:
        process = PROCESSES.Process(target=_train, args=(groups, at, end, visit, core.root(), ready))
        process.start()
        if not ready.is_set():
            await_all(compiling, visit)
            ready.set()
        _follow(process, visit, packer)
        code = code or process.exitcode
        if process.exitcode in (0, FAILED):
            break
        words = f"training died (exit code {process.exitcode}) in group {at.value + 1}"
        visit.say(f"error: {words}; on with the next")
        at.value += 1
    for process in compiling:
        _stop(process)
    packed = _pack(visit, packer)
    for line in packer.left:
        visit.say(line)
    further = _report(visit, packer.queue, before)
    if queue and not further and not code:
        words = f"the deadline is too short for an epoch of {packer.queue[0].name}"
        visit.say(f"error: {words}: give --deadline more seconds")
    return packed and further and not code


def _report(visit: Visit, queue: list[runs.Run], before: dict) -> bool:
    "Say how far each run came. Whether any came further, or none had to."
    for run in queue:
        visit.say(f"{_state(run)}{' (new record)' if run.record() else ''}")
    return not queue or any(run.progress() > before[run.name] for run in queue)


# The command line


def _check_place(out: str | None) -> Path:
    "The output folder. `ValueError` in one line if it is not given, full or not to be written."
    if not out:
        raise ValueError("no --out FOLDER, and $OUT is not set: say where the results go")
    try:
        with core.whole(Path(out)/"log.txt") as part:
            part.write_bytes(b"")
        free = shutil.disk_usage(out).free
    except OSError as error:
        words = f"nothing can be written there ({error})"
        raise ValueError(f"--out {out}: {words}: give another folder") from None
    if free < NEEDED:
        raise ValueError(f"--out {out}: {free >> 20} MiB are free, {NEEDED >> 20} are needed")
    return Path(out).resolve()


def _check_machine(device: str) -> None:
    "`ValueError` in one line if there is no GPU, or if nothing says which commit this is."
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: this needs one; --rehearse runs all of it on the CPU")
    if core.code()["commit"] == "unknown":
        raise ValueError("BAS_COMMIT is not set and there is no git here: BAS_COMMIT=$(git rev-parse HEAD)")


def _check_time(options: argparse.Namespace) -> None:
    "`ValueError` in one line if there is no time for the first run."
    least = PACKING + LEAST
    if options.deadline < least:
        words = f"--deadline {options.deadline:g} s is too short for the first run"
        raise ValueError(f"{words}: give {least:g} or more")
    if options.runs_at_once < 1:
        raise ValueError(f"--runs-at-once {options.runs_at_once}: give 1 or more")


def take_up(folder: str, any_commit: bool, say=print) -> bool:
    "Unpack what came back; whether nothing was refused."
    taken, refused = gpu_packing.unpack(folder, any_commit)
    for line in taken:
        say(line)
    for line in refused:
        say(f"error: {line}")
    return not refused


def visit(options: argparse.Namespace, device: str, began: float) -> bool:
    "Stage A, then stage B. Whether all went well."
    _check_machine(device)
    _check_time(options)
    queue = queue_of(options.presets)
    this = Visit(_check_place(options.out), began + options.deadline, device, options.checks)
    well, compiling = True, compile_ahead(queue, this)
    if options.resume:
        well = take_up(options.resume, options.any_commit, this.say)
    if not options.no_checks:
        well = all(line["passed"] is not False for line in stage_a(this)) and well
    return stage_b(this, queue, options.runs_at_once, compiling) and well


def arguments(words: list[str] | None) -> argparse.Namespace:
    "The command line's words."
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("presets", nargs="*", metavar="PRESET.yaml", help="by priority; or: unpack FOLDER")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="what is to come back ($OUT)")
    parser.add_argument("--deadline", type=float, default=560, help="seconds of the whole visit (560)")
    parser.add_argument("--resume", metavar="FOLDER", help="with what came back from the visit before")
    parser.add_argument("--runs-at-once", type=int, default=8, metavar="R", help="that many side by side (8)")
    parser.add_argument("--checks", type=float, default=240, metavar="SECONDS", help="of all checks (240)")
    parser.add_argument("--no-checks", action="store_true", help="stage B alone")
    parser.add_argument("--any-commit", action="store_true", help="also take up what another commit made")
    parser.add_argument("--rehearse", action="store_true", help="all of it on the CPU, in small")
    options = parser.parse_args(words)
    options.unpack = options.presets[:1] == ["unpack"]
    if options.unpack and len(options.presets) != 2 or options.rehearse and options.presets:
        parser.error("it is: unpack FOLDER; or --rehearse alone; or presets")
    return options


def main(words: list[str] | None = None) -> None:
    "Do what the command line says; exit code 1 if something failed."
    options, began = arguments(words), time.monotonic()
    try:
        if options.unpack:
            well = take_up(options.presets[1], options.any_commit)
        elif options.rehearse:
            from benchmarks import gpu_rehearsal
            well = gpu_rehearsal.rehearse()
        else:
            serve()
            well = visit(options, "cuda", began)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
