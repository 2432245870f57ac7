"""What all groups share: stages in processes of their own, and what these leave.

Importing PyTorch takes three seconds.  So the stages are imported once, here, and
a run is a fork of this process which calls a stage's main.  A few runs are fresh
interpreters all the same, as a user has them.

Every run has a folder of its own, in which it and all its children have their
working directory.  By that they are found when somebody asks who is left.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import runtime  # before torch, which it tells how threads wait

import numpy as np
import torch
import torch._dynamo   # the optimisers would import it in every fork
from matplotlib import pyplot  # noqa: F401  for the forks as well

import data
import evaluate
import sample
import toy2d
import train_dit
import train_tokenizer
from studies import plot

ROOT = Path(runtime.__file__).parent
LIMIT = 90         # seconds that a run may take
PROMPTLY = 10.0    # seconds in which wrong input and signals are answered
MEMORY = 6 * 2**30   # bytes: a file that fills it must not take the machine down
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"
NETWORK = "127.0.0.1", "localhost", "::1"


class Broken(Exception):
    """A promise was not kept.  The message says which."""


class Skipped(Exception):
    """This machine cannot show it.  The message says why."""


@dataclass
class Case:
    """A promise to be put to the test in an empty folder.

    slow: it starts new interpreters, and is left out of small selections.
    """
    name: str
    action: Callable[[Path], None]
    slow: bool = False


# ------------------------------------------------------------------------------
# A run: a process, the end of which is waited for with a limit.


class Run:
    """A stage that works in `folder`.

    argv: as typed.  before: called in the new process before the stage's main.
    fresh: a new interpreter, with the words that come before the script's name.
    environment: variables of the new process.
    """
    number = 0

    def __init__(self, folder: Path, stage: ModuleType, argv: str,
                 before: Iterable[Callable[[], None]] = (), fresh: str | None = None,
                 **environment: str) -> None:
        Run.number += 1
        self.folder, self.script = folder, Path(stage.__file__).name
        streams = folder.parent / "streams"
        streams.mkdir(exist_ok=True)
        self.streams = [streams / f"{Run.number}.{end}" for end in ("out", "err")]
        self.begin, self.status = time.monotonic(), None
        self.process = multiprocessing.get_context("fork").Process(
            target=live, args=(folder, self.streams, stage, argv, before, fresh, environment))
        self.process.start()
        self.pid = self.process.pid
        while os.getpgid(self.pid) != self.pid:   # signals may go to its group from now on
            time.sleep(0.001)

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    @property
    def said(self) -> str:
        return self.streams[1].read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """stderr without progress bars."""
        parts = [part.strip() for part in re.split(r"[\r\n]+", self.said)]
        return [part for part in parts if part and not re.fullmatch(BAR, part)]

    def wait(self, limit: float = LIMIT) -> "Run":
        """Until the process has ended, and all that it has started."""
        end = time.monotonic() + limit
        while self.running and time.monotonic() < end:
            time.sleep(0.003)
        if self.status is None:   # the first time that it is waited for
            self.seconds = time.monotonic() - self.begin
        if self.running:
            kill(family(self.folder))
            self.process.join()
            raise Broken(f"no end after {limit:.0f} s: {self.tail()}")
        self.status = self.process.exitcode
        return self

    def tail(self) -> str:
        return " | ".join(self.lines[-3:])[-400:] or "nothing on stderr"

    # What may be promised of an end.

    def went_well(self) -> "Run":
        if self.status != 0 or "Traceback" in self.said:
            raise Broken(f"ended with status {self.status}: {self.tail()}")
        return self

    def refused(self, *words: str, status: tuple[int, ...] = (2,),
                others: str = "$^") -> str:
        """The one line on stderr.  words: what it must hold.  others: more lines."""
        if self.status not in status:
            raise Broken(f"ended with status {self.status}, not {status[0]}: {self.tail()}")
        lines = [line for line in self.lines if not re.search(others, line)]
        if len(lines) != 1:
            raise Broken(f"{len(lines)} lines on stderr: {self.tail()}")
        line, = lines
        if not line.startswith(self.script):
            raise Broken(f"the line does not begin with {self.script}: {line[:300]}")
        if len(line) > 700:
            raise Broken(f"the line has {len(line)} characters: {line[:200]} ...")
        for word in words:
            if word not in line:
                raise Broken(f"the line does not say {word!r}: {line[:300]}")
        return line


# A bar of tqdm, with or without a known end.
BAR = r"(\x1b\[A)*[^|]{0,120}?\s*(\d+%\|.*\|.*|\d+\w* )\[\d+:\d\d[^\]]*\](\x1b\[A)*"


def live(folder: Path, streams: list[Path], stage: ModuleType, argv: str,
         before: Iterable[Callable[[], None]], fresh: str | None,
         environment: dict[str, str]) -> None:
    """In the new process: become a session of its own, and the stage."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    script = Path(stage.__file__)
    if fresh is not None:
        command = [sys.executable, *shlex.split(fresh), str(script), *shlex.split(argv)]
        os.execve(command[0], command, os.environ)
    sys.argv = [str(script), *shlex.split(argv)]
    torch.seed()   # so that no two runs draw the same by chance
    np.random.seed()
    random.seed()
    sys.addaudithook(stay_at_home)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for action in before:
        action()
    stage.main(sys.argv[1:])


def stay_at_home(event: str, args: tuple) -> None:
    """An audit hook: nothing is fetched from a network."""
    if event == "socket.getaddrinfo" and args[0] not in (*NETWORK, None, socket.gethostname()):
        raise OSError(101, "Network is unreachable")


def family(folder: Path) -> list[int]:
    """The processes that work in a folder, but for those that are dead already."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                place = os.readlink(entry / "cwd")
            except OSError:   # it has ended, or belongs to somebody else
                continue
            if Path(place).is_relative_to(folder):
                found.append(int(entry.name))
    return found


def ranks_of(pids: Iterable[int]) -> dict[int, int]:
    """{rank: process} of torchrun's workers among these processes."""
    found = {}
    for pid in pids:
        words = dict(word.partition(b"=")[::2] for word in
                     Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        if b"RANK" in words:
            found[int(words[b"RANK"])] = pid
    return found


def kill(pids: Iterable[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def nobody_left(folder: Path, within: float = 5) -> None:
    """All processes of a run are gone, at the latest after so many seconds."""
    end = time.monotonic() + within
    while found := family(folder):
        if time.monotonic() > end:
            names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:80]
                     for pid in found if Path(f"/proc/{pid}").exists()]
            kill(found)
            raise Broken(f"{len(found)} processes are left after {within:.0f} s: {names}")
        time.sleep(0.02)


def wait_for(met: Callable[[], Any], run: Run, limit: float = 60) -> None:
    """Until something is seen in a run that goes on."""
    end = time.monotonic() + limit
    while not met():
        if not run.running:
            raise Broken(f"ended before it was to be disturbed, with status "
                         f"{run.process.exitcode}: {run.tail()}")
        if time.monotonic() > end:
            kill(family(run.folder))
            raise Broken(f"nothing was to be seen in {limit:.0f} s: {run.tail()}")
        time.sleep(0.002)


# ------------------------------------------------------------------------------
# What a run leaves: a digest of every file, without dates and durations.

TIMES = "date", "seconds", "training_seconds"


def contents(folder: Path, *names: str) -> dict[str, Any]:
    """{path: digest} of all files in these folders, or of these files."""
    found = {}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*") if path.is_dir() else [path]):
            if file.is_file():
                found[str(file.relative_to(folder))] = content(file)
    return found


def content(path: Path) -> Any:
    """What must be equal in two files of a kind.  A log is a list of its lines."""
    try:
        if path.suffix == ".pt":
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"{damaged} is damaged")
            state = torch.load(path, weights_only=True, map_location="cpu")
            return {key: digest(value) for key, value in state.items() if key not in TIMES}
        if path.suffix == ".npz":
            with np.load(path) as file:
                return {key: digest(file[key]) for key in file.files}
        if path.suffix == ".json":
            return without_times(json.loads(path.read_text()))
        if path.suffix == ".jsonl":
            return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    except Exception as error:   # half a dozen types, from all kinds of readers
        raise Broken(f"{path.name} is damaged: {type(error).__name__}: {error}") from None
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [without_times(part) for part in value]
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return value


def digest(value: Any) -> str:
    """A hash of tensors and arrays in containers of any depth."""
    found = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            part = (part.float() if part.dtype == torch.bfloat16 else part).numpy()
        if isinstance(part, np.ndarray):
            found.update(repr((part.dtype.str, part.shape)).encode())
            found.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(part, dict):
            for key, inner in part.items():
                found.update(repr(key).encode())
                take(inner)
        elif isinstance(part, (list, tuple)):
            found.update(f"{len(part)} parts".encode())
            for inner in part:
                take(inner)
        else:
            found.update(repr(part).encode())

    take(value)
    return found.hexdigest()


def same(found: dict[str, Any], expected: dict[str, Any], what: str = "the run") -> None:
    """Both have the same files, with the same contents."""
    missing, more = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or more:
        raise Broken(f"{what}: missing files {sorted(missing)}, unexpected {sorted(more)}")
    for name in expected:
        if found[name] != expected[name]:
            raise Broken(f"{what}: {name} differs {where(found[name], expected[name])}")


def where(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        return f"in {sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))}"
    if isinstance(a, list) and isinstance(b, list):
        first = next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]),
                     min(len(a), len(b)))
        return f"from line {first + 1} on ({len(a)} lines, expected {len(b)})"
    return ""


def losses(value: Any) -> Any:
    """A log without its scores of held-out images."""
    if isinstance(value, list) and all(isinstance(line, dict) for line in value):
        return [line for line in value if "held_out" not in line]
    return value


UNFINISHED = r"\.\d+-unfinished-.*|\.lock|tmp.*"   # temporary files and locks


def nothing_left(folder: Path, pattern: str = rf"{UNFINISHED}|\.parts.*|chunks") -> None:
    """None of the files and folders that a run removes at its end."""
    if found := sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                       if re.fullmatch(pattern, path.name)):
        raise Broken(f"left behind: {found}")


# ------------------------------------------------------------------------------
# The work that is disturbed, as small as it can be, and what it needs.


def small_chunks() -> None:
    """A cache of latents in several files, although there are few images."""
    data.CHUNK = 16


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Work:
    """A command and the folders that it writes.  ranks: processes that share it."""
    name: str
    stage: ModuleType = field(repr=False)
    argv: str
    writes: tuple[str, ...] = ("run",)
    ranks: int = 1
    before: tuple[Callable[[], None], ...] = ()

    def begin(self, folder: Path, before: Iterable[Callable[[], None]] = (),
              **environment: str) -> list[Run]:
        """Begin this work, with one Run for each rank.  before: of rank 0."""
        if self.ranks > 1:
            environment |= {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(free_port())}
        runs = []
        for rank in range(self.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.ranks > 1 else {}
            steps = (*self.before, *before) if rank == 0 else self.before
            runs.append(Run(folder, self.stage, self.argv, steps,
                            **environment | place))
        return runs

    def finish(self, folder: Path) -> None:
        """Give the command, and see it end well."""
        for run in self.begin(folder):
            run.wait().went_well()
        nobody_left(folder)


SMOKE = "--smoke --device cpu"
TOKENIZER = Work("tokenizer", train_tokenizer, f"{SMOKE} --out run")
GAN = Work("tokenizer with GAN", train_tokenizer,
           f"{SMOKE} --disc-weight 0.5 --disc-start 1 --out run")
LOADERS = Work("tokenizer with loaders", train_tokenizer, f"{SMOKE} --workers 2 --out run")
DIT = Work("transformer", train_dit, f"{SMOKE} --tokenizer stock/tokenizer/checkpoint.pt "
           "--cache cache --out run", ("run", "cache"), before=(small_chunks,))
SAMPLE = Work("samples", sample, f"{SMOKE} --dit stock/dit/checkpoint.pt "
              "--tokenizer stock/tokenizer/checkpoint.pt --count 12 --out run")
EVALUATE = Work("evaluation", evaluate, f"{SMOKE} --tokenizer stock/tokenizer/checkpoint.pt "
                "--samples stock/samples/samples.npz --out run")
TOY = Work("toy", toy2d, f"{SMOKE} --out run")
PLOT = Work("plot", plot, "stock/tokenizer --keys rec --out run/plot.png")


def shared(work: Work) -> Work:
    """The same by two processes that talk through gloo."""
    return Work(f"{work.name}, two processes", work.stage, work.argv, work.writes, 2,
                work.before)


@dataclass
class Undisturbed:
    """What work leaves when nobody disturbs it, and the place where that lies."""
    home: Path
    contents: dict[str, Any]
    sizes: dict[str, int]   # of its files, in bytes
    seconds: float
    operations: int         # on files, of the first rank


class Bench:
    """A place for the folders of cases, beside what undisturbed work has left.

    base: of this process alone.  common: shared by all that try cases.
    """

    def __init__(self, base: Path, common: Path, seed: int = 0) -> None:
        self.base, self.common, self.seed = base, common, seed
        base.mkdir()
        self.known: dict[Work, Undisturbed] = {}

    def draws(self, *name: Any) -> random.Random:
        return random.Random(repr((self.seed, *name)))

    def folder(self, name: str) -> Path:
        """A new folder for a case, in which `stock` is at hand."""
        folder = self.base / name
        folder.mkdir()
        (folder / "stock").symlink_to(self.common / "stock")
        return folder

    def reference(self, work: Work) -> Undisturbed:
        """What undisturbed work leaves.  It is done once."""
        if work not in self.known:
            key = hashlib.sha256(f"{work.name} {work.argv}".encode()).hexdigest()[:16]
            home = self.common / key
            if not home.exists():
                self.work_undisturbed(work, home)
            facts = json.loads((home / "facts").read_text())
            sizes = {str(path.relative_to(home)): path.stat().st_size
                     for name in work.writes for path in (home / name).rglob("*")}
            self.known[work] = Undisturbed(home, contents(home, *work.writes), sizes, *facts)
        return self.known[work]

    def work_undisturbed(self, work: Work, home: Path) -> None:
        """Do some work, and keep what it leaves in `home`."""
        folder = self.folder("undisturbed")
        count = multiprocessing.get_context("fork").Value("i", 0)
        runs = work.begin(folder, [lambda: watch_files(folder, counter(count))])
        try:
            seconds = max(run.wait().went_well().seconds for run in runs)
            nobody_left(folder)
            nothing_left(folder)
            (folder / "facts").write_text(json.dumps([seconds, count.value]))
            if not home.exists():   # another process may have been faster
                os.rename(folder, home)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def finished(self, work: Work, folder: Path) -> None:
        """Copy into a folder what undisturbed work leaves."""
        for name in work.writes:
            shutil.copytree(self.reference(work).home / name, folder / name)

    def clear(self, folder: Path, work: Work) -> None:
        """As it was before the work began."""
        for name in work.writes:
            shutil.rmtree(folder / name, ignore_errors=True)

    def unharmed(self, work: Work, folder: Path) -> None:
        """The command is given once more, and ends as if nothing had happened."""
        work.finish(folder)
        same(contents(folder, *work.writes), self.reference(work).contents, "after resuming")
        nothing_left(folder)

    def as_undisturbed(self, work: Work, folder: Path) -> None:
        """As `unharmed`, but for pictures and scores that a stop has saved as well."""
        work.finish(folder)
        self.as_reference(work, folder)

    def as_reference(self, work: Work, folder: Path) -> None:
        expected, found = self.reference(work).contents, contents(folder, *work.writes)
        found = {name: value for name, value in found.items()
                 if name in expected or "images/" not in name}
        same(*({name: losses(value) for name, value in files.items()}
               for files in (found, expected)), "after resuming")
        nothing_left(folder)


def make_stock(common: Path) -> None:
    """A tokenizer, a transformer and samples, for the stages that need them."""
    common.mkdir()
    for stage, argv in (
            (train_tokenizer, "--out stock/tokenizer"),
            (train_dit, "--tokenizer stock/tokenizer/checkpoint.pt --cache stock/latents "
             "--out stock/dit"),
            (sample, "--dit stock/dit/checkpoint.pt --count 12 --out stock/samples")):
        Run(common, stage, f"{SMOKE} {argv}").wait().went_well()


# ------------------------------------------------------------------------------
# Operations on files, which Python announces to audit hooks: a file that is opened
# to be written, made, renamed or removed.


def watch_files(folder: Path, action: Callable[[str, str], None]) -> None:
    """Call action(event, path) before every such operation below `folder`."""
    events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

    def hook(event: str, args: tuple) -> None:
        if event not in events or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith(f"{folder}/"):
            action(event, path)

    sys.addaudithook(hook)


def counter(count: Any) -> Callable[[str, str], None]:
    def action(event: str, path: str) -> None:
        count.value += 1
    return action


def dies_at(number: int) -> Callable[[str, str], None]:
    """Kill this process before operation `number`, which counts from 1."""
    done = 0

    def action(event: str, path: str) -> None:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
    return action


def as_anybody() -> None:
    """Root without its capabilities is held to the permissions of files."""
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None).capset(header, nothing):
            raise OSError("capabilities cannot be dropped")


# ------------------------------------------------------------------------------
# Nothing that was downloaded as data may run as a program.

PROGRAMS = "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"


class Hostile:
    """A pickle that leaves a trace when somebody reads it."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def watch_programs(folder: Path) -> None:
    """Leave a trace also when this process starts a program."""
    def hook(event: str, args: tuple) -> None:
        if event in PROGRAMS:
            (folder / "executed").write_text(repr((event, args)))

    sys.addaudithook(hook)


def nothing_ran(folder: Path) -> None:
    if (folder / "executed").exists():
        raise Broken(f"executed: {(folder / 'executed').read_text()[:300] or 'a program'}")
