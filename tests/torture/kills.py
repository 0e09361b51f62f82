"""SIGINT, SIGTERM and kill -9 at random moments of builds, extractions, conversions, pushes and prunings.

Each round runs one command in a place of its own and ends it: at a moment of its whole life, the interpreter's start and the
commit included, or right before the n-th call by which a file or a connection gets anywhere. Then nothing of it may run, the
target must be what it was before or complete, no name may be left that is not documented, blobs must be what their names
say, the cache must open. Run again without a signal, the command must give what it always gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from outcome import ROOT, Outcome, parser

sys.path.insert(0, str(ROOT / "tests"))

from reference.blobs import tar_of
from registry import registry

import estargz

PROGRAM = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())"]
PATIENCE = 60.0  # seconds in which whatever was signalled must have ended, also where much else runs
QUICK_KILLS = 34
KILLS = 1400  # of which a thousand come in time
LOOK_OUTSIDE = 20  # skopeo looks at every so-manieth image
# signal -> the statuses that say that the process has heeded it
SIGNALS = {
    signal.SIGINT: (130, -signal.SIGINT),
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGKILL: (-signal.SIGKILL,),
}
# Calls by which something gets its name, its place on the disk, or to a registry. No openat: hundreds open modules.
CALLS = "fsync,fdatasync,link,linkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,flock,pwrite64,sendto"
# What the interpreter says, with a status of its own, when a signal ends it before anything of this package runs: any of
# the steps of its start may be the one (init_sys_streams, init_import_site).
STARTING = "Fatal Python error: init_"
TEMPORARY = re.compile(r"\.estargz-[0-9a-f]+\.tmp")  # docs/embedding.md
MANIFESTS = "application/vnd.oci.image.manifest.v1+json"
NOISE = 0.4  # of the files' bytes


Call = tuple[str, int]
"""A call by its name, and which of a thread's calls of that name it is: strace counts them so."""


class Torn(Exception):
    """A target that is neither as it was nor complete."""


@dataclass(frozen=True)
class World:
    """What all rounds share: a tree, a tar, a blob, an image in a layout, a cache that has its layers, and a registry."""

    given: Path
    host: str

    @classmethod
    @contextlib.contextmanager
    def made(cls, folder: Path) -> Iterator[World]:
        rng = random.Random(3)
        given = folder / "given"
        files = {}
        for number in range(60):
            size = rng.randrange(1000, 200_000)
            noise = rng.randbytes(int(size * NOISE))
            files[f"d{number % 7}/f{number}"] = noise + b"text " * ((size - len(noise)) // 5)
        for name, data in files.items():
            (given / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (given / "tree" / name).write_bytes(data)
        (given / "tar").write_bytes(tar_of(*files.items()))
        estargz.build(given / "tree", given / "blob")
        estargz.build(given / "tar", given / "old", compression="gzip")
        image = estargz.Image.new("linux/amd64").append(given / "tree").append(given / "tar")
        image.export(f"type=oci,tar=false,dest={given}/image,name=a:1,compression=gzip")
        small = estargz.Image.new("linux/amd64").append(given / "old")
        small.export(f"type=oci,tar=false,dest={given}/small,name=a:1")
        with estargz.VariantStore(given / "cache") as cache:
            estargz.convert(f"oci:{given}/image", f"oci:{given}/converted:1", compression="estargz", cache=cache)
        (folder / "registry").mkdir()
        with registry(folder / "registry") as started:
            yield cls(given, started.host)


# ---------------------------------------------------------------------------------------------------------------------
# what targets are: a state is None where there is nothing, and else a digest of all that is there


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def file_state(path: Path) -> str | None:
    return digest(path.read_bytes()) if path.exists() else None


def tree_state(folder: Path) -> str | None:
    if not folder.exists():
        return None
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        found.update(f"{path.relative_to(folder)} {path.lstat().st_mode} {digest(data)}\n".encode())
    return found.hexdigest()


def check_blobs(folder: Path) -> None:
    for path in folder.glob("blobs/sha256/*"):
        if not TEMPORARY.fullmatch(path.name) and digest(path.read_bytes()) != f"sha256:{path.name}":
            raise Torn(f"{path.name} has other bytes than its name says")


def layout_state(folder: Path) -> str | None:
    """What index.json names, having read all that it leads to."""
    check_blobs(folder)
    if not (folder / "index.json").exists():
        return None
    waiting = json.loads((folder / "index.json").read_bytes())["manifests"]
    names = json.dumps(waiting, sort_keys=True)
    while waiting:
        descriptor = waiting.pop()
        path = folder / "blobs" / descriptor["digest"].replace(":", "/")
        if not path.exists():
            raise Torn(f"{descriptor['digest']} is named and missing")
        if "manifest" in descriptor["mediaType"]:
            document = json.loads(path.read_bytes())
            waiting += [document["config"], *document["layers"]]
    return digest(names.encode())


def cache_state(folder: Path) -> str | None:
    """Nothing to compare, for times differ: that it opens, that its tables are whole, and its blobs what they are called."""
    if not folder.exists():
        return None
    check_blobs(folder)
    if (folder / "index.sqlite").exists():
        with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as database:
            (found,) = database.execute("PRAGMA integrity_check").fetchone()
        if found != "ok":
            raise Torn(f"the cache's tables are damaged: {found}")
    with estargz.VariantStore(folder) as cache:
        cache.usage()
        cache.prune(grace=0)
        check_blobs(folder)
    return None


def registry_state(host: str, repository: str) -> str | None:
    """What the tag names, having fetched all that it leads to."""
    try:
        manifest = fetched(f"http://{host}/v2/{repository}/manifests/1")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None
    document = json.loads(manifest)
    for descriptor in [document["config"], *document["layers"]]:
        if digest(fetched(f"http://{host}/v2/{repository}/blobs/{descriptor['digest']}")) != descriptor["digest"]:
            raise Torn(f"{descriptor['digest']} has other bytes in the registry")
    return digest(manifest)


def fetched(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers={"Accept": MANIFESTS}), timeout=30) as answer:
        return bytes(answer.read())


# ---------------------------------------------------------------------------------------------------------------------
# jobs


@dataclass(frozen=True)
class Job:
    """A command; {place} is a directory of the round, {name} a name of its own in the registry.

    before:    what is there already: name in the place -> name of what is given
    state:     of the target, which raises Torn
    piped:     a tar comes through a pipe on standard input
    partial:   what kill -9 leaves is completed when it runs again, and may be in part until then (docs/extract.md)
    outside:   where skopeo finds the image
    """

    name: str
    arguments: str
    state: Callable[[World, Path, str], str | None]
    before: tuple[tuple[str, str], ...] = ()
    piped: bool = False
    partial: bool = False
    outside: str = ""


def file_at(name: str) -> Callable[[World, Path, str], str | None]:
    return lambda world, place, _: file_state(place / name)


def layout_at(name: str) -> Callable[[World, Path, str], str | None]:
    def state(world: World, place: Path, _: str) -> str | None:
        cache_state(place / "cache")
        return layout_state(place / name)

    return state


CONVERT = "convert oci:{given}/image"
JOBS = [
    Job("tree", "build {given}/tree -o {place}/blob", file_at("blob")),
    Job("tree over a blob", "build {given}/tree -o {place}/blob", file_at("blob"), (("blob", "old"),)),
    Job(
        "zstd over a blob", "build {given}/tar -o {place}/blob --compression zstd", file_at("blob"), (("blob", "old"),)
    ),
    Job("pipe to path", "build - -o {place}/blob", file_at("blob"), piped=True),
    Job("pipe to pipe", "build - -o -", file_at("stdout"), piped=True),
    Job("prefetch", "build - -o {place}/blob --prefetch d1/**", file_at("blob"), piped=True),
    Job(
        "extract",
        "extract {given}/blob {place}/tree --no-same-owner",
        lambda _, place, __: tree_state(place / "tree"),
        partial=True,
    ),
    Job("unpack", "unpack {given}/blob -o {place}/tar", file_at("tar")),
    Job("convert", CONVERT + " oci:{place}/out:1 --compression estargz", layout_at("out"), outside="oci:{place}/out:1"),
    Job(
        "convert over a layout",
        CONVERT + " oci:{place}/out:1 --compression zstd",
        layout_at("out"),
        (("out", "converted"),),
    ),
    Job("fill a cache", CONVERT + " oci:{place}/out:1 --compression estargz --cache {place}/cache", layout_at("out")),
    Job(
        "use a cache",
        CONVERT + " oci:{place}/out:1 --compression estargz --cache {place}/cache",
        layout_at("out"),
        (("cache", "cache"),),
    ),
    Job(
        "image to an archive",
        "image build --layer {given}/tree --layer {given}/tar --output type=oci,dest={place}/image.tar,name=a:1",
        file_at("image.tar"),
        outside="oci-archive:{place}/image.tar",
    ),
    Job(
        "image to a layout",
        "image build --layer {given}/tree --layer {given}/tar --output type=oci,tar=false,dest={place}/out,name=a:1",
        layout_at("out"),
        (("out", "small"),),
    ),
    Job(
        "push",
        CONVERT + " docker://{host}/{name}:1 --compression estargz",
        lambda world, _, name: registry_state(world.host, name),
        outside="docker://{host}/{name}:1",
    ),
    Job(
        "build and push",
        "image build --from oci:{given}/small --layer {given}/tree --cache {place}/cache "
        "--output type=image,name={host}/{name}:1,push=true,compression=estargz",
        lambda world, place, name: cache_state(place / "cache") or registry_state(world.host, name),
    ),
    Job(
        "prune",
        "cache prune --all --cache {place}/cache",
        lambda _, place, __: cache_state(place / "cache"),
        (("cache", "cache"),),
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# one round


class Round:
    """A place, and the command in it."""

    def __init__(self, world: World, job: Job, place: Path, name: str) -> None:
        self.world, self.job, self.place, self.name = world, job, place, name
        self.words = {"given": world.given, "place": place, "host": world.host, "name": name}
        for target, source in job.before:
            copy = shutil.copytree if (world.given / source).is_dir() else shutil.copy
            copy(world.given / source, place / target)  # type: ignore[operator]

    def state(self) -> str | None:
        return self.job.state(self.world, self.place, self.name)

    def run(self, number: int = 0, delay: float = 0.0, call: Call | None = None) -> tuple[int, str]:
        """Runs it; sends a signal after ``delay`` seconds, or before a call. Its status and messages."""
        tracing = []
        if call:
            fault = f"inject={call[0]}:signal={signal.Signals(number).name}:when={call[1]}"
            tracing = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call[0]}", "-e", fault]
        arguments = self.job.arguments.format(**self.words).split()
        out = self.place / ("stdout" if self.job.name == "pipe to pipe" else "messages")
        with contextlib.ExitStack() as open_files:
            stdout = open_files.enter_context(out.open("wb"))
            stderr = open_files.enter_context(tempfile.TemporaryFile())
            stdin = open_files.enter_context(self._fed()) if self.job.piped else subprocess.DEVNULL
            process = subprocess.Popen(
                [*tracing, *PROGRAM, *arguments], stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.place)},
            )  # fmt: skip
            status = self._ended(process, number if not call else 0, delay)
            stderr.seek(0)
            return status, stderr.read().decode(errors="replace")

    @contextlib.contextmanager
    def _fed(self) -> Iterator[int]:
        """The end of a pipe that gets the tar, some of it at a time."""
        read, write = os.pipe()

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError), open(write, "wb", buffering=0) as pipe:
                for part in parts:
                    pipe.write(part)
                    time.sleep(0.001)

        tar = (self.world.given / "tar").read_bytes()
        parts = [tar[at : at + 100_000] for at in range(0, len(tar), 100_000)]
        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            yield read
        finally:
            os.close(read)
            feeder.join()

    def _ended(self, process: subprocess.Popen[bytes], number: int, delay: float) -> int:
        """The status of a process that is sent a signal; Torn when it or a child of it does not end."""
        if number:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            process.send_signal(number)  # to nobody, where it has ended
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise Torn("it did not end") from None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            raise Torn("a child of it went on")
        return status

    def leftovers(self) -> list[str]:
        """Names that nothing complete has, in the place and beneath it."""
        return sorted(
            str(path.relative_to(self.place))
            for path in self.place.rglob("*")
            if path.name.startswith(".") or path.suffix in (".tmp", ".part") or path.name.startswith("tmp")
        )


@dataclass
class Usual:
    """What a command gives without a signal, how long it takes, and which of CALLS its threads make."""

    state: str | None
    seconds: float
    calls: list[Call]


def calls_of(log: str) -> list[Call]:
    """What strace has seen, each once. It also shows calls that are too new for it to have a name for."""
    counts: Counter[tuple[str, str]] = Counter()
    found = set()
    for thread, name in re.findall(rf"^(\d+) +({CALLS.replace(',', '|')})\(", log, re.MULTILINE):
        counts[thread, name] += 1
        found.add((name, counts[thread, name]))
    return sorted(found)


class Kills:
    def __init__(self, world: World, folder: Path, outcome: Outcome, rng: random.Random) -> None:
        self.world, self.folder, self.outcome, self.rng = world, folder, outcome, rng
        self.looked_outside = 0
        self.known: dict[str, Usual] = {}

    @contextlib.contextmanager
    def round(self, job: Job, name: str) -> Iterator[Round]:
        place = self.folder / name
        place.mkdir()
        try:
            yield Round(self.world, job, place, name)
        finally:
            shutil.rmtree(place)

    def usual(self, job: Job) -> Usual:
        if job.name not in self.known:
            self.known[job.name] = self.measured(job)
        return self.known[job.name]

    def measured(self, job: Job) -> Usual:
        with self.round(job, f"usual{len(self.known)}") as made:
            begun = time.monotonic()
            status, messages = made.run()
            seconds = time.monotonic() - begun
            if status:
                raise SystemExit(f"{job.name}: fails without a signal: {messages}")
            state = made.state()
        with self.round(job, f"counted{len(self.known)}") as made:
            log = self.folder / "calls"
            command = [*PROGRAM, *job.arguments.format(**made.words).split()]
            with contextlib.ExitStack() as stack:
                stdin = stack.enter_context(made._fed()) if job.piped else subprocess.DEVNULL
                subprocess.run(
                    ["strace", "-qq", "-f", "-o", log, "-e", f"trace={CALLS}", *command],
                    stdin=stdin, capture_output=True, check=True, timeout=60,
                )  # fmt: skip
            return Usual(state, seconds, calls_of(log.read_text()))

    def kill(self, number: int, job: Job) -> None:
        """One round; what is wrong becomes a defect."""
        usual = self.usual(job)
        sent = self.rng.choice(list(SIGNALS))
        call = self.rng.choice(usual.calls) if usual.calls and self.rng.random() < 0.5 else None
        delay = self.rng.uniform(0, usual.seconds * 1.1)
        when = f"{call[0]} {call[1]}" if call else f"{delay:.3f} s of {usual.seconds:.3f} s"
        what = f"round {number}: {job.name}, {signal.Signals(sent).name} at {when}"
        with self.round(job, f"round{number}") as made:
            try:
                before = made.state()
                status, messages = made.run(sent, delay, call)
                self.outcome.count("kills" if status else "signals that came too late")
                self.look(made, usual, before, sent, status, messages)
                self.again(made, usual)
            except (Torn, OSError, ValueError, estargz.EstargzError, sqlite3.Error) as error:
                self.outcome.defect(f"{what}: {type(error).__name__}: {error}")

    def look(self, made: Round, usual: Usual, before: str | None, sent: int, status: int, messages: str) -> None:
        """Raises Torn for what no command may leave behind."""
        job = made.job
        began = STARTING not in messages
        if began and status and status not in SIGNALS[signal.Signals(sent)]:
            raise Torn(f"ended with status {status}: {messages[-1500:]}")
        if began and "Traceback" in messages and status > 0:
            raise Torn(f"shows a traceback: {messages[-1500:]}")
        state = made.state()
        if job.name == "pipe to pipe" and status:
            self.check_beginning(made)
        elif state != usual.state and (
            status == 0 or not (state == before or (job.partial and sent == signal.SIGKILL))
        ):
            raise Torn(f"the target is torn (status {status})")
        left = [name for name in made.leftovers() if sent != signal.SIGKILL or not TEMPORARY.fullmatch(Path(name).name)]
        if left:
            raise Torn(f"leaves {', '.join(left)}")
        self.outcome.count("targets complete" if state == usual.state else "targets as before")

    def check_beginning(self, made: Round) -> None:
        got, whole = (made.place / "stdout").read_bytes(), made.world.given / "piped"
        if not whole.exists():
            estargz.build(made.world.given / "tar", whole)
        if not whole.read_bytes().startswith(got):
            raise Torn("what went through the pipe is not a blob's beginning")

    def again(self, made: Round, usual: Usual) -> None:
        status, messages = made.run()
        if status:
            raise Torn(f"run again, it fails with status {status}: {messages[-1500:]}")
        if made.state() != usual.state:
            raise Torn("run again, it gives something else")
        if left := [name for name in made.leftovers() if not TEMPORARY.fullmatch(Path(name).name)]:
            raise Torn(f"run again, it leaves {', '.join(left)}")
        self.outcome.count("runs again")
        if made.job.outside:
            self.look_from_outside(made)

    def look_from_outside(self, made: Round) -> None:
        self.looked_outside += 1
        if self.looked_outside % LOOK_OUTSIDE != 1:
            return
        image = made.job.outside.format(**made.words)
        command = ["skopeo", "copy", "--src-tls-verify=false", image, f"dir:{made.place}/outside"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise Torn(f"skopeo cannot read {image}: {done.stderr[-500:]}")
        self.outcome.count("images read by skopeo")


def main() -> int:
    arguments = parser("kills", __doc__)
    arguments.add_argument("--seed", type=int, default=1, help="of the choice of jobs, signals and moments")
    arguments.add_argument("--kills", type=int, help=f"how many rounds; default: {KILLS}, with --quick {QUICK_KILLS}")
    arguments.add_argument("--job", help="only the jobs whose name has this in it")
    options = arguments.parse_args()
    subprocess.run(
        [ROOT / "scripts/tools", *(f"{name}:{name}" for name in ("strace", "skopeo", "docker-registry"))], check=True
    )
    outcome = Outcome("kills", options.quick)
    jobs = [job for job in JOBS if (options.job or "") in job.name]
    folder = Path(tempfile.mkdtemp(prefix="estargz-kills-"))
    try:
        with World.made(folder) as world:
            kills = Kills(world, folder, outcome, random.Random(options.seed))
            for number in range(options.kills or (QUICK_KILLS if options.quick else KILLS)):
                kills.kill(number, jobs[number % len(jobs)])
    finally:
        shutil.rmtree(folder)
    return outcome.close()


if __name__ == "__main__":
    sys.exit(main())
