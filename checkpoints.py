"""Files of weights, in and out: ours, and those of LDM, VA-VAE, diffusers,
LightningDiT and SiT.

    python checkpoints.py show runs/dit/checkpoint.pt
    python checkpoints.py export runs/tokenizer --to vavae vavae.pt
    python checkpoints.py export runs/tokenizer --to diffusers FOLDER
"""

import errno
import json
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runtime  # before torch, because it says how idle threads wait

import numpy as np
import torch
from torch import Tensor, nn

import models
from runtime import InputError

# ------------------------------------------------------------------------------
# Files of torch.save.  Only tensors and plain containers are made of what a file
# holds, so that no file runs code.

def save(state: dict, path: str | Path) -> None:
    """Write a checkpoint, or leave the old one if the process dies."""
    with runtime.atomic(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:   # PyTorch's writer hides what the disk has said
            if "inline_container" not in str(error):
                raise
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(
                errno.EIO, "a write has failed", str(path)) from None

class Ignored:
    """Stands for what a file holds of any class but PyTorch's, and does nothing."""
    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

def unpickle(path: Path) -> Any:
    """What torch.save has written, with the checksums compared, which PyTorch does not do.

    Lightning's callbacks and SiT's command line become Ignored.
    """
    names = []
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"   # since PyTorch 1.6
    if zipped:
        with zipfile.ZipFile(path) as parts:
            if any(part.compress_type for part in parts.infolist()) or parts.testzip():
                raise ValueError("a checksum does not fit")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    others: list[Any] = [
        (OrderedDict if name.endswith("Dict") else Ignored, name) for name in names]
    with torch.serialization.safe_globals(others), warnings.catch_warnings(action="ignore"):
        return torch.load(path, weights_only=True, map_location="cpu")

def read(path: str | Path, kind: str | None = None, resume: bool = False) -> dict:
    """The dict in a file of torch.save or safetensors, on the CPU.

    With a kind, "tokenizer", "dit" or "teacher", the file must be of this kind.
    A published tokenizer or DiT gets the entries of ours.
    resume: it must be ours, with all that a training needs to go on.
    """
    if kind and not Path(path).exists():
        raise InputError(f"{path} is not there: `python train_{kind}.py` makes one, or name "
                         "another")
    path = runtime.regular(path)
    if path.suffix == ".safetensors":
        state = {name: torch.from_numpy(array.copy()).view(dtype)
                 for name, (array, dtype) in read_safetensors(path).items()}
    else:
        try:
            state = unpickle(path)
        except PermissionError:
            raise
        except Exception as error:   # PyTorch and zipfile raise a dozen types here
            raise InputError(f"{path} is damaged, or holds more than tensors: get it again, "
                             "or save its state_dict alone") from error
        if not isinstance(state, dict):
            raise InputError(f"{path} holds no dict of tensors: give a checkpoint")
    found = state.get("kind")
    if kind in ("tokenizer", "dit") and found is None and not resume:
        return (from_ldm if kind == "tokenizer" else from_dit)(state, path)
    if kind and found != kind:
        what = f'a "{found}"' if str(found).isalnum() else "no kind"
        raise InputError(f'{path} holds {what}, not a "{kind}"')
    if kind:
        check(state, path, resume)
    return state

# NumPy's and PyTorch's type of a number; NumPy has no bfloat16.
STORED = {"F16": (np.float16, torch.float16), "BF16": (np.int16, torch.bfloat16),
          "F32": (np.float32, torch.float32), "F64": (np.float64, torch.float64),
          "I32": (np.int32, torch.int32), "I64": (np.int64, torch.int64)}

def read_safetensors(path: str | Path) -> dict[str, tuple]:
    """Each tensor as a memory-mapped array, and its type in PyTorch.

    A file is the length of its header in 8 bytes, the header, and the data: one
    tensor after the other, without gaps.
    """
    runtime.regular(path)
    try:
        raw, found, end = np.memmap(path, np.uint8, "r"), {}, 0
        begin = 8 + min(10**8, int.from_bytes(raw[:8].tobytes(), "little"))
        pairs = json.loads(raw[8:begin].tobytes(), object_pairs_hook=unique)
        rows = [(row["data_offsets"], row["shape"], row["dtype"], name)
                for name, row in pairs.items() if name != "__metadata__"]
        for (first, last), shape, stored, name in sorted(rows):
            kind, dtype = STORED[stored]
            count = math.prod(shape) * np.dtype(kind).itemsize
            if first != end or last - first != count:
                raise ValueError(f"{name} is not where it should be")
            array = np.asarray(raw[begin + first:begin + last]).view(kind)
            found[name] = array.reshape(shape), dtype
            end = last
        if begin + end != len(raw):
            raise ValueError("the data are longer or shorter")
    except Exception as error:
        raise InputError(f"{path} is damaged: copy it again ({error})") from error
    return found

def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs whose names differ."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)

def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """The inverse, for tensors of float32."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in state.items():
        header[name] = {"dtype": "F32", "shape": [*value.shape],
                        "data_offsets": [end, end := end + 4 * value.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with runtime.atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in state.values():
            file.write(value.float().contiguous().numpy().tobytes())

# ------------------------------------------------------------------------------
# What our files hold.  To load a network, three entries are enough; a transformer's
# file must have its average as well.

NETWORK: dict[str, Any] = {"model_config": dict, "model": dict, "step": int}
RUN = NETWORK | {"config": dict, "latent_mean": Tensor, "latent_std": Tensor}
ENTRIES: dict[str, dict] = {
    "tokenizer": RUN | {"optimizer": dict},
    "teacher": NETWORK | {"config": dict, "optimizer": dict},
    "dit": RUN | {"ema": dict, "ema_updates": int, "errors_by_t": Tensor, "optimizers": list,
                  "tokenizer": dict, "classes": list}}

def check(state: dict, path: Path, resume: bool) -> None:
    """Raise InputError if entries are missing or of another type."""
    wrong = [name for name, kind in ENTRIES[state["kind"]].items()
             if not isinstance(state.get(name), kind)
             and (name in state or resume or name in (*NETWORK, "ema"))]
    if wrong:
        raise InputError(f"{path} is damaged or of an older version: {', '.join(wrong)} "
                         "missing or wrong; train it again")

def finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    floats = value.is_floating_point() and value.numel()
    return not floats or bool(torch.stack(value.aminmax()).isfinite().all())

def tensors(state: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, without the "module." of DDP."""
    pairs = state.items() if isinstance(state, dict) else []
    return {name.removeprefix("module."): value for name, value in pairs
            if isinstance(name, str) and torch.is_tensor(value)}

def load_strict(module: nn.Module, state: Any, source: str | Path) -> None:
    """Fill `module`, or say which tensors are missing, extra, misshapen or not finite."""
    try:
        module.load_state_dict(tensors(state))
    except RuntimeError as error:   # PyTorch lists all of them
        faults = " ".join(str(error).split())[:400]
        raise InputError(f"{source} does not fit: {faults}") from None
    for name, value in module.state_dict().items():
        if not finite(value):
            raise InputError(f"{source} does not fit: {name} has NaN or infinite numbers")

def build(make: Callable, config: dict, state: Any, path: str | Path) -> Any:
    """The network of a config with the tensors of `state`, in eval mode on the CPU."""
    try:
        with torch.device("meta"):   # which spends no time on random weights
            network = make(config)
    except Exception as error:   # a config of another version
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path} has a model_config that makes no network: {reason}") from error
    network.to_empty(device="cpu")
    load_strict(network, state, path)
    return network.eval()

def restore(state: dict, path: Path, **parts: Any) -> None:
    """Fill networks, optimisers and tensors with the checkpoint's entries of their names."""
    for name, part in parts.items():
        try:
            if isinstance(part, nn.Module):
                load_strict(part, state.get(name), path)
            elif torch.is_tensor(part):
                part.copy_(state[name])
            elif isinstance(part, list):
                for optimizer, saved in zip(part, state[name], strict=True):
                    optimizer.load_state_dict(saved)
            else:
                part.load_state_dict(state[name])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} cannot go on: its {name} does not fit; "
                             "choose another --out") from error

def resume(path: Path, kind: str, settings: dict, free: set[str], **parts: Any) -> dict:
    """Fill the parts from a run's checkpoint, and return it; {} if there is none yet.

    Its settings must be these, but for those that are free.
    """
    if not path.exists():
        return {}
    state = read(path, kind, resume=True)
    runtime.check_same_command(state["config"], settings, free, path)
    restore(state, path, **parts)
    return state

# ------------------------------------------------------------------------------
# Tokenizers.  A file of LDM or VA-VAE holds tensors, bare or as "state_dict".
# Some belong to its losses, to the foundation model to which it aligns, or to
# the average of its weights.  A file of a latent diffusion model calls the
# tokenizer its first stage.  diffusers has other names for the same network.

PREFIXES = {"discriminator": "loss.discriminator.", "projection": "linear_proj."}
OTHERS = "loss.", "linear_proj.", "foundation_model.", "model_ema."
SD_SCALE = 0.18215   # 1 / std of the latents of Stable Diffusion 1 and 2, which is f8d4

# Parts of a name in LDM, and in diffusers; then those of old files of diffusers.
NAMES = [
    (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."), (".down.", ".down_blocks."),
    (".up.", ".up_blocks."), (".block.", ".resnets."), (".attn.", ".attentions."),
    (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."), (".norm_out.", ".conv_norm_out."),
    (".norm.", ".group_norm."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
    (".proj_out.", ".to_out.0.")]
OLD_NAMES = [
    (".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn.")]

# Parts of a name in GAE's autoencoder, and in ours.
GAE_NAMES = [
    ("foundation_encoder.", "encoder."), (".patch_embed.", ".embed."), (".z_proj.", ".embed."),
    (".proj_out.", ".linear."), (".linear_out.", ".linear."), ("adapter.model.", "adapter."),
    (".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3.")]

def load_tokenizer(path: str | Path, decode_steps: int | None = None
                   ) -> tuple[models.Tokenizer, dict]:
    """The tokenizer of a file, in eval mode on the CPU, and the file's dict.

    Published files hold no statistics of their latents.  Those of Stable Diffusion's
    are known, and diffusers' config.json may have them.
    decode_steps: of a diffusion decoder, in place of those in its file.
    """
    file = read(path, "tokenizer")
    tokenizer = build(models.build_tokenizer, file["model_config"], file["model"], path)
    if decode_steps:
        if not tokenizer.diffuses:
            raise InputError(f"{path} decodes in one step: leave out --decode-steps")
        tokenizer.config["decode_steps"] = decode_steps
    return tokenizer, file | {"model_config": tokenizer.config}

def read_tokenizer_parts(path: str | Path) -> dict[str, dict]:
    """The state dicts of model and, if any, discriminator and projection."""
    file = read(path, "tokenizer")
    others = {name: tensors(file.get(name)) for name in PREFIXES}
    return {"model": tensors(file["model"])} | {k: part for k, part in others.items() if part}

def begin_from(path: Path, parts: dict[str, Any], disc_start: int) -> None:
    """Fill those of the parts that a tokenizer's file has.

    disc_start: the step from which the discriminator counts.
    """
    found = read_tokenizer_parts(path)
    if "discriminator" in parts.keys() - found.keys() and disc_start == 0:
        raise InputError(f"{path} has no discriminator, and an untrained one would do harm: "
                         "give --disc-start 2501")
    for name in parts.keys() & found.keys():
        load_strict(parts[name], found[name], path)

def from_ldm(file: dict, path: Path) -> dict:
    """Entries of ours, with a config that is read off the tensors."""
    state = tensors(file.get("state_dict", file))
    first = "first_stage_model."
    state = {k.removeprefix(first): v for k, v in state.items() if k.startswith(first)} or state
    parts = {name: {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
             for name, start in PREFIXES.items()}
    model = {k: v for k, v in state.items() if not k.startswith(OTHERS)}
    # LDM's names of averaged weights have no dots.
    names = {k: "model_ema." + k.replace(".", "") for k in model}
    if all(name in state for name in names.values()):
        model = {k: state[name] for k, name in names.items()}
    if "foundation_encoder.pos_embed" in model:
        return parts | from_gae(model, path)
    about, place, known = {}, path.with_name("config.json"), {}
    if any(".down_blocks." in name for name in model):
        model, about = from_diffusers(model), runtime.read_json(place) if place.is_file() else {}
    try:
        row = config_of(model)
        if about.get("latents_std"):
            known = {f"latent_{k}": torch.tensor(about[f"latents_{k}"]) for k in ("mean", "std")}
        elif row == models.AUTOENCODERS["f8d4"]:
            scale = float(about.get("scaling_factor", SD_SCALE))
            known = {"latent_mean": torch.zeros(4), "latent_std": torch.full((4,), 1 / scale)}
        groups = about.get("norm_num_groups", 32)
        if norm_groups(row) != {groups} and not any(w % groups for w in widths(row)):
            raise InputError(f"{path} has norms of {groups} groups, and this network would "
                             f"have {sorted(norm_groups(row))}: it cannot be loaded")
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no autoencoder of LDM, VA-VAE or diffusers "
                         f"({error} is missing)") from error
    return parts | {"model": model, "model_config": row} | known

def from_gae(state: dict[str, Tensor], path: Path) -> dict:
    """Entries of ours from the tensors of GAE's autoencoder, whose images are square.

    Its two matrices of a SwiGLU are one here, and its linear map of z a convolution.
    The file does not say with which noise it was trained; 0.2 is the paper's.
    """
    try:
        model = {}
        for old, value in state.items():
            if not old.startswith(("foundation_encoder.", "adapter.", "decoder.")):
                continue
            name = old
            for part, ours in GAE_NAMES:
                name = name.replace(part, ours)
            if old.endswith(".fc1.weight"):
                value = torch.cat([value, state[old.replace(".fc1.", ".gate.")]])
            if old == "decoder.z_proj.weight":
                value = value[:, :, None, None]
            if not old.endswith(".gate.weight"):
                model[name] = value
        width, patch = model["encoder.embed.weight"].shape[::3]
        side = math.isqrt(model["encoder.pos_embed"].shape[1])
        depth = 1 + max(int(name.split(".")[2]) for name in model if ".blocks." in name)
        channels = len(model["adapter.weight"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is no autoencoder of GAE ({error} is missing)") from error
    return {"model": model, "model_config": dict(
        arch="vit", image_size=side * patch, patch=patch, depth=depth, width=width,
        heads=max(1, width // 64), z_channels=channels, latent_norm=True, smooth=0,
        noise="gaussian", sigma=0.2)}

def config_of(model: dict[str, Tensor]) -> dict:
    """The config of a network, from its tensors in LDM's names."""
    ch = len(model["encoder.conv_in.bias"])
    levels = 1 + max(int(k.split(".")[2]) for k in model if k.startswith("encoder.down."))
    width = [len(model[f"encoder.down.{i}.block.0.conv2.bias"]) for i in range(levels)]
    blocks = sum(k.startswith("encoder.down.0.") and k.endswith(".conv2.bias") for k in model)
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.bias" in model]
    return models.LDM_F16 | dict(
        ch=ch, ch_mult=tuple(w // ch for w in width), num_res_blocks=blocks,
        attn_resolutions=tuple(256 // 2**i for i in attention), resolution=256,
        z_channels=len(model["post_quant_conv.bias"]))

def widths(config: dict) -> set[int]:
    return {config["ch"] * m for m in (1, *config["ch_mult"])}

def norm_groups(config: dict) -> set[int]:
    """The numbers of groups in the norms.  A published network has one number for all its norms."""
    return {models.group_norm(w).num_groups for w in widths(config)}

def rename(name: str, pairs: list[tuple[str, str]], levels: int) -> str:
    """A name in which parts are replaced.  The decoder's levels are counted backwards."""
    for old, new in pairs:
        name = name.replace(old, new)
    return re.sub(r"^(decoder\.up(?:_blocks)?\.)(\d+)",
                  lambda found: f"{found[1]}{levels - 1 - int(found[2])}", name)

def from_diffusers(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """LDM's names.  What is linear there is a convolution of 1 x 1 here."""
    levels = len({name.split(".")[2] for name in model if ".down_blocks." in name})
    back = [(b, a) for a, b in NAMES + OLD_NAMES]
    found = {rename(name, back, levels): value for name, value in model.items()}
    return {name: value[:, :, None, None] if value.ndim == 2 else value
            for name, value in found.items()}

def to_ldm(file: dict, path: Path) -> dict[str, Tensor]:
    """The network's tensors.  Noise that is not learned becomes a constant log-variance."""
    if kind := {"vit": "a ViT", "dgae": "a U-Net"}.get(file["model_config"].get("arch")):
        raise InputError(f"{path} holds {kind}, which no published code can load")
    tokenizer = build(models.build_tokenizer, file["model_config"], file["model"], path)
    state = tokenizer.state_dict()
    if not tokenizer.learns_sigma:
        logvar = 2 * math.log(max(tokenizer.fixed_std, 1e-6))
        state["quant_conv.weight"][tokenizer.channels:] = 0
        state["quant_conv.bias"][tokenizer.channels:] = logvar
    return state

def to_vavae(file: dict, path: Path) -> dict:
    """The inverse of from_ldm."""
    state = to_ldm(file, path)
    for name, prefix in PREFIXES.items():
        state |= {prefix + k: v for k, v in tensors(file.get(name)).items()}
    return {"state_dict": state}

def to_diffusers(file: dict, path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the config.json of diffusers' AutoencoderKL."""
    state, config = to_ldm(file, path), file["model_config"]
    levels = len(config["ch_mult"])
    if len(groups := norm_groups(config)) > 1:
        raise InputError(f"{path} has norms of {sorted(groups)} groups, and diffusers' "
                         "AutoencoderKL has one number for all: it cannot be exported")
    attention = [config["resolution"] // 2**i in config["attn_resolutions"]
                 for i in range(levels)]
    prefix = ["Attn" if a else "" for a in attention]
    found = {}
    for name, value in state.items():
        new = rename(name, NAMES, levels)
        found[new] = value.flatten(1) if ".attentions." in new and value.ndim == 4 else value
    return found, {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu",
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in prefix],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in reversed(prefix)],
        "block_out_channels": [config["ch"] * m for m in config["ch_mult"]],
        "layers_per_block": config["num_res_blocks"], "norm_num_groups": groups.pop(),
        "latent_channels": config["z_channels"], "sample_size": config["resolution"],
        "scaling_factor": 1.0, "latents_mean": file["latent_mean"].tolist(),
        "latents_std": file["latent_std"].tolist()}

def images_of(path: str | Path, file: dict, source: str | None,
              size: int | None) -> tuple[str, int, int]:
    """The images of a tokenizer's file: what was asked for, else what it was trained on.

    Their name, their side, and the seed by which some are held out.
    """
    trained = file.get("config", {})
    source, size = source or trained.get("data"), size or trained.get("size")
    if not (source and size):
        raise InputError(f"{path} does not name its images: give --data and --size")
    return source, size, trained.get("seed", 0)

# ------------------------------------------------------------------------------
# Transformers.  A file of LightningDiT or SiT holds tensors, bare or as "model"
# and "ema".  Beware: a file of DiT looks like SiT's, but predicts noise.

def load_dit(path: str | Path) -> tuple[models.DiT, dict]:
    """As load_tokenizer, with the averaged weights if there are any."""
    file = read(path, "dit")
    state = file["ema"] if "kind" in file else file.get("ema") or file["model"]
    return build(models.build_dit, file["model_config"], state, path), file

def load_guide(path: Path, dit: Path, origin: dict, tokenizer: dict,
               stats: Path | None) -> models.DiT:
    """A DiT to guide that of `origin`, the file `dit`: its latents and classes are the same."""
    guide, file = load_dit(path)
    same = [net["model_config"][k] for net in (origin, file)
            for k in ("in_channels", "input_size", "num_classes")]
    sha256 = [net.get("tokenizer", {}).get("sha256") for net in (origin, file)]
    if same[:3] != same[3:] or sha256[0] != sha256[1] or not all(map(torch.equal, *(
            statistics(*net, tokenizer, stats) for net in ((dit, origin), (path, file))))):
        raise InputError(f"{path} cannot guide {dit}: other latents or classes")
    return guide

def tokenizer_of(path: Path, file: dict) -> Path:
    """The file of the tokenizer that a DiT's file names.

    It is beside the DiT's, in the folder beside that has its old folder's name,
    or where it was.
    """
    named = file.get("tokenizer", {})
    if not {"path", "sha256"} <= named.keys():
        raise InputError(f"{path} names no tokenizer: give --tokenizer")
    old, folder = Path(named["path"]), path.absolute().parent
    places = [folder / old.name, folder.parent / old.parent.name / old.name, old]
    places = [place for place in places if place.is_file() and not place.samefile(path)]
    for place in places:
        if runtime.file_sha256(place) == named["sha256"]:
            return place
    if places:
        raise InputError(f"{places[-1]} is not the tokenizer of {path}: give that one with "
                         "--tokenizer, or train the DiT again")
    raise InputError(f"the tokenizer of {path} is neither beside it nor at {old}: "
                     "give --tokenizer")

def check_pair(dit: Path, file: dict, tokenizer: Path, channels: int,
               side: int | None = None) -> None:
    """InputError if the DiT of this file has learned the latents of another tokenizer.

    channels, and side where it is known: of the tokenizer's latents.
    """
    config, named = file["model_config"], file.get("tokenizer", {})
    if (config["in_channels"] != channels or side not in (None, config["input_size"])
            or named.get("sha256") not in (None, runtime.file_sha256(tokenizer))):
        size = ", or --size is another" if side else ""
        raise InputError(f"{tokenizer} is not the tokenizer of {dit}{size}: give that one, "
                         "or train the DiT again")

def statistics(dit: Path, origin: dict, tokenizer: dict, stats: Path | None) -> list[Tensor]:
    """Mean and std of the latents, [C] each: those of `stats`, or of the DiT's file.

    A published tokenizer's file may have them too.  origin, tokenizer: what their files hold.
    """
    known = read(stats) if stats else (tokenizer if "kind" not in tokenizer else {}) | origin
    names = ("mean", "std") if stats else ("latent_mean", "latent_std")
    channels = origin["model_config"]["in_channels"]
    found = [known[k].float().flatten() for k in names if torch.is_tensor(known.get(k))]
    if [values.isfinite().sum() for values in found] != [channels, channels]:
        raise InputError(f"{stats or dit} has no mean and std of {channels} channels: "
                         "give --latent-stats")
    return found

def from_dit(file: dict, path: Path) -> dict:
    """Entries of ours, with a config that is read off the tensors.

    The number of heads is seen in rotary tables; else the row of models.DITS tells.
    """
    state = tensors(file.get("ema")) or tensors(file.get("model")) or tensors(file)
    heads = {(row["depth"], row["width"]): row["heads"] for row in models.DITS.values()}
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = sum(name.endswith("attn.qkv.weight") for name in state)
        family = "lightningdit" if "blocks.0.mlp.w12.weight" in state else "sit"
        table = state.get("feat_rope.freqs_cos")
        if family == "lightningdit" and table is None:
            raise InputError(f"{path} is a LightningDiT without rotary positions (use_rope: "
                             "false), which is not built here: give one that has them")
        config = dict(
            family=family, depth=depth, width=width, patch=patch, in_channels=channels,
            heads=heads[depth, width] if table is None else width // table.shape[1],
            input_size=patch * math.isqrt(state["pos_embed"].shape[1]),
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            qk_norm="blocks.0.attn.q_norm.weight" in state,
            learn_sigma=len(state["final_layer.linear.bias"]) > channels * patch**2)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no LightningDiT or SiT of a row of "
                         f"models.DITS: {error} is not known") from error
    return file | {"model": state, "ema": None, "model_config": config}

def to_dit(file: dict, family: str, path: Path) -> dict:
    """The inverse.  SiT's code has twice the output channels, half of them unused."""
    nets = {name: build(models.build_dit, file["model_config"], file.get(name), path)
            for name in ("model", "ema")}
    states, config = {name: net.state_dict() for name, net in nets.items()}, nets["ema"].config
    if config["family"] != family:
        raise InputError(f"{path} can be exported only --to {config['family']}")
    if family == "sit" and not config["learn_sigma"]:
        for state in states.values():
            for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
                used = state[name].unflatten(0, (-1, config["in_channels"]))
                both = torch.cat([used, torch.zeros_like(used)], dim=1)
                state[name] = both.flatten(0, 1)
    return states

# ------------------------------------------------------------------------------
# The command line.

FORMS = "vavae", "diffusers", "lightningdit", "sit"

def export(path: Path, form: str, to: Path) -> None:
    """Write what the published code loads, with the statistics of the latents."""
    kind = "tokenizer" if form in FORMS[:2] else "dit"
    file = read(path, kind)
    if "kind" not in file:
        raise InputError(f"{path} is a published file already: give one of ours")
    if lacking := [k for k in ("latent_mean", "latent_std") if k not in file]:
        raise InputError(f"{path} has no {lacking[0]}: train it again")
    if form != "diffusers" and (to.suffix == ".safetensors" or to.exists() and to.samefile(path)):
        raise InputError(f"{form} cannot be written to {to}: name another file, such as {form}.pt")
    if form == "diffusers":
        state, config = to_diffusers(file, path)
        write_safetensors(state, to / "diffusion_pytorch_model.safetensors")
        runtime.write_json(to / "config.json", config)
        return print(f"wrote {to}: AutoencoderKL.from_pretrained({str(to)!r}) loads it")
    save(to_vavae(file, path) if form == "vavae" else to_dit(file, form, path), to)
    mean, std = (file[f"latent_{s}"].view(1, -1, 1, 1) for s in ("mean", "std"))
    stats = to.with_name(f"{to.stem}-latents_stats.pt")
    save({"mean": mean, "std": std}, stats)
    print(f"wrote {to}, and {stats.name} beside it, which LightningDiT calls latents_stats.pt")
    if form == "vavae" and norm_groups(file["model_config"]) != {32}:
        print("LDM's norms have 32 groups and these have fewer: only this project builds it")

def show(path: Path) -> None:
    """Print the hash of a file, and one line for each of its entries and classes."""
    file = read(path)
    print(f"{path}  sha256 {runtime.file_sha256(path)}")
    for name, value in file.items():
        if torch.is_tensor(value):
            value = f"{list(value.shape)} {value.dtype}"
        elif "opt" in str(name):
            value = "the state of the optimiser"
        elif isinstance(value, dict) and tensors(value):
            sizes = [tensor.numel() for tensor in tensors(value).values()]
            value = f"{len(sizes)} tensors, {sum(sizes):,} numbers"
        elif name == "classes" and isinstance(value, list):
            rows = (f"\n{i:14} {label}" for i, label in enumerate(value))
            value = f"{len(value)}" + "".join(rows)
        print(f"{name:14} {value}")

@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("action", choices=["show", "export"])
    p.add_argument("path", type=Path, help="a checkpoint, or the folder of a run")
    p.add_argument("--to", nargs=2, metavar=("FORMAT", "FILE"),
                   help=f"{', '.join(FORMS)}, and the file to write, or diffusers' folder")
    args = p.parse(argv)
    path = args.path / "checkpoint.pt" if args.path.is_dir() else args.path
    if args.action == "show":
        return show(path)
    if not args.to or args.to[0] not in FORMS:
        p.error(f"give --to {', '.join(FORMS)}, and a file to write")
    export(path, args.to[0], Path(args.to[1]))

if __name__ == "__main__":
    main()
