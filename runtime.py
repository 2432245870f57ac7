"""What every stage needs around its loop, and what knows nothing of images:
device and torchrun, random streams, files, the averaged weights, and the log.

Without torchrun, `start` returns rank 0 of a world of 1, and the collectives
return their argument, so that one process and many share every line.
"""

import argparse
import copy
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

try:
    import fcntl
except ImportError:   # on Windows, where nothing is locked
    fcntl = None   # type: ignore[assignment]

# Ctrl-C during the imports ends a stage in silence.  Later, `command` handles it.
HERE, STARTED = Path(__file__).parent, getattr(sys.modules["__main__"], "__file__", None)
if Path(STARTED or "-").parent in (HERE, HERE / "studies"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_parent() -> None:
    """End this process when its parent has ended, so that it does not train on alone."""
    known, parent = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        # Only multiprocessing notices a parent that had ended before.
        while os.getppid() == parent and (known is None or known.is_alive()):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if "--multiprocessing-fork" in sys.orig_argv:   # a helper, whose parent may end while it imports
    end_with_parent()

# OpenMP's idle threads spin.  Where two processes share the cores, that made a
# step of 348 ms last 7.3 s.  PyTorch reads this once, when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# PyTorch 2.9 tells everybody who chooses a precision of another way to do it.
warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")

# ------------------------------------------------------------------------------
# The command line.  A mistake of the user ends in one line on stderr and exit
# status 2.  Anything else is a bug, and keeps its traceback.


class InputError(Exception):
    """Wrong input.  The message is one line: what is wrong, and what to do."""


class Stopped(BaseException):
    """SIGINT or SIGTERM has come.  The message says how far the work is."""


STOPPED = "stopped; the same command goes on"


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a stage's main: what ends it from outside becomes one line.

    The exit status is 2 for wrong input and for what the machine refuses, such as
    a file or memory, and 130 or 143 for SIGINT and SIGTERM.
    """
    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with signals.caught():
            try:
                return main(*args, **kwargs)
            except Stopped as error:
                message, status = str(error), 128 + signals.received
            except Exception as error:
                message, status = in_one_line(error)
            finally:
                signals.waits = True   # one more signal changes nothing now
                finish()
            script = Path(sys.modules[main.__module__].__file__ or "").name
            print(f"{script}: {message}", file=sys.stderr, flush=True)
            if status > 128 and main.__module__ == "__main__":
                signals.ignored()   # one more would end the interpreter without its status
            raise SystemExit(status)
    return wrapped


def in_one_line(error: Exception) -> tuple[str, int]:
    """What is said of an error from outside, and the exit status.  Others are bugs."""
    memory = "error: out of memory: a smaller --batch needs less"
    if signals.raised:   # a library has turned Stopped into an error of its own
        return STOPPED, 128 + signals.received
    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, OSError):
        reason = error.strerror or str(error).strip().split("\n")[-1]
        return f"error: {error.filename or 'a file'}: {reason}", 2
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return memory, 2
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return memory, 2
    if isinstance(error, RuntimeError) and (
            "gloo/transport" in str(error) or isinstance(error, dist.DistError)):
        return "error: another process of this run has ended, and says why", 2
    raise error


class Signals:
    """Ctrl-C (SIGINT) and SIGTERM, which Slurm sends before it takes a machine back.

    The first one raises Stopped, or waits for the end of a training's step.  The
    next one ends the process at once.  One that comes within a second is the same
    one: torchrun passes on what the terminal has sent to everybody already.
    """
    received, when, waits, raised = 0, 0.0, False, False

    @contextmanager
    def caught(self) -> Iterator[None]:
        self.received, self.waits, self.raised, before = 0, False, False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self.receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, handler)

    def ignored(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def unhandled(self) -> Iterator[None]:
        """Both end the process at once, as if it had no handler."""
        numbers = signal.SIGINT, signal.SIGTERM
        before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def receive(self, number: int, _: Any) -> None:
        if self.received and time.monotonic() - self.when > 1:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)
        if not self.received:
            self.received, self.when = number, time.monotonic()
            if not self.waits:
                self.raised = True
                raise Stopped(STOPPED)


signals = Signals()


def steps(name: str, done: int, total: int, runtime: "Runtime") -> Iterator[int]:
    """The steps that are left, with a bar.  A signal waits for the end of a step."""
    signals.waits = True
    yield from tqdm(range(done, total), name, total, initial=done,
                    disable=not runtime.is_main)


def stop_asked() -> bool:
    """Whether any process has got a signal; all processes learn the same."""
    number = torch.tensor(signals.received)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    if int(number) and not signals.received:   # this process will get the same one in a moment
        signals.when = time.monotonic()
    # A signal that came during all_reduce counts in the next step.
    signals.received = int(number) or signals.received
    return int(number) > 0


def helper(*_: Any) -> None:
    """First call of a helper: signals are for its parent, and it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):   # a group of its own
        os.setsid()
    end_with_parent()


def in_processes(count: int, action: Callable[[Any], Any], jobs: list) -> Iterator[Any]:
    """Yield action(job) for every job as it is done, by `count` processes.

    They end with this one, however it ends.  Ctrl-C is blocked while they
    start, or it would interrupt their imports.
    """
    context, masks = multiprocessing.get_context("spawn"), hasattr(signal, "pthread_sigmask")
    with ProcessPoolExecutor(count, context, helper) as pool:
        try:
            if masks:   # not on Windows
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            begun = [pool.submit(action, job) for job in jobs]
            if masks:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for job in as_completed(begun):
                yield job.result()
        except BrokenExecutor:
            raise InputError("a process was killed: is the memory full?") from None
        finally:
            for process in multiprocessing.active_children():
                process.kill()


# What the codebases of DiT, SiT and diffusers call our flags.  Both names work.
SECOND_NAMES = {
    "--data-path": "--data", "--results-dir": "--out", "--image-size": "--size",
    "--global-batch-size": "--batch", "--global-seed": "--seed", "--max-train-steps": "--steps",
    "--learning-rate": "--lr", "--num-workers": "--workers", "--ckpt": "--dit",
    "--cfg-scale": "--guidance", "--num-sampling-steps": "--steps",
    "--t-shift": "--shift", "--sample-dir": "--out", "--num-fid-samples": "--count",
    "--per-proc-batch-size": "--at-once"}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one, and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with presets.  `doc` is the docstring of the stage.

    Its first paragraph describes the stage, and its indented commands are examples.
    """

    def __init__(self, doc: str) -> None:
        first, *others = doc.split("\n\n")
        examples = [part for part in others if part.startswith("    ") and "python" in part]
        super().__init__(description=first, epilog="\n\n".join(examples), allow_abbrev=False,
                         formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, argv: list[str] | None, presets: dict[str, dict] = {},
              smoke: dict[str, Any] = {}) -> argparse.Namespace:
        """Parse with the defaults of --preset, and over them those of --smoke.

        Keys of a preset that are not flags become attributes all the same.
        """
        argv = [self.first_name(word) for word in (sys.argv[1:] if argv is None else argv)]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", nargs="?", default=self.get_default("preset"))
        first.add_argument("--smoke", action="store_true")
        chosen, _ = first.parse_known_args(argv)
        row = presets.get(chosen.preset, {})
        self.set_defaults(**row | (smoke if chosen.smoke else {}))
        return self.parse_args(argv)

    def first_name(self, word: str) -> str:
        """Our name of a flag, if we have such a flag; word is "--flag" or "--flag=value"."""
        flag, *value = word.split("=", 1)
        ours = SECOND_NAMES.get(flag)
        return "=".join([ours, *value]) if ours in self._option_string_actions else word


def number(kind: type, text: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse that says in one line which numbers it takes."""
    def parse(given: str) -> Any:
        try:
            value = kind(given)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{given} is not {text}")
        return value
    return parse


positive_int = number(int, "a whole number from 1 to 10^12", lambda n: 1 <= n <= 10**12)
natural_int = number(int, "a whole number from 0 to 10^12", lambda n: 0 <= n <= 10**12)
positive = number(float, "a number above 0 and up to 10^12", lambda v: 0 < v <= 1e12)
non_negative = number(float, "a number from 0 to 10^12", lambda v: 0 <= v <= 1e12)
finite = number(float, "a finite number", math.isfinite)
fraction = number(float, "a number of at least 0 and below 1", lambda v: 0 <= v < 1)
share = number(float, "a number from 0 to 1", lambda v: 0 <= v <= 1)
seed = number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both training stages share."""
    add = parser.add_argument_group("running").add_argument
    add("--epochs", type=positive, help="passes over the images, in place of --steps")
    add("--seed", type=seed, default=0, help="of weights, order of the data and every draw")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="of what is trained; auto is bf16 on CUDA; latents and losses are fp32")
    add("--workers", type=natural_int, default=2, help="processes that load data, per rank")
    add("--save-every", type=positive_int, default=500, help="steps between checkpoints")
    add("--accept-data", action="store_true",
        help="go on although the images are not those with which the run began")
    add("--smoke", action="store_true", help="a few steps of everything, in seconds")


def add_card_flags(parser: argparse._ActionsContainer) -> None:
    """These flags change the time and the memory of a step."""
    add, either = parser.add_argument, argparse.BooleanOptionalAction
    add("--accumulate", type=positive_int,
        help="parts of a step's batch; default: as few as fit a CUDA card, and 1 elsewhere")
    add("--recompute", action=either, help="less memory, more time; default: "
        "where a CUDA card cannot hold one image without")
    add("--compile", action=either, help="torch.compile the networks; default: on CUDA")


def steps_of(epochs: float, images: int, batch: int) -> int:
    """The number of steps in which each image is seen `epochs` times."""
    return math.ceil(epochs * images / batch)


def check_batch(batch: int, runtime: "Runtime", parts: int | None = None) -> None:
    """Raise InputError unless all processes, and all parts of a step, get as many images."""
    if batch % (runtime.world * (parts or 1)):
        raise InputError(f"--batch {batch} must be a multiple of {runtime.world} process(es)"
                         + f" x --accumulate {parts}" * bool(parts))


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as plain values, for the checkpoint and the log."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def check_same_command(old: dict, new: dict, free: set[str], path: str | Path) -> None:
    """Raise InputError if flags other than `free` differ from those that began a run.

    data_sha256 stands for the images.  They may differ if --accept-data is given.
    """
    free = free | {"accept_data", "data_sha256"}
    differ = [k for k in sorted(new) if k not in free and k in old and old[k] != new[k]]
    if differ:
        listed = ", ".join(f"--{k.replace('_', '-')} {old[k]} (now {new[k]})" for k in differ)
        raise InputError(f"{path} was begun with {listed}; repeat those flags to resume, "
                         "or choose another --out")
    images = new.get("data_sha256")
    if old.get("data_sha256", images) != images and not new.get("accept_data"):
        raise InputError(f"the images have changed since {path} was begun: bring them back, "
                         "go on with --accept-data, or choose another --out")


# ------------------------------------------------------------------------------
# Devices and processes.  torchrun sets RANK, WORLD_SIZE and LOCAL_RANK.  The
# processes talk through NCCL on CUDA and through gloo elsewhere.


@dataclass(frozen=True)
class Runtime:
    """Process `rank` of `world` on `device`; `local_rank` counts on one machine."""
    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *message: Any) -> None:
        """Print once, whatever the number of processes."""
        if self.is_main:
            print(*message, flush=True)

    def autocast(self, precision: str) -> Any:
        """bf16 for "bf16", and for "auto" on CUDA; otherwise nothing."""
        if precision == "bf16" or (precision == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def compile(self, chosen: bool | None, *modules: nn.Module) -> bool:
        """torch.compile the modules, if that is chosen, or left open on CUDA.

        Blocks of one shape share one graph.  Of more than eight shapes, PyTorch's own
        limit would leave the rest uncompiled.
        """
        if chosen is None:
            chosen = self.device.type == "cuda"
        if chosen:
            import torch._dynamo   # here, because it takes seconds
            torch._dynamo.config.recompile_limit = 64
            # Two gradients of one graph are taken where losses are balanced.
            torch._functorch.config.donated_buffer = False
        for module in modules if chosen else ():
            module.compile(dynamic=False)
        return chosen

    def wrap(self, module: nn.Module) -> nn.Module:
        """DDP if there are several processes.  No buffer is used that a training changes."""
        if self.world == 1:
            return module
        ids = [self.local_rank] if self.device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters   # renamed in 2.13
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True,
                                       **{sync: False})   # type: ignore[arg-type]


def start(device: str = "auto") -> Runtime:
    """Join torchrun's processes; device is auto (CUDA or else CPU), cpu, cuda, mps."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    kind = ("cuda" if cards else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {device}: choose one of auto, cpu, cuda, mps")
    if kind == "cuda" and local >= cards:
        raise InputError(f"every process needs its own CUDA card, and PyTorch sees {cards} "
                         "here: start fewer processes, or use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("PyTorch sees no Metal device here: use --device cpu")
    if kind == "cuda":
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True   # all steps have the same shapes
    if world > 1 and not dist.is_initialized():
        # DDP imports this.  Imported only then, it would keep the group, whose threads
        # can abort the exit.
        from torch.distributed import nn as _  # noqa: F401

        # No handler of Python's runs while this waits for the others.
        with signals.unhandled():
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    place = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
    return Runtime(place, rank, world, local)


def exact_products() -> None:
    """CUDA keeps float32 as it is: its shorter form, TF32, would change small differences."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def finish() -> None:
    """Leave the process group, if there is one, and give the folders back."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while locks:
        unlock(*locks.popitem())


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The average over the processes, in place."""
    if dist.is_initialized():
        all_reduce_sum(tensor).div_(dist.get_world_size())
    return tensor


def mean_over_ranks(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each [] tensor averaged over the processes, for the log."""
    values = torch.stack([v.detach().float() for v in terms.values()])
    return dict(zip(terms, all_reduce_mean(values)))


def gather_rows(tensor: Tensor, runtime: Runtime) -> Tensor:
    """All ranks' rows in the order of the ranks: [n_r, ...] -> [sum of n_r, ...]."""
    if runtime.world == 1:
        return tensor
    parts: list[Any] = [None] * runtime.world
    dist.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts).to(tensor.device)


def check_same_on_all_ranks(model: nn.Module) -> None:
    """Raise RuntimeError if the processes' parameters have drifted apart."""
    if dist.is_initialized():
        mine = torch.stack([p.detach().double().sum() for p in model.parameters()])
        first = mine.clone()
        dist.broadcast(first, 0)
        if not torch.equal(mine, first):
            raise RuntimeError(f"the parameters of rank {dist.get_rank()} are not rank 0's")


def micro_batches(module: nn.Module | list[nn.Module], count: int,
                  *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split a batch into `count` parts; DDP averages the gradients after the last.

    The callers divide each part's loss by `count`, and refuse a batch that it does
    not divide.
    """
    modules = module if isinstance(module, list) else [module]
    parts = list(zip(*(tensor.chunk(count) for tensor in tensors)))
    for n, part in enumerate(parts, 1):
        with ExitStack() as stack:
            for m in modules:
                if n < len(parts) and isinstance(m, DistributedDataParallel):
                    stack.enter_context(m.no_sync())
            yield part


# What the forward pass keeps for the backward pass, without and with --recompute, as
# studies/costs.py counts it: kilobytes for a pixel of an image, with all losses, by the
# tokenizer; and bytes for a token, a block and a unit of width, by the transformer.  Other
# tokenizers keep less.  To this comes what the allocator loses between tensors, and what
# CUDA, cuDNN and NCCL keep for themselves.
OF_PIXEL = {
    "f8d4": (33.5, 19), "f8d8": (33.5, 19), "f16d16": (25.5, 21.5), "f16d32": (25.5, 21.5),
    "vit-l": (15, 9.5), "gae-d32": (15, 9.5), "gae-d64": (15, 9.5),
    "dgae-b": (62.5, 22), "dgae-m": (86.5, 28), "dgae-l": (110.5, 34)}
OF_TOKEN = {"lightningdit": (60, 10), "sit": (55, 10)}
LOST, OTHERS = 1.1, 2 * 2**30


def kept_of_image(model: str, size: int, precision: str) -> tuple[float, float]:
    """Bytes that a step keeps of an image, without and with recomputing the decoder."""
    pixels = size * size * (2 if precision == "fp32" else 1)
    without, recomputed = OF_PIXEL.get(model, (6, 6))
    return 1000 * pixels * without, 1000 * pixels * recomputed


def kept_of_latent(config: dict, precision: str) -> tuple[float, float]:
    """Bytes that a step keeps of a latent, without and with recomputing the blocks."""
    tokens = (config["input_size"] // config["patch"]) ** 2
    units = tokens * config["depth"] * config["width"] * (2 if precision == "fp32" else 1)
    without, recomputed = OF_TOKEN[config["family"]]
    return units * without, units * recomputed


def fit(runtime: Runtime, images: int, kept: tuple[float, float], parameters: int,
        accumulate: int | None, recompute: bool | None) -> tuple[int, bool]:
    """In how many parts a step takes its images, and whether it recomputes.

    As few parts as a CUDA card has memory for; and it recomputes only if one image
    at a time would be too much.  What is given stays.

    kept: bytes that the forward pass keeps of an image, without and with recomputing.
    parameters: of the network on the card, which is all that is there as yet.
    """
    if runtime.device.type != "cuda":
        return accumulate or 1, bool(recompute)
    torch.cuda.empty_cache()
    free = torch.tensor(torch.cuda.mem_get_info(runtime.device)[0])
    if dist.is_initialized():
        dist.all_reduce(free, dist.ReduceOp.MIN)
    # A gradient, two numbers of AdamW, and the average; and the weight in bfloat16.
    room = float(free - OTHERS) / LOST - (4 + 8 + 4 + 2) * parameters
    ways = [(parts, again)
            for again in ([False, True] if recompute is None else [recompute])
            for parts in ([accumulate] if accumulate else range(1, images + 1))
            if images % parts == 0]
    fitting = [way for way in ways if images // way[0] * kept[way[1]] <= room]
    parts, again = (fitting or ways[-1:])[0]
    runtime.print(f"memory: {images // parts} of {images} images at a time need "
                  f"{images // parts * kept[again] / 2**30:.1f} GiB of {room / 2**30:.1f}"
                  + ", with --recompute" * again)
    return parts, again


# ------------------------------------------------------------------------------
# Randomness is a function of the seed and of a stream's name, such as ("eps",
# step).  A resumed run therefore draws the noise that it would have drawn, and a
# checkpoint needs no states of generators.


def generator(seed: int, *stream: int | str, device: Any = "cpu") -> torch.Generator:
    """A fresh generator for the stream that any ints and strings name."""
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def noise_of(images: Iterable[int], shape: Sequence[int], seed: int, name: str,
             *stream: int | str) -> Tensor:
    """N(0, I), [B, *shape].  Each number of `images` has a stream of its own."""
    draws = [generator(seed, name, i, *stream) for i in images]
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws])


def global_randn(shape: Any, runtime: Runtime, seed: int, *stream: int | str) -> Tensor:
    """This rank's rows, [b, ...] = shape, of one N(0, I) draw for the whole batch.

    Every rank draws all b * world rows and keeps its own, so that the noise does
    not depend on the number of processes.
    """
    (b, *rest), device = shape, runtime.device
    draws = generator(seed, *stream, device=device)
    rows = torch.randn(b * runtime.world, *rest, generator=draws, device=device)
    return rows[runtime.rank::runtime.world]


def global_rand(n: int, runtime: Runtime, seed: int, *stream: int | str) -> Tensor:
    """As `global_randn`, but [n] numbers uniform in [0, 1)."""
    draws = generator(seed, *stream, device=runtime.device)
    rows = torch.rand(n * runtime.world, generator=draws, device=runtime.device)
    return rows[runtime.rank::runtime.world]


# ------------------------------------------------------------------------------
# Files.  A process that is killed at any moment leaves the old file or the new
# one, and never half of one.  A folder belongs to one run at a time.


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which becomes `path` at the end.

    The folders are made.  The temporary name ends as `path` does, because NumPy
    and Pillow choose the format by it.  What the disk refuses is an InputError.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-unfinished-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A file that cannot be closed would print a traceback beside our line.
        sys.unraisablehook = lambda _: None
        raise InputError(f"{path} cannot be written ({error.strerror or error}): mend that, "
                         "and give the same command again") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def regular(path: str | Path) -> Path:
    """The path of a file.  A pipe or a device could be waited for without end."""
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a file: name one")
    return Path(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object that a file of JSON holds."""
    try:
        found = json.loads(regular(path).read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged or not ours: remove it, or name another")
    return found


locks: dict[Path, tuple[IO, bool]] = {}   # open files that this process has locked
made: set[Path] = set()                   # and folders that it has made for them


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine does this with the folder."""
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    with ExitStack() as stack:
        with suppress(OSError):   # where no file can be opened, nobody waits
            path = Path(tempfile.gettempdir(), f"turn-{name}")
            file = stack.enter_context(open(path, "a"))
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock(folder: Path, shared: bool = False) -> None:
    """Keep other processes out of a folder until this one ends, however it ends.

    shared: others may have it too, but shared.  A second call with another
    `shared` changes the lock.
    """
    path, old = folder.resolve() / ".lock", None
    if not folder.is_dir():
        folder.mkdir(parents=True)
        made.add(path.parent)
    while not old or not path.exists() or not os.path.samestat(old, path.stat()):
        # Another process may have removed the file since it was opened.
        file = locks.pop(path)[0] if path in locks else open(path, "a+")
        old = os.fstat(file.fileno())
        try:
            if fcntl:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.lockf(file, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise InputError(f"{folder} is in use by {owner}: wait for its end, or choose "
                             "another folder") from None
        except OSError:   # a network disk that knows no locks
            pass
    locks[path] = file, shared
    if not shared:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({command_line()})")
        file.flush()
        for left in (*folder.glob(".*"), *folder.glob("*/.*")):
            # By processes that were killed while they wrote.  A folder inside may be
            # another run's, which then has a lock there.
            inside = left.parent != folder and (left.parent / ".lock").exists()
            if re.match(r"\.\d+-unfinished-", left.name) and left.is_file() and not inside:
                left.unlink()


def unlock(path: Path, held: tuple[IO, bool]) -> None:
    """Give a folder back.  One that was made for nothing is removed."""
    file, shared = held
    with suppress(OSError):
        if shared and fcntl:   # if nobody else reads
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        if path.parent in made:
            path.parent.rmdir()
    with suppress(OSError):   # the disk may be full
        file.close()


def claim(runtime: "Runtime", folder: Path, *files: Path) -> None:
    """Take a folder for this run, before its work begins, or say who has it.

    files: others that it will write; whether it can is tested now.
    """
    def take() -> None:
        try:
            lock(folder)
            for path in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=path.parent).close()
                if path.is_dir():
                    raise IsADirectoryError(0, "Is a folder", path)
        except OSError as error:
            raise InputError(f"{error.filename or folder} cannot be written to "
                             f"({error.strerror}): choose another folder") from None
    on_main(runtime, take)


def on_main(runtime: "Runtime", action: Callable[[], Any]) -> None:
    """Rank 0 does this.  If it meets wrong input, all processes end, and one says so."""
    refused: list[InputError | None] = [None]
    if runtime.is_main:
        try:
            action()
        except InputError as error:
            refused = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(refused)
    if refused[0]:
        if runtime.is_main:
            raise refused[0]
        raise SystemExit(2)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------
# The learning rate, the averaged weights, and a watch over the numbers.


def learning_rate(step: int, steps: int, lr: float, warmup: int, cooldown: float = 0,
                  cosine: bool = False) -> float:
    """Linear over `warmup` steps, then lr, then linear to 0.

    cooldown: the share of all steps over which the rate falls; 0 keeps it at lr.
    cosine: after the warm-up, half a wave down to lr / 10 in place of that.
    """
    up = (step + 1) / max(1, warmup)
    if cosine:
        share = max(0, step - warmup) / max(1, steps - warmup)
        return lr * min(up, 0.55 + 0.45 * math.cos(math.pi * share))
    down = (steps - step) / (cooldown * steps) if cooldown else 1
    return lr * min(1, up, down)


class Ema:
    """The exponential moving average of the trainable parameters, in `model`.

    ema <- d ema + (1 - d) parameter, with d = decay.  With a ramp it is
    d = min(decay, (1 + n) / (10 + n)) at update n, which lets a short run use a
    long average.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: bool = True) -> None:
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self.model = copy.deepcopy(model).eval()
        pairs = zip(model.parameters(), self.model.parameters())
        self.source, self.target = zip(*(pair for pair in pairs if pair[0].requires_grad))
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        decay = (1 + self.updates) / (10 + self.updates) if self.ramp else 1
        decay = min(self.decay, decay)
        self.updates += 1
        torch._foreach_lerp_(self.target, self.source, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()


class FiniteCheck:
    """Stops a run that meets a NaN or an infinity, and says where it was first.

    On CUDA the numbers are looked at in `flush`, to be called before every line
    of the log and every save: a look makes the processor wait for the card.
    """

    def __init__(self, device: torch.device) -> None:
        self.wait = device.type == "cuda"
        self.pending: list[tuple[int, list[str], Tensor]] = []

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """terms: [] tensors, in the order in which they are to be blamed."""
        values = torch.stack([v.detach().float() for v in terms.values()])
        self.pending.append((step, list(terms), values))
        if not self.wait:
            self.flush()

    def flush(self) -> None:
        for step, names, values in self.pending:
            for name, value in zip(names, values.tolist()):
                if not math.isfinite(value):
                    raise InputError(f"step {step}: {name} is {value}; what was saved before is "
                                     "good. Lower --lr, or use --precision fp32")
        self.pending.clear()


# ------------------------------------------------------------------------------
# log.jsonl.  Its first line has the command, its settings and the versions.
# Every other line is one JSON object about one step.


class Log:
    """Rank 0 appends lines.  A resumed run drops those past its checkpoint."""

    def __init__(self, path: str | Path, config: dict[str, Any], runtime: Runtime,
                 resumed_step: int = 0) -> None:
        self.path, self.active = Path(path), runtime.is_main
        if not self.active:
            return
        header = provenance(runtime.device) | {"config": config, "world": runtime.world}
        first = json.dumps(header, default=str)
        lines, changed = [first], {}
        if resumed_step and self.path.exists():
            old = self.path.read_text(errors="replace").splitlines()
            lines = [line for line in old if step_of(line) <= resumed_step]
            if not lines or step_of(lines[0]) != -1:
                lines = [first, *lines]   # somebody has cut the file
            before = json.loads(lines[0])["config"]
            changed = {k: v for k, v in json.loads(first)["config"].items()
                       if k in before and before[k] != v}
        with atomic(self.path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
        if changed:
            self.write(step=resumed_step, changed=changed)

    def write(self, **values: Any) -> None:
        """step=..., and anything JSON knows, or tensors of it."""
        if self.active:
            line = json.dumps(values, default=lambda tensor: tensor.tolist())
            with open(self.path, "a") as file:
                file.write(line + "\n")


def step_of(line: str) -> float:
    """-1 for the first line, and infinity for one that is broken."""
    try:
        found = json.loads(line)
        return float(found["step"]) if "step" in found else -1 if "config" in found else math.inf
    except (ValueError, TypeError, RecursionError):   # half a line, of a process that was killed
        return math.inf


def report_skipped(names: list[str]) -> int:
    """Name the images that could not be read, and return how many there are."""
    for name in names:
        tqdm.write(f"skipped unreadable image {name}", file=sys.stderr)
    return len(names)


def command_line() -> str:
    """The command as typed, without the folder of the script; a study is a module."""
    script = Path(sys.argv[0])
    name = f"-m studies.{script.stem}" if script.parent.name == "studies" else script.name
    return " ".join(["python", name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, Any]:
    """What belongs beside every measured number."""
    return {"command": command_line(), "date": time.strftime("%F"), "versions": versions(),
            "device": device_name(device)}


def save_figure(figure: Any, path: Path, dpi: int, **options: Any) -> None:
    """Write a figure of matplotlib, and let it go."""
    from matplotlib import pyplot
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, **options)
    pyplot.close(figure)


def peak_memory(device: torch.device) -> float:
    """The most memory held so far on the CUDA card, in GiB; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
