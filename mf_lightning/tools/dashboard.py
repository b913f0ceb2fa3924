"""`python -m mf_lightning dashboard`: runs beside each other in W&B, one panel per metric with a line per NFE."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from mf_lightning.flow.sampler import check_nfe
from mf_lightning.metrics.protocol import METRICS
from mf_lightning.types import UserError

STEP = "trainer/global_step"
DIAGNOSTICS = {
    "Raw error": ("train/raw_error", "val/raw_error"),
    "Velocity error": ("train/velocity_error", "val/velocity_error"),
    "Size of du/dt": ("train/dudt_norm", "val/dudt_norm"),
    "Gradient norm": ("train/grad_norm",),
    "Raw error by t (validation)": tuple(f"val/raw_error_t{b / 5:.1f}-{(b + 1) / 5:.1f}" for b in range(5)),
    "Velocity error by t (validation)": tuple(f"val/velocity_error_t{b / 5:.1f}-{(b + 1) / 5:.1f}" for b in range(5)),
    "Images per second": ("train/images_per_s",),
}
DEFAULT_NFE = (1, 2, 4)
WITHOUT = "Without an account, `python -m mf_lightning report RUN [RUN ...]` makes the same comparison in one HTML file."


@dataclass(frozen=True)
class Compared:
    """What a dashboard shows."""

    entity: str
    project: str
    runs: tuple[str, ...]
    """Ids, or names where the server was not asked; empty takes all of the project."""
    protocols: tuple[str, ...]
    """Ids; figures of different ones never share a panel. Empty where the server was not asked."""
    metrics: tuple[str, ...]
    nfe: tuple[int, ...]
    asked: bool = False
    """Whether the server was."""


def dashboard(
    project: str,
    runs: list[str] | None = None,
    kind: Literal["workspace", "report"] = "workspace",
    nfe: list[int] | None = None,
    protocol: str | None = None,
    name: str = "Quality by NFE",
    save: bool = True,
) -> None:
    """Save a comparison of runs in W&B: quality against steps and best quality, per NFE, errors, speed and grids.

    Only figures of one protocol (extractor, reference, images, seed, ...) are drawn together: a report has a part for each, a
    workspace shows one.

    Args:
        project: ENTITY/PROJECT in W&B.
        runs: names or ids of the runs to compare; all of the project if left out.
        kind: a saved view of the project's workspace, or a report.
        nfe: sampling steps to show; what the runs have if left out.
        protocol: id of the protocol to show, as it stands in a run's config; needed where runs have several, for a workspace.
        name: title of the view or report.
        save: false asks no server and prints the view or report as JSON instead.
    """
    entity, project = parse_project(project)
    if nfe is not None:
        check_nfe("--nfe", nfe)
    _require()
    if save:
        compared = ask_server(entity, project, runs or [], nfe=nfe, protocol=protocol, kind=kind)
    else:
        metrics = tuple(metric.name for metric in METRICS)
        protocols = () if protocol is None else (protocol,)
        compared = Compared(entity, project, tuple(runs or ()), protocols, metrics, tuple(nfe or DEFAULT_NFE))
    made = build_workspace(compared, name) if kind == "workspace" else build_report(compared, name)
    if not save:
        model = made._to_model()
        print(json.dumps(model.model_dump(mode="json", by_alias=True), indent=1))
        return
    with _server_errors(f"{entity}/{project}"):
        made.save()
    print(f"Saved {kind}: {made.url}")


def parse_project(project: str) -> tuple[str, str]:
    """Return entity and project of ENTITY/PROJECT.

    Raises:
        UserError: it is something else.
    """
    parts = project.split("/")
    if len(parts) != 2 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise UserError(f"Got the project '{project}', expected ENTITY/PROJECT, as in its address in W&B. {WITHOUT}")
    return parts[0], parts[1]


def _require() -> None:
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Got no package wandb-workspaces, expected it for dashboards. Install it: pip install 'mf_lightning[dashboard]'. "
            + WITHOUT
        ) from error


@contextmanager
def _server_errors(project: str) -> Iterator[None]:
    """Turn what W&B's client raises (its own errors, those of requests, ValueError) into one message."""
    from wandb.errors import Error

    try:
        yield
    except UserError:
        raise
    except (Error, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"Got no answer for {project} from W&B ({str(error).splitlines()[0][:200]}), expected a login that may "
            f"use that project. Log in with `wandb login`. {WITHOUT}"
        ) from error


def ask_server(
    entity: str, project: str, names: list[str], *, nfe: list[int] | None, protocol: str | None, kind: str
) -> Compared:
    """Return what the runs of a project hold.

    Raises:
        UserError: no login, no answer, no such runs, or several protocols where one can be shown.
    """
    import wandb

    with _server_errors(f"{entity}/{project}"):
        found = list(wandb.Api(timeout=30).runs(f"{entity}/{project}"))
    chosen = [run for run in found if not names or run.name in names or run.id in names]
    missing = [name for name in names if not any(name in (run.name, run.id) for run in chosen)]
    if missing or not chosen:
        there = ", ".join(run.name for run in found[:10]) or "none"
        raise UserError(
            f"Got --runs={missing or names} in {entity}/{project}, expected runs that are there: {there}. Give their names or "
            "ids, or leave the option out."
        )
    protocols = sorted({run.config["protocol_id"] for run in chosen if run.config.get("protocol_id")})
    if protocol is not None and protocol not in protocols:
        raise UserError(
            f"Got --protocol={protocol}, expected one that the runs began with: {', '.join(protocols) or 'none has figures'}."
        )
    if protocol is not None:
        protocols = [protocol]
    elif len(protocols) > 1 and kind == "workspace":
        raise UserError(
            f"Got runs of {len(protocols)} protocols ({', '.join(protocols)}), expected one: their figures do not compare. "
            "Choose with --protocol, or make a report (--kind=report), which has a part for each."
        )
    keys = {key for run in chosen for key in dict(run.summary)}
    seen = {match.groups() for key in keys if (match := re.fullmatch(r"(\w+)/nfe(\d+)", key))}
    metrics = tuple(metric.name for metric in METRICS if any(metric.name == name for name, _ in seen))
    if not metrics:
        print("None of these runs has figures yet: the panels stay empty until one has.", file=sys.stderr)
    counts = nfe or sorted({int(number) for _, number in seen}) or list(DEFAULT_NFE)
    ids = tuple(run.id for run in chosen) if names else ()
    return Compared(entity, project, ids, tuple(protocols), metrics, tuple(counts), asked=True)


def sections(compared: Compared) -> dict[str, list[Any]]:
    """Return the panels of a dashboard, by the title of their part."""
    import wandb_workspaces.reports.v2 as wr

    curves, best = [], []
    for metric in METRICS:
        if metric.name not in compared.metrics:
            continue
        keys = [f"{metric.name}/nfe{nfe}" for nfe in compared.nfe]
        hint = "lower is better" if metric.better == "min" else "higher is better"
        curves.append(wr.LinePlot(title=f"{metric.title} ({hint})", x=STEP, y=keys, title_x="step", smoothing_type="none"))
        summaries = [f"{key}.{metric.better}" for key in keys]
        best.append(wr.BarPlot(title=f"Best {metric.title}", metrics=summaries, orientation="v"))
    errors = [wr.LinePlot(title=title, x=STEP, y=list(keys), title_x="step") for title, keys in DIAGNOSTICS.items()]
    grids = wr.MediaBrowser(title="A column is one noise and class; rows: NFE, real", media_keys=["samples/grid"])
    return {
        "Quality against steps, a line per NFE": curves,
        "Best quality at each NFE": best,
        "Samples": [grids],
        "Errors and speed": errors,
    }


def build_workspace(compared: Compared, name: str) -> Any:
    """Return the view, not yet saved."""
    import wandb_workspaces.workspaces as ws

    parts = [ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections(compared).items()]
    runset = ws.RunsetSettings(filters=filters(compared, compared.protocols[0] if compared.protocols else None))
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(
        entity=compared.entity, project=compared.project, name=name, sections=parts, settings=settings, runset_settings=runset
    )


def build_report(compared: Compared, name: str) -> Any:
    """Return the report, not yet saved: a part for each protocol."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for protocol in compared.protocols or (None,):
        of = "" if protocol is None else f", protocol {protocol}"
        for title, panels in sections(compared).items():
            runset = wr.Runset(name="Runs", filters=filters(compared, protocol))  # of the report's own project
            blocks += [wr.H2(f"{title}{of}"), wr.PanelGrid(runsets=[runset], panels=panels)]
    about = "Only figures of one protocol (extractor, reference, number of images, seed, ...) are drawn together."
    return wr.Report(
        entity=compared.entity, project=compared.project, title=name, description=about, blocks=blocks, width="fluid"
    )


def filters(compared: Compared, protocol: str | None) -> str:
    """Return which runs are shown, in the language of W&B's filters; empty for all."""
    terms = []
    if compared.runs:
        terms.append(f"Metric('{'ID' if compared.asked else 'Name'}') in {list(compared.runs)!r}")
    if protocol is not None:
        terms.append(f"Config('protocol_id') == '{protocol}'")
    return " and ".join(terms)
