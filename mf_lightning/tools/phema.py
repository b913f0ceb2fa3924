"""`python -m mf_lightning phema`: an average of any width, made after training of the snapshots of two."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mf_lightning.checkpoints import CHECKPOINT_FORMAT, write_checkpoint
from mf_lightning.checkpoints.metadata import Told, weights_metadata
from mf_lightning.checkpoints.publish import aside_path, publish
from mf_lightning.checkpoints.snapshots import FOLDER, Header, Snapshot, combine, list_snapshots
from mf_lightning.profiles import Fit, check_width, fit_profile
from mf_lightning.types import UserError

TOLERANCE = 0.05
"""Largest relative L2 error of a profile that is written unasked."""
SHOWN = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25)


def phema(
    run: Path,
    sigma_rel: float | None = None,
    step: int | None = None,
    out: Path | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> None:
    """Put a power-function average of any width together from a run's snapshots (post-hoc EMA, EDM2).

    Args:
        run: folder of a run that was trained with --phema.snapshot_every, or of its snapshots.
        sigma_rel: width, the profile's standard deviation over its step, in (0, 0.2886]; without it a list of widths with their
            errors is printed, and nothing is written.
        step: optimizer step at which the average ends; without it the last snapshot's.
        out: .ckpt, for test, sample, export and model.init_from, or .safetensors to write; without it a .ckpt in RUN/phema.
        force: write it also where the snapshots give the profile with an error above 5 %.
        overwrite: replace an existing OUT.

    Raises:
        UserError: no snapshots, damaged ones or those of several runs; a width or step out of their reach.
    """
    folder = run / FOLDER if (run / FOLDER).is_dir() else run
    snapshots = list_snapshots(folder)
    last = snapshots[-1].header.step
    end = last if step is None else step
    used = [each for each in snapshots if each.header.step <= end]
    if not used or end > last:
        raise UserError(
            f"Got --step={end} with snapshots of the steps {snapshots[0].header.step} to {last}, expected one between them. An "
            "average holds no step that was not yet taken."
        )
    if sigma_rel is None:
        _tell_widths(used, end)
        return
    check_width(sigma_rel, "--sigma_rel")
    out = out or _home(folder) / "phema" / f"step{end:08d}_sigma{sigma_rel:g}.ckpt"
    if out.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"Got OUT = {out}, expected a name that ends in .ckpt or .safetensors.")
    if out.exists() and not overwrite:
        raise UserError(f"Got OUT = {out}, which exists, expected a new file. Give another name, or --overwrite=true.")
    fit = _fit(used, end, sigma_rel)
    if fit.error > TOLERANCE and not force:
        raise UserError(
            f"Got --sigma_rel={sigma_rel} at step {end}, which {len(used)} snapshots give with an error of {fit.error:.1%} of "
            f"the profile, expected at most {TOLERANCE:.0%}. Take a width nearer to theirs ({_widths(used)}), the step of a "
            "snapshot (without --sigma_rel the errors are listed), or --force=true."
        )
    _write(out, combine(used, map(float, fit.factors)), used[-1].header, end, sigma_rel, fit)
    print(
        f"{out}: sigma_rel {sigma_rel:g} at step {end} of {len(used)} snapshots ({_widths(used)}); relative L2 error of the "
        f"profile {fit.error:.2e}; rounding of snapshots enters at most {np.abs(fit.factors).sum():.1f} times"
    )
    if out.suffix == ".ckpt":
        print(f"Score it with test --ckpt_path={out} --sample_eval.emas=[null]; sample and export take it as it is")


def _home(folder: Path) -> Path:
    return folder.parent if folder.name == FOLDER else folder


def _fit(used: list[Snapshot], end: int, sigma_rel: float) -> Fit:
    return fit_profile([(each.header.step, each.header.sigma_rel) for each in used], end, sigma_rel)


def _widths(used: list[Snapshot]) -> str:
    return ", ".join(f"{width:g}" for width in sorted({each.header.sigma_rel for each in used}))


def _tell_widths(used: list[Snapshot], end: int) -> None:
    print(f"{len(used)} snapshots (sigma_rel {_widths(used)}) up to step {end}; error of each profile that they can make:")
    for width in SHOWN:
        error = _fit(used, end, width).error
        print(f"  sigma_rel {width:<5g} {error:.1e}{'' if error <= TOLERANCE else '  too large'}")


def _write(out: Path, tensors: dict[str, Tensor], header: Header, end: int, sigma_rel: float, fit: Fit) -> None:
    """Write weights alone, as a checkpoint that `import` might have made, or as `consolidate` writes them."""
    name = f"phema {sigma_rel:g}"
    if out.suffix == ".ckpt":
        write_checkpoint(_checkpoint(tensors, header, end, name, fit), out)
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    told = Told(header.net, header.data, name, header.fm_fraction == 1)
    metadata = weights_metadata({**asdict(told), "step": end})
    aside = aside_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, metadata=metadata)
        publish(aside, out, step=end)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Got {out} not written ({error}), expected space for it. Free some, or give another place.") from error
    finally:
        aside.unlink(missing_ok=True)


def _checkpoint(tensors: dict[str, Tensor], header: Header, end: int, name: str, fit: Fit) -> dict[str, Any]:
    import lightning

    return {
        "pytorch-lightning_version": lightning.__version__,
        "format_version": CHECKPOINT_FORMAT,
        "epoch": 0,
        "global_step": end,
        "net": header.net,
        "data": header.data,
        "fm_fraction": header.fm_fraction,
        "state_dict": {f"net.{key}": value for key, value in tensors.items()},
        "callbacks": {},  # or Lightning asks none of them to look at the checkpoint
        "ema": {"updates": 0, "weights": {}},
        "imported": {
            "source": f"snapshots of run {header.run}",
            "container": "snapshots",
            "format": "meanflow",
            "weights": name,
            "flow_matching": header.fm_fraction == 1,
            "profile_error": fit.error,
        },
    }
