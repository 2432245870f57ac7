"""Files of weights, in and out: ours, VA-VAE's, LDM's, LightningDiT's and SiT's.

    python checkpoints.py show runs/dit/checkpoint.pt
    python checkpoints.py export runs/tokenizer --to vavae vavae.pt
"""

import argparse
import json
import math
from pathlib import Path

import runtime  # before torch, because it says how idle threads wait

import numpy as np
import torch
from torch import Tensor, nn

import models
from runtime import InputError

# ------------------------------------------------------------------------------
# Files.  Only tensors and plain containers are read, so that no file runs code.

def save(state: dict, path: str | Path) -> None:
    """Write a checkpoint, or leave the old one if the process dies."""
    with runtime.atomic(path) as temporary:
        torch.save(state, temporary)

def read(path: str | Path, kind: str | None = None) -> dict:
    """The dict in a file of torch.save or safetensors, on the CPU.

    With a kind, "tokenizer" or "dit", the file is ours of this kind, or a
    published one, of which our entries are made.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a checkpoint")
    if path.suffix == ".safetensors":
        state = {name: torch.from_numpy(array.copy()).view(dtype)
                 for name, (array, dtype) in read_safetensors(path).items()}
    else:
        # Training files of SiT hold their command line as a Namespace.
        torch.serialization.add_safe_globals([argparse.Namespace])
        try:
            state = dict(torch.load(path, weights_only=True, map_location="cpu"))
        except Exception as error:  # torch raises half a dozen types here
            raise InputError(f"{path} is damaged or no dict of tensors: get it again") from error
    found = state.get("kind")
    if kind and found is None:
        return (from_vavae if kind == "tokenizer" else from_dit)(state, path)
    if kind and found != kind:
        raise InputError(f'{path} holds a "{found}", not a "{kind}"')
    if found == "tokenizer" and "noise" not in state["model_config"]:
        raise InputError(f"{path} is of an older version: train it again")
    return state

# NumPy's and PyTorch's type of a number; NumPy has no bfloat16.
STORED = {"F16": (np.float16, torch.float16), "BF16": (np.int16, torch.bfloat16),
          "F32": (np.float32, torch.float32), "I32": (np.int32, torch.int32),
          "I64": (np.int64, torch.int64)}

def read_safetensors(path: str | Path) -> dict[str, tuple]:
    """Each tensor as a memory-mapped array, and its type in PyTorch.

    A file is the length of its header in 8 bytes, the header, and the data.
    """
    try:
        raw, found = np.memmap(path, np.uint8, "r"), {}
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:begin].tobytes())
        for name in header.keys() - {"__metadata__"}:
            kind, dtype = STORED[header[name]["dtype"]]
            first, last = (begin + n for n in header[name]["data_offsets"])
            array = np.asarray(raw[first:last]).view(kind)
            found[name] = array.reshape(header[name]["shape"]), dtype
    except Exception as error:
        raise InputError(f"{path} is damaged: copy it again") from error
    return found

def tensors(state: dict) -> dict[str, Tensor]:
    """The tensors of a state dict, without the "module." of DDP."""
    return {name.removeprefix("module."): value
            for name, value in state.items() if torch.is_tensor(value)}

def load_strict(module: nn.Module, state: dict, source: str | Path) -> None:
    """Fill `module`, or say which tensors are missing, extra or misshapen."""
    try:
        module.load_state_dict(tensors(state))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:600]
        raise InputError(f"{source} does not fit: {reason}") from error

# ------------------------------------------------------------------------------
# Tokenizers.  A file of LDM or VA-VAE holds tensors, bare or as "state_dict".
# Some belong to its losses, and to the foundation model to which it aligns.

PREFIXES = {"discriminator": "loss.discriminator.", "projection": "linear_proj."}
OTHERS = "loss.", "linear_proj.", "foundation_model."

def load_tokenizer(path: str | Path, config: dict | None = None
                   ) -> tuple[models.Tokenizer, dict]:
    """The tokenizer of a file, in eval mode on the CPU, and the file's dict.

    Published files hold no latent statistics, and need a config if not LDM's f16.
    """
    file = read(path, "tokenizer")
    tokenizer = models.build_tokenizer(config or file["model_config"])
    load_strict(tokenizer, file["model"], path)
    return tokenizer.eval(), file | {"model_config": tokenizer.config}

def read_tokenizer_parts(path: str | Path) -> dict[str, dict]:
    """The state dicts of model and, if any, discriminator and projection."""
    file = read(path, "tokenizer")
    return {name: file[name] for name in ("model", *PREFIXES) if file.get(name)}

def from_vavae(file: dict, path: Path) -> dict:
    """The config is that of LDM's f16, with the channels of the file."""
    state = tensors(file.get("state_dict", file))
    parts = {name: {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
             for name, start in PREFIXES.items()}
    model = {k: v for k, v in state.items() if not k.startswith(OTHERS)}
    channels = len(model.get("post_quant_conv.bias", range(32)))
    return parts | {"model": model, "model_config": models.LDM_F16 | {"z_channels": channels}}

def to_vavae(file: dict, path: Path) -> dict:
    """The inverse.  Noise that is not learned becomes a constant log-variance."""
    if file["model_config"]["arch"] == "vit":
        raise InputError(f"{path} holds a ViT, which VA-VAE's code cannot load")
    with torch.device("meta"):
        tokenizer = models.build_tokenizer(file["model_config"])
    state = {name: value.clone() for name, value in file["model"].items()}
    if not tokenizer.learns_sigma:
        logvar = 2 * math.log(max(tokenizer.fixed_std, 1e-6))
        state["quant_conv.weight"][tokenizer.channels:] = 0
        state["quant_conv.bias"][tokenizer.channels:] = logvar
    for name, prefix in PREFIXES.items():
        state |= {prefix + k: v for k, v in file.get(name, {}).items()}
    return {"state_dict": state}

# ------------------------------------------------------------------------------
# Transformers.  A file of LightningDiT or SiT holds tensors, bare or as "model"
# and "ema".  Beware: a file of DiT looks like SiT's, but predicts noise.

def load_dit(path: str | Path) -> tuple[models.DiT, dict]:
    """As load_tokenizer, with the averaged weights if there are any.

    A LightningDiT without rotary tables (use_rope: false) does not fit.
    """
    file = read(path, "dit")
    dit = models.build_dit(file["model_config"])
    load_strict(dit, file.get("ema") or file["model"], path)
    return dit.eval(), file

def from_dit(file: dict, path: Path) -> dict:
    """The config follows from the tensors, but for the number of heads."""
    state = tensors(file.get("ema") or file.get("model") or file)
    heads = {(row["depth"], row["width"]): row["heads"] for row in models.DITS.values()}
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = sum(name.endswith("attn.qkv.weight") for name in state)
        config = dict(
            family="lightningdit" if "blocks.0.mlp.w12.weight" in state else "sit",
            depth=depth, width=width, heads=heads[depth, width], patch=patch,
            input_size=patch * math.isqrt(state["pos_embed"].shape[1]),
            in_channels=channels,
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
            qk_norm="blocks.0.attn.q_norm.weight" in state,
            learn_sigma=len(state["final_layer.linear.bias"]) > channels * patch**2)
    except KeyError as error:
        raise InputError(f"{path} is no LightningDiT or SiT of a row of "
                         f"models.DITS: {error} is not known") from error
    return file | {"model": state, "model_config": config}

def to_dit(file: dict, family: str, path: Path) -> dict:
    """The inverse.  SiT's code has twice the output channels, half of them unused."""
    config = file["model_config"]
    if config["family"] != family:
        raise InputError(f"{path} can be exported only --to {config['family']}")
    states = {name: dict(file[name]) for name in ("model", "ema")}
    if family == "sit" and not config["learn_sigma"]:
        for state in states.values():
            for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
                used = state[name].unflatten(0, (-1, config["in_channels"]))
                both = torch.cat([used, torch.zeros_like(used)], dim=1)
                state[name] = both.flatten(0, 1)
    return states

# ------------------------------------------------------------------------------
# The command line.

def export(path: Path, form: str, to: Path) -> None:
    """Write what the published code loads, and latents_stats.pt beside it."""
    file = read(path, "tokenizer" if form == "vavae" else "dit")
    if "kind" not in file:
        raise InputError(f"{path} is a published file already: give one of ours")
    save(to_vavae(file, path) if form == "vavae" else to_dit(file, form, path), to)
    mean, std = (file[f"latent_{s}"].view(1, -1, 1, 1) for s in ("mean", "std"))
    save({"mean": mean, "std": std}, to.with_name("latents_stats.pt"))
    print(f"wrote {to}, and latents_stats.pt beside it")

def show(path: Path) -> None:
    """Print the hash of a file, and one line for each of its entries."""
    file = read(path)
    print(f"{path}  sha256 {runtime.file_sha256(path)}")
    for name, value in file.items():
        if torch.is_tensor(value):
            value = f"{list(value.shape)} {value.dtype}"
        elif "opt" in name:
            value = "the state of the optimiser"
        elif isinstance(value, dict) and tensors(value):
            sizes = [tensor.numel() for tensor in tensors(value).values()]
            value = f"{len(sizes)} tensors, {sum(sizes):,} numbers"
        print(f"{name:14} {value}")

@runtime.command
def main(argv: list[str] | None = None) -> None:
    p = runtime.Parser(__doc__)
    p.add_argument("action", choices=["show", "export"])
    p.add_argument("path", type=Path, help="a checkpoint, or the folder of a run")
    p.add_argument("--to", nargs=2, metavar=("FORMAT", "FILE"),
                   help="vavae, lightningdit or sit, and the file to write")
    args = p.parse(argv)
    path = args.path / "checkpoint.pt" if args.path.is_dir() else args.path
    if args.action == "show":
        return show(path)
    if not args.to or args.to[0] not in ("vavae", "lightningdit", "sit"):
        p.error("give --to vavae, lightningdit or sit, and a file to write")
    export(path, args.to[0], Path(args.to[1]))

if __name__ == "__main__":
    main()
