"""What every stage needs around its loop: device and torchrun, random streams, precision, checkpoints, EMA,
log.

Nothing in here knows about images, latents or losses.  One process and many share every line: without
torchrun `start` returns rank 0 of a world of 1, and the collectives below return their argument.
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import platform
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Errors a user can mend.  They end a script with one line and exit status 2; anything else is a bug and keeps
# its traceback.


class InputError(Exception):
    """Wrong input.  The message is one line: what is wrong, and what to do about it."""


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for `main(argv=None)`: an InputError becomes one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            name = Path(sys.modules[main.__module__].__file__ or "python").name
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        finally:
            finish()
    return wrapped


@contextmanager
def input_errors() -> Iterator[None]:
    """The rooms that do not know InputError raise ValueError or OSError for bad input; inside, they become
    one.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


# ------------------------------------------------------------------------------------------------------------
# Processes and devices.  torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; NCCL on CUDA, gloo elsewhere.


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: `device`, global `rank` of `world` processes, `local_rank` on this machine."""
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

    def autocast(self, precision: str) -> AbstractContextManager:
        """bf16 autocast for precision 'bf16', and for 'auto' on CUDA; nothing for 'fp32'."""
        if precision == "bf16" or (precision == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def wrap(self, model: nn.Module) -> nn.Module:
        """DistributedDataParallel when there is more than one process; the model itself otherwise.

        Buffers are not broadcast: ours are constants, or batch statistics that only the rank itself uses.
        """
        if self.world == 1:
            return model
        ids = [self.local_rank] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True,
                                                   broadcast_buffers=False)

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Instead of `wrap`: FSDP2 in place.  Each process keeps 1 / world of every parameter, and gathers a
        block's only while it computes with it; backward averages the gradients.

        Everything is given back after forward, else an average's next forward would see its old weights.
        """
        if self.world > 1:
            warnings.filterwarnings("ignore", ".*returned a view tensor")   # which nobody writes into
            mesh = init_device_mesh(self.device.type, (self.world,))
            for part in (*blocks, model):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)


def start(device: str = "auto") -> Runtime:
    """Join the process group torchrun describes, or be a world of one.

    device: 'auto' (CUDA if there is a card, else the CPU), 'cpu', 'cuda' or 'mps'.
    Errors: InputError for a device this machine does not have, or a local rank without a card.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no CUDA card here; use --device cpu")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(f"local rank {local_rank} has no card of its own, there are "
                         f"{torch.cuda.device_count()}: lower --nproc_per_node")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps, but PyTorch sees no Metal device here; use --device cpu")
    if kind not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {device}: choose one of auto, cpu, cuda, mps")
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    return Runtime(place, rank, world, local_rank)


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place; the tensor itself in a world of one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The inverse of `whole`: this process's part of a tensor that all hold, laid out as `other` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def sync_gradients(module: nn.Module, now: bool) -> AbstractContextManager:
    """Around forward and backward of one part of an accumulated batch: DDP averages gradients only if
    `now`.  (FSDP2 does so for every part: waiting would keep whole gradients on every process.)
    """
    ddp = isinstance(module, nn.parallel.DistributedDataParallel)
    return module.no_sync() if ddp and not now else nullcontext()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Average over the processes, in place; the tensor itself in a world of one."""
    return all_reduce_sum(tensor).div_(dist.get_world_size()) if dist.is_initialized() else tensor


def mean_over_ranks(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average of each [] tensor over the processes, for the log: a rank holds the mean of its own images."""
    if not dist.is_initialized():
        return terms
    values = all_reduce_mean(torch.stack([v.detach().float() for v in terms.values()]))
    return dict(zip(terms, values))


def gather_rows(tensor: Tensor, runtime: Runtime) -> Tensor:
    """Concatenate every rank's rows in rank order, on every rank.  [n_r, ...] -> [sum n_r, ...]; n_r may
    differ.
    """
    if runtime.world == 1:
        return tensor
    counts = torch.zeros(runtime.world, dtype=torch.long, device=tensor.device)
    counts[runtime.rank] = len(tensor)
    sizes = all_reduce_sum(counts).tolist()
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[:len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes)])


def check_same_on_all_ranks(model: nn.Module) -> None:
    """Raise RuntimeError if the processes' parameters have drifted apart (one float64 sum per tensor is
    compared).  Sharded parameters exist once and cannot drift.
    """
    copies = [p.detach() for p in model.parameters() if not isinstance(p, DTensor)]
    if dist.is_initialized() and copies:
        mine = torch.stack([p.double().sum() for p in copies])
        first = mine.clone()
        dist.broadcast(first, 0)
        if not torch.equal(mine, first):
            raise RuntimeError(f"rank {dist.get_rank()}'s parameters differ from rank 0's")


# ------------------------------------------------------------------------------------------------------------
# Randomness is a pure function of (seed, stream...): step 1000 draws the same noise in an uninterrupted run,
# in a resumed one, and for any number of processes, so a checkpoint needs no generator states, only seed and
# step.


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for the stream named by any ints and strings, e.g. generator(0, "noise", step)."""
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def global_randn(shape: Iterable[int], runtime: Runtime, seed: int, *stream: int | str) -> Tensor:
    """This rank's rows r::world of one N(0, I) draw for the whole global batch.  shape: this rank's [b, ...].

    Every rank draws all b * world rows and keeps its own, which costs little beside a network and makes the
    noise independent of the number of processes.
    """
    b, *rest = shape
    draws = generator(seed, *stream, device=runtime.device)
    rows = torch.randn(b * runtime.world, *rest, generator=draws, device=runtime.device)
    return rows[runtime.rank::runtime.world]


def global_rand(n: int, runtime: Runtime, seed: int, *stream: int | str) -> Tensor:
    """As global_randn, uniform in [0, 1).  n: this rank's count.  Returns [n]."""
    draws = generator(seed, *stream, device=runtime.device)
    return torch.rand(n * runtime.world, generator=draws, device=runtime.device)[runtime.rank::runtime.world]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: one dictionary of tensors and plain containers, written to a temporary name and renamed, so
# that a process killed at any moment leaves the old file or the new one, never half of one.


def save_atomic(state: dict[str, Any], path: str | Path) -> None:
    """torch.save under a temporary name in the same folder, flushed to disk, then os.replace."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_file(path: str | Path, hint: str = "") -> dict[str, Any]:
    """torch.load(weights_only=True) onto the CPU.  InputError when the file is missing or not a
    checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file{'; ' + hint if hint else ''}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # torch raises half a dozen types for a damaged file
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable PyTorch checkpoint ({reason})") from None


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def training_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """{"model", "optimizer"}: whole tensors by parameter name, the same whether the run is sharded or not.

    To be called by all processes of a sharded run, of which only rank 0 gets the tensors.
    """
    return {"model": get_model_state_dict(model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(model, optimizers, options=WHOLE)}


def load_training_state(model: nn.Module, optimizers: list[torch.optim.Optimizer],
                        state: dict[str, Any]) -> None:
    """The inverse, in every process, from the same file."""
    set_model_state_dict(model, state["model"], options=WHOLE)
    set_optimizer_state_dict(model, optimizers, state["optimizer"], options=WHOLE)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_running_flags(parser: argparse.ArgumentParser, image_every: int) -> argparse._ArgumentGroup:
    """The flags that both training stages share, with the same meaning.  Returns: their group."""
    g = parser.add_argument_group("running")
    g.add_argument("--seed", type=int, default=0, help="of weights, data order and every draw")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="autocast of the networks; auto is bf16 on CUDA; latents are always fp32")
    g.add_argument("--workers", type=int, default=2, help="loader processes per training process")
    g.add_argument("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    g.add_argument("--image-every", type=int, default=image_every, help="steps between pictures")
    g.add_argument("--smoke", action="store_true", help="a few steps of everything, in seconds")
    return g


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of a command as plain values, for its checkpoint and its log."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def check_config(old: dict[str, Any], new: dict[str, Any], free: set[str], where: Path) -> None:
    """A run is resumed only by the command that began it.  `free` names the flags that may differ (steps,
    ...).

    Errors: InputError listing the flags that differ.
    """
    differ = [k for k in sorted(new) if k not in free and k in old and old[k] != new[k]]
    if differ:
        listed = ", ".join(f"--{k.replace('_', '-')} {old[k]} (now {new[k]})" for k in differ[:6])
        raise InputError(f"{where} was begun with {listed}; repeat those flags to resume, "
                         "or choose another --out")


# ------------------------------------------------------------------------------------------------------------
# Exponential moving average of the trainable parameters, in fp32.


class Ema:
    """ema <- lerp(ema, parameter, 1 - d), d = min(decay, (1 + n) / (10 + n)) at update n.

    The ramp lets short runs use a long average; at decay 0.9999 it ends after 90,000 updates.  Frozen
    parameters and buffers keep the model's own values.
    """

    def __init__(self, model: nn.Module, decay: float, average: nn.Module | None = None) -> None:
        """average: a copy of `model`, sharded as it is; made here if there is none."""
        self.decay, self.updates = decay, 0
        self.model = (average or copy.deepcopy(model)).eval()
        source, target = dict(model.named_parameters()), dict(self.model.named_parameters())
        trainable = [n for n, p in source.items() if p.requires_grad]
        self.source, self.target = [source[n] for n in trainable], [target[n] for n in trainable]
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.target, self.source, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model, options=WHOLE)

    def load_state_dict(self, state: dict[str, Any], updates: int) -> None:
        set_model_state_dict(self.model, state, options=WHOLE)
        self.updates = updates


# ------------------------------------------------------------------------------------------------------------
# Stop on the first non-finite number without making the GPU wait: on CUDA the values of step k are looked at
# two steps later, when their copy has long arrived.  `flush` looks at all of them; call it before every save.


class FiniteCheck:
    def __init__(self, device: torch.device) -> None:
        self.lag = 2 if device.type == "cuda" else 0
        self.pending: deque = deque()

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """terms: name -> [] tensor, in the order in which they should be blamed."""
        values = torch.stack([v.detach().float() for v in terms.values()])
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, list(terms), values, event))
        while len(self.pending) > self.lag:
            self._look()

    def flush(self) -> None:
        while self.pending:
            self._look()

    def _look(self) -> None:
        step, names, values, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        for name, value in zip(names, values.tolist()):
            if not math.isfinite(value):
                raise InputError(f"step {step}: {name} is {value}; the last checkpoint is still good. "
                                 "Lower --lr or the weight of that term, or use --precision fp32")


# ------------------------------------------------------------------------------------------------------------
# log.jsonl: the first line is the command, its settings and the versions; then one JSON object per logged
# step.


class Log:
    """Append-only JSON lines, rank 0 only.  A resumed run drops the lines past its checkpoint and goes on."""

    def __init__(self, path: str | Path, config: dict[str, Any], runtime: Runtime,
                 resumed_step: int = 0) -> None:
        self.path, self.active = Path(path), runtime.is_main
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() and resumed_step else []
        kept = [line for line in lines if _step_of(line) <= resumed_step]
        if not kept:
            kept = [json.dumps({"command": command_line(), "config": config, "versions": versions(),
                                "device": device_name(runtime.device), "world": runtime.world,
                                "date": time.strftime("%Y-%m-%d")}, default=str)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("\n".join(kept) + "\n")
        os.replace(temporary, self.path)

    def write(self, **values: Any) -> None:
        """One object: step=..., then scalars (tensors are converted) or lists."""
        if self.active:
            plain = {k: v.item() if isinstance(v, Tensor) and v.ndim == 0 else
                     v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps(plain) + "\n")


def report_skipped(names: list[str]) -> int:
    """Name the image files that could not be read, above the progress bar.  Returns: how many."""
    for name in names:
        tqdm.write(f"skipped unreadable image {name}", file=sys.stderr)
    return len(names)


def _step_of(line: str) -> float:
    try:
        return json.loads(line).get("step", -1)
    except json.JSONDecodeError:   # the half line of a killed process
        return math.inf


def command_line() -> str:
    """The command as typed, without this machine's folders."""
    return " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held so far, in GiB: allocated on the CUDA card, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:   # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
