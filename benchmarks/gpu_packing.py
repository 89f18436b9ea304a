"""What a visit to a borrowed GPU brings home, and how it is taken up.

records.tar.gz has the records of the runs finished in this visit, models.tar their weights (matrices in half
precision), resume-1.tar to resume-3.tar the checkpoints of unfinished runs. The first member of an archive,
contents.json, names the commit and the SHA-256 of every file. An archive takes the place of the one before
by renaming, so it is whole at any kill. The lender gives back eight
files of 16 MiB, 64 MiB together: seven are planned (bench.json and log.txt are the others), for a kill can
leave one that is half written.
"""
import hashlib
import io
import json
import pickle
import re
import tarfile
import zlib
from pathlib import Path

import torch
import yaml

from bas_repro import core, runs

MOST = 15 * 2**20  # bytes of an archive
ROOM = 46 * 2**20  # bytes of all archives together
RESUMES = 3  # archives of checkpoints
GROWTH = 0.8  # share of an archive of checkpoints that is filled: they grow
BENCH = "outputs/07_timing/gpu/metrics.json"  # where bench.json goes
MEMBER = re.compile(r"outputs/\w[\w.-]*/\w[\w.+-]*/\w[\w.-]*")  # a file of a run
FAULTS = (tarfile.TarError, pickle.UnpicklingError, EOFError, OSError, zlib.error, KeyError, ValueError)


def archive(
    files: dict[str, bytes],
    zipped: bool = False,
) -> bytes:
    "A tar archive of some files, its contents in front."
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    contents = json.dumps({"commit": core.code()["commit"], "files": digests}).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if zipped else "w") as tar:
        for name, data in {"contents.json": contents, **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def read_archive(path: Path) -> tuple[str, dict[str, bytes]]:
    "An archive's commit and files; `ValueError` in one line if it is not whole."
    try:
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
        contents = json.loads(files.pop("contents.json"))
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        if digests != contents["files"]:
            raise ValueError("not all that its contents name is there")
        return contents["commit"], files
    except FAULTS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        raise ValueError(f"{path} is cut short or damaged ({reason}): fetch it again") from None


def _bytes(path: Path) -> bytes | None:
    "A file's bytes; None if it is not there."
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _files(
    run: runs.Run,
    *names: str,  # of files in its folder
) -> dict[str, bytes]:
    "Those files of a run that are there, by their paths from the repository's root."
    found = {name: _bytes(run.folder/name) for name in names}
    folder = run.folder.relative_to(core.root()).as_posix()
    return {f"{folder}/{name}": data for name, data in found.items() if data is not None}


def _half(run: runs.Run) -> bytes | None:
    "A finished run's weights with its matrices in half precision; None if they are not there."
    if not (run.folder/"model.pt").exists():
        return None
    state = core.read_state(run.folder/"model.pt", "the weights of a run")
    wide = {name: t for name, t in state.items() if t.is_floating_point() and t.dim() > 1}
    buffer = io.BytesIO()
    torch.save(state | {name: t.half() for name, t in wide.items()}, buffer)
    return buffer.getvalue()


def _size(files: dict[str, bytes]) -> int:
    "About how many bytes some files take in an archive."
    return sum(len(data) + 2048 for data in files.values())


class Packer:
    "Packs what some runs leave, as often as it is asked; what was complete before stays out."

    def __init__(self, queue: list, out: Path):
        self.queue = [run for run in queue if not run.record()]
        self.out = out
        self.halves = {}  # run's name → weights of a finished run
        self.places = {}  # run's name → number of its archive of checkpoints; it never moves
        self.left = []  # what found no room, in words

    def pack(self) -> list[str]:
        "Write all archives anew; what found no room, a line each. Finished runs first, so that none is lost."
        for stale in self.out.glob(".*.part"):
            stale.unlink()
        self.left = []
        done, begun = self._state()
        records = {name: data for run in done for name, data in self._records(run).items()}
        room = ROOM - self._write("records.tar.gz", archive(records, True) if records else b"")
        models = self._models(done, min(room, MOST))
        room -= self._write("models.tar", archive(models) if models else b"")
        for number, files in self._checkpoints(begun, room).items():
            self._write(f"resume-{number}.tar", archive(files) if files else b"")
        return self.left

    def _state(self) -> tuple[list, dict]:
        "Finished runs, and the files of begun ones."
        done, begun = [], {}
        for run in self.queue:
            files = _files(run, "params.yaml", "log.csv", "checkpoint.pt")  # before the look for its record
            if run.record():
                done.append(run)
            elif any(name.endswith(".pt") for name in files):
                begun[run.name] = files
        return done, begun

    def _records(self, run) -> dict[str, bytes]:
        "All that a finished run left besides weights."
        names = [path.name for path in run.folder.iterdir() if path.suffix != ".pt" and path.name[0] != "."]
        return _files(run, *sorted(names))

    def _models(self, done: list, room: int) -> dict[str, bytes]:
        "Weights in the order of the queue, as many as find room."
        models = {}
        for run in done:
            if run.name not in self.halves:
                self.halves[run.name] = _half(run)
            if self.halves[run.name] is None:
                continue
            one = _files(run, "params.yaml", "metrics.json")
            one[f"{run.folder.relative_to(core.root()).as_posix()}/model.pt"] = self.halves[run.name]
            if _size(models | one) > room:
                self.left.append(f"no room for the weights of {run.name}: its record comes back alone")
                continue
            models |= one
        return models

    def _checkpoints(self, begun: dict, room: int) -> dict[int, dict]:
        "Number of an archive → its files."
        archives = {number: {} for number in range(1, RESUMES + 1)}
        for name, files in begun.items():
            number = self.places.get(name) or self._place(archives, files, begun)
            held = sum(map(_size, archives.values()))
            if not number or _size(archives[number] | files) > MOST or held + _size(files) > room:
                self.left.append(f"no room for the checkpoint of {name}: it will start anew")
                continue
            self.places[name] = number
            archives[number] |= files
        return archives

    def _place(self, archives: dict, files: dict, begun: dict) -> int | None:
        "The first archive with room for some files besides those that have their place in it."
        for number in archives:
            held = [begun[name] for name, place in self.places.items() if place == number and name in begun]
            if sum(map(_size, held)) + _size(files) <= GROWTH * MOST:
                return number
        return None

    def _write(self, name: str, data: bytes) -> int:  # bytes
        "Put an archive in the place of the one before; an empty one is taken away."
        if not data:
            (self.out/name).unlink(missing_ok=True)
            return 0
        with core.whole(self.out/name) as part:
            part.write_bytes(data)
        return len(data)


def _runs_of(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    "Folder of a run → its files by name. `ValueError` for a path that is no run's file."
    folders = {}
    for path, data in files.items():
        if not MEMBER.fullmatch(path) or ".." in path:
            raise ValueError(f"holds {path!r}, which is no file of a run")
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = data
    return folders


def _rows(log: bytes | None) -> int:
    "How many epochs a log has."
    return len(log.splitlines()) - 1 if log else 0


def _settings(name: str, data: bytes) -> dict | None:
    "The settings that a file of a run names; None if it names none."
    if name == "metrics.json":
        return json.loads(data)["settings"]
    if name == "params.yaml":
        return yaml.safe_load(data)
    if name == "checkpoint.pt":
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["settings"]
    return None


def _check_settings(folder: Path, files: dict[str, bytes]) -> None:
    "`ValueError` in one line if some file belongs to a run with other settings than the folder's name says."
    named = {name: _settings(name, data) for name, data in files.items()}
    if not any(named.values()):
        raise ValueError(f"{folder.name} has no params.yaml that says whose it is")
    for name, settings in named.items():
        if settings is not None and runs.of(settings, folder.parent).name != folder.name:
            ours = runs.of(settings, folder.parent).name
            raise ValueError(f"{folder.name}/{name} has the settings of {ours}: it is left out")


def _accept(folder: Path, files: dict[str, bytes]) -> str:
    "Put a run's files in its folder, the record last; nothing that is finished there is replaced. In words."
    _check_settings(folder, files)
    record = _bytes(folder/"metrics.json")
    ours = files.get("metrics.json")
    if record and ours and json.loads(record) != json.loads(ours):
        raise ValueError(f"{folder.name} is complete here with another record, which stays")
    if "model.pt" in files and (folder/"model.pt").exists() or "checkpoint.pt" in files and record:
        return f"{folder.name} was complete here"
    if "checkpoint.pt" in files and (folder/"checkpoint.pt").exists():
        if _rows(_bytes(folder/"log.csv")) >= _rows(files.get("log.csv")):
            return f"{folder.name} was as far here"
    for name in sorted(files, key=lambda name: name == "metrics.json"):
        with core.whole(folder/name) as part:
            part.write_bytes(files[name])
    if ours:
        (folder/"checkpoint.pt").unlink(missing_ok=True)
    return f"{folder.name}: {', '.join(sorted(files))}"


def _same_commit(path: Path, commit: str, any_commit: bool) -> None:
    "`ValueError` in one line if an archive is of another commit and that matters."
    here = core.code()["commit"]
    if commit != here and not any_commit:
        words = f"{path} is of commit {commit[:12]}, this is {here[:12]}"
        raise ValueError(f"{words}: check that one out, or take it as it is with --any-commit")


def _take_archive(path: Path, any_commit: bool) -> tuple[list[str], list[str]]:
    "What was taken from an archive and what was not, a line each."
    commit, files = read_archive(path)
    _same_commit(path, commit, any_commit)
    taken, refused = [], []
    for name, one in _runs_of(files).items():
        try:
            taken.append(_accept(core.root()/name, one))
        except (*FAULTS, TypeError, RuntimeError, yaml.YAMLError) as error:
            refused.append(f"{path.name}: {str(error).splitlines()[0]}")
    return taken, refused


def _take_bench(path: Path, any_commit: bool) -> list[str]:
    "Keep bench.json, if any check ran; in words."
    bench = core.read_json(path)
    if not bench.get("lines"):
        return []
    _same_commit(path, bench["made"]["commit"], any_commit)
    core.write_json(core.root()/BENCH, bench)
    return [f"bench.json: {BENCH}"]


def unpack(
    folder: str | Path,  # with what came back
    any_commit: bool = False,  # also take up what another commit made
) -> tuple[list[str], list[str]]:  # what was taken, what was refused; a line each
    "Take up what came back: records, weights and checkpoints go to the folders of their runs."
    folder = Path(folder)
    order = ("records.tar.gz", "models.tar", *(f"resume-{n}.tar" for n in range(1, RESUMES + 1)))
    paths = [folder/name for name in ("bench.json", *order) if (folder/name).is_file()]
    if not paths:
        raise ValueError(f"{folder} has none of bench.json, {', '.join(order)}: give a folder that came back")
    taken, refused = [], []
    for path in paths:
        try:
            if path.name == "bench.json":
                taken += _take_bench(path, any_commit)
                continue
            ours, theirs = _take_archive(path, any_commit)
            taken += ours
            refused += theirs
        except ValueError as error:
            refused.append(str(error))
    return taken, refused
