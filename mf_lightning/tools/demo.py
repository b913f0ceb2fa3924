"""`python -m mf_lightning demo`: a checkpoint in the browser."""

from __future__ import annotations

import base64
import html
import io
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mf_lightning.flow.sampler import Sampler
from mf_lightning.pipeline import Generated, MeanFlowPipeline
from mf_lightning.pipeline.requests import choose_grid, choose_sampler
from mf_lightning.sheet import to_picture
from mf_lightning.tools.generators import open_generator
from mf_lightning.tools.listening import LOOPBACK, free_port
from mf_lightning.types import UserError

if TYPE_CHECKING:
    import gradio

NFES = (1, 2, 4)
SMOOTH = 128
"""Pictures at least this many pixels wide are drawn smoothly, smaller ones as squares."""
WARM_UP_S = 10
LONGEST = 60
"""Characters of an input that a message repeats."""
STYLE = """
.mf-row {display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 18rem); gap: .75rem}
.mf-row figure {margin: 0}
.mf-row img {display: block; width: 100%; border-radius: 4px}
.mf-row img.squares {image-rendering: pixelated}
.mf-row figcaption {padding-top: .4rem; font-variant-numeric: tabular-nums}
.mf-row b {white-space: nowrap}
.mf-message {margin: 0; padding: .75rem 1rem; border-left: 4px solid #dc2626; overflow-wrap: anywhere}
"""


def demo(
    checkpoint: Path,
    host: str = LOOPBACK,
    port: int | None = None,
    share: bool = False,
    weights: str | None = None,
    sampler: Literal["average", "euler"] = "average",
    autoencoder: str | None = None,
    data: str | None = None,
    device: str | None = None,
    trust_net: bool = False,
) -> None:
    """Serve a page on which a checkpoint draws pictures, until it is interrupted; it fetches nothing from elsewhere.

    Args:
        checkpoint: a file, a directory of shards, or a folder that `export` made.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: without it a free one from 7860 on.
        share: also open a public address, through a tunnel of Gradio's makers.
        weights: "raw", or an average's decay; without it the one that the run's evaluation used.
        sampler: "euler" follows the instantaneous velocity, for flow-matching networks.
        autoencoder: local directory or hub name, where the one that made the latents is not found by its id.
        data: directory of the data set, where the checkpoint does not describe it.
        device: without it a GPU where there is one.
        trust_net: import a network class of another package, which runs its code.

    Raises:
        UserError: a checkpoint or an address that cannot be used.
        ImportError: Gradio is not there.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")  # read when it is imported and launched
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The page needs the package gradio: pip install 'mf_lightning[demo]'") from error
    port = free_port(host, port)
    how = {"weights": weights, "autoencoder": autoencoder, "data": data, "device": device, "trust_net": trust_net}
    studio = Studio(open_generator(checkpoint, **how), choose_sampler(sampler))
    page = build_page(studio, title=f"mf_lightning: {checkpoint.name}")
    around = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    os.environ["NO_PROXY"] = ",".join(filter(None, [around, LOOPBACK, "localhost", host]))  # launch looks whether it answers
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    name = f"[{host}]" if ":" in host else host
    ways = {"server_name": name, "server_port": port, "share": share, "ssr_mode": False, "quiet": True}
    try:
        *_, public = page.launch(**ways, prevent_thread_lock=True, theme=theme, css=STYLE, footer_links=[])
    except (OSError, ValueError) as error:
        raise UserError(
            f"Got {host}:{port}, where no page can be served ({error}), expected another --host or --port."
        ) from error
    print(f"http://{name}:{port}/ (Ctrl+C ends it)" + (f", for everyone: {public}" if public else ""), flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nended")
    finally:
        page.close(verbose=False)


def answered(ask: Callable[..., str]) -> Callable[..., str]:
    """Return a function whose failures are messages on the page."""

    @wraps(ask)
    def answer(*inputs: object) -> str:
        try:
            return ask(*inputs)
        except UserError as error:
            words = str(error)
        except RuntimeError as error:  # torch's, for example no memory left on the device
            words = f"The network failed: {str(error).splitlines()[0]}"
        return f'<p class="mf-message" role="alert">{html.escape(words)}</p>'

    return answer


class Studio:
    """A generator that answers the page: what its fields hold => HTML.

    All pictures are made one after the other on one thread, so that none is timed while another is made, and the thread, whose
    first pass is slower, has been warmed up.

    Args:
        pipeline: the generator.
        sampler: how a jump is made.
    """

    def __init__(self, pipeline: MeanFlowPipeline, sampler: Sampler) -> None:
        self.pipeline = pipeline
        self.sampler = sampler
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._warm_up()

    def _warm_up(self) -> None:
        """Make pictures until three in a row are no faster than one before them, for about ten seconds at most."""
        fastest, waited, spent = float("inf"), 0, 0.0
        noise, y = self.pipeline.request(n=1)
        while waited < 3 and spent < WARM_UP_S:
            seconds = self._generate(noise, y, NFES[0]).seconds
            waited = 0 if seconds < 0.9 * fastest else waited + 1
            fastest, spent = min(fastest, seconds), spent + seconds

    @property
    def conditions(self) -> str:
        """What the milliseconds are of."""
        pipeline = self.pipeline
        device = torch.cuda.get_device_name(pipeline.device) if pipeline.device.type == "cuda" else str(pipeline.device)
        kind = str(pipeline.dtype).removeprefix("torch.")
        told = pipeline.description
        return (
            f"Milliseconds are of the network and the decoder together, batch size 1, {kind}, device {device}, one measurement "
            f"after a warm-up. Weights: {told.name}, step {told.step:,}."
        )

    def choices(self) -> list[tuple[str, str]]:
        """Return the classes as they are shown, and their numbers, which are never ambiguous."""
        return [
            (name if name == str(number) else f"{number}: {name}", str(number))
            for number, name in enumerate(self.pipeline.class_names)
        ]

    def side_by_side(self, seed: object, label: object = None) -> str:
        """Return pictures of one noise and class at each NFE."""
        classes = [_class(label)] if self.pipeline.num_classes else None
        noise, y = self.pipeline.request(classes, n=1, seed=_seed(seed))
        about = f"seed {str(seed).strip()}" + ("" if y is None else f", class {self.pipeline.class_names[int(y[0])]}")
        return _row([self._make(noise, y, nfe, about) for nfe in NFES])

    def on_the_way(
        self,
        nfe: object,
        noise_weight: object,
        seed: object,
        last_seed: object,
        class_weight: object = 0,
        label: object = None,
        last_label: object = None,
    ) -> str:
        """Return the picture between two noises and between two classes, each with a weight of its own."""
        if nfe not in NFES:
            raise UserError(f"Got NFE {_short(nfe)}, expected one of {', '.join(map(str, NFES))}.")
        seeds = [_seed(seed), _seed(last_seed)]
        noise, y = self.pipeline.between(_weight(noise_weight), seeds=seeds)
        if self.pipeline.num_classes:
            _, y = self.pipeline.between(_weight(class_weight), labels=[_class(label), _class(last_label)])
        return _row([self._make(noise, y, int(nfe), f"noise at {noise_weight}, class at {class_weight}")])

    def _generate(self, noise: Tensor, y: Tensor | None, nfe: int) -> Generated:
        grid = choose_grid(nfe, None)
        return self._worker.submit(self.pipeline.generate, noise, y, grid=grid, sampler=self.sampler, batch_size=1).result()

    def _make(self, noise: Tensor, y: Tensor | None, nfe: int, about: str) -> str:
        return self._figure(self._generate(noise, y, nfe), about)

    @staticmethod
    def _figure(made: Generated, about: str) -> str:
        """Return one picture and its milliseconds."""
        file = io.BytesIO()
        to_picture(made.pixels[0]).save(file, "PNG")
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        squares = ' class="squares"' if made.pixels.shape[-1] < SMOOTH else ""
        words = f"NFE {made.nfe} <b>{1000 * made.seconds:.1f} ms</b>"
        alt = html.escape(f"{about}, NFE {made.nfe}")
        return f'<figure><img src="{source}" alt="{alt}"{squares}><figcaption>{words}</figcaption></figure>'


def _row(figures: list[str]) -> str:
    return f'<div class="mf-row">{"".join(figures)}</div>'


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _seed(value: object) -> int:
    text = str(value).strip()
    if not (text.isdecimal() and len(text) <= 20 and int(text) < 2**64):
        raise UserError(f"Got the seed {_short(value)}, expected a whole number from 0 to 2^64 - 1. Type one, for example 0.")
    return int(text)


def _class(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST:
        raise UserError(f"Got the class {_short(value)}, expected one of the list, by its number or name.")
    return value


def _weight(value: object) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"Got {_short(value)} for a place on the way, expected a number from 0 (first) to 1 (last).")
    return torch.tensor([float(value)], dtype=torch.float64)


def _next_seed(value: object) -> str:
    """Return the seed after one; 0 after what is none."""
    try:
        return str((_seed(value) + 1) % 2**64)
    except UserError:
        return "0"


def build_page(studio: Studio, *, title: str) -> gradio.Blocks:
    """Return the page; its fields reach :class:`Studio` unchecked, which tells what is wrong with them."""
    import gradio as gr

    classes, last = studio.choices(), max(0, len(studio.choices()) - 1)
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    live = {"preprocess": False, "trigger_mode": "always_last", **quiet}  # while one request is answered, only the newest waits

    def pick(label: str, number: int, name: str) -> list[gradio.Dropdown]:
        kept = {"allow_custom_value": True, "label": label, "elem_id": name, "min_width": 120}
        return [gr.Dropdown(classes, value=classes[number][1], **kept)] if classes else []

    def number(label: str, value: str, name: str) -> gradio.Textbox:
        return gr.Textbox(value, label=label, elem_id=name, min_width=120, max_lines=1)

    def place(label: str, name: str) -> gradio.Slider:
        return gr.Slider(0, 1, value=0, step=0.01, label=label, elem_id=name)

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(f"<h2>{html.escape(title)}</h2><p>{html.escape(studio.conditions)}</p>", elem_id="about")
        gr.HTML("<h3>One noise, three numbers of network passes (NFE)</h3>")
        with gr.Row(equal_height=True):
            chosen, seed = pick("Class", 0, "class"), number("Seed", "0", "seed")
            following = gr.Button("Next seed", elem_id="next", scale=0, min_width=140)
        pictures = gr.HTML(studio.side_by_side(*["0", *(choice.value for choice in chosen)]), elem_id="pictures")
        gr.HTML("<h3>Between two noises and two classes</h3>")
        with gr.Row():
            ends = [number("First seed", "0", "first-seed"), number("Last seed", "1", "last-seed")]
            end_classes = [*pick("First class", 0, "first-class"), *pick("Last class", last, "last-class")]
        with gr.Row():
            with gr.Column(scale=1, min_width=200):
                between = gr.HTML(elem_id="between")
            with gr.Column(scale=3, min_width=200):
                noise_place = place("Noise: first to last", "noise-place")
                class_place = [place("Class: first to last", "class-place")] if classes else []
                nfe = gr.Radio(list(NFES), value=NFES[0], label="NFE", elem_id="nfe")
        fields = [nfe, noise_place, *ends, *class_place, *end_classes]
        between.value = studio.on_the_way(*(field.value for field in fields))

        gr.on([field.change for field in [seed, *chosen]], answered(studio.side_by_side), [seed, *chosen], pictures, **live)
        gr.on([field.change for field in fields], answered(studio.on_the_way), fields, between, **live)
        following.click(_next_seed, seed, seed, **quiet)
    return page
