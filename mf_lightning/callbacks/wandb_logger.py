"""W&B that never stops a run: a server that does not answer is done without, and what was logged waits on the disk."""

from __future__ import annotations

import http.client
import netrc
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from wandb import Run

_NO_ANSWER = re.compile("time|deadline|connect|retrying|giving up|no such host|network|EOF|50[0-9]", re.IGNORECASE)
_ours: set[str] = set()
"""Values of WANDB_DATA_DIR that were set here, not by the user."""


class SafeWandbLogger(WandbLogger):
    """Lightning's W&B logger, which goes offline by itself where the server cannot be reached.

    The whole run then lies in ``SAVE_DIR/wandb/offline-run-*``, and ``wandb sync`` sends it later. A missing login still ends
    the run at the start, as a mistake. A run takes the name of its folder.

    Args:
        project: of W&B.
        save_dir: folder of the run.
        name: of the run; null is the name of ``save_dir``.
        id: of the run; the command line sets it, so that a resumed run goes on in its W&B run.
        offline: never connect.
        log_model: upload the best checkpoints as artifacts ``best_nfe1-ID``, ...: true at the end, "all" at each new best.
        entity: user or team; null is the login's own.
        group: runs shown together.
        tags: of the run.
        wait_s: seconds within which the server must answer at the start.
        init_s: seconds within which it must have opened the run.
        finish_s: seconds that the end of a run waits for what is not yet sent.
    """

    def __init__(
        self,
        project: str = "mf_lightning",
        save_dir: str = ".",
        name: str | None = None,
        id: str | None = None,
        offline: bool = False,
        log_model: bool | str = False,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        wait_s: float = 10.0,
        init_s: float = 60.0,
        finish_s: float = 300.0,
    ) -> None:
        name = name or Path(save_dir).absolute().name
        more = {"entity": entity, "group": group, "tags": tags}
        super().__init__(name=name, save_dir=save_dir, id=id, offline=offline, project=project, log_model=log_model, **more)
        self._wandb_init.pop("anonymous", None)  # W&B warns of it whatever its value
        self.wait_s = wait_s
        self.init_s = init_s
        self.finish_s = finish_s

    @property
    def experiment(self) -> Run:
        """Return the W&B run, made on first use on the first process."""
        if self._experiment is None and rank_zero_only.rank == 0:
            self._start()
        return super().experiment

    def _start(self) -> None:
        """Open the run, or open it offline if the server does not answer."""
        import wandb
        from wandb.errors import CommError

        folder = Path(self.save_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if os.environ.get("WANDB_DATA_DIR") in (None, *_ours):  # files of tables and artifacts wait beside the run, not in HOME
            os.environ["WANDB_DATA_DIR"] = str(folder / "wandb")
            _ours.add(str(folder / "wandb"))
        limits = {"init_timeout": self.init_s, "finish_timeout": self.finish_s}
        known = getattr(wandb.Settings, "model_fields", {})
        self._wandb_init["settings"] = wandb.Settings(**{name: value for name, value in limits.items() if name in known})
        settings = wandb.setup().settings
        if self._offline or settings.mode not in ("online", "run", None):
            return
        problem = no_answer(settings.base_url, self.wait_s)
        if problem is not None and has_login(settings.base_url, settings.api_key):
            self._go_offline(f"{settings.base_url} does not answer ({problem})")
            return
        try:
            _ = super().experiment
        except (CommError, TimeoutError) as error:
            if not (isinstance(error, TimeoutError) or _NO_ANSWER.search(str(error))):
                raise  # it answers, and refuses: that is a mistake in the settings
            wandb.teardown()
            self._go_offline(f"{settings.base_url} opened no run ({str(error).splitlines()[0][:120]})")

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """Go on without W&B where its process beside ours has died; what it had written stays on the disk."""
        from wandb.errors import Error

        try:
            yield
        except (ConnectionError, Error) as error:
            if self._experiment is None:  # it never began: a missing login, a project that refuses
                raise
            self._experiment = DummyExperiment()
            print(
                f"W&B: its process is lost ({str(error).splitlines()[0][:120]}). Training goes on without it; what was logged "
                f"so far lies in {Path(self.save_dir) / 'wandb'}, and metrics.csv goes on.",
                file=sys.stderr,
            )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values, pictures and tables of a step."""
        with self.surviving():
            super().log_metrics(metrics, step)

    def _go_offline(self, problem: str) -> None:
        self._wandb_init["mode"] = "offline"
        print(
            f"W&B: {problem}. This run is written to {Path(self.save_dir) / 'wandb'} instead; send it later: "
            f"wandb sync {Path(self.save_dir) / 'wandb'}/offline-run-*",
            file=sys.stderr,
        )

    def _scan_and_log_checkpoints(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log each new best checkpoint under its own name: Lightning gives all of them one."""
        import wandb

        path, score = Path(checkpoint_callback.best_model_path), checkpoint_callback.best_model_score
        if not (checkpoint_callback.best_model_path and path.exists()) or isinstance(self._experiment, DummyExperiment):
            return  # the latter: W&B is lost
        written = path.stat().st_mtime
        if self._logged_model_time.get(str(path)) == written:
            return
        metadata = {"monitor": checkpoint_callback.monitor, "score": None if score is None else float(score)}
        with self.surviving():
            artifact = wandb.Artifact(f"{path.stem}-{self.experiment.id}", type="model", metadata=metadata)
            if path.is_dir():  # shards
                artifact.add_dir(str(path))
            else:
                artifact.add_file(str(path))
            self.experiment.log_artifact(artifact, aliases=["best"])
        self._logged_model_time[str(path)] = written


def no_answer(url: str, wait_s: float) -> str | None:
    """Return why a server gives no answer of any kind within so many seconds; None if it does."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/healthz", timeout=wait_s).close()
    except urllib.error.HTTPError:
        return None  # an answer
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error))
    return None


def has_login(url: str, api_key: Any) -> bool:
    """Tell whether there is a key for a server, in the environment or in the file where ``wandb login`` leaves it."""
    if api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for place in places:
        file = None if place is None else Path(place).expanduser()
        if file is not None and file.is_file():
            try:
                return netrc.netrc(str(file)).authenticators(urlsplit(url).hostname or "") is not None
            except netrc.NetrcParseError:
                return False
    return False
