"""Which check belongs to which file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mf_lightning.types import UserError
from tests.parity.family import Family, check_flax_weights, check_torch_weights
from tests.parity.losses import check_haoyi, check_official, check_zhuyu
from tests.parity.networks import CONVERTERS, check_forward
from tests.parity.report import FAIL, NOT_BUILT, Checks, Oracle, Row
from tests.parity.sampling import check_py_meanflow_times, check_sampler, check_times

LOSSES = {"haoyi": check_haoyi, "official": check_official, "zhuyu": check_zhuyu}


def check_directory(folder: str | Path) -> list[Row]:
    """Return the rows of every .npz file of a folder; other files are not looked at.

    Raises:
        UserError: no such folder, or no .npz file in it.
    """
    folder = Path(folder)
    how = "Give the folder that holds the stored reference numbers."
    if not folder.is_dir():
        raise UserError(f"Got the folder '{folder}', which does not exist, expected a folder of .npz files. {how}")
    names = sorted(path.name for path in folder.glob("*.npz"))
    if not names:
        raise UserError(f"Got the folder '{folder}' without any .npz file, expected reference numbers in it. {how}")
    family = Family(folder)
    return [row for name in names for row in check_file(family, name)]


def check_file(family: Family, name: str) -> list[Row]:
    """Return the rows of one file; whatever goes wrong is a row too."""
    if name.startswith("imf_") or name == "sampling_imf.npz":
        return [Row(name, "improved MeanFlow", NOT_BUILT, None, None, "this project has no improved MeanFlow")]
    try:
        oracle = Oracle(family.folder / name)
        with _threads(None if name == "fid_images.npz" else 1):
            checks = _check(oracle, family)
    except Exception as error:  # one broken file must not hide the others
        problem = str(error) if isinstance(error, LookupError) else f"{type(error).__name__}: {error}"
        return [Row(name, "file", FAIL, None, None, " ".join(problem.split()))]
    if checks is None:
        return [Row(name, "unknown file", FAIL, None, None, "no check is known for this name; add one to tests/parity")]
    if oracle.unread:
        note = f"no check reads {', '.join(sorted(oracle.unread))}"
        checks.add(f"{len(oracle.unread)} more arrays", NOT_BUILT, None, None, note)
    return checks.rows


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Compute with so many threads (None: leave them): beside other work one is ten times faster for tiny networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(oracle: Oracle, family: Family) -> Checks | None:
    """Run the check that the file's name asks for; None if there is none."""
    name = oracle.name.removesuffix(".npz")
    if name.startswith("sit_forward_"):
        kind = name.removeprefix("sit_forward_")
        return check_forward(oracle, kind) if kind in CONVERTERS else None
    if name.startswith("meanflow_loss_"):
        source, _, case = name.removeprefix("meanflow_loss_").partition("_")
        return LOSSES[source](oracle, family) if source in LOSSES and case else None
    if name in ("meanflow_weights_torch", "meanflow_weights_flax"):
        return (check_torch_weights if name.endswith("torch") else check_flax_weights)(oracle, family)
    if name == "sampling_sit":
        return check_sampler(oracle, family)
    if name in ("time_sampling", "time_sampling_py_meanflow"):
        return (check_times if name == "time_sampling" else check_py_meanflow_times)(oracle)
    if name in ("fid_features", "fid_images"):
        from tests.parity import fidelity  # torch-fidelity loads late

        return (fidelity.check_features if name == "fid_features" else fidelity.check_images)(oracle)
    return None
