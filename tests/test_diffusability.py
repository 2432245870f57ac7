"""The page of properties, its comparison, and the two studies that belong to it.

Each wrong input ends with status 2 and one line, and leaves no file behind.
"""

import importlib
import json
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import checkpoints
import diffusability
import evaluate
import latents
import models
import objectives
import runtime
import train_tokenizer
from runtime import InputError
from studies import diffusability_benchmark, diffusability_study

AUTOENCODER = dict(arch="conv", ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(),
                   resolution=16, z_channels=4, noise="learned", sigma=0.0)
TRANSFORMER = dict(depth=1, width=32, heads=2, in_channels=4, input_size=4, num_classes=10)
NAMES = sum(map(list, latents.PERSPECTIVES.values()), [])
ROOT = Path(__file__).parents[1]


def save_tokenizer(path, seed=0, broken=None, data="shapes", **changed):
    torch.manual_seed(seed)
    net = models.build_tokenizer(AUTOENCODER | changed)
    with torch.no_grad():
        net.encode(torch.zeros(1, 3, 16, 16))
        if broken:
            net.encoder.conv_out.weight[:] = broken
    checkpoints.save({
        "kind": "tokenizer", "config": dict(data=data, size=16, seed=0), "step": 1,
        "model_config": net.config, "model": net.state_dict(),
        "latent_mean": torch.zeros(4), "latent_std": torch.ones(4)}, path)


def save_dit(path, tokenizer, **changed):
    torch.manual_seed(0)
    net = models.build_dit(models.DITS["demo"] | TRANSFORMER | changed)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    checkpoints.save({
        "kind": "dit", "step": 1, "config": {"data": "shapes"}, "model_config": net.config,
        "model": net.state_dict(), "ema": net.state_dict(), "classes": list("0123456789"),
        "tokenizer": {"path": tokenizer, "sha256": runtime.file_sha256(tokenizer)},
        "latent_mean": torch.zeros(4), "latent_std": torch.ones(4)}, path)


def pictures(folder, sizes, side=16):
    """A folder with sizes[y] images of class y, noise around a colour of the class."""
    draw = np.random.default_rng(0)
    for y, n in enumerate(sizes):
        colour = draw.integers(60, 200, 3)
        for i in range(n):
            pixels = (colour + draw.integers(-50, 50, (side, side, 3))).clip(0, 255)
            path = Path(folder, f"class{y}", f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


def masks(folder, images, size=None):
    """A mask beside every image: its left half is the object."""
    for path in Path(images).rglob("*.png"):
        side = size or Image.open(path).size[0]
        pixels = np.zeros((side, side), np.uint8)
        pixels[:, :side // 2] = 1   # what is not black
        target = Path(folder, path.relative_to(images))
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(home)
    for name, options in dict(
            a={}, b=dict(seed=1), none=dict(noise="none"), nan=dict(broken=math.nan),
            fixed=dict(noise="fixed", sigma=0.3), unnamed=dict(data=None)).items():
        Path(name).mkdir()
        save_tokenizer(f"{name}/t.pt", **options)
    save_dit("a/dit.pt", "a/t.pt")
    save_dit("b/dit.pt", "b/t.pt")
    save_dit("a/other.pt", "a/t.pt", input_size=8)
    pictures("classes/train", [20, 20, 20])
    pictures("classes/val", [12, 12, 1])
    pictures("single/train", [2] * 20)
    pictures("single/val", [1] * 20)
    pictures("few/train", [5, 5])
    pictures("few/val", [5, 5])
    masks("masks", "classes/val")
    masks("masks8", "classes/val", size=8)
    masks("masks_few", "classes/val")
    Path("masks_few/class1/3.png").unlink()
    masks("masks_text", "classes/val")
    Path("masks_text/class1/3.png").write_text("mask")
    Path("text.json").write_text("{")
    Path("empty.json").write_text("{}")
    Path("old.json").write_text(json.dumps({
        "of": "a/t.pt", "properties": dict.fromkeys(NAMES), "curves": {"x": [1]}, "protocol": {}}))
    Path("file").write_text("here")
    Path("tiny.py").write_text(
        "from torch.nn.functional import avg_pool2d\n"
        "def patches(x): return avg_pool2d(x / 255, x.shape[3] // 4).flatten(1)\n")
    os.chdir(before)
    return home


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(home / "hub"))
    monkeypatch.setattr(sys, "argv", ["diffusability.py"])


COMMON = ["--workers", "0", "--device", "cpu", "--features", "tiny:patches"]


def page(out, *flags):
    diffusability.main([*map(str, flags), *COMMON, "--out", str(out)])
    return json.loads(Path(out).read_text())


def values(found):
    return {name: row["value"] for name, row in found["properties"].items()}


# ------------------------------------------------------------------------------
# A page.


def test_every_property_has_a_value_or_a_reason(tmp_path, capsys):
    found = page(tmp_path / "p.json", "--tokenizer", "a/t.pt", "--dit", "a/dit.pt",
                 "--limit", 120, "--decode", 40)
    assert [*found["properties"]] == NAMES
    missing = {name for name, value in values(found).items() if value is None}
    # Nothing is n/a but what may be: t-SNE has enough images here, a random decoder
    # may never double its error, and stationary fits may be VIV already.
    assert missing <= {"noise that doubles rFD", "VIV, stationary"}
    assert all(found["properties"][name]["beside"] for name in missing)
    assert set(found["curves"]) == {"variance of the velocity", "rFD with noise on the latent",
                                    "length of steps"}
    assert found["protocol"]["images"] == 120 and found["protocol"]["decoded"] == 40
    shown = capsys.readouterr().out
    for name in NAMES:
        assert f"  {name:24} " in shown
    assert "↓" in shown and "↑" in shown and "What the paper leaves open" in shown
    again = page(tmp_path / "q.json", "--tokenizer", "a/t.pt", "--dit", "a/dit.pt",
                 "--limit", 120, "--decode", 40)
    assert values(again) == values(found)
    parts = page(tmp_path / "q.json", "--tokenizer", "a/t.pt", "--dit", "a/dit.pt",
                 "--limit", 120, "--decode", 40, "--at-once", 7)
    for name, value in values(parts).items():
        if value is not None and "density" not in name:   # t-SNE enlarges any rounding
            assert value == pytest.approx(values(found)[name], rel=0.02, abs=1e-4), name


def test_without_mixing_ifd_is_the_reconstructions_rfd(tmp_path):
    found = values(page(tmp_path / "p.json", "--tokenizer", "a/t.pt", "--limit", 64,
                        "--decode", 64))
    evaluate.main(["--tokenizer", "a/t.pt", "--limit", "64", "--out", str(tmp_path / "e"),
                   *COMMON])
    row, = json.loads((tmp_path / "e/results.json").read_text())
    assert found["rFD"] == row["metrics"]["rFD-tiny:patches"]
    assert found["PSNR"] == pytest.approx(row["metrics"]["PSNR"], rel=1e-6)
    noisy = {point["level"]: point for point in row["curve"] if point["noise"] != "absolute"}
    assert noisy[0.0]["rFD-tiny:patches"] == found["rFD"]


def test_a_neighbour_that_is_the_latent_itself_changes_nothing():
    raw = torch.randn(40, 4, 4, 4, generator=runtime.generator(0))
    z, shown = latents.Standardised(raw), torch.arange(0, 40, 2)

    def distance(z):
        return z.double().square().sum().item()

    found = latents.continuity(distance, z, shown, raw, lambda *names: runtime.generator(0, *names))
    assert found["iFD, 1 of train"] == found["rFD"] == distance(raw[shown])
    assert found["iFD, 1 of val"] != found["rFD"]   # there it is not its own neighbour
    found = latents.continuity(distance, z, shown, None, lambda *names: runtime.generator(0))
    assert "needs training images" in found["iFD, 10 of train"]


def test_noise_moves_viv_of_samples(tmp_path):
    """A fixed noise adds its square to each variance; without noise nothing changes."""
    quiet = values(page(tmp_path / "p.json", "--tokenizer", "none/t.pt", "--limit", 200,
                        "--decode", 16))
    noisy = page(tmp_path / "q.json", "--tokenizer", "fixed/t.pt", "--limit", 200,
                 "--decode", 16)
    assert quiet["VIV of samples"] == pytest.approx(quiet["VIV"], rel=1e-6)
    assert quiet["noise / spread"] == 0
    found = values(noisy)
    assert found["VIV of samples"] > 1.02 * found["VIV"] and found["noise / spread"] > 0.1
    assert quiet["KL per number"] is None and found["KL per number"] > 0


def test_a_property_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise InputError("needs something else")
    monkeypatch.setattr(latents, "spectral_energy", refuse)
    found = page(tmp_path / "p.json", "--tokenizer", "a/t.pt", "--limit", 40, "--decode", 16)
    assert values(found)["SEC 0.25"] is None and values(found)["LDS"] is not None
    assert found["properties"]["SEC 0.5"]["beside"] == "needs something else"
    shown = capsys.readouterr().out
    line, = (line for line in shown.splitlines() if line.startswith("  SEC 0.25 "))
    assert "n/a ↓" in line and line.endswith("(needs something else)")
    assert "give --dit" in found["properties"]["straightness"]["beside"]
    assert "t-SNE needs 90 images" in found["properties"]["density CV"]["beside"]


# ------------------------------------------------------------------------------
# Folders of images, their masks, and small classes.


def test_masks_of_a_folder(tmp_path):
    flags = "--tokenizer", "a/t.pt", "--data", "classes", "--decode", 16
    bare = page(tmp_path / "p.json", *flags)
    assert values(bare)["SRSS"] is None
    assert "give --masks" in bare["properties"]["LNC, foreground"]["beside"]
    found = values(page(tmp_path / "q.json", *flags, "--masks", "masks"))
    assert found["SRSS"] is not None and found["LNC, foreground"] is not None
    assert found["LDS"] == values(bare)["LDS"]
    assert "2 classes of 12 images or more" in bare["choices"]["velocity"]
    assert values(bare)["linear probe"] is not None   # it needs no mask, but train/


def test_masks_are_cropped_as_their_images_are(tmp_path):
    """24 x 16 pixels: the crop at the centre loses 4 columns on either side."""
    import data
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, 8:12] = 255
    for name, image in (("images/c/0.png", pixels), ("fronts/c/0.png", pixels[:, :, 0])):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / name)
    images = data.open_dataset(str(tmp_path / "images"), 16, "train")
    found = data.read_masks(tmp_path / "fronts", images, [0])
    expected = images[0][0][0] / 255
    assert torch.equal(found[0], expected.float())


def test_odd_latents_of_training_images_spoil_one_perspective_only(tmp_path, monkeypatch):
    class Refuses(latents.Standardised):
        def __init__(self, *args, like=None):
            if like is not None:
                raise InputError("they are odd")
            super().__init__(*args)

    monkeypatch.setattr(diffusability, "Standardised", Refuses)
    found = page(tmp_path / "p.json", "--tokenizer", "a/t.pt", "--data", "classes",
                 "--decode", 16)
    assert found["properties"]["LNC, 10 neighbours"]["beside"] == "they are odd"
    assert values(found)["VIV"] is not None and values(found)["LDS"] is not None


def test_classes_of_one_image(tmp_path):
    found = page(tmp_path / "p.json", "--tokenizer", "a/t.pt", "--data", "single",
                 "--decode", 16)
    reason = found["properties"]["VIV"]["beside"]
    assert reason == "VIV needs 4 images of a class, and the largest class has 1"
    assert found["properties"]["VIV seen"]["beside"] == "VIV is n/a"
    for name in ("LDS", "SEC 0.25", "rFD", "rotation error", "decoder gain"):
        assert values(found)[name] is not None
    reason = found["properties"]["LNC, 10 neighbours"]["beside"]
    assert reason == "needs two classes, and two images of one of them"


# ------------------------------------------------------------------------------
# Comparison.


def test_tokenizers_side_by_side(tmp_path, capsys):
    flags = "--limit", 40, "--decode", 16
    pages = page(tmp_path / "all.json", "--compare", "a/t.pt", "b/t.pt", *flags)["pages"]
    shown = capsys.readouterr().out
    table = shown[shown.index("\n" + " " * 29):]
    line = next(line for line in table.splitlines() if line.startswith("  VIV "))
    assert [f"{values(p)['VIV']:.4g}" for p in pages] == line.split()[-2:]
    assert (tmp_path / "all.png").stat().st_size > 1000
    one = page(tmp_path / "a.json", "--tokenizer", "a/t.pt", *flags)
    assert values(one) == values(pages[0])
    capsys.readouterr()
    mixed = page(tmp_path / "mixed.json", "--compare", tmp_path / "a.json", "b/t.pt", *flags)
    assert [values(p) for p in mixed["pages"]] == [*map(values, pages)]
    other = page(tmp_path / "c.json", "--tokenizer", "b/t.pt", "--limit", 41, "--decode", 16)
    assert other["protocol"]["images"] == 41
    with pytest.raises(SystemExit) as stop:
        page(tmp_path / "d.json", "--compare", tmp_path / "a.json", tmp_path / "c.json")
    assert stop.value.code == 2 and "of other images" in capsys.readouterr().err
    assert not (tmp_path / "d.json").exists()


def test_other_images_are_told_before_the_first_is_measured(tmp_path, capsys, monkeypatch):
    """Shapes differ from seed to seed of a training."""
    state = torch.load("b/t.pt")
    state["config"]["seed"] = 7
    torch.save(state, tmp_path / "t.pt")
    monkeypatch.setattr(diffusability, "measure", None)   # would be a TypeError
    with pytest.raises(SystemExit) as stop:
        page(tmp_path / "d.json", "--compare", "a/t.pt", tmp_path / "t.pt")
    assert stop.value.code == 2 and "with one seed" in capsys.readouterr().err


# ------------------------------------------------------------------------------
# Bad input.


BAD = """
--tokenizer nowhere.pt                               | nowhere.pt
--tokenizer a/dit.pt                                 | "dit"
--tokenizer text.json                                | text.json
--tokenizer unnamed/t.pt                             | does not name its images
--tokenizer nan/t.pt                                 | NaN or infinite
--tokenizer a/t.pt --size 18                         | choose a multiple of 4
--tokenizer a/t.pt --dit b/dit.pt                    | is not the tokenizer of b/dit.pt
--tokenizer a/t.pt --dit a/other.pt                  | is not the tokenizer of a/other.pt
--tokenizer a/t.pt --dit nowhere.pt                  | nowhere.pt
--tokenizer a/t.pt --data nowhere                    | nowhere
--tokenizer a/t.pt --data few                        | few has 10 images to look at, and 16
--tokenizer a/t.pt --limit 15                        | has 15 images to look at, and 16
--tokenizer a/t.pt --limit 0                         | --limit
--tokenizer a/t.pt --decode 0                        | --decode
--tokenizer a/t.pt --decode 1                        | give 2 or more
--tokenizer a/t.pt --masks masks                     | --masks are for folders
--tokenizer a/t.pt --data classes --masks masks8     | masks8/class0/0.png has (8, 8) pixels
--tokenizer a/t.pt --data classes --masks masks_few  | masks_few/class1/3.png is no mask
--tokenizer a/t.pt --data classes --masks masks_text | masks_text/class1/3.png is no mask
--tokenizer a/t.pt --features nobody:nothing         | nobody:nothing
--tokenizer a/t.pt --device abacus                   | --device abacus
--compare a/t.pt nowhere.pt                          | nowhere.pt is not a file
--compare a/t.pt --dit a/dit.pt                      | --dit belongs to one --tokenizer
--compare a/t.pt text.json                           | text.json is damaged
--compare empty.json a/t.pt                          | empty.json is no page of this version
--compare old.json a/t.pt                            | old.json is no page of this version
--tokenizer a/t.pt --out page.txt                    | must end in .json
--tokenizer a/t.pt --out file/page.json              | cannot be written to
--tokenizer a/t.pt --out a                           | must end in .json
"""


def listing():
    return {str(path) for path in Path().rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("row", BAD.strip().splitlines())
def test_bad_input(row, capsys, monkeypatch):
    flags, reason = (part.strip() for part in row.split("|"))
    before = listing()
    with pytest.raises(SystemExit) as stop:
        diffusability.main(["--out", "out/page.json", *COMMON, *flags.split()])
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n")
             if line.strip() and "%|" not in line and "/s]" not in line]
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert "error: " in lines[0] and reason in lines[0], lines
    assert listing() == before


def test_where_it_writes_is_tried_before_the_work(tmp_path, monkeypatch, capsys):
    def work(*_):
        raise AssertionError("it has begun")
    monkeypatch.setattr(diffusability, "prepare", work)
    (tmp_path / "page.json").mkdir()
    for out, flags in ((tmp_path / "page.json", ["--tokenizer", "a/t.pt"]),
                       ("file/page.json", ["--compare", "a/t.pt"])):
        with pytest.raises(SystemExit) as stop:
            diffusability.main([*flags, *COMMON, "--out", str(out)])
        assert stop.value.code == 2
    (tmp_path / "all.png").mkdir()
    with pytest.raises(SystemExit):
        diffusability.main(["--compare", "a/t.pt", *COMMON, "--out", str(tmp_path / "all.json")])
    assert "all.png cannot be written to" in capsys.readouterr().err


# ------------------------------------------------------------------------------
# The studies: the costs, one tiny arm, and the statistics.


def test_the_benchmark_names_what_it_times(capsys):
    diffusability_benchmark.main(["--smoke", "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert {"VIV", "VIV without labels", "LNC", "SEC", "t-SNE and density"} <= {*found["seconds"]}
    total = sum(found["seconds"].values())
    assert found["seconds of all"] == pytest.approx(total, abs=0.1)
    assert found["peak memory in GiB"] > 0.01
    with pytest.raises(SystemExit):
        diffusability_benchmark.main(["--count", "60"])
    raw, labels = diffusability_benchmark.synthetic(120, 3, 4, 0.1)
    assert raw.shape == (120, 3, 4, 4) and labels.bincount().tolist() == [50, 50, 20]


def test_the_arms_of_the_study():
    arms = diffusability_study.table_of_arms()
    assert len({arm.name for arm in arms}) >= 16 and len({arm.key for arm in arms}) == len(arms)
    assert [arm.key for arm in arms if arm.seed] == ["KL 1e-6 seed 1", "VE 1e-3 seed 1"]
    used = set()
    for arm in arms:
        plan = diffusability_study.Plan(arm, diffusability_study.RECIPE, "x", Path("r"), "cpu")
        first, *_, last = (shlex.split(command) for command, _ in plan.stages())
        assert (first[0], last[0]) == ("train_tokenizer.py", "diffusability.py")
        args, page = train_tokenizer.parse(first[1:]), diffusability.parse(last[1:])
        used.add((args.regularizer, args.loss))
        assert page.decode == 1000 and page.dit and page.out.name == "page.json"
    both = {(name, loss) for name in objectives.REGULARIZERS for loss in ("kl", "ve")}
    assert both - used == {("lcr", "ve")}   # its published weight is very small


def test_an_arm_runs_end_to_end_and_only_once(tmp_path, monkeypatch, capsys):
    ran = []

    def execute(command):
        stage, *flags = shlex.split(command)
        ran.append(stage)
        importlib.import_module(stage[:-3]).main(flags)
        return ""

    def study(*flags):
        diffusability_study.main(["--smoke", "--device", "cpu", "--out", f"{tmp_path}/runs",
                                  "--results", f"{tmp_path}/results", *flags])

    monkeypatch.setattr(diffusability_study, "execute", execute)
    study()
    stages = ["train_tokenizer.py", "train_dit.py", "sample.py", "evaluate.py", "evaluate.py",
              "diffusability.py"]
    assert ran == stages
    arm, = (tmp_path / "results/arms").glob("*.json")
    found = json.loads(arm.read_text())
    assert found["family"] == "VE" and found["numbers"]["fd"] > 0
    assert found["page"]["properties"]["VIV"]["value"] > 0
    losses = [json.loads(line) for line in next(tmp_path.glob("runs/dit/*/log.jsonl")).open()]
    losses = [line["velocity"] for line in losses if "velocity" in line]
    assert found["beside"]["flow loss"] == pytest.approx(sum(losses) / 4) and len(losses) == 4
    assert found["beside"]["floor"] > 0 and found["beside"]["VIV seen of samples"] > 0
    study()
    assert ran == stages
    arm.unlink()   # it was killed before the file
    study()
    assert ran == stages and "page" in json.loads(arm.read_text())
    capsys.readouterr()
    study("--list")
    assert capsys.readouterr().out.split()[-1] == "done"
    with pytest.raises(SystemExit):
        study("--draw")
    assert "has 1 finished arms that reconstruct alike" in capsys.readouterr().err


def columns(n=12):
    g = runtime.generator(0, "columns")
    x, y, z = torch.randn(3, n, generator=g)
    return x, 0.8 * x + 0.5 * y, z + 0.5 * x


def test_correlations_are_scipys():
    x, y, z = columns()
    assert diffusability_study.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    tied = (2 * y).round()
    assert diffusability_study.spearman(x, tied) == pytest.approx(
        scipy.stats.spearmanr(x, tied)[0])
    r = {pair: scipy.stats.pearsonr(*pair_of)[0] for pair, pair_of in
         dict(xy=(x, y), xz=(x, z), yz=(y, z)).items()}
    expected = (r["xy"] - r["xz"] * r["yz"]) / math.sqrt((1 - r["xz"]**2) * (1 - r["yz"]**2))
    assert diffusability_study.partial(x, y, z) == pytest.approx(expected)


def test_bootstrapped_intervals():
    x, y, _ = columns(43)

    def correlation(rows):
        return diffusability_study.pearson(x[rows], y[rows])

    r = correlation(torch.arange(43))
    low, high = diffusability_study.interval(correlation, [str(i) for i in range(43)])
    width = math.tanh(math.atanh(r) + 1.96 / math.sqrt(40)) - r   # Fisher's
    assert low < r < high and high - r == pytest.approx(width, rel=0.5)
    families = [str(i // 11) for i in range(43)]
    wide = diffusability_study.interval(correlation, families)
    assert wide[0] <= r <= wide[1]
    seen = set()   # families are drawn whole
    diffusability_study.interval(lambda rows: seen.add(len(rows)) or 0.0, families, draws=50)
    assert seen <= {43, 42, 41, 40, 44}


def test_what_the_best_of_many_properties_reaches_by_chance():
    """Of one column it is the |r| of Student's test; of many it is more."""
    x, y, _ = columns(23)
    t = scipy.stats.t.ppf(0.975, 21)
    one = diffusability_study.threshold([x], y)
    assert one == pytest.approx(t / math.sqrt(21 + t * t), abs=0.03)
    many = diffusability_study.threshold(list(torch.randn(40, 23)), y)
    assert 0.55 < many < 0.75 and diffusability_study.threshold([x, x, -x], y) == one


def test_regression_on_two_properties():
    x, y, z = columns()
    families = [str(i // 3) for i in range(12)]
    inside, outside = diffusability_study.explained([x, z], 3 * x - 2 * z + 7, families)
    assert inside == pytest.approx(1) and outside == pytest.approx(1)
    inside, outside = diffusability_study.explained([x], y, families)
    assert inside == pytest.approx(diffusability_study.pearson(x, y) ** 2)
    assert outside < inside


def test_tables_and_figures_are_drawn_from_the_files_of_arms(tmp_path, capsys):
    x, y, z = columns()
    for k in range(12):
        rows = {name: {"value": None} for name in NAMES}
        rows["VIV"]["value"] = x[k].item() + 3
        rows["SRSS"]["value"] = z[k].item()
        rows["LNC, 10 neighbours"]["value"] = y[k].item()
        rows["VIV seen"]["value"] = x[k].item() + y[k].item()
        rows["rotation error"]["value"] = 1.5   # it never varies
        rows["LDS"]["value"] = k**2
        rows["rFD"]["value"], rows["rFD at noise 0.3"]["value"] = 20 + z[k].item(), 30
        run = {"arm": f"VE {k}", "family": ("VE", "KL", "none")[k % 3], "seed": 0,
               "settings": {"tokenizer": ("--loss ve --kl-weight 1e-6", "--loss kl --kl-weight 1e-6",
                                          "--loss none")[k % 3], "scores": "a few steps"},
               "features": "Test", "hardware": "none", "date": "today", "versions": {"torch": "2"},
               "numbers": {"fd": 100 + 10 * x[k].item()}, "page": {"properties": rows},
               "beside": {"floor": 20 + z[k].item(), "flow loss": 1 + y[k].item()}}
        runtime.write_json(tmp_path / f"arms/{k}.json", run)
    again = run | {"arm": "VE 0", "seed": 1, "numbers": {"fd": 111.0}}
    runtime.write_json(tmp_path / "arms/again.json", again)
    blurred = {name: row | {"value": 100.0 if name == "rFD" else row["value"]}
               for name, row in rows.items()}
    runtime.write_json(tmp_path / "arms/blurred.json", run | {
        "arm": "EQ kl", "family": "EQ", "page": {"properties": blurred}})
    diffusability_study.main(["--draw", "--results", str(tmp_path)])
    text = (tmp_path / "correlations.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| VIV |")]
    assert "| velocity | 1.00 | [1.00, 1.00] |" in lines[0] and lines[0].endswith("| yes |")
    assert "more than 2 times the lowest: EQ kl (100)." in text
    assert "over 12 tokenizers" in text and "r without noise is that of the 8 tokenizers" in text
    assert f"VE 0 with 2 seeds: FD {100 + 10 * x[0].item():.1f} and 111.0, floor" in text
    assert "| equivariance is the weakest | rotation error | was not measured" in text
    assert "| LNC, 10 neighbours, SRSS |" in text and "rFD" not in text.split("## Two")[1]
    # A property is judged where the interval of its r does not hold 0.
    assert {line.split("|")[-2].strip() for line in text.split("## The paper's")[0].splitlines()
            if line.startswith("| ")} >= {"yes", "undecided"}
    r = scipy.stats.pearsonr(y, x)[0]
    line, = [line for line in text.splitlines() if line.startswith("| flow loss |")]
    assert f"| paths of the transformer | {r:.2f} |" in line
    assert "| rFD that noise 0.3 adds | decoder |" in text
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"velocity.png", "semantics.png", "spatial-structure.png", "decoder.png",
                     "continuity.png", "paths-of-the-transformer.png", "pair.png"}
    assert "|r| of VIV seen less |r| of VIV: -" in text
    assert "or the same for all: VIV of samples" in text and "rotation error" in text
    runtime.write_json(tmp_path / "arms/again.json",
                       again | {"settings": again["settings"] | {"scores": "many steps"}})
    with pytest.raises(SystemExit):
        diffusability_study.main(["--draw", "--results", str(tmp_path)])
    assert "are of other sizes: move one of them away" in capsys.readouterr().err
    (tmp_path / "arms/again.json").unlink()
    (tmp_path / "arms/3.json").write_text("{}")
    with pytest.raises(SystemExit):
        diffusability_study.main(["--draw", "--results", str(tmp_path)])
    assert "arms/3.json is damaged or not of this study" in capsys.readouterr().err


def test_features_of_the_teacher():
    pytest.importorskip("efficientnet_lite_pytorch")
    import frozen
    if frozen.find_weights("efficientnet-lite0") is None:
        pytest.skip("the weights of EfficientNet-Lite0 are not here")
    assert diffusability_study.teacher(torch.zeros(2, 3, 32, 32)).shape == (2, 112, 8, 8)
