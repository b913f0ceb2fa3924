"""`python -m mf_lightning export`: a generator for others, as a folder with a model card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Literal

from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.pipeline.loading import CONFIG_FILE, FORMAT
from mf_lightning.tools.export_diffusers import CLASS, export_diffusers
from mf_lightning.tools.export_graphs import export_onnx, export_torch
from mf_lightning.tools.generators import open_generator
from mf_lightning.tools.model_card import write_card
from mf_lightning.types import UserError

Kind = Literal["safetensors", "diffusers", "onnx", "torch"]


def export(
    checkpoint: Path,
    out: Path,
    to: Kind = "safetensors",
    weights: str | None = None,
    autoencoder: str | None = None,
    data: str | None = None,
    opset: int | None = None,
    push: str | None = None,
    public: bool = False,
    trust_net: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a generator into a folder, with a model card (README.md). Nothing leaves this machine without --push.

    Args:
        checkpoint: a file, a directory of shards, or a folder that an earlier export made.
        out: folder to write.
        to: "safetensors" weights and config.json; "diffusers" a folder for DiffusionPipeline; "onnx" and "torch"
            (torch.export) the one-step generator as graphs, noise and label to latent and to picture, for any batch.
        weights: "raw", or an average's decay; without it the one that the run's evaluation used.
        autoencoder: local directory or hub name, where the one that made the latents is not found by its id.
        data: directory of the data set, where the checkpoint does not describe it.
        opset: of ONNX; without it 18.
        push: send the folder to this repository of the Hugging Face hub (OWNER/NAME), which is made private if it is new; one
            that exists stays as public or private as it is.
        public: make a new repository public; without effect on one that exists.
        trust_net: import a network class of another package, which runs its code.
        overwrite: replace an earlier export.

    Raises:
        UserError: something that cannot be; nothing is left at OUT then.
    """
    _check(out, to=to, opset=opset, push=push, public=public, overwrite=overwrite)
    pipeline = open_generator(
        checkpoint, weights=weights, autoencoder=autoencoder, data=data, device="cpu", trust_net=trust_net
    )
    if pipeline.description.flow_matching and to in ("onnx", "torch"):
        raise UserError(
            f"Got a flow-matching network for --to {to}, expected one that was trained with MeanFlow: the graph is one jump, "
            "which this network was never taught. Use --to safetensors."
        )
    aside = out.absolute().with_name(f".{out.absolute().name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        checks = _write(pipeline, aside, to, opset)
        name = push or out.absolute().name
        write_card(pipeline, aside, checkpoint=checkpoint, to=to, name=name, checks=checks)
        if out.exists():
            shutil.rmtree(out)
        os.replace(aside, out)
    except OSError as error:
        raise UserError(
            f"Got {out} not written ({error.strerror or error}), expected space for it and the right to write. Free some, or "
            "give another place."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for file, worst in checks.items():
        print(f"{file}: differs from torch by at most {worst:.1e}")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {to}, {size / 1e6:.1f} MB, model card README.md")
    if push is not None:
        print(f"sent to {push_folder(out, push, public=public)}")


def _check(out: Path, *, to: str, opset: int | None, push: str | None, public: bool, overwrite: bool) -> None:
    if opset is not None and to != "onnx":
        raise UserError(f"Got --opset {opset} with --to {to}, expected it with --to onnx only. Leave it out.")
    if public and push is None:
        raise UserError("Got --public without --push, expected the repository to send to: --push OWNER/NAME.")
    if push is not None and (push.count("/") != 1 or not all(push.split("/"))):
        raise UserError(f"Got --push {push}, expected OWNER/NAME.")
    if out.exists() and not (overwrite and is_export(out)):
        how = "Give another name, or --overwrite=true." if is_export(out) else "It is no earlier export: give another name."
        raise UserError(f"Got OUT = {out}, which exists, expected a new folder. {how}")


def _write(pipeline: MeanFlowPipeline, folder: Path, to: str, opset: int | None) -> dict[str, float]:
    """Write the files of one kind; return each graph's largest difference from torch."""
    if to == "safetensors":
        pipeline.save_pretrained(folder)
        return {}
    if to == "diffusers":
        export_diffusers(pipeline, folder)
        return {}
    (folder / CONFIG_FILE).write_text(json.dumps({**pipeline.description.plain(), "graphs": to}, indent=1) + "\n")
    checks = {}
    for stem, image in (("generator", False), ("image", True)):
        file = folder / f"{stem}.{'onnx' if to == 'onnx' else 'pt2'}"
        if to == "onnx":
            checks[file.name] = export_onnx(pipeline, file, image=image, opset=opset)
        else:
            checks[file.name] = export_torch(pipeline, file, image=image)
    return checks


def is_export(folder: Path) -> bool:
    """Tell whether an earlier export wrote a folder, by its own files."""
    try:
        if (folder / CONFIG_FILE).is_file():
            return json.loads((folder / CONFIG_FILE).read_text()).get("format") == FORMAT
        return CLASS in json.loads((folder / "model_index.json").read_text()).get("_class_name", [])
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def push_folder(folder: Path, repository: str, *, public: bool) -> str:
    """Send a folder to the hub, into a repository that is made where there is none; return its address and who may see it.

    Raises:
        UserError: no login, no right, or no connection.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("--push needs the package huggingface_hub: pip install huggingface_hub") from error

    from huggingface_hub.errors import HfHubHTTPError

    unanswered = HfHubHTTPError.__bases__  # of its client's errors, which have been those of requests, httpx and httpx2
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export of {folder.name}")
        is_public = not api.repo_info(repository).private
    except (*unanswered, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of what sends large files
        raise UserError(
            f"Got {folder} not sent to {repository} ({' '.join(str(error).split())[:300]}), expected a login with the right to "
            f"write there, and a hub that answers. The folder is whole: log in (hf auth login), then `hf upload {repository} "
            f"{folder}`, or export again with --overwrite=true."
        ) from error
    kept = "" if is_public == public else "; it was there before, and --public decides over new ones only"
    return f"{address}, a {'public' if is_public else 'private'} repository{kept}"
