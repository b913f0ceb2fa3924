"""`dashboard` builds a panel per metric with a line per NFE, of one protocol; no server is needed to look at it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import wandb

from mf_lightning.__main__ import main
from mf_lightning.metrics.protocol import METRICS
from mf_lightning.tools.dashboard import Compared, build_report, build_workspace
from tests.runs import error_of, python


def panels(tree) -> list[dict]:
    """Return every panel of a view or report, wherever it lies."""
    if isinstance(tree, dict):
        found = [tree] if "viewType" in tree else []
        return found + [panel for value in tree.values() for panel in panels(value)]
    return [panel for value in tree for panel in panels(value)] if isinstance(tree, list) else []


def filtered(tree) -> set[str]:
    """Return the filters of every set of runs, as text."""
    if isinstance(tree, dict):
        mine = {json.dumps([[f["key"]["name"], f["value"]] for f in tree["filters"]])} if "filterFormat" in tree else set()
        return mine.union(*(filtered(value) for value in tree.values()))
    return set().union(*(filtered(value) for value in tree)) if isinstance(tree, list) else set()


def command(capsys, *args: str) -> dict:
    main(["dashboard", "me/mf", "--save=false", *args])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["workspace", "report"])
def test_a_panel_per_metric_with_a_line_per_nfe(capsys, kind):
    tree = command(capsys, f"--kind={kind}", "--nfe=[1,2,8]", "--name=Mine", "--runs=[a,b]", "--protocol=0123abcd")
    assert tree["displayName"] == "Mine"
    lines = {p["config"]["chartTitle"]: p["config"] for p in panels(tree) if p["viewType"] == "Run History Line Plot"}
    for metric in METRICS:
        hint = "lower" if metric.better == "min" else "higher"
        curve = lines[f"{metric.title} ({hint} is better)"]
        assert curve["metrics"] == [f"{metric.name}/nfe{nfe}" for nfe in (1, 2, 8)]
        assert curve["xAxis"] == "trainer/global_step"
    assert lines["Raw error by t (validation)"]["metrics"][0] == "val/raw_error_t0.0-0.2"
    assert lines["Images per second"]["metrics"] == ["train/images_per_s"]
    bars = {p["config"]["chartTitle"]: p["config"]["metrics"] for p in panels(tree) if p["viewType"] == "Bar Chart"}
    assert bars["Best FID"] == [f"fid/nfe{nfe}.min" for nfe in (1, 2, 8)]
    assert bars["Best Recall"] == [f"recall/nfe{nfe}.max" for nfe in (1, 2, 8)]
    assert [p["config"]["mediaKeys"] for p in panels(tree) if p["viewType"] == "Media Browser"] == [["samples/grid"]]
    assert filtered(tree) == {json.dumps([["displayName", ["a", "b"]], ["protocol_id", "0123abcd"]])}


def test_protocols_have_parts_of_their_own():
    compared = Compared("me", "mf", ("id1",), ("aaaa", "bbbb"), ("fid",), (1,), asked=True)
    tree = build_report(compared, "n")._to_model().model_dump(mode="json", by_alias=True)
    grids = [block for block in tree["spec"]["blocks"] if block["type"] == "panel-grid"]
    shown = [filtered(block) for block in grids if any(p["config"].get("metrics") == ["fid/nfe1"] for p in panels(block))]
    assert shown == [{json.dumps([["name", ["id1"]], ["protocol_id", protocol]])} for protocol in ("aaaa", "bbbb")]
    view = build_workspace(Compared("me", "mf", (), ("aaaa",), ("fid",), (1,)), "n")._to_model()
    assert filtered(view.model_dump(mode="json", by_alias=True)) == {json.dumps([["protocol_id", "aaaa"]])}


def server(monkeypatch, *runs: tuple[str, str | None, tuple[str, ...]]) -> list:
    """Put a server with runs of (name, protocol, keys) in W&B's place; return what is saved."""
    made = [
        SimpleNamespace(
            id=f"id-{name}", name=name, config={"protocol_id": protocol} if protocol else {}, summary=dict.fromkeys(keys, 1)
        )
        for name, protocol, keys in runs
    ]  # fmt: skip
    monkeypatch.setattr(wandb, "Api", lambda **how: SimpleNamespace(runs=lambda path: made))
    saved = []
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    for kind in (ws.Workspace, wr.Report):
        monkeypatch.setattr(kind, "save", lambda self: saved.append(self._to_model().model_dump(mode="json", by_alias=True)))
        monkeypatch.setattr(kind, "url", "https://here", raising=False)
    return saved


def test_what_the_runs_have_is_shown(monkeypatch, capsys):
    keys = ("fid/nfe1", "fid/nfe4", "fid/nfe1@ffff", "precision/nfe2/raw", "train/loss")
    saved = server(monkeypatch, ("one", "aaaa", keys), ("two", "aaaa", ()), ("bare", None, ()))
    main(["dashboard", "me/mf", "--runs=[one,id-two]"])
    assert capsys.readouterr().out == "Saved workspace: https://here\n"
    metrics = [p["config"].get("metrics") for p in panels(saved[0])]
    assert ["fid/nfe1", "fid/nfe4"] in metrics
    assert not any("precision" in str(m) or "@" in str(m) for m in metrics)
    assert filtered(saved[0]) == {json.dumps([["name", ["id-one", "id-two"]], ["protocol_id", "aaaa"]])}


def test_a_workspace_shows_one_protocol(monkeypatch, capsys):
    saved = server(monkeypatch, ("one", "aaaa", ("fid/nfe1",)), ("two", "bbbb", ("fid/nfe1",)))
    with pytest.raises(SystemExit):
        main(["dashboard", "me/mf"])
    said = capsys.readouterr().err
    assert "Got runs of 2 protocols (aaaa, bbbb), expected one" in said
    assert "--kind=report" in said
    main(["dashboard", "me/mf", "--protocol=bbbb"])
    main(["dashboard", "me/mf", "--kind=report"])
    assert filtered(saved[0]) == {json.dumps([["protocol_id", "bbbb"]])}
    assert filtered(saved[1]) == {json.dumps([["protocol_id", p]]) for p in ("aaaa", "bbbb")}


def test_protocols_and_steps_that_are_not_there(monkeypatch, capsys):
    saved = server(monkeypatch, ("one", "aaaa", ("fid/nfe1",)), ("bare", None, ()))
    for option, message in (
        ("--protocol=bbbb", "Got --protocol=bbbb, expected one that the runs began with: aaaa"),
        ("--nfe=[]", "Got --nfe = []"),
        ("--nfe=[0]", "0"),
    ):
        with pytest.raises(SystemExit):
            main(["dashboard", "team/project", option])
        assert message in capsys.readouterr().err
    assert not saved
    main(["dashboard", "team/project", "--runs=[bare]"])
    assert "None of these runs has figures yet" in capsys.readouterr().err


def test_runs_that_are_not_there(monkeypatch, capsys):
    server(monkeypatch, ("one", "aaaa", ()))
    with pytest.raises(SystemExit):
        main(["dashboard", "me/mf", "--runs=[one,other]"])
    assert "Got --runs=['other'] in me/mf, expected runs that are there: one" in capsys.readouterr().err


def test_without_an_account_the_way_out_is_named(tmp_path):
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    message = error_of(python("-m", "mf_lightning", "dashboard", "me/mf", env={**env, "NETRC": str(tmp_path / "none")}))
    assert "wandb login" in message
    assert "python -m mf_lightning report RUN" in message


@pytest.mark.parametrize("project", ["mf", "a/b/c", "https://wandb.ai/me/mf"])
def test_a_project_is_entity_and_name(capsys, project):
    with pytest.raises(SystemExit):
        main(["dashboard", project])
    assert "expected ENTITY/PROJECT" in capsys.readouterr().err
