"""Does it keep its promises?  Faults of every kind, on purpose.

    python -m studies.faults                        # all: 20 minutes on two cores
    python -m studies.faults --only kills --count 20
    python -m studies.faults --only files --case "samples.json"
    python -m studies.faults --out results/faults.json

Seven groups: kills, signals, a disk that refuses, pictures, files, flags, and two
runs in one folder.  Each case is a run of a stage, with small networks on the
CPU, in a folder of its own that is removed.  It starts processes of its own only,
each with a time limit, and uses no network.  It needs Linux, whose /proc tells
which processes are left; as root it also mounts small disks.

The same command again repeats no group that --out holds of the same code.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"   # a fork does not inherit OpenMP's threads
os.environ["MPLBACKEND"] = "Agg"
import runtime  # before torch, which it tells how threads wait

import torch

from studies.faults import bench, disk, files, flags, kills, pairs, pictures, signals
from studies.faults.bench import Bench, Broken, Case, Skipped, make_stock

GROUPS = {"kills": kills, "signals": signals, "disk": disk, "pictures": pictures,
          "files": files, "flags": flags, "pairs": pairs}

# ------------------------------------------------------------------------------
# Cases are tried in as many lanes as there are cores.  A lane is a process with a
# Bench of its own, and appends a line of JSON for every case to its file.


def try_case(case: Case, place: Bench) -> dict[str, str]:
    """What is to be told of a case: its name, and what was not as promised."""
    folder, told = place.base / "case", {"case": case.name}
    try:
        case.action(place.folder("case"))
    except Broken as error:
        told["not"] = str(error)
    except Skipped as error:
        told["left out"] = str(error)
    except (OSError, ValueError, LookupError) as error:
        told["not"] = f"the case itself failed: {type(error).__name__}: {error}"
    finally:
        bench.kill(bench.family(folder))
        disk.unmount(folder)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(place.base / "streams", ignore_errors=True)
    return told


def run_lane(cases: list[Case], place: Bench, file: Path) -> None:
    runtime.helper()   # it ends when the campaign ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for case in cases:
        told = try_case(case, place)
        if "not" in told:
            print(f"{case.name}: {told['not']}", flush=True)
        with open(file, "a") as out:
            out.write(json.dumps(told) + "\n")


def choose(name: str, place: Bench, count: int | None, text: str) -> list[Case]:
    """Those cases whose names match; of the quick ones `count`, or all."""
    cases = [case for case in GROUPS[name].cases(place) if re.search(text, case.name)]
    if count:
        quick = [case for case in cases if not case.slow]
        cases = place.draws("choice", name).sample(quick, min(count, len(quick)))
    return sorted(cases, key=lambda case: not case.slow)


def run_group(name: str, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Try the cases of a group: how many, and which were not as promised."""
    begin, lanes, outputs, chosen = time.monotonic(), [], [], 0
    for number in range(args.jobs):
        place = Bench(base / f"{name}-{number}", base / "common", args.seed)
        cases = choose(name, place, args.count, args.case)
        chosen, mine = len(cases), cases[number::args.jobs]
        outputs.append(place.base / "told.jsonl")
        lanes.append(multiprocessing.get_context("fork").Process(
            target=run_lane, args=(mine, place, outputs[-1])))
        lanes[-1].start()
    try:
        for lane in lanes:
            lane.join()
    finally:
        for lane in lanes:
            lane.kill()
    told = [json.loads(line) for path in outputs if path.exists()
            for line in path.read_text().splitlines()]
    if len(told) != chosen:
        raise runtime.InputError(f"{name}: {chosen - len(told)} cases were not tried: the "
                                 "stages do not work undisturbed, or the machine is too small")
    tried = [row for row in told if "left out" not in row]
    broken = [row for row in tried if "not" in row]
    for reason in sorted({row["left out"] for row in told if "left out" in row}):
        print(f"{name}: left out {reason}")
    return {"cases": len(tried), "as promised": len(tried) - len(broken), "not": broken,
            "left out": len(told) - len(tried), "seconds": round(time.monotonic() - begin)}


# ------------------------------------------------------------------------------


def code_sha256() -> str:
    """A hash of all that is tested, and of the tests."""
    found = hashlib.sha256()
    for path in sorted([*bench.ROOT.glob("*.py"), *Path(__file__).parent.glob("*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()


def show(results: dict[str, Any], names: list[str]) -> None:
    columns = "cases", "as promised", "not", "left out", "seconds"
    print("\ngroup     ", *(f"{column:>12}" for column in columns))
    for name in names:
        row = results["groups"][name]
        numbers = row | {"not": len(row["not"])}
        print(f"{name:10}", *(f"{numbers[column]:>12}" for column in columns))


@runtime.command
def main(argv: list[str] | None = None) -> None:
    parser = runtime.Parser(__doc__)
    parser.prog = "python -m studies.faults"
    add = parser.add_argument
    add("--only", choices=GROUPS, nargs="+", default=list(GROUPS), help="groups")
    add("--case", default="", metavar="PATTERN",
        help="only cases whose names match this regular expression")
    add("--count", type=runtime.positive_int,
        help="so many cases of each group, none of which starts new interpreters; else all")
    add("--seed", type=runtime.seed, default=0, help="of the moments, and of the choice")
    add("--jobs", type=runtime.positive_int, default=2, help="cases at a time")
    add("--out", type=Path, default=Path("runs/faults.json"), help="file of the results")
    args = parser.parse_args(argv)
    settings = {"seed": args.seed, "count": args.count, "case": args.case,
                "code_sha256": code_sha256()}
    results = runtime.read_json(args.out) if args.out.exists() else {}
    if {key: results.get(key) for key in settings} != settings:
        results = settings | {"groups": {}}
    results |= {"command": " ".join([parser.prog, *sys.argv[1:]]),
                "date": time.strftime("%Y-%m-%d"), "versions": runtime.versions(),
                "device": runtime.device_name(torch.device("cpu"))}
    runtime.write_json(args.out, results)
    if not Path("/proc/self/cwd").exists():
        raise runtime.InputError("this needs Linux, whose /proc tells which processes are left")
    base = Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    base.chmod(0o755)
    try:
        make_stock(base / "common")
        for name in args.only:
            if name not in results["groups"]:
                results["groups"][name] = run_group(name, base, args)
                runtime.write_json(args.out, results)
    except Broken as error:
        raise runtime.InputError(f"what is not disturbed fails as well: {error}") from None
    finally:
        bench.kill(bench.family(base))
        disk.unmount(base)
        shutil.rmtree(base, ignore_errors=True)
    show(results, args.only)
    if any(results["groups"][name]["not"] for name in args.only):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
