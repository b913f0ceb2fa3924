"""Raw images in: every kind of source gives the same images and labels; the crop is ADM's; what is odd is said or refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mf_lightning.data import crop
from mf_lightning.data.crop import center_crop, read_picture
from mf_lightning.data.images import Unreadable, open_images, source
from mf_lightning.types import UserError

CLASSES = ("ant", "bee", "cat")


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


IMAGES = {f"{name}/{i}.png": encoded(picture(10 * k + i)) for k, name in enumerate(CLASSES) for i in range(3)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_parquet(path: Path, files: dict[str, bytes], *, named: bool = True, row_group: int = 2) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": content, "path": name} for name, content in files.items()]
    table = pa.table({"image": images, "label": [CLASSES.index(name.split("/")[0]) for name in files]})
    if named:
        features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group)
    return path


def webdataset_files(files: dict[str, bytes], label=lambda k: (".cls", str(k).encode())) -> dict[str, bytes]:
    out = {}
    for i, (name, content) in enumerate(files.items()):
        ending, text = label(CLASSES.index(name.split("/")[0]))
        out |= {f"{i:06d}.png": content, f"{i:06d}{ending}": text}
    return out


def as_folder(tmp):
    return write_folder(tmp / "s", {**IMAGES, "ant/notes.txt": b"x", "ant/._0.png": b"x"})


def as_flat_csv(tmp):
    files = {name.replace("/", "_"): content for name, content in IMAGES.items()}
    table = "file_name,label\n" + "".join(f"{name},{name.split('_')[0]}\n" for name in files)
    return write_folder(tmp / "s", {**files, "labels.csv": table.encode()})


def as_flat_json(tmp):
    files = {name.replace("/", "_"): content for name, content in IMAGES.items()}
    table = {name: name.split("_")[0] for name in files}
    return write_folder(tmp / "s", {**files, "labels.json": json.dumps(table).encode()})


def as_zip(tmp):
    return write_zip(tmp / "s.zip", {f"top/train/{name}": content for name, content in reversed(IMAGES.items())})


def as_labelled_zip(tmp):  # as StyleGAN and EDM write it
    files = {f"00000/{name.replace('/', '')}": content for name, content in IMAGES.items()}
    pairs = [[name, CLASSES.index(name[6:9])] for name in files]
    return write_zip(tmp / "s.zip", {**files, "dataset.json": json.dumps({"labels": pairs}).encode()})


def as_tar(tmp):
    return write_tar(tmp / "s.tar", {f"./train/{name}": content for name, content in reversed(IMAGES.items())})


def as_tar_gz(tmp):
    return write_tar(tmp / "s.tar.gz", IMAGES, "w:gz")


def as_tar_of_tars(tmp):  # ILSVRC2012_img_train.tar
    inner = {f"{k}.tar": tar_bytes({n[4:]: c for n, c in IMAGES.items() if n.startswith(k)}) for k in CLASSES}
    return write_tar(tmp / "s.tar", inner)


def as_tar_per_class(tmp):
    (tmp / "s").mkdir()
    for name in CLASSES:
        write_tar(tmp / "s" / f"{name}.tar", {n[4:]: c for n, c in IMAGES.items() if n.startswith(name)})
    return tmp / "s"


def as_webdataset(tmp):
    (tmp / "s").mkdir()
    files = list(webdataset_files(IMAGES).items())
    write_tar(tmp / "s" / "train-000.tar", dict(files[:10]))
    write_tar(tmp / "s" / "train-001.tar", dict(files[10:]))
    return tmp / "s"


def as_webdataset_json(tmp):
    named = webdataset_files(IMAGES, lambda k: (".json", json.dumps({"label": CLASSES[k]}).encode()))
    return write_tar(tmp / "s.tar.gz", named, "w:gz")


def as_parquet(tmp):
    half = list(IMAGES.items())
    write_parquet(tmp / "s/data/train-00000-of-00002.parquet", dict(half[:4]))
    write_parquet(tmp / "s/data/train-00001-of-00002.parquet", dict(half[4:]))
    return tmp / "s"


def as_pattern(tmp):
    write_parquet(tmp / "train-00000-of-00001.parquet", IMAGES)
    write_parquet(tmp / "test-00000-of-00001.parquet", dict(list(IMAGES.items())[:1]))
    return tmp / "train-*"


NAMED = (as_folder, as_flat_csv, as_flat_json, as_zip, as_tar, as_tar_gz, as_tar_of_tars, as_tar_per_class,
         as_webdataset_json, as_parquet, as_pattern)  # fmt: skip


@pytest.mark.parametrize("make", [*NAMED, as_labelled_zip, as_webdataset])
def test_every_kind_of_source_gives_the_same_images(tmp_path, make):
    found = open_images(make(tmp_path))
    assert [found.read(i) for i in range(len(found))] == list(IMAGES.values())
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.class_names == (CLASSES if make in NAMED else ("0", "1", "2"))
    assert len(set(found.names)) == 9
    again = pickle.loads(pickle.dumps(found))  # as it reaches another process
    assert again.read(7) == found.read(7)
    assert again.read(1) == found.read(1)  # also backwards
    assert again.fingerprint() == found.fingerprint()


def test_the_order_does_not_depend_on_how_the_files_were_written(tmp_path):
    one = open_images(write_folder(tmp_path / "one", IMAGES))
    other = open_images(write_folder(tmp_path / "other", dict(reversed(IMAGES.items()))))
    assert one.names == other.names == sorted(one.names)
    assert one.fingerprint() == other.fingerprint()
    write_folder(tmp_path / "other", {"ant/9.png": b""})
    assert open_images(tmp_path / "other").fingerprint() != one.fingerprint()


def test_labels_given_apart_and_none(tmp_path):
    folder = write_folder(tmp_path / "s", {"b.png": b"", "a.png": b"", "c d/é\n.png": b""})
    (tmp_path / "given.csv").write_text('b.png,7\n"c d/é\n.png",0\na.png,2\n')
    found = open_images(folder, labels=str(tmp_path / "given.csv"))
    assert found.names == ["a.png", "b.png", "c d/é\n.png"]
    assert found.labels.tolist() == [2, 7, 0]
    assert found.class_names == tuple("01234567")
    none = open_images(folder, labels="none")
    assert none.labels.tolist() == [0, 0, 0]
    assert none.class_names == ()


def test_names_with_odd_characters(tmp_path):
    names = ["a'\"b.png", "tab\there.png", "new\nline.png", "雪 %20 *.png", "-rf.png", os.fsdecode(b"caf\xe9.png")]
    found = open_images(write_folder(tmp_path / "s", {f"k/{name}": name.encode("utf-8", "replace") for name in names}))
    assert sorted(found.names) == sorted(f"k/{name}" for name in names)
    for i, name in enumerate(found.names):
        assert found.read(i) == name[2:].encode("utf-8", "replace")
    assert len(found.fingerprint()) == 16
    assert len(open_images(write_zip(tmp_path / "s.zip", {"k/雪 %20.png": b"x"}))) == 1


# the crop


def adm_reference(pixels: np.ndarray, size: int) -> np.ndarray:
    """The crop written once more, on arrays: averages of 2 x 2 pixels by hand, the bicubic step by Pillow."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        assert pixels.shape[:2] == (2 * height, 2 * width)  # a box filter over whole pairs
        blocks = pixels.reshape(height, 2, width, 2, -1).astype(int)
        # Pillow rounds after each pass, and which one comes first depends on its version and the image's shape
        orders = [(((blocks.sum(a) + 1) // 2).sum(b) + 1) // 2 for a, b in ((3, 1), (1, 2))]
        found = np.asarray(Image.fromarray(pixels).resize((width, height), Image.BOX))
        assert any((found == order).all() for order in orders)
        pixels = found
    height, width = pixels.shape[:2]
    short = min(height, width)
    to = (round(width * (size / short)), round(height * (size / short)))
    pixels = np.asarray(Image.fromarray(pixels).resize(to, Image.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (128, 64, 16),
        (64, 192, 16),
        (160, 96, 20),
        (50, 31, 16),
        (16, 16, 16),
        (17, 90, 16),
        (9, 5, 16),
        (32, 32, 16),
        (31, 32, 16),
    ],
)
def test_the_crop_is_adms(width, height, size):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert cropped.shape == (size, size, 3)
    assert (cropped == adm_reference(pixels, size)).all()
    if (width, height) == (size, size):
        assert (cropped == pixels).all()


def test_halving_drops_odd_edges_as_pillow_does():
    image = picture(0, 67, 45)  # 45 >= 2 * 16: halved once, to 33 x 22
    half = image.resize((33, 22), Image.BOX)
    scaled = half.resize((24, 16), Image.BICUBIC)
    assert (np.asarray(center_crop(image, 16)) == np.asarray(scaled)[:, 4:20]).all()


# odd pictures


def pixels_of(content: bytes, size: int = 8, channels: int = 3) -> tuple[np.ndarray, tuple[str, ...]]:
    found = read_picture(content, size=size, channels=channels)
    assert found.pixels.shape == (channels, size, size)
    assert found.pixels.dtype == np.uint8
    return found.pixels.transpose(1, 2, 0), found.traits


def test_small_images_are_enlarged_and_counted():
    _, traits = pixels_of(encoded(picture(0, 5, 6)))
    assert traits == (crop.ENLARGED,)
    assert pixels_of(encoded(picture(0, 8, 9)))[1] == ()


def test_cmyk_and_grey():
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    pixels, traits = pixels_of(encoded(cmyk, "JPEG"))
    assert abs(pixels.astype(int) - [0, 255, 255]).max() < 12  # cyan
    assert traits == ()
    assert (pixels_of(encoded(Image.new("L", (8, 8), 77)))[0] == 77).all()
    assert (pixels_of(encoded(Image.new("RGB", (8, 8), (9, 9, 9))), channels=1)[0] == 9).all()
    assert (pixels_of(encoded(Image.new("1", (8, 8), 1)))[0] == 255).all()


def test_sixteen_bits_are_scaled_not_cut():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels, traits = pixels_of(encoded(Image.fromarray(ramp)))
    assert (pixels[..., 0] == np.round(ramp / 257)).all()
    assert traits == (crop.DEEP,)


def test_palette_and_transparency_are_laid_on_white():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    pixels, traits = pixels_of(encoded(palette))
    assert (pixels == [10, 20, 30]).all()
    assert traits == ()
    pixels, traits = pixels_of(encoded(palette, transparency=1))
    assert (pixels == 255).all()
    assert traits == (crop.TRANSPARENT,)
    half = np.full((8, 8, 4), (200, 100, 0, 128), np.uint8)
    pixels, traits = pixels_of(encoded(Image.fromarray(half)))
    assert abs(pixels.astype(int) - [227, 177, 127]).max() <= 1
    assert traits == (crop.TRANSPARENT,)
    half[..., 3] = 255
    assert pixels_of(encoded(Image.fromarray(half)))[1] == ()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    how = {"lossless": True} if form == "WEBP" else {}
    pixels, traits = pixels_of(encoded(frames[0], form, save_all=True, append_images=frames[1:], **how))
    assert (pixels == [255, 0, 0]).all()
    assert traits == (crop.ANIMATED,)


def test_a_photograph_with_its_preview_is_no_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    pixels, traits = pixels_of(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert (pixels == 255).all()
    assert traits == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = picture(3, 8, 8)
    undo = {6: Image.ROTATE_90, 8: Image.ROTATE_270, **{k: v for k, v in crop._TURNS.items() if k not in (6, 8)}}
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, traits = pixels_of(encoded(stored, exif=exif))
    assert (pixels == np.asarray(upright)).all()
    assert traits == ((crop.TURNED,) if orientation != 1 else ())


def test_damaged_exif_leaves_the_picture_whole(monkeypatch):
    content = encoded(picture(3, 8, 8), exif=b"Exif\0\0garbage that is no TIFF head")
    assert (pixels_of(content)[0] == np.asarray(picture(3, 8, 8))).all()

    def fails(image):  # as Pillow 10 does
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fails)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.getexif", fails)
    pixels, traits = pixels_of(content)
    assert traits == (crop.NO_EXIF,)
    assert (pixels == np.asarray(picture(3, 8, 8))).all()


def bomb() -> bytes:
    """A few hundred bytes that claim 400 million pixels: the head of a PNG with other sizes and its right checksum."""
    import zlib

    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def text_bomb() -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("x", "0" * (2 << 20), zip=True)
    return encoded(Image.new("L", (8, 8)), pnginfo=info)


JPEG = encoded(picture(1, 64, 64), "JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "no image of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "no image of the formats"),  # runs a program
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encoded(picture(1))[:-40], r"OSError|SyntaxError|ValueError"),
        (JPEG[:2] + b"\0" * 100, "no image of the formats"),
        (encoded(picture(1))[:60] + b"\0" * 50 + encoded(picture(1))[110:], r"SyntaxError|OSError"),
        (bomb(), r"20000 x 20000 pixels.*limit|limit of .* pixels"),
        (text_bomb(), "Decompressed data too large"),
        (encoded(Image.new("L", (1, 40_000))), "so narrow that"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF"), "16 bits at most"),
    ],
)
def test_unreadable_images_have_a_reason_that_is_the_same_each_time(content, reason, monkeypatch):
    size = 2048 if reason == "so narrow that" else 8
    reasons = []
    for _ in range(2):
        with pytest.raises(Unreadable, match=reason) as error:
            read_picture(content, size=size, channels=3)
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]
    assert "0x" not in reasons[0]


def test_an_image_at_pillows_limit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unreadable, match="40 x 30 pixels, more than Pillow's limit of 1,000"):
        read_picture(IMAGES["ant/0.png"], size=8, channels=3)


# sources that are refused, and members that are


def test_members_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "s.zip", {"a/0.png": b"x" * 1000, "a/1.png": IMAGES["ant/0.png"]})
    content = path.read_bytes()
    found = open_images(path)
    monkeypatch.setattr(source, "MAX_BYTES", 999)
    with pytest.raises(Unreadable, match="more than 999 bytes"):
        found.read(0)
    monkeypatch.undo()
    start = content.index(IMAGES["ant/0.png"][-30:-20]) if IMAGES["ant/0.png"][-30:-20] in content else 140
    path.write_bytes(content[:start] + b"\xff" * 10 + content[start + 10 :])
    with pytest.raises(Unreadable, match="damaged in the zip file"):
        open_images(path).read(1)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        member = tarfile.TarInfo("a/one.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    found = open_images(tmp_path / "s.tar")
    with pytest.raises(Unreadable, match="a link or a sparse file"):
        found.read(0)
    assert found.read(1) == b"abc"
    cut = write_tar(tmp_path / "cut.tar", {"a/0.png": b"x" * 5000})
    found = open_images(cut)
    os.truncate(cut, 2000)
    with pytest.raises(Unreadable, match="cut off"):
        found.read(0)


def test_symbolic_links(tmp_path):
    root = write_folder(tmp_path / "s", {"k/0.png": b"0"})
    write_folder(tmp_path / "outside", {"1.png": b"1"})
    (root / "k" / "2.png").symlink_to(root / "k" / "0.png")
    assert open_images(root).names == ["k/0.png", "k/2.png"]
    (root / "gone").mkdir()
    (root / "k" / "3.png").symlink_to(root / "k" / "not there.png")
    found = open_images(root)
    with pytest.raises(Unreadable, match="cannot be opened"):
        found.read(2)
    (root / "far").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"symbolic link .*far.* expected only links within .*follow_links=true"):
        open_images(root)
    found = open_images(root, follow_links=True)
    assert found.names[0] == "far/1.png"
    assert found.read(0) == b"1"
    (root / "k" / "up").symlink_to(root)
    with pytest.raises(UserError, match="a circle"):
        open_images(root, follow_links=True)


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        ({}, None, "without a single image"),
        ({"notes.txt": b""}, None, "without a single image"),
        ({"a.png": b""}, None, r"outside of any class folder, the first is 'a.png'.*--labels=none"),
        ({"k/a.png": b"", "b.png": b""}, None, "Got 1 of 2 images .* outside of any class folder"),
        ({"a.png": b"", "labels.csv": b"a.png,0\nb.png,1\n"}, None, r"1 label\(s\) without an image, the first is 'b.png'"),
        ({"a.png": b"", "b.png": b"", "labels.csv": b"a.png,0"}, None, r"1 image\(s\) without a label, the first is 'b.png'"),
        ({"a.png": b"", "labels.csv": b"a.png,0\na.png,1"}, None, "Got two labels, 0 and 1, for 'a.png'"),
        ({"a.png": b"", "labels.csv": b"a.png,0,1"}, None, "has 3 cells"),
        ({"a.png": b"", "labels.csv": b""}, None, "it is empty"),
        ({"a.png": b"", "labels.json": b"{"}, None, "cannot be read"),
        ({"a.png": b"", "labels.json": b'{"a.png": 1.5}'}, None, "not a name and a label"),
        ({"a.png": b"", "labels.json": b'{"a.png": -1}'}, None, "Got label -1"),
        ({"a.png": b"", "labels.json": b'{"a.png": 9999999999}'}, None, "Got label 9999999999"),
        ({"a.png": b"", "b.png": b"", "labels.json": b'{"a.png": 1, "b.png": "x"}'}, None, "Got the label 'x' among numbers"),
        ({"a.png": b""}, "nowhere.csv", r"Got --labels=nowhere.csv, expected a .csv or .json"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, labels, message):
    (tmp_path / "s").mkdir()
    with pytest.raises(UserError, match=message):
        open_images(write_folder(tmp_path / "s", files), labels=labels)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="which does not exist"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "x.rar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"expected a folder of images"):
        open_images(tmp_path / "x.rar")
    for name in ("x.zip", "x.tar", "x.tar.gz", "x.parquet"):
        (tmp_path / name).write_bytes(b"no archive" * 100)
        with pytest.raises(UserError, match=rf"Got '.*{name}', .*cannot be read"):
            open_images(tmp_path / name)
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_zip(folder / "a.zip", IMAGES)
    write_tar(folder / "b.tar", IMAGES)
    with pytest.raises(UserError, match="all of one kind"):
        open_images(folder)
    with pytest.raises(UserError, match=r"Got two images named 'k/0.png'"):
        open_images(write_tar(tmp_path / "double.tar", {"k/0.png": b"", "./k/0.png": b""}))


def test_labels_in_archives_that_do_not_match(tmp_path):
    files = webdataset_files(IMAGES)
    del files["000003.cls"]
    with pytest.raises(UserError, match=r"1 image\(s\) without .cls or .json.*'000003' with no label"):
        open_images(write_tar(tmp_path / "a.tar", files))
    assert len(open_images(tmp_path / "a.tar", labels="none")) == 9
    del files["000004.png"]
    files["000003.cls"] = b"1"
    with pytest.raises(UserError, match="'000004' with a label but no image"):
        open_images(write_tar(tmp_path / "b.tar", files))
    files = {**webdataset_files(IMAGES), "000000.jpg": b""}
    with pytest.raises(UserError, match="two files of one kind"):
        open_images(write_tar(tmp_path / "c.tar", files))


def test_parquet_files_that_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"picture": [b""], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="columns picture, label, expected image or img"):
        open_images(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"xy"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"expected label .*--labels=none"):
        open_images(tmp_path / "b.parquet")
    assert open_images(tmp_path / "b.parquet", labels="none").read(0) == b"xy"
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "/x/y.png"}], "label": [0]}), tmp_path / "c.parquet")
    with pytest.raises(Unreadable, match=r"no bytes, only the path '/x/y.png'"):
        open_images(tmp_path / "c.parquet").read(0)
    pq.write_table(pa.table({"image": [b"", b""], "label": [0, None]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="Got the label None"):
        open_images(tmp_path / "d.parquet")
    as_pattern(tmp_path)
    with pytest.raises(UserError, match=r"files of several splits \(test, train\).*--val_source"):
        open_images(tmp_path / "t*-0*")
    assert open_images(write_parquet(tmp_path / "e.parquet", IMAGES, named=False)).class_names == ("0", "1", "2")
