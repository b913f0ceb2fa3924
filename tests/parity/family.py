"""A folder of stored files, and the one network that its loss and sampling files share."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mf_lightning.flow.path import interpolate
from mf_lightning.interop.flax_names import from_flax
from mf_lightning.nets import SiT
from tests.parity import importing
from tests.parity.networks import build, own_table
from tests.parity.report import FAIL, NOT_BUILT, OK, Checks, MissingArray, Oracle, Unreadable, difference

WEIGHTS = "meanflow_weights_torch.npz"


class Family:
    """One folder; files that several checks need are read once.

    Args:
        folder: where the .npz files lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._siblings: dict[str, Oracle] = {}

    def sibling(self, name: str) -> Oracle:
        """Return another file of the folder, which the file under check cannot be judged without."""
        if not (self.folder / name).is_file():
            raise MissingArray(f"missing file '{name}' beside it; copy the whole folder")
        if name not in self._siblings:
            self._siblings[name] = Oracle(self.folder / name)
        return self._siblings[name]

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The loss network's parameters, under torch names."""
        return {name: value for name, value in self.sibling(WEIGHTS).arrays.items() if not name.startswith("cfg/")}

    @cached_property
    def heads(self) -> tuple[int, str]:
        """Attention heads of the loss network and how they were found: a state dict does not show them.

        Without cfg/num_heads, each divisor of the width (4 first, so it wins ties) is tried on a stored output.
        """
        for file in self._of_this_net():
            if "cfg/num_heads" in file:
                return int(file.arrays["cfg/num_heads"]), f"heads from {file.name}"
        width = len(self.state["x_embedder.proj.bias"])
        divisors = sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: n != 4)
        for what, inputs, stored in self._stored_outputs():
            errors = {n: difference(_output(build(self.state, num_heads=n), *inputs), stored) for n in divisors}
            best = min(errors, key=errors.__getitem__)
            return best, f"heads are in no file: of {divisors}, {best} meets {what} best ({errors[best]:.1e})"
        return divisors[0], f"heads are in no file and no output is stored: {divisors[0]} taken"

    def net(self) -> SiT:
        """Return the loss network, fresh, in float32."""
        return build(self.state, num_heads=self.heads[0])

    def _stored_outputs(self) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor]]:
        """Give stored outputs u with the state, t, r and labels that they were computed from."""
        for file in self._of_this_net():
            have = file.arrays
            if {"x", "e", "t", "r", "y_inp", "u"} <= have.keys() and have["u"].isfinite().all():
                z_t = interpolate(have["x"], have["e"], t=have["t"])
                yield f"u of {file.name}", (z_t, have["t"], have["r"], have["y_inp"]), have["u"]
            if {"z1", "labels", "steps1"} <= have.keys() and have["steps1"].isfinite().all():
                ones = torch.ones(len(have["z1"]))
                u = have["z1"] - have["steps1"]
                yield f"steps1 of {file.name}", (have["z1"], ones, 0 * ones, have["labels"]), u

    def _of_this_net(self) -> Iterator[Oracle]:
        """Give the files that were computed with the loss network; an unreadable one has a FAIL row of its own."""
        name = re.compile(r"(meanflow_(weights_torch|loss_(haoyi|official|zhuyu)_.*)|sampling_sit)\.npz")
        for path in sorted(self.folder.glob("*.npz")):
            if name.fullmatch(path.name):
                with suppress(Unreadable):
                    yield self.sibling(path.name)


@torch.no_grad()
def _output(net: SiT, z_t: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
    return net(z_t, t=t, r=r, y=y)


def check_torch_weights(oracle: Oracle, family: Family) -> Checks:
    """Load HaoyiZhu's parameters strictly, and compare the position table with ours."""
    checks = Checks(oracle)
    oracle.unread.clear()  # strict loading reads every array
    net = family.net()
    count = len(net.state_dict())
    checks.judge(f"strict load ({len(family.state)} arrays)", abs(count - len(family.state)), 0.0, family.heads[1])
    broken = [name for name, value in family.state.items() if not value.isfinite().all()]
    checks.judge("finite values", len(broken), 0.0, ", ".join(broken))
    checks.close("pos_embed", lambda: own_table(net), note="our table against the file's")
    return checks


def check_flax_weights(oracle: Oracle, family: Family) -> Checks:
    """Rename and transpose the official parameters; they must then be the torch file's, bit by bit."""
    checks = Checks(oracle)
    mapped = from_flax(oracle.under("params/"))
    expected = {name: value for name, value in family.state.items() if name != "pos_embed"}
    apart = sorted(mapped.keys() ^ expected.keys())
    note = f"on one side only: {', '.join(apart)}" if apart else "the position table is computed there"
    checks.judge(f"names ({len(mapped)} arrays)", len(apart), 0.0, note)
    unequal = [name for name in sorted(mapped.keys() & expected.keys()) if not mapped[name].equal(expected[name])]
    note = f"unequal: {', '.join(unequal)}" if unequal else "number of arrays that are not equal bit by bit"
    checks.add("values and layouts", FAIL if unequal else OK, len(unequal), 0.0, note)
    for container in ("msgpack", "orbax"):
        _check_flax_import(checks, family, container)
    return checks


def _check_flax_import(checks: Checks, family: Family, container: str) -> None:
    """Write the parameters as the official code does, import them, and compare with the torch file bit by bit."""
    quantity = f"imported, {container}"
    if not importing.JAX:
        return checks.add(quantity, NOT_BUILT, None, None, "needs the extra jax")
    side = str(math.isqrt(family.state["pos_embed"].shape[1]) * family.state["x_embedder.proj.weight"].shape[-1])
    with tempfile.TemporaryDirectory() as name:
        file = importing.write_flax(checks.oracle.under("params/net/"), Path(name), container=container)
        options = (f"--num_heads={family.heads[0]}", f"--latent_size={side}")
        state = importing.imported(file, Path(name) / "ours.ckpt", *options)[0].state_dict()
    unequal = [name for name, value in state.items() if not value.equal(family.state[name])]
    return checks.add(quantity, FAIL if unequal else OK, len(unequal), 0.0, f"unequal: {unequal}" if unequal else "bit by bit")
