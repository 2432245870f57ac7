"""Files that are damaged, foreign, or written to do harm.

Checkpoints, safetensors, arrays, JSON, logs and caches.  Each is refused in one
line, promptly; nothing in it is executed, and what lay beside it stays as it was.
What can be made again, such as a cache, may be made again: with the same result.
"""

import copy
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoints
import runtime
from studies import answers, experiments, plot
from studies.faults.bench import (
    DIT, EVALUATE, PROMPTLY, SAMPLE, SMOKE, TOKENIZER, TOY, Bench, Broken, Case, Hostile,
    Run, Work, contents, nobody_left, nothing_left, nothing_ran, same, watch_programs)
from studies.faults.flags import all_finite
from studies.faults.pictures import good_pictures

Prepare = Callable[[Path], object]


def cases(bench: Bench) -> list[Case]:
    found = []
    for use, (work, argv, path, source) in CHECKPOINTS.items():
        keys = DIT_KEYS if "dit" in source else TOKENIZER_KEYS
        spoilt = [(name, spoil, True) for name, spoil in {**BYTES, **DAMAGED}.items()]
        # `show` tells what a file holds, whatever that is.
        spoilt += [(name, spoil, use != "show") for name, spoil in FOREIGN.items()]
        spoilt += [(name, rewritten(change), use != "show") for name, change in WEIGHTS.items()]
        spoilt += [(f"{key} is {name}", entry(key, value), use in needed and name not in allowed)
                   for key, (needed, allowed) in keys.items() for name, value in VALUES.items()]
        found += [Case(f"{use}: {name}", checkpoint(
            bench, work, argv, path, source, spoil, refused)) for name, spoil, refused in spoilt]
    for name, spoil in {**SAFETENSORS, **BYTES}.items():
        for use, (work, argv) in SAFE_USES.items():
            found.append(Case(f"{use}: safetensors, {name}", refuses(
                work, argv, lambda folder, spoil=spoil: spoil(folder / "bad.safetensors"))))
    for name, prepare in LATENTS.items():
        found.append(Case(f"LightningDiT's latents: {name}", refuses(
            DIT, "--latents latents", lambda folder, prepare=prepare: latents(folder, prepare),
            begins=name in ("NaN", "infinity"))))
    for name, prepare in ARRAYS.items():
        for use, argv in NPZ_USES.items():
            found.append(Case(f"{use}: {name}", refuses(
                EVALUATE, argv, lambda folder, prepare=prepare: prepare(folder / "bad.npz"))))
    for name, prepare in STATISTICS.items():
        found.append(Case(f"statistics of a reference: {name}", refuses(
            EVALUATE, NPZ_USES["reference"], lambda folder, prepare=prepare: statistics(
                folder / "bad.npz", prepare))))
    for name, text in OBJECTS.items():
        found.append(Case(f"samples.json: {name}", beside_samples(bench, text)))
    found += [Case(f"{work.name}, {name} is spoilt: {kind}", made_again(bench, work, name, spoil))
              for work, name in KEPT for kind, spoil in BYTES.items()]
    found += [Case(f"an arm of the experiments: {name}", refuses(
        Work("experiments", experiments, ""), "--draw --results results", damaged_arm(spoil)))
        for name, spoil in {**BYTES, **ARMS}.items()]
    for name, text in LOGS.items():
        found.append(Case(f"plot: {name}", refuses(
            Work("plot", plot, ""), "bad.jsonl --out run/plot.png", written("bad.jsonl", text))))
        found.append(Case(f"tokenizer, resumed with a log: {name}", log_of_run(bench, text)))
    found += [Case(f"{name}: {kind}", refuses(
        work, argv, lambda folder, path=path, spoil=spoil: spoil(folder / path),
        refused=needed, TORCH_HOME="torch"))
        for name, work, argv, path, needed in FROZEN for kind, spoil in BYTES.items()]
    return found + [Case(name, action(bench)) for name, action in SILENT.items()]


# ------------------------------------------------------------------------------
# What is promised.


def state_of(folder: Path) -> dict[str, Any]:
    """Every file and folder, with size and time, but for features that are kept."""
    found = {}
    for path in {*folder.rglob("*")} - {*folder.glob("run/cache/*.pt"), *folder.glob("run/cache"),
                                        folder / "run"}:
        status = path.lstat()
        size = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
        found[str(path.relative_to(folder))] = size
    return found


def refuses(work: Work, argv: str, prepare: Prepare, refused: bool = True,
            begins: bool = False, **environment: str) -> Callable:
    """One line, and nothing has happened.

    refused=False: or it ends well.  begins: or it has begun, and saved good numbers.
    """
    def action(folder: Path) -> None:
        prepare(folder)
        before = state_of(folder)
        run = Run(folder, work.stage, f"{work.argv} {argv}",
                  [*work.before, lambda: watch_programs(folder)], **environment)
        run.wait(PROMPTLY)
        nobody_left(folder)
        nothing_ran(folder)
        if run.status == 0 and not refused:
            run.went_well()
            return nothing_left(folder)
        run.refused(others="no val/")
        if begins:
            nothing_left(folder)
            return all_finite(folder)
        after = state_of(folder)
        if changed := sorted(k for k in before.keys() | after.keys()
                             if before.get(k) != after.get(k)):
            raise Broken(f"left behind or changed: {changed}")
    return action


# ------------------------------------------------------------------------------
# Checkpoints.

# Each use: the work, its flags, where the file lies, and of which file it is made.
CHECKPOINTS: dict[str, tuple[Work, str, str, str]] = {
    "tokenizer, resumed": (TOKENIZER, "--steps 6", "run/checkpoint.pt", "run/checkpoint.pt"),
    "transformer, resumed": (DIT, "--steps 6", "run/checkpoint.pt", "run/checkpoint.pt of dit"),
    "tokenizer --init": (TOKENIZER, "--init bad.pt", "bad.pt", "stock/tokenizer/checkpoint.pt"),
    "transformer --tokenizer": (DIT, "--tokenizer bad.pt", "bad.pt",
                                "stock/tokenizer/checkpoint.pt"),
    "evaluation --tokenizer": (EVALUATE, "--tokenizer bad.pt", "bad.pt",
                               "stock/tokenizer/checkpoint.pt"),
    "samples --dit": (SAMPLE, "--dit bad.pt --tokenizer stock/tokenizer/checkpoint.pt", "bad.pt",
                      "stock/dit/checkpoint.pt"),
    "show": (Work("show", checkpoints, ""), "show bad.pt", "bad.pt", "stock/dit/checkpoint.pt"),
}


def checkpoint(bench: Bench, work: Work, argv: str, path: str, source: str, spoil: Prepare,
               refused: bool = True) -> Callable:
    def prepare(folder: Path) -> None:
        if path.startswith("run/"):
            bench.finished(work, folder)
        else:
            (folder / path).write_bytes((folder / source).read_bytes())
        spoil(folder / path)
    return refuses(work, argv, prepare, refused)


def cut(share: float) -> Prepare:
    def spoil(path: Path) -> None:
        kept = path.read_bytes()
        path.write_bytes(kept[:int(share * len(kept))])
    return spoil


def flipped(seed: int) -> Prepare:
    """64 bytes at random places are others."""
    def spoil(path: Path) -> None:
        found, draws = bytearray(path.read_bytes()), random.Random(seed)
        for place in draws.sample(range(len(found)), min(64, len(found))):
            found[place] ^= draws.randrange(1, 256)
        path.write_bytes(found)
    return spoil


def replaced(make: Callable[[Path], object]) -> Prepare:
    """Something else lies in its place."""
    def spoil(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        make(path)
    return spoil


def holding(value: Any) -> Prepare:
    return replaced(lambda path: torch.save(value, path))


BYTES: dict[str, Prepare] = {
    "empty": replaced(Path.touch),
    "text": replaced(lambda path: path.write_text("step 4\n" * 99)),
    "random bytes": replaced(lambda path: path.write_bytes(random.Random(0).randbytes(99_999))),
    "a pipe": replaced(os.mkfifo),
    "a folder": replaced(Path.mkdir),
    "a link to a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a pickle that runs a program": holding(Hostile()),
    "a dict with a program": holding({"kind": "tokenizer", "model": Hostile()}),
}
DAMAGED: dict[str, Prepare] = {
    "cut in half": cut(0.5), "without its last bytes": cut(0.9999),
    "flipped bytes, 1": flipped(1), "flipped bytes, 2": flipped(2),
    "flipped bytes, 3": flipped(3)}
FOREIGN: dict[str, Prepare] = {
    "a list": holding([1, 2]), "a tensor": holding(torch.zeros(3)), "a number": holding(1.0),
    "an empty dict": holding({}), "a dict of a list": holding({"model": [1]}),
    "keys that are numbers": holding({1: torch.zeros(1), 2: 3}),
}


def rewritten(change: Callable[[dict], object]) -> Prepare:
    """The same file with another content."""
    def spoil(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    return spoil


def entry(key: str, value: Any) -> Prepare:
    def change(state: dict) -> None:
        state.pop(key)
        if value is not MISSING:
            state[key] = copy.deepcopy(value)
    return rewritten(change)


MISSING = object()
VALUES = {"missing": MISSING, "None": None, "text": "text", "a list": [], "an empty dict": {},
          "NaN": float("nan"), "a tensor": torch.zeros(2)}
# For which uses an entry is needed, and what may stand for it.  A config without
# settings is one of an older version, and a file without a kind may be published.
RESUMED, GIVEN = ("tokenizer, resumed", "transformer, resumed"), (
    "transformer --tokenizer", "evaluation --tokenizer", "samples --dit")
Keys = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
TOKENIZER_KEYS: Keys = {
    "kind": (RESUMED + GIVEN[:2], ()), "config": (RESUMED, ("an empty dict",)),
    "model_config": (GIVEN, ()), "step": (RESUMED, ()), "optimizer": (RESUMED, ()),
    "model": ((*RESUMED, *GIVEN, "tokenizer --init"), ())}
DIT_KEYS: Keys = {
    "kind": (RESUMED, ()), "config": (RESUMED, ("an empty dict",)), "model_config": (GIVEN, ()),
    "step": (RESUMED, ()), "model": (RESUMED, ()), "ema": (RESUMED + GIVEN, ()),
    "ema_updates": (RESUMED, ()), "optimizers": (RESUMED, ()), "errors_by_t": (RESUMED, ()),
    "tokenizer": ((), ()), "classes": ((), ()), "latent_mean": (GIVEN, ()),
    "latent_std": (GIVEN, ())}


def of_weights(change: Callable[[dict, str], object]) -> Callable[[dict], None]:
    """Change the first matrix of all that are learned."""
    def apply(state: dict) -> None:
        for part in ("model", "ema"):
            if part in state:
                name = next(k for k, v in state[part].items() if v.ndim > 1)
                change(state[part], name)
    return apply


WEIGHTS: dict[str, Callable[[dict], object]] = {
    "NaN in a weight": of_weights(lambda part, name: part[name].view(-1)[0].fill_(torch.nan)),
    "infinity in a weight": of_weights(
        lambda part, name: part[name].view(-1)[0].fill_(torch.inf)),
    "a weight of another shape": of_weights(
        lambda part, name: part.update({name: part[name][..., :1]})),
    "a weight is missing": of_weights(lambda part, name: part.pop(name)),
    "a weight too many": of_weights(lambda part, name: part.update(extra=torch.zeros(1))),
    "a weight is text": of_weights(lambda part, name: part.update({name: "text"})),
}


# ------------------------------------------------------------------------------
# safetensors: the length of the header, the header in JSON, and the data.


def safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> Prepare:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def spoil(path: Path) -> None:
        size = len(text) if length is None else length
        path.write_bytes(size.to_bytes(8, "little") + text + data)
    return spoil


def tensor(dtype: Any = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, Prepare] = {
    "a header of 2^62 bytes": safetensors({"w": tensor()}, length=2**62),
    "a header longer than the file": safetensors({"w": tensor()}, length=999),
    "a header of no bytes": safetensors(b"", length=0),
    "a header that is no JSON": safetensors(b"{'w': 1}"),
    "a header that is a list": safetensors([1, 2]),
    "a header of 99,999 brackets": safetensors(b"[" * 99_999),
    "an entry that is a number": safetensors({"w": 1}),
    "data outside the file": safetensors({"w": tensor(offsets=(64, 128))}),
    "data before the file": safetensors({"w": tensor(offsets=(-64, 0))}),
    "an end before its begin": safetensors({"w": tensor(offsets=(64, 0))}),
    "data of text": safetensors({"w": tensor(offsets=("a", "b"))}),
    "data that overlap": safetensors({"v": tensor(), "w": tensor()}),
    "an unknown dtype": safetensors({"w": tensor("X9")}),
    "a dtype of a list": safetensors({"w": tensor([])}),
    "a shape of other size": safetensors({"w": tensor(shape=(4, 5))}),
    "a negative shape": safetensors({"w": tensor(shape=(-4, -4))}),
    "a shape of 10^18 numbers": safetensors({"w": tensor(shape=(10**9, 10**9))}),
    "a name twice": safetensors(b'{"w":%b,"w":%b}' % ((json.dumps(tensor()).encode(),) * 2)),
    "no tensors": safetensors({}),
}
SAFE_USES = {"tokenizer --init": (TOKENIZER, "--init bad.safetensors"),
             "transformer --tokenizer": (DIT, "--tokenizer bad.safetensors")}


def store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A good file, by hand."""
    kinds = {"float32": "F32", "int64": "I64", "float64": "F64"}
    header, data = {}, b""
    for name, array in arrays.items():
        header[name] = tensor(kinds[str(array.dtype)], array.shape,
                              (len(data), len(data) + array.nbytes))
        data += array.tobytes()
    safetensors(header, data)(path)


def latents(folder: Path, change: Callable[[dict, dict], object]) -> None:
    """LightningDiT's files for the tokenizer at hand, after a change to them."""
    dit = torch.load(folder / "stock/dit/checkpoint.pt", weights_only=True)
    c, h, w = dit["latent_shape"]
    z = np.random.default_rng(0).standard_normal((8, c, h, w), np.float32)
    arrays = {"latents": z, "latents_flip": z.copy(), "labels": np.arange(8) % 4}
    stats: dict = {"mean": torch.zeros(1, c, 1, 1), "std": torch.ones(1, c, 1, 1)}
    change(arrays, stats)
    (folder / "latents").mkdir()
    if arrays:
        store(folder / "latents/latents_rank00_shard000.safetensors", arrays)
    if stats:
        torch.save(stats, folder / "latents/latents_stats.pt")


LATENTS: dict[str, Callable[[dict, dict], object]] = {
    "no files": lambda arrays, stats: arrays.clear(),
    "no statistics": lambda arrays, stats: stats.clear(),
    "no labels": lambda arrays, stats: arrays.pop("labels"),
    "no mirror images": lambda arrays, stats: arrays.pop("latents_flip"),
    "fewer labels": lambda arrays, stats: arrays.update(labels=arrays["labels"][:3]),
    "negative labels": lambda arrays, stats: arrays.update(labels=arrays["labels"] - 9),
    "labels of 10^15": lambda arrays, stats: arrays.update(labels=arrays["labels"] + 10**15),
    "labels with a fraction": lambda arrays, stats: arrays.update(labels=arrays["labels"] + 0.5),
    "latents of two dimensions": lambda arrays, stats: arrays.update(
        latents=arrays["latents"].reshape(8, -1)),
    "mirror images of another size": lambda arrays, stats: arrays.update(
        latents_flip=arrays["latents"][:, :, :1].copy()),
    "NaN": lambda arrays, stats: arrays["latents"].fill(np.nan),
    "infinity": lambda arrays, stats: arrays["latents_flip"].fill(np.inf),
    "no images": lambda arrays, stats: arrays.update({k: v[:0] for k, v in arrays.items()}),
    "other channels": lambda arrays, stats: (arrays.update({
        k: v[:, :-1].copy() if v.ndim > 1 else v for k, v in arrays.items()}),
        stats.update({k: v[:, :-1] for k, v in stats.items()})),
    "statistics without std": lambda arrays, stats: stats.pop("std"),
    "statistics of other channels": lambda arrays, stats: stats.update(mean=torch.zeros(1)),
    "statistics of text": lambda arrays, stats: stats.update(mean="text"),
    "statistics of NaN": lambda arrays, stats: stats["std"].fill_(torch.nan),
    "a deviation of 0": lambda arrays, stats: stats["std"].zero_(),
    "a negative deviation": lambda arrays, stats: stats["std"].neg_(),
    "statistics with a program": lambda arrays, stats: stats.update(mean=Hostile()),
}


# ------------------------------------------------------------------------------
# Arrays: samples, and references of the ADM evaluator.


def arrays_of(**arrays: Any) -> Prepare:
    return lambda path: np.savez(path, **arrays)


def member(name: str, content: bytes) -> Prepare:
    """A zip file with one member."""
    def spoil(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
    return spoil


def npy(shape: str, kind: str = "|u1", data: bytes = b"") -> bytes:
    """The format of NumPy, with any header."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + data


def objects(path: Path) -> None:
    np.savez(path, arr_0=np.array([Hostile()], dtype=object))


IMAGES = np.random.default_rng(2).integers(0, 256, (12, 32, 32, 3), np.uint8)


def cut_archive(path: Path) -> None:
    np.savez(path, arr_0=IMAGES)
    cut(0.7)(path)


def flipped_archive(path: Path) -> None:
    np.savez_compressed(path, arr_0=IMAGES)
    flipped(5)(path)


ARRAYS: dict[str, Prepare] = {
    **{name: spoil for name, spoil in BYTES.items()},
    "cut": cut_archive, "flipped bytes": flipped_archive,
    "objects with a program": objects,
    "an archive of nothing": lambda path: zipfile.ZipFile(path, "w").close(),
    "other names": arrays_of(images=IMAGES),
    "floats": arrays_of(arr_0=IMAGES / 255),
    "text in arr_0": arrays_of(arr_0=np.array(["a", "b"])),
    "three dimensions": arrays_of(arr_0=IMAGES[0]),
    "oblong images": arrays_of(arr_0=IMAGES[:, :16]),
    "one channel": arrays_of(arr_0=IMAGES[..., :1]),
    "no images": arrays_of(arr_0=IMAGES[:0]),
    "one image": arrays_of(arr_0=IMAGES[:1]),
    "a member that is no array": member("arr_0.npy", b"text"),
    "a member without data": member("arr_0.npy", npy("(12, 32, 32, 3)")),
    "10^12 images": member("arr_0.npy", npy("(1000000000000, 32, 32, 3)")),
    "a negative shape": member("arr_0.npy", npy("(-12, 32, 32, 3)", data=bytes(36_864))),
    "a shape of text": member("arr_0.npy", npy("'text'")),
    "a header that calls a function": member("arr_0.npy", npy("__import__('os').getcwd()")),
    "a header of brackets": member("arr_0.npy", npy("(" * 9_999)),
}
NPZ_USES = {"samples": "--samples bad.npz --reference shapes", "reference": "--reference bad.npz"}


def statistics(path: Path, change: Callable[[dict], object]) -> None:
    """mu and sigma of the judge's features, after a change to them."""
    draws = np.random.default_rng(3).standard_normal((500, 96))
    found: dict[str, Any] = {"mu": draws.mean(0), "sigma": np.cov(draws.T),
                             "features": np.array("Shapes")}
    change(found)
    np.savez(path, **found)


STATISTICS: dict[str, Callable[[dict], object]] = {
    "no sigma": lambda found: found.pop("sigma"),
    "no mu": lambda found: found.pop("mu"),
    "mu of text": lambda found: found.update(mu=np.array(["a"] * 96)),
    "mu of objects": lambda found: found.update(mu=np.array([Hostile()] * 96, dtype=object)),
    "mu of other length": lambda found: found.update(mu=found["mu"][:50]),
    "both of other length": lambda found: found.update(
        mu=found["mu"][:50], sigma=found["sigma"][:50, :50]),
    "mu of two dimensions": lambda found: found.update(mu=found["mu"][None]),
    "sigma of one dimension": lambda found: found.update(sigma=found["mu"]),
    "sigma that is not square": lambda found: found.update(sigma=found["sigma"][:50]),
    "sigma that is not symmetric": lambda found: found["sigma"].__setitem__((0, 1), 5.0),
    "sigma that is indefinite": lambda found: found.update(sigma=-found["sigma"]),
    "a negative variance": lambda found: found["sigma"].__setitem__((3, 3), -1.0),
    "complex numbers": lambda found: found.update(sigma=found["sigma"] + 1j),
    "NaN": lambda found: found["mu"].fill(np.nan),
    "infinity": lambda found: found["sigma"].fill(np.inf),
    "features of another name": lambda found: found.update(features=np.array("Other")),
    "features of objects": lambda found: found.update(
        features=np.array(Hostile(), dtype=object)),
}


# ------------------------------------------------------------------------------
# JSON beside samples.

OBJECTS: dict[str, str | bytes] = {
    "empty": "", "text": "not JSON", "a list": "[1, 2]", "a number": "3", "null": "null",
    "brackets": "[" * 99_999, "half of it": '{"data": "sha', "bytes": b"\xff\xfe\x00\x01",
    "data is a number": '{"data": 3, "data_seed": 0}',
    "data is a list": '{"data": ["shapes"], "data_seed": 0}',
    "data_seed is text": '{"data": "shapes", "data_seed": "x"}',
    "data_seed is NaN": '{"data": "shapes", "data_seed": NaN}',
    "data is a folder that is not here": '{"data": "/not/here", "data_seed": 0}',
}


def beside_samples(bench: Bench, text: str | bytes) -> Callable:
    def prepare(folder: Path) -> None:
        for name in ("samples.npz", "samples.json"):
            (folder / name).write_bytes((folder / "stock/samples" / name).read_bytes())
        (folder / "samples.json").write_bytes(
            text if isinstance(text, bytes) else text.encode())
    return refuses(EVALUATE, "--samples samples.npz", prepare)


# ------------------------------------------------------------------------------
# What a run has kept for the next one, and what can be made again.

KEPT = ((DIT, "cache/*/*.npy"), (DIT, "cache/*/*.json"), (EVALUATE, "run/cache/*.pt"),
        (SAMPLE, "run/samples.json"), (TOY, "run/arms/*.pt"))


def made_again(bench: Bench, work: Work, pattern: str, spoil: Prepare) -> Callable:
    """With the same result, or it is refused: then its removal mends it."""
    def action(folder: Path) -> None:
        bench.finished(work, folder)
        path = sorted(folder.glob(pattern))[0]
        if work is DIT:   # a training that is over would not look at its cache
            (folder / "run/checkpoint.pt").unlink()
        spoil(path)
        run = Run(folder, work.stage, work.argv,
                  [*work.before, lambda: watch_programs(folder)]).wait()
        nobody_left(folder)
        nothing_ran(folder)
        if run.status:
            run.refused()
            path.rmdir() if path.is_dir() else path.unlink()
            work.finish(folder)
        same(contents(folder, *work.writes), bench.reference(work).contents, "made again")
    return action


LOGS: dict[str, str | bytes] = {
    "empty": "", "bytes": random.Random(1).randbytes(9_999), "text": "step 1\nstep 2\n",
    "lists": "[1, 2]\n[3]\n", "numbers": "1\n2\n", "brackets": "[" * 99_999,
    "steps of text": '{"step": "one", "rec": 1}\n', "steps of NaN": '{"step": NaN, "rec": 1}\n',
    "no steps": '{"rec": 1}\n', "only a header": '{"config": {}, "command": "python"}\n',
    "a header of text": '{"config": "text"}\n',
}


START = {"e": 0.1, "loss": 2.0, "injected": 1.0}
LOOK = {"training": 1, "generated": {"fd": 9.0, "invalid": 9.0, "distance": 3.0, "round_trip": 0.2},
        "starts": {str(answers.START): START}, "injected": {"fd": 5.0, "invalid": 5.0},
        "curve": [[0.01, 0.0], [0.1, 1.0], [1.0, 2.0]]}
ARM = {"value": "1", "seed": 1, "features": "Shapes", "settings": {"scores": "one look"},
       "hardware": "none", "date": "today", "versions": {"torch": "2"}, "numbers": {},
       "real": {"sigma": 0.1, "psnr": 30.0, "fd": 2.0, "invalid": 2.0, "distance": 1.5,
                "round_trip": 0.1, "images": {"fd": 1.0, "invalid": 0.0}}, "rows": [LOOK]}


def arms(folder: Path) -> Path:
    """The files of two arms.  Returns one of them."""
    path = folder / "results/shapes/arms/VE.json"
    for family in "KL", "VE":
        path = path.with_name(f"{family}.json")
        runtime.write_json(path, ARM | {"arm": f"{family} 1", "family": family})
    return path


def damaged_arm(spoil: Prepare) -> Prepare:
    return lambda folder: spoil(arms(folder))


def arm(change: Callable[[dict], object]) -> Prepare:
    def spoil(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
    return spoil


ARMS: dict[str, Prepare] = {
    "half of it": cut(0.5), "a list": replaced(lambda path: path.write_text("[1, 2]")),
    "brackets": replaced(lambda path: path.write_text("[" * 99_999)),
    "an empty object": replaced(lambda path: path.write_text("{}")),
    "no rows": arm(lambda found: found.pop("rows")),
    "rows of text": arm(lambda found: found.update(rows="text")),
    "a number of text": arm(lambda found: found["real"].update(fd="text")),
    "a number of NaN": arm(lambda found: found["real"].update(fd=float("nan"))),
    "a number of a list": arm(lambda found: found["real"].update(psnr=[1])),
    "curves of text": arm(lambda found: found["rows"][0].update(curve="text")),
    "settings of text": arm(lambda found: found.update(settings="text")),
    "a name of a number": arm(lambda found: found.update(arm=3)),
}


def written(name: str, text: str | bytes) -> Prepare:
    return lambda folder: (folder / name).write_bytes(
        text if isinstance(text, bytes) else text.encode())


def log_of_run(bench: Bench, text: str | bytes) -> Callable:
    """A training goes on with its checkpoint, and mends the log."""
    def action(folder: Path) -> None:
        bench.finished(TOKENIZER, folder)
        written("run/log.jsonl", text)(folder)
        run = Run(folder, TOKENIZER.stage, f"{TOKENIZER.argv} --steps 6").wait()
        nobody_left(folder)
        if run.status:
            run.refused()
            return
        run.went_well()
        lines = contents(folder, "run/log.jsonl")["run/log.jsonl"]
        if "config" not in lines[0] or lines[-1].get("step") != 6:
            raise Broken(f"the log begins with {str(lines[0])[:80]}, ends {str(lines[-1])[:80]}")
    return action


# ------------------------------------------------------------------------------
# Weights that others have trained, where PyTorch keeps them.

HUB = "torch/hub/checkpoints"
# The last entry: whether there is no score without them.
FROZEN = (
    ("weights of the Inception", EVALUATE, "--features inception",
     f"{HUB}/pt_inception-2015-12-05-6726825d.pth", True),
    ("weights of LPIPS", TOKENIZER, "--perceptual-weight 1", f"{HUB}/vgg16-397923af.pth", True),
    ("weights of LPIPS, for scores", EVALUATE, "", f"{HUB}/vgg16-397923af.pth", False),
    ("weights of DINOv2", TOKENIZER, "--align-weight 0.1",
     f"{HUB}/dinov2_vitl14_pretrain.pth", True),
    ("weights of DINOv2, by name", TOKENIZER, "--align-weight 0.1 --teacher bad.pt", "bad.pt",
     True))


# ------------------------------------------------------------------------------
# What would be wrong in silence.


def new_pictures(bench: Bench) -> Callable:
    """The images change between the halves of a training."""
    def action(folder: Path) -> None:
        good_pictures(folder / "data")
        argv = f"{TOKENIZER.argv} --data data"
        Run(folder, TOKENIZER.stage, argv).wait().went_well()
        (folder / "data/3.png").write_bytes((folder / "data/4.png").read_bytes())
        Run(folder, TOKENIZER.stage, f"{argv} --steps 6").wait().refused(
            "--accept-data", others="no val/")
        Run(folder, TOKENIZER.stage, f"{argv} --steps 6 --accept-data").wait().went_well()
        lines = contents(folder, "run/log.jsonl")["run/log.jsonl"]
        if not any("changed" in line for line in lines):
            raise Broken("the log does not say that the images have changed")
    return action


def new_reference(bench: Bench) -> Callable:
    """One image of a reference changes after its features were kept."""
    def action(folder: Path) -> None:
        good_pictures(folder / "data", 64)
        argv = (f"{SMOKE} --limit 64 --samples stock/samples/samples.npz --reference data "
                "--features judge")

        def score(out: str) -> dict:
            Run(folder, EVALUATE.stage, f"{argv} --out {out}").wait().went_well()
            return contents(folder, f"{out}/results.json")[f"{out}/results.json"][-1]["metrics"]

        before = score("run")
        status = (folder / "data/9.png").stat()
        (folder / "data/9.png").write_bytes((folder / "data/10.png").read_bytes())
        os.utime(folder / "data/9.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        after, anew = score("run"), score("new")
        if after != anew or after == before:
            raise Broken(f"{before}, then {after}, and anew {anew}")
    return action


def not_finite(bench: Bench) -> Callable:
    """Statistics of NaN in a published transformer's file."""
    def prepare(folder: Path) -> None:
        state = torch.load(folder / "stock/dit/checkpoint.pt", weights_only=True)
        c = len(state["latent_mean"])
        torch.save({"mean": torch.full((c,), torch.nan), "std": torch.ones(c)}, folder / "bad.pt")
    return refuses(SAMPLE, "--latent-stats bad.pt", prepare)


def other_network(bench: Bench) -> Callable:
    """The tokenizer of a transformer is replaced by another one."""
    def prepare(folder: Path) -> None:
        Run(folder, TOKENIZER.stage, f"{TOKENIZER.argv} --seed 5 --out other"
            ).wait().went_well()
    return refuses(SAMPLE, "--tokenizer other/checkpoint.pt", prepare)


SILENT: dict[str, Callable[[Bench], Callable]] = {
    "silence: the images change within a training": new_pictures,
    "silence: an image of a reference changes": new_reference,
    "silence: statistics of NaN": not_finite,
    "silence: another tokenizer decodes": other_network,
}
