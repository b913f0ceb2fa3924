"""The demo page in a real browser, what its fields may hold, and where it may listen."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from mf_lightning.__main__ import main
from mf_lightning.flow import AverageSampler, EulerSampler
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.tools import demo, listening
from mf_lightning.types import UserError
from tests.browser import PHONE, tab
from tests.generators import DIGITS, pixel_info, write_generator
from tests.runs import ROOT

CLASSES = ("cat", "2", "<i>dog</i>")
PICTURES, BETWEEN = "#pictures img", "#between img"
START_S, WAIT_S = 240, 60


@contextmanager
def served(checkpoint, *options):
    """Run the command and give the address that it prints, and what it has printed by the end."""
    environment = {**os.environ, "HTTP_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}  # no way out
    command = [sys.executable, "-m", "mf_lightning", "demo", str(checkpoint), "--device=cpu", *options]
    log = checkpoint.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START_S
        while not (found := re.search(r"^(http://\S+) ", log.read_text(), re.M)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "no page was served"
            time.sleep(0.2)
        yield found[1], log
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pytest.importorskip("gradio")
    with served(write_generator(tmp_path_factory.mktemp("demo") / "tiny.ckpt", pixel_info(CLASSES))) as (address, log):
        yield address
    assert log.read_text().endswith("ended\n")


@contextmanager
def shown(address, *size):
    """Open the page; it shall log no error, stay inside its window and ask no other address."""
    with tab(*size) as opened:
        opened.page.set_default_timeout(1000 * WAIT_S)
        opened.page.goto(address)
        opened.page.wait_for_selector(BETWEEN)
        yield opened.page
        assert opened.overflow() <= 0
        assert opened.errors == []
        assert opened.requests
        assert [url for url in opened.requests if not url.startswith(address)] == []


def sources(page, where):
    return [image.get_attribute("src") for image in page.locator(where).all()]


def changed(page, where, before):
    """Wait until the first picture is another one, and return all."""
    page.wait_for_function(
        "([where, old]) => ![undefined, old].includes(document.querySelector(where)?.src)", arg=[where, before[0]]
    )
    return sources(page, where)


def write(page, name, text):
    page.locator(f"#{name} :is(input, textarea)").first.fill(text)


def drag(page, name, share):
    """Move a slider with the button held down, to a share of its length, and leave the button down."""
    slider = page.locator(f"#{name} input[type=range]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], middle, steps=3)


def test_a_click_changes_the_pictures_and_times_stand_below(address):
    with shown(address) as page:
        first = sources(page, PICTURES)
        assert len(set(first)) == 3
        captions = page.locator("#pictures figcaption").all_inner_texts()
        assert [re.fullmatch(r"NFE (\d)\s+\d+\.\d ms", text)[1] for text in captions] == ["1", "2", "4"]
        assert re.search(r"batch size 1, float32, device cpu", page.locator("#about").inner_text())
        assert "ema 0.99, step 7" in page.locator("#about").inner_text()
        page.locator("#next").click()
        second = changed(page, PICTURES, first)
        assert page.locator("#seed :is(input, textarea)").input_value() == "1"
        page.locator("#class input").click()
        page.get_by_role("option", name="<i>dog</i>").click()
        assert not {*first, *second} & {*changed(page, PICTURES, second)}
        write(page, "seed", "0")
        page.locator("#class input").fill("cat")  # by name
        page.locator("#class input").press("Enter")
        page.wait_for_function("([where, src]) => document.querySelector(where)?.src === src", arg=[PICTURES, first[0]])
        assert sources(page, PICTURES) == first


@pytest.mark.parametrize("name", ["noise-place", "class-place"])
def test_pictures_follow_a_slider_while_it_is_dragged(address, name):
    with shown(address) as page:
        start = sources(page, BETWEEN)
        drag(page, name, 0.5)
        half = changed(page, BETWEEN, start)
        page.mouse.up()
        drag(page, name, 0.99)
        assert changed(page, BETWEEN, half) != start
        page.mouse.up()
        page.locator("#nfe label").nth(2).click()
        page.wait_for_selector("#between figcaption:has-text('NFE 4')")


def test_a_bad_seed_is_a_message_on_the_page(address):
    with shown(address) as page:
        for text in ("-1", "", "one", "1.5", "9" * 30, "<script>alert(1)</script>"):
            write(page, "seed", text)
            message = page.locator("#pictures [role=alert]", has_text=f"Got the seed {text!r}, expected a whole number from 0")
            message.wait_for()
            write(page, "seed", "5")
            page.wait_for_selector(PICTURES)
        write(page, "last-seed", "-1")
        page.locator("#between [role=alert]").wait_for()


def test_a_class_out_of_range_is_a_message_on_the_page(address):
    with shown(address) as page:
        page.locator("#class input").fill("3")
        page.locator("#class input").press("Enter")
        message = page.locator("#pictures [role=alert]")
        message.wait_for()
        assert "Got the class '3', expected a number from 0 to 2" in message.inner_text()


def test_the_page_fits_a_phone(address):
    with shown(address, PHONE) as page:
        images = [image.bounding_box() for image in page.locator(PICTURES).all()]
        assert len({box["y"] for box in images}) == 1  # side by side
        assert min(box["width"] for box in images) > 60
        fields = [field.bounding_box() for field in page.locator("input:visible, textarea:visible, button:visible").all()]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0] for box in [*images, *fields])


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    file = write_generator(tmp_path_factory.mktemp("demo") / "tiny.ckpt", pixel_info(CLASSES))
    return demo.Studio(MeanFlowPipeline.from_checkpoint(file, device="cpu"), AverageSampler())


def picture(page_part, which=0):
    return re.findall(r'src="([^"]+)"', page_part)[which]


def test_pictures_are_the_pipelines_and_a_way_ends_at_them(studio):
    one, other = studio.side_by_side("3", "cat"), studio.side_by_side(" 4 ", "2")
    for index, nfe in enumerate(demo.NFES):
        assert picture(studio.on_the_way(nfe, 0, "3", "4", 0, "0", "2")) == picture(one, index)
        assert picture(studio.on_the_way(nfe, 1, "3", "4", 1.0, "0", "2")) == picture(other, index)
    assert picture(studio.on_the_way(1, 0.5, "3", "3", 0.5, "0", "0")) == picture(one)
    made = studio.pipeline.generate(*studio.pipeline.request(["cat"], n=1, seed=3))
    assert picture(studio.side_by_side("3", "cat")) == picture(studio._figure(made, ""))
    assert studio.choices() == [("0: cat", "0"), ("1: 2", "1"), ("2: <i>dog</i>", "2")]
    assert "<i>" not in studio.side_by_side("0", "2")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((1, 2, "0", "1", 0, "0", "0"), "Got 2 for a place on the way"),
        ((1, 0, "0", "1", float("nan"), "0", "0"), "Got nan for a place"),
        ((1, None, "0", "1", 0, "0", "0"), "Got None for a place"),
        ((3, 0, "0", "1", 0, "0", "0"), "Got NFE 3, expected one of 1, 2, 4"),
        (("1", 0, "0", "1", 0, "0", "0"), "Got NFE '1'"),
        (([], 0, "0", "1", 0, "0", "0"), "Got NFE []"),
        ((1, 0, None, "1", 0, "0", "0"), "Got the seed None"),
        ((1, 0, "0", str(2**64), 0, "0", "0"), f"Got the seed '{2**64}'"),
        ((1, 0, "0", "1", 0, None, "0"), "Got the class None"),
        ((1, 0, "0", "1", 0, "0", ["0", "1"]), "Got the class ['0', '1']"),
        ((1, 0, "0", "1", 0, "0", "x" * 10**6), "Got the class 'xxx"),
    ],
)
def test_what_the_page_would_not_send_is_answered_too(studio, inputs, message):
    answer = demo.answered(studio.on_the_way)(*inputs)
    assert message in answer.replace("&#x27;", "'")
    assert answer.startswith('<p class="mf-message" role="alert">')
    assert len(answer) < 400


def test_a_network_that_fails_is_a_message(studio, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError("CUDA out of memory.\nmany lines")

    monkeypatch.setattr(studio.pipeline, "generate", out_of_memory)
    assert "The network failed: CUDA out of memory.<" in demo.answered(studio.side_by_side)("0", "0")


def test_a_network_without_labels_has_no_classes(tmp_path):
    pytest.importorskip("gradio")
    file = write_generator(tmp_path / "plain.ckpt", pixel_info(()))
    studio = demo.Studio(MeanFlowPipeline.from_checkpoint(file, device="cpu"), AverageSampler())
    labels = {block.label for block in demo.build_page(studio, title="plain").blocks.values() if hasattr(block, "label")}
    assert {"Seed", "Noise: first to last"} <= labels
    assert not {"Class", "First class", "Class: first to last"} & labels
    assert len({picture(studio.on_the_way(1, place, "0", "1")) for place in (0, 0.5, 1)}) == 3


def test_flow_matching_is_refused_before_a_page_is_made(tmp_path):
    file = write_generator(tmp_path / "fm.ckpt", pixel_info(DIGITS), fm_fraction=1)
    pipeline = MeanFlowPipeline.from_checkpoint(file, device="cpu")
    with pytest.raises(UserError, match="--sampler=euler"):
        demo.Studio(pipeline, AverageSampler())
    assert picture(demo.Studio(pipeline, EulerSampler()).side_by_side("0", "0"))


def test_a_port_in_use_is_told_with_another_one(tmp_path, capsys):
    pytest.importorskip("gradio")
    file = write_generator(tmp_path / "tiny.ckpt", pixel_info())
    with socket.socket() as taken:
        taken.bind((listening.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stop:
            main(["demo", str(file), f"--port={port}"])
        assert stop.value.code == 2
        other = re.search(rf"Got --port={port}, which is in use, .* Give --port=(\d+)", capsys.readouterr().err)[1]
        assert listening.free_port(listening.LOOPBACK, int(other)) == int(other) != port


def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    pytest.importorskip("gradio")
    file = write_generator(tmp_path / "tiny.ckpt", pixel_info())
    with pytest.raises(SystemExit) as stop:
        main(["demo", str(file), "--device=gpu"])
    assert stop.value.code == 2
    assert "Got the device gpu" in capsys.readouterr().err


def test_weights_of_classes_are_asked_for_between_classes_only(studio, monkeypatch):
    """Networks need take int64 labels only; then the page is made all the same, and noise is dragged."""
    look_up = studio.pipeline.net.y_embedder.forward

    def labels_only(y):
        if y.is_floating_point():
            raise RuntimeError("weights of classes")
        return look_up(y)

    monkeypatch.setattr(studio.pipeline.net.y_embedder, "forward", labels_only)
    other = demo.Studio(studio.pipeline, AverageSampler())
    assert picture(other.on_the_way(1, 0.5, "3", "4", 0, "0", "2"))
    assert "weights of classes" in demo.answered(other.on_the_way)(1, 0.5, "3", "4", 0.5, "0", "2")


def test_a_port_is_found_from_7860_on(monkeypatch):
    monkeypatch.setattr(listening, "_is_free", lambda host, port: port > 7862)
    assert listening.free_port(listening.LOOPBACK, None) == 7863
    monkeypatch.setattr(listening, "_is_free", lambda host, port: False)
    with pytest.raises(UserError, match="no free port from 7860 to 7959"):
        listening.free_port(listening.LOOPBACK, None)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        (listening.LOOPBACK, 0, "Got --port=0, expected a number from 1 to 65535"),
        (listening.LOOPBACK, 65536, "Got --port=65536"),
        ("192.0.2.1", 7860, r"Got --host=192.0.2.1 and port 7860, where this machine may not listen"),
        ("no.such.host.invalid", None, r"Got --host=no.such.host.invalid .*Try --host=127.0.0.1"),
    ],
)
def test_addresses_that_cannot_be(host, port, message):
    with pytest.raises(UserError, match=message):
        listening.free_port(host, port)
