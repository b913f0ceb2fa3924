"""The report: what it reads, what it refuses, and the page in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mf_lightning.__main__ import main
from mf_lightning.callbacks import run_summary, sample_eval
from mf_lightning.cli import load
from mf_lightning.cli import main as train
from mf_lightning.report import FIGURES_FILE, charts, plots, png, runs, tables, write_report
from mf_lightning.report.charts import Chart, Series, draw, ticks
from mf_lightning.report.page import sections_of_charts
from mf_lightning.types import UserError
from tests.browser import DESKTOP, PHONE, tab
from tests.report_runs import make_run, row, write_rows
from tests.runs import ROOT, lines

SMOKE = ["--config", str(ROOT / "configs/experiment/smoke.yaml"), "--trainer.enable_progress_bar=false"]
SMALL = [*SMOKE, "--trainer.val_check_interval=2", "--sample_eval.num_samples=20", "--sample_grid.rows=1"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """One run, and another with its raw weights scored too, and its EMA with more images."""
    folder = tmp_path_factory.mktemp("runs")
    more = [row(s, n, ema=e, factor=1.3 if e else 3) for s in (300, 1500) for n in (1, 2, 4) for e in (0.995, None)]
    more += [row(1500, n, num_samples=50_000, factor=1.2) for n in (1, 2, 4, 32)]
    first, second = make_run(folder / "first"), make_run(folder / "second", rows=more, lr=4e-3)
    write_report([first, second])
    return first, second


# --- what is read


def test_damaged_lines_are_left_out_and_named(tmp_path):
    run = make_run(tmp_path / "run", steps=600)
    file = run / "sample_eval.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 900, "nfe": 1, "fi\n[1]\n{"nfe": 1}\n' + json.dumps({**row(900, 1), "fid": "low"}) + "\n")
    (run / "metrics.csv").open("a").write("broken\n1,2,3\n" + "," * 17 + "\n")
    (run / "run.json").write_text('{"sessions": [{"seconds": "long"}, 3]}')
    (run / "grids" / "step00000600_nfe1.png").write_bytes(b"\x89PNG nothing")
    page, _, notes = write_report([run])
    text = "\n".join(notes)
    assert [f"line {number}," in text for number in (7, 8, 9, 10)] == [True] * 4
    assert "metrics.csv: 3 damaged lines left out" in text
    assert "run.json is damaged" in text
    assert "step00000600_nfe1.png cannot be read" in text
    html = page.read_text()
    assert all(part in html for part in ("line 7,", "3 damaged lines", "run.json is damaged", "cannot be read"))
    assert {one.step for one in runs.read_run(run, "run").rows} == {300, 600}


def test_newest_line_of_what_was_measured_again_counts(tmp_path):
    write_rows(tmp_path, [row(300, 1), {**row(300, 1), "fid": 7.5}])
    read = runs.read_run(tmp_path, "run")
    assert [one.figures["fid"] for one in read.rows] == [7.5]
    assert "measure again" in read.notes[0]


def test_old_runs_lack_fields(tmp_path):
    rows = [
        {k: v for k, v in row(300, n, names=("fid",)).items() if k not in ("protocol_id", "seconds_per_image")} for n in (1, 2)
    ]
    write_rows(tmp_path / "old", rows)
    (tmp_path / "old" / "sample_eval.jsonl").open("a").write('{"step": 600, "nfe": 1, "fid": 3.5}\n')
    page, _, _ = write_report([tmp_path / "old"])
    html = page.read_text()
    read = runs.read_run(tmp_path / "old", "old")
    assert read.rows[0].protocol_id == row(300, 1)["protocol_id"]
    assert read.rows[0].seconds == pytest.approx(1 / 90)
    assert "includes scoring" in html
    assert "not recorded" in html
    assert "3.5" in html


def test_a_run_without_figures_has_its_curves(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "sample_eval.jsonl").unlink()
    html = write_report([run])[0].read_text()
    assert "No figures of generated images were measured" in html
    assert "Nothing to show: no evaluation has run yet" in html
    assert 'data-chart="raw_error"' in html


def test_a_picture_that_cannot_be_read_stays(tmp_path):
    run = make_run(tmp_path / "run", steps=300)
    (run / "plots").mkdir()
    (run / "plots" / "mine.png").write_bytes(b"")
    (run / "plots" / "fid_by_step.png").write_bytes(b"cut off")
    _, files, _ = write_report([run])
    assert (run / "plots" / "mine.png").read_bytes() == b""
    for file in files:
        Image.open(file).load()


def test_what_is_no_run_is_refused(tmp_path):
    run = make_run(tmp_path / "all" / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "sample_eval.jsonl").write_text("{\n")
    for folder, words in (
        (tmp_path / "gone", "no folder, expected a run's folder"),
        (run / "config.yaml", f"give its folder, {run}"),
        (tmp_path / "empty", "expected the folder of a run"),
        (tmp_path / "all", f"Runs below it: {run}"),
        (tmp_path / "hollow", "without one readable figure"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            write_report([folder])
    with pytest.raises(UserError, match="where nothing can be written"):
        write_report([run], out=run / "config.yaml")


def test_the_same_run_twice_is_shown_once(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=300)
    main(["report", str(run), f"{run}/../run", "--png=false"])
    out = capsys.readouterr().out
    assert "given more than once; it is shown once" in out
    assert out.endswith(f"report: {run / 'report.html'}\n")
    assert not (run / "plots").exists()


def test_equal_folder_names_are_told_apart(tmp_path):
    found, _ = runs.read_runs([make_run(tmp_path / "a" / "run", steps=300), make_run(tmp_path / "b" / "run", steps=300)])
    assert [run.name for run in found] == ["a/run", "b/run"]


# --- what is drawn


def test_protocols_never_share_a_line(two_runs):
    found, _ = runs.read_runs(two_runs)
    protocols = {one.protocol_id for run in found for one in run.rows}
    assert len(protocols) == 2
    for group in plots.groups(found):
        assert {(one.protocol_id, one.ema) for one in group.rows} == {(group.protocol_id, group.ema)}
    names = [group.name for group in plots.groups(found)]
    assert len(set(names)) == len(names) == 4
    assert "second, EMA 0.995, 50,000 images" in names
    drawn = sections_of_charts(found)["Quality against NFE"][0]
    values = {one.name: dict(one.points) for one in drawn.series}
    assert values["second, EMA 0.995, 50,000 images"][32.0] == row(1500, 32, factor=1.2)["fid"]
    assert max(values["second, EMA 0.995, 2,000 images"]) == 4


def test_runs_of_different_metrics(tmp_path):
    first = make_run(tmp_path / "first", rows=[row(300, 1, names=("fid",))])
    second = make_run(tmp_path / "second", rows=[row(300, 1, names=("recall",))])
    html = write_report([first, second])[0].read_text()
    newest = html[html.index('class="figures newest"') :]
    assert tables.NOTHING in newest[: newest.index("</table>")]


def test_best_is_marked_within_a_protocol_only(tmp_path):
    rows = [row(300, 1), row(300, 2), row(300, 1, factor=0.1, num_samples=50)]
    html = write_report([make_run(tmp_path / "run", rows=rows)])[0].read_text()
    first = html[html.index('class="figures newest"') :].split("</table>")[0]
    stars = re.findall(r'data-metric="(\w+)" data-value="([^"]+)"><span class="star"', first)
    assert dict(stars)["fid"] == repr(row(300, 2)["fid"])
    assert dict(stars)["recall"] == repr(row(300, 2)["recall"])


def test_values_that_are_no_numbers_are_gaps(tmp_path):
    rows = [{**row(step, 1), "fid": fid} for step, fid in ((300, 5.0), (600, float("nan")), (900, 4.0), (1200, float("inf")))]
    html = write_report([make_run(tmp_path / "run", rows=rows, steps=1200)])[0].read_text()
    assert 'data-value="nan"' in html
    chart = Chart("k", "t", "x", "y", (Series("s", ((1, 5.0), (2, float("nan")), (3, 4.0)), 0),))
    assert [line for line in draw(chart).lines if line.colour is not None] == []  # two points, no line over the gap


@pytest.mark.parametrize("values", [(5.0,), (0.0, 0.0), (-3.0, 4.0), (1e-9, 1e9), (1e12, 1e12 + 1), (0.0, 1e-12)])
def test_axes_of_odd_values(values):
    points = tuple((float(number), value) for number, value in enumerate(values))
    drawing = draw(Chart("k", "t", "x", "y", (Series("s", points, 0),)))
    assert all(0 <= mark.x <= charts.WIDTH and 0 <= mark.y <= charts.HEIGHT for mark in drawing.marks)
    assert len(drawing.texts) >= 4


def test_ticks_are_round_and_inside():
    assert ticks(charts.Scale(0.0, 1500.0, False, 0, 1), 5) == [0, 500, 1000, 1500]
    assert ticks(charts.Scale(1.3, 300.0, True, 0, 1), 5) == [2, 5, 10, 20, 50, 100, 200]


def test_long_curves_are_means_over_spans():
    points, span = plots.thinned([(step, float(step)) for step in range(1, 1001)])
    assert (len(points), span) == (200, 5)
    assert points[0] == (5, 3.0)


def test_plots_are_files_and_old_ones_go(tmp_path):
    run = make_run(tmp_path / "run", steps=600)
    _, files, _ = write_report([run])
    assert {"fid_step.png", "fid_nfe.png", "fid_seconds.png", "raw_error.png", "val_raw_error_by_t.png"} <= {
        f.name for f in files
    }
    for file in files:
        with Image.open(file) as image:
            assert image.width == charts.WIDTH * png.SIZE
            assert len(image.convert("RGB").resize((200, 150)).getcolors(100_000)) > 5
    Image.new("RGB", (4, 4)).save(run / "plots" / "mine.png")
    (run / "plots" / "fid_nfe.png").rename(run / "plots" / "fid_step_nfe8.png")
    (run / "sample_eval.jsonl").write_text(json.dumps(row(300, 1, names=("recall",))) + "\n")
    write_report([run])
    left = {file.name for file in (run / "plots").iterdir()}
    assert "mine.png" in left
    assert not [name for name in left if name.startswith("fid")]


# --- what is compared


def test_settings_that_differ(two_runs):
    html = (two_runs[0] / "report.html").read_text()
    section = html[html.index('id="settings"') : html.index('id="protocol"')]
    different = section[: section.index("</table>")]
    assert re.findall(r'<th scope="row">([^<]+)', different) == ["model.optimizer.init_args.lr"]
    assert "0.002" in different
    assert "0.004" in different
    assert str(two_runs[0]) not in section  # its own folder is RUN


def test_secrets_and_foreign_marks_stay_out(tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", steps=300)
    (run / "config.yaml").write_text(
        "data: {storage_options: {key: AKIA123, secret: hush}, name: '</pre><script>alert(2)</script>'}"
    )
    html = write_report([run])[0].read_text()
    assert "AKIA123" not in html
    assert "hush" not in html
    assert "<img src=x" not in html
    assert "<script>alert" not in html


def test_versions_and_cost(two_runs):
    html = (two_runs[0] / "report.html").read_text()
    section = html[html.index('id="cost-and-versions"') :]
    for words in ("1,234,567", "5 min 0 s", "192,000", "640", "1 x cpu (Some CPU, 2 cores)", "2.8.0", "DDPStrategy"):
        assert words in section, words


def test_nothing_external(two_runs):
    html = (two_runs[0] / "report.html").read_text()
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"base64,[\w+/=]+", "", html))


# --- a run writes it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps, resumed for two more."""
    root = tmp_path_factory.mktemp("trained") / "run"
    train(["fit", *SMALL, f"--trainer.default_root_dir={root}", "--trainer.max_steps=4"])
    train(["fit", *SMALL, f"--trainer.default_root_dir={root}", "--trainer.max_steps=6", "--ckpt_path=last"])
    return root


def test_a_fit_ends_with_its_report(trained):
    html = (trained / "report.html").read_text()
    assert f'data-step="6" data-seconds="{lines(trained / FIGURES_FILE)[-1].get("seconds_per_image", "")}' in html
    assert FIGURES_FILE == sample_eval.RESULTS_FILE
    assert not (trained / "plots").exists()


def test_sessions_add_up(trained):
    record = json.loads((trained / "run.json").read_text())
    assert [(one["from_step"], one["to_step"], one["ended"]) for one in record["sessions"]] == [(0, 4, True), (4, 6, True)]
    assert all(one["seconds"] > 0 and one["versions"]["torch"] for one in record["sessions"])
    assert record["parameters"] == 207_936


def test_a_report_that_fails_stops_no_run(tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no\nink")

    monkeypatch.setattr(run_summary, "write_report", broken)
    run = load([*SMALL, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2"])
    run.trainer.fit(run.model, run.datamodule)
    assert capsys.readouterr().out.rstrip().endswith("report:         none, RuntimeError: no ink")


def test_the_last_line_names_the_report(trained, capsys, monkeypatch):
    summary = run_summary.RunSummary()
    run = load([*SMALL, f"--trainer.default_root_dir={trained}"])
    assert summary._report(run.trainer, trained) == [f"  report:         {trained / 'report.html'}"]
    assert summary._report(run.trainer, trained / "gone") == []


# --- the page


def shown_figures(page, style: str) -> list[tuple]:
    """Return (run, step, ema, nfe, metric, data-value, text) of a page's tables of figures."""
    return page.evaluate(
        """style => [...document.querySelectorAll(`table.${style} td[data-metric]`)].map(cell => {
            const row = cell.parentElement.dataset;
            return [row.run, Number(row.step), row.ema, Number(row.nfe), row.protocol, cell.dataset.metric,
                    cell.dataset.value, cell.textContent];
        })""",
        style,
    )


def check_figures(page, folders: list[Path]) -> int:
    """Hold every figure of the page against the JSON; return how many there are."""
    shown = {tuple(one[:6]): one[6:] for one in shown_figures(page, "every")}
    count = 0
    for folder in folders:
        for line in lines(folder / "sample_eval.jsonl"):
            for metric in ("fid", "sfid", "kid", "fd_dinov2", "inception_score", "precision", "recall", "class_accuracy"):
                if line.get(metric) is None:
                    continue
                ema = "null" if line["ema"] is None else str(line["ema"])
                protocol = line.get("protocol_id") or runs.protocol_id(line["protocol"])
                value, text = shown[(folder.name, line["step"], ema, line["nfe"], protocol, metric)]
                assert float(value) == line[metric]
                assert text.split(" ")[0] == charts.exact(line[metric])
                assert float(text.split(" ")[0].replace(",", "")) == pytest.approx(line[metric], rel=5.1e-4)
                count += 1
    assert count == len(shown)
    newest = {tuple(one[:6]): one[6] for one in shown_figures(page, "newest")}
    assert newest
    assert all(shown[key][0] == value for key, value in newest.items())
    return count


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)])
def test_page_in_a_browser(two_runs, size, dark):
    with tab(size, dark=dark) as opened:
        opened.page.goto((two_runs[0] / "report.html").as_uri())
        assert opened.errors == []
        assert opened.requests == [(two_runs[0] / "report.html").as_uri()]
        assert opened.overflow() <= 0
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
        assert check_figures(opened.page, list(two_runs)) > 150
        opened.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        assert opened.overflow() <= 0
        outside = opened.page.evaluate(OUTSIDE)
        assert outside == []
        assert opened.page.evaluate("document.querySelectorAll('.card > svg').length") > 30


OUTSIDE = """() => {  // labels that are cut off, or too small to read
    const wrong = [];
    for (const text of document.querySelectorAll('.card > svg text')) {
        const box = text.getBoundingClientRect(), whole = text.ownerSVGElement.getBoundingClientRect();
        if (!box.width) continue;
        const across = box.left < whole.left - 1 || box.right > whole.right + 1;
        if (across || box.top < whole.top - 1 || box.bottom > whole.bottom + 1)
            wrong.push('cut off: ' + text.textContent);
        if (box.height < 11) wrong.push('small: ' + text.textContent);
    }
    return wrong;
}"""


def test_values_under_a_chart_equal_the_json(two_runs):
    with tab() as opened:
        opened.page.goto((two_runs[0] / "report.html").as_uri())
        rows = opened.page.evaluate(
            """() => [...document.querySelectorAll('[data-chart="fid_nfe"] tbody tr')].map(
                row => [...row.children].map(cell => cell.dataset.value ?? null))"""
        )
        heads = opened.page.locator('[data-chart="fid_nfe"] thead th').all_text_contents()
    column = heads.index("second, EMA 0.995, 50,000 images")
    got = {float(one[0]): float(one[column]) for one in rows if one[column]}
    assert got == {float(n): row(1500, n, factor=1.2)["fid"] for n in (1, 2, 4, 32)}


def test_slider_of_samples(two_runs):
    with tab(PHONE) as opened:
        opened.page.goto((two_runs[0] / "report.html").as_uri())
        box = opened.page.locator(".samples").first
        assert box.locator("output").text_content() == "step 1,500"
        visible = box.locator(".pictures:visible")
        assert visible.count() == 1
        assert visible.locator("img").count() == 3
        box.locator("input").focus()
        opened.page.keyboard.press("ArrowLeft")
        assert box.locator("output").text_content() == "step 1,200"
        assert visible.get_attribute("data-step") == "1200"
        assert opened.page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_page_of_a_real_run(trained):
    with tab(PHONE) as opened:
        opened.page.goto((trained / "report.html").as_uri())
        assert opened.errors == []
        assert opened.overflow() <= 0
        assert check_figures(opened.page, [trained]) > 0


def test_the_browser_sees_what_is_wrong(tmp_path):
    wide = "<div style='width:2000px'>x</div><script>console.error('bad'); throw Error('worse')</script>"
    (tmp_path / "page.html").write_text(f"<meta charset=utf-8>{wide}<img src='gone.png'>")
    with tab(PHONE) as opened:
        opened.page.goto((tmp_path / "page.html").as_uri())
        assert opened.overflow() > 1000
        assert any("bad" in error for error in opened.errors)
        assert any("worse" in error for error in opened.errors)
        assert any("gone.png" in error for error in opened.errors)
