"""`make claim` and `make ablations`: the arms differ in what they say, finished ones are kept, words follow from figures."""

import functools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from mf_lightning.cli import load
from mf_lightning.flow import AverageSampler, Draw, EulerSampler, Guidance, MeanFlowLoss, total_derivative
from mf_lightning.types import UserError
from scripts import ablations, arms, claim
from scripts.arms import Arm, Measured, Plan, measure, open_record, settings_of, taken
from scripts.other_tangents import OtherTangents, derivative_along
from scripts.results_page import figure, figures_table, write_section
from tests.nets import randomise, tiny_sit
from tests.runs import RECIPES, command_line

SMOKE = RECIPES / "smoke.yaml"
LOSS = "model.loss.init_args."
TINY = ("--trainer.val_check_interval=3", "--trainer.limit_val_batches=1", "--data.init_args.batch_size=8")
TANGENTS = {"model.loss.class_path", "self_check.enabled", f"{LOSS}dr", f"{LOSS}dt"}


def plan_in(folder, **changes) -> Plan:
    return Plan(**{"root": folder, "nfe": (1, 2), "steps": 3, "num_samples": 20, "recipe": SMOKE, "options": TINY, **changes})


@functools.cache
def settings_without_folder(arm: Arm, plan: Plan) -> dict:
    return {name: str(value).replace(str(plan.folder(arm, 0)), "RUN") for name, value in settings_of(arm, 0, plan).items()}


def differences(arm: Arm, base: Arm, plan: Plan) -> dict:
    """Return {setting: value in the arm} where the two differ, but for the folder."""
    ours, theirs = settings_without_folder(arm, plan), settings_without_folder(base, plan)
    return {name: ours.get(name) for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}


def test_the_arms_of_the_claim_differ_in_what_they_say(tmp_path):
    plan, base = plan_in(tmp_path, recipe=arms.RECIPE, options=()), claim.ARMS["meanflow"]
    settings = settings_without_folder(base, plan)
    assert settings[f"{LOSS}fm_fraction"] == "0.75"
    assert (settings[f"{LOSS}guidance.omega"], settings[f"{LOSS}guidance.kappa"]) == ("1.0", "0.0")
    fm, guided, plain = {f"{LOSS}fm_fraction": "1.0"}, {f"{LOSS}guidance.kappa": "0.5"}, {f"{LOSS}weight.norm_p": "0.0"}
    expected = {
        "fm": fm, "meanflow": {}, "fm-guided": fm | guided, "meanflow-guided": guided, "fm-p0": fm | plain,
        "fm-guided-p0": fm | guided | plain,
    }  # fmt: skip
    assert {name: differences(arm, base, plan) for name, arm in claim.ARMS.items()} == expected
    assert all(EulerSampler in arm.samplers for arm in claim.ARMS.values())
    for name, arm in claim.ARMS.items():  # a flow-matching network was never taught anything but r = t
        assert (AverageSampler in arm.samplers) == name.startswith("meanflow")


def test_the_guided_meanflow_arm_is_the_quickstart(tmp_path):
    plan = plan_in(tmp_path, recipe=arms.RECIPE, steps=1500, options=())
    quickstart = Arm("quickstart", "", ())
    assert differences(claim.ARMS["meanflow-guided"], quickstart, plan) == {}


def test_the_arms_of_the_ablations_differ_in_one_thing(tmp_path):
    plan = plan_in(tmp_path, recipe=arms.RECIPE, options=())
    names = {
        "jumps": {f"{LOSS}fm_fraction"}, "tangents": TANGENTS, "p": {f"{LOSS}weight.norm_p"},
        "times": {f"{LOSS}times.class_path", f"{LOSS}times.init_args.P_mean", f"{LOSS}times.init_args.P_std"},
    }  # fmt: skip
    for kind, group in ablations.GROUPS.items():
        entries = [arm for _, arm, _ in group.entries]
        assert ablations.BASE in entries
        for arm in entries:
            changed = differences(arm, ablations.BASE, plan)
            assert set(changed) <= names[kind], arm
            assert bool(changed) == (arm != ablations.BASE)


def test_the_papers_table_is_whole():
    fids = {kind: [fid for *_, fid in group.entries] for kind, group in ablations.GROUPS.items()}
    assert fids == {
        "jumps": [328.91, 61.06, 63.14, 67.32], "tangents": [61.06, 268.06, 329.22, 137.96], "times": [65.90, 63.83, 61.06],
        "p": [79.75, 63.98, 61.06, 66.57, 69.19],
    }  # fmt: skip
    names = [arm.name for group in ablations.GROUPS.values() for _, arm, _ in group.entries if arm != ablations.BASE]
    assert len(set(names)) == len(names)


def test_flow_matching_learns_the_guided_velocity():
    """With fm_fraction 1 the target is v_g = omega v_t + kappa v_c + (1 - omega - kappa) v_u, and no derivative is paid."""
    net = randomise(tiny_sit(), std=0.2)
    x, e, y = torch.randn(6, *x_shape(net)).double(), torch.randn(6, *x_shape(net)).double(), torch.arange(6) % 4
    t, dropped = torch.rand(6), torch.zeros(6, dtype=torch.bool)
    terms = MeanFlowLoss(fm_fraction=1.0, guidance=Guidance(omega=1.0, kappa=0.5))(net, x, y, Draw(e, t, t, dropped), y_null=4)
    t = t.double()
    z_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * e
    v_c, v_u = net(z_t, t=t, r=t, y=y), net(z_t, t=t, r=t, y=torch.full_like(y, 4))
    assert torch.allclose(terms.u_tgt, (e - x) + 0.5 * v_c - 0.5 * v_u)
    assert (terms.dudt == 0).all()


@pytest.mark.parametrize("sampler", ["Average", "Euler"])
def test_flow_matching_sampled_by_average_velocities_is_warned_of(sampler, tmp_path):
    cli = load([
        "--config", str(SMOKE), f"--trainer.default_root_dir={tmp_path}", "--model.loss.init_args.fm_fraction=1.0",
        "--sample_eval.num_samples=0", "--sample_grid.rows=1", "--sample_grid.nfe=[1]", "--trainer.limit_val_batches=1",
        f"--sample_grid.sampler=mf_lightning.flow.{sampler}Sampler", "--trainer.enable_progress_bar=false", "--ema.decays=[]",
    ])  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    assert any("is sampled by average velocities" in str(w.message) for w in caught) == (sampler == "Average")


def x_shape(net) -> tuple[int, ...]:
    return tuple(net.config["latent_shape"])


def test_other_tangents_are_the_right_ones_at_0_1_and_others_elsewhere():
    net = randomise(tiny_sit(), std=0.2)
    x, e, y = torch.randn(6, *x_shape(net)).double(), torch.randn(6, *x_shape(net)).double(), torch.arange(6) % 4
    t, r = torch.full((6,), 0.8), torch.full((6,), 0.3)
    draw = Draw(e, t, r, torch.zeros(6, dtype=torch.bool))
    right = MeanFlowLoss(jvp="torch")(net, x, y, draw, y_null=4)
    assert torch.equal(OtherTangents()(net, x, y, draw, y_null=4).u_tgt, right.u_tgt)
    seen = [OtherTangents(dr=dr, dt=dt)(net, x, y, draw, y_null=4).u_tgt for dr, dt in ((0, 0), (1, 0), (1, 1))]
    assert all(not torch.allclose(u_tgt, right.u_tgt, rtol=1e-3) for u_tgt in seen)


@pytest.mark.parametrize(("dr", "dt"), [(0, 0), (1, 0), (1, 1), (0, 1)])
def test_derivatives_along_other_tangents_are_central_differences(dr, dt):
    net = randomise(tiny_sit(), std=0.2)
    z, v = torch.randn(3, *x_shape(net)).double(), torch.randn(3, *x_shape(net)).double()
    t, r, y = torch.full((3,), 0.8).double(), torch.full((3,), 0.3).double(), torch.arange(3)
    found, step = derivative_along(net, z, v, t=t, r=r, y=y, dr=dr, dt=dt), 1e-5
    with torch.no_grad():
        ends = [net(z + h * v, t=t + h * dt, r=r + h * dr, y=y) for h in (step, -step)]
    assert torch.allclose(found, (ends[0] - ends[1]) / (2 * step), atol=1e-7)
    if (dr, dt) == (0, 1):
        assert torch.equal(found, total_derivative(net, z, v, t=t, r=r, y=y))


def measured(name: str, fids: dict[int, float], **more) -> Measured:
    arm = claim.ARMS.get(name) or Arm(name, name, ())
    rows = {s.name: {nfe: [{"fid": fid, "class_accuracy": 0.5}] for nfe, fid in fids.items()} for s in arm.samplers}
    return Measured(arm, rows, **more)


@pytest.mark.parametrize(
    ("meanflow", "flow_matching", "said", "many"),
    [
        (2.0, (300.0, 60.0, 9.0, 3.0, 1.0), "the claim holds**: it beats flow matching at 1, 2, 4 NFE by a factor of 4", "32"),
        (2.0, (300.0, 60.0, 2.5, 3.0, 2.1), "but not by far**: at 1, 2, 4 NFE flow", "1, 2, 4, 8, 32"),
        (2.0, (300.0, 60.0, 1.5, 1.4, 1.0), "holds in part**: it beats flow matching at 1, 2 NFE, not at all of 1, 2, 4", "4"),
        (9.0, (8.0, 7.0, 6.0, 5.0, 4.0), "**the claim does not hold here**: flow matching has the lower or the same FID", "1"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_figures(meanflow, flow_matching, said, many, tmp_path):
    nfe = (1, 2, 4, 8, 32)
    mf = measured("meanflow", dict(zip(nfe, (meanflow, 1.5, 1.4, 1.3, 1.2), strict=True)))
    fm = measured("fm", dict(zip(nfe, flow_matching, strict=True)))
    sentences = claim.verdict("Without guidance", fm, mf, plan_in(tmp_path, nfe=nfe))
    assert said in sentences[0]
    assert f"does not reach that one step at {many} NFE" in sentences[1] or f"needs {many} to have a lower" in sentences[1]
    assert "lower than with one" in sentences[2]


def test_the_order_of_ablations_is_said_plainly():
    group = ablations.Group("p", tuple((n, Arm(n, n, ()), fid) for n, fid in (("a", 10.0), ("b", 20.0), ("c", 20.5))))

    def words(*fids):
        results = {n: SimpleNamespace(mean=lambda *_, fid=fid: fid) for n, fid in zip("abc", fids, strict=True)}
        return ablations.order_words(group, results)

    assert words(1.0, 2.0, 3.0) == "Same order as in the paper, best first: a < b < c."
    other = words(1.0, 3.0, 2.0)
    assert "Not the same order.** Paper, best first: a < b < c; here: a < c < b" in other
    assert "b against c (here 3 and 2). Of the 2 pairs that lie at least 10 % apart in the paper, 2 come" in other
    assert other.endswith("The best setting is the same.")
    assert "The best here is b, not a." in words(3.0, 1.0, 2.0)


def test_tables(tmp_path):
    assert figure([0.25], percent=True) == "25.0 %"
    assert figure([1.0, 3.0]) == "2 ± 1.414"
    table = figures_table([measured("meanflow", {1: 1.5, 2: 0.5})], plan_in(tmp_path), "fid").splitlines()
    assert table[0] == "|  | sampler | NFE 1 | NFE 2 |"
    assert table[2:] == ["| MeanFlow | average velocity | 1.500 | 0.5000 |", "| MeanFlow | Euler | 1.500 | 0.5000 |"]


def test_a_section_is_written_between_its_marks(tmp_path):
    page = tmp_path / "results.md"
    page.write_text("top\n<!-- claim: begin -->\nold\n<!-- claim: end -->\nmiddle\n<!-- x: begin -->\n<!-- x: end -->\n")
    write_section(page, "claim", "new")
    write_section(page, "x", "other")
    assert page.read_text() == (
        "top\n<!-- claim: begin -->\nnew\n<!-- claim: end -->\nmiddle\n<!-- x: begin -->\nother\n<!-- x: end -->\n"
    )
    with pytest.raises(UserError, match="without the lines <!-- y: begin"):
        write_section(page, "y", "no")
    write_section(tmp_path / "fresh.md", "claim", "new")
    assert (tmp_path / "fresh.md").read_text() == "<!-- claim: begin -->\nnew\n<!-- claim: end -->\n"


def test_the_committed_page_has_its_sections():
    text = (arms.ROOT / "docs" / "results.md").read_text()
    for name in ("claim", "ablations"):
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1


def test_an_arm_is_used_again_with_its_own_settings_only(tmp_path):
    folder, settings = tmp_path / "fm-seed0", {"lr": 1.0, "steps": 3}
    record = open_record(folder, settings)
    assert not record["fitted"]
    assert open_record(folder, settings) == record
    assert open_record(folder, {**settings, "new option": None}) == record
    with pytest.raises(UserError, match=r"Got new option = 1 \(there: not set\)"):
        open_record(folder, {**settings, "new option": 1})
    with pytest.raises(UserError, match=r"Got lr = 2.0 \(there: 1.0\) for .*fm-seed0"):
        open_record(folder, {**settings, "lr": 2.0})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.csv").touch()
    with pytest.raises(UserError, match=r"files but no arm\.json"):
        open_record(tmp_path / "other", settings)
    with taken(folder), pytest.raises(UserError, match="another call is at work"), taken(folder):
        pass


@pytest.mark.slow
def test_a_killed_arm_goes_on_and_a_finished_one_is_kept(tmp_path, monkeypatch):
    """Through the command line: killed after step 2 of 3, then trained to the end and scored, then only read."""
    plan, arm = plan_in(tmp_path), claim.ARMS["meanflow"]
    folder = plan.folder(arm, 0)
    open_record(folder, settings_of(arm, 0, plan))
    killed = command_line(*plan.fit(arm, 0), "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    assert killed.returncode == 0, killed.stderr[-2000:]
    assert (folder / "checkpoints" / "last.ckpt").resolve().name == "step00000002.ckpt"
    result = measure(arm, [0], plan)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert [(one["from_step"], one["to_step"]) for one in sessions] == [(0, 2), (2, 3)]
    assert {name: sorted(by_nfe) for name, by_nfe in result.rows.items()} == {"average velocity": [1, 2], "Euler": [1, 2]}
    for name, by_nfe in result.rows.items():
        for nfe, (row,) in by_nfe.items():
            told = (row["protocol"]["sampler"], row["nfe"], row["step"], row["protocol"]["num_samples"])
            assert told == (name, nfe, 3, 20)
    ids = {row["protocol_id"] for by_nfe in result.rows.values() for (row,) in by_nfe.values()}
    assert len(ids) == 2  # figures of two samplers never share a curve
    assert result.training_seconds[0] >= sum(one["seconds"] for one in sessions)

    monkeypatch.setattr(arms, "run_stage", lambda *_: pytest.fail("a finished arm was run again"))
    assert measure(arm, [0], plan).rows == result.rows
    with pytest.raises(UserError, match=r"data.init_args.batch_size = 16 \(there: 8\)"):
        measure(arm, [0], plan_in(tmp_path, options=(*TINY, "--data.init_args.batch_size=16")))


@pytest.mark.slow
def test_the_commands_write_page_and_plot(tmp_path, monkeypatch):
    """Both commands, end to end, with two arms of three steps each."""
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    marks = "".join(f"<!-- {name}: {edge} -->\n" for name in ("claim", "ablations") for edge in ("begin", "end"))
    page.write_text(marks)
    how = ["--steps=3", "--num_samples=20", f"--recipe={SMOKE}", f"--page={page}", f"--options={json.dumps(TINY)}"]
    claim.main([*how, f"--root={tmp_path / 'claim'}", "--arms=[fm, meanflow]", "--nfe=[1, 2]"])
    entries = (("(v, 0, 1)", ablations.BASE, 61.06), ("(v, 1, 0)", ablations.tangents(1, 0), 329.22))
    monkeypatch.setitem(ablations.GROUPS, "tangents", ablations.Group("Tangents", entries))
    ablations.main([*how, f"--root={tmp_path / 'ablations'}", "--groups=[tangents]"])
    text = page.read_text()
    assert "Without guidance, one MeanFlow step has FID" in text
    assert "| flow matching | Euler |" in text
    assert "| (v, 1, 0) | 329.22 |" in text
    assert "smoke.yaml`, 3 steps" in text
    assert (page.parent / "images" / "claim.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        claim.main(["--arms=[nothing]"])
