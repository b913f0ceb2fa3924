"""Every fenced command of the documentation is parsed or run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from mf_lightning.__main__ import main as commands
from mf_lightning.cli import main
from tests.generators import digits_info, write_generator
from tests.runs import ROOT, command_line, python

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return [b for path in DOCUMENTS for b in re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)]


COMMANDS = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
TRAINING = [c for c in COMMANDS if "lightning_cli.py" in c]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_there_are_commands():
    assert len(COMMANDS) >= 15
    assert len(TRAINING) >= 6


def test_every_make_target_exists():
    targets = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_plain_lines_are_what_make_runs():
    """The README's pip and python lines stand in the Makefile's recipes."""
    recipes = MAKEFILE.replace("$(BIN)", ".venv/bin").replace("$(DIGITS)", "datasets/digits").replace(" --quiet", "")
    for command in COMMANDS:
        if command.startswith(".venv/bin"):
            assert command.replace(" -m pytest -m", " -m pytest -m") in recipes, command


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_parse(command, tmp_path, capsys, monkeypatch):
    for name in ("IMAGENET_LATENTS", "IMAGENET_REFERENCE", "CIFAR10_PIXELS", "SIT_XL2"):  # the ImageNet recipes ask for them
        monkeypatch.setenv(name, str(tmp_path))
    arguments = shlex.split(command)
    arguments = arguments[arguments.index(next(a for a in arguments if a.endswith("lightning_cli.py"))) + 1 :]
    arguments = [re.sub(r"^runs/(\w+)/config.yaml$", r"configs/experiment/\1.yaml", a) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *([] if "--help" in arguments else ["--print_config"])])
    assert stop.value.code == 0, capsys.readouterr().err


HELD = (  # by which test
    r"make ", r"\.venv/bin/", r"python3 -m venv \.venv$", r".*lightning_cli\.py ", r"python benchmarks/", r".*-m mf_lightning ",
    r"sbatch ", r"python -m tests\.\w+ ",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_held_by_a_test(command):
    assert any(re.match(pattern, command) for pattern in HELD)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("sbatch")])
def test_cluster_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET_LATENTS", str(tmp_path))
    monkeypatch.setenv("IMAGENET_REFERENCE", str(tmp_path))
    words = shlex.split(command)[1:]
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/slurm/"))
    assert (ROOT / words[script]).is_file()
    config, _, *options = words[script + 1 :]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config, *options, "--print_config"])
    assert stop.value.code == 0


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("python -m tests.")}))
def test_commands_of_tests_have_these_options(command):
    words = shlex.split(command)
    known = python("-m", words[2], "--help")
    assert known.returncode == 0, known.stderr
    for option in (word.split("=")[0] for word in words[3:] if word.startswith("--")):
        assert option in known.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if "benchmarks/" in c])
def test_benchmark_commands_parse(command):
    words = shlex.split(command)
    benchmark = importlib.import_module(f"benchmarks.{Path(words[1]).stem}")
    benchmark.parse(words[2:])


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m mf_lightning" in c])
def test_other_commands_have_these_options(command, capsys):
    words = shlex.split(command)
    name, *given = words[words.index("mf_lightning") + 1 :]
    with pytest.raises(SystemExit) as stop:
        commands([name, "--help"])
    assert stop.value.code == 0
    known = capsys.readouterr().out
    for option in (word.split("=")[0] for word in given if word.startswith("--")):
        assert re.search(rf"{option}\b", known), option


def test_sample_and_export_commands_run(tmp_path, monkeypatch):
    """On a small checkpoint in the place of the quickstart's; nothing is sent."""
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "own_images"):
        write_generator(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", digits_info())
    ran = [
        shlex.split(c)[3:] for c in COMMANDS if c.startswith(("python -m mf_lightning sample", "python -m mf_lightning export"))
    ]
    assert len(ran) >= 6
    for words in ran:
        if "--push" not in words:
            commands([*words, "--device=cpu"] if words[0] == "sample" else words)
            assert any(Path(word).exists() for word in words[2:]), words


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "block.py").write_text(code)
    if "runs/quickstart/" in code:
        write_generator(tmp_path / "runs" / "quickstart" / "checkpoints" / "last.ckpt", digits_info())
    result = python("block.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    if "write_info" in code:
        assert "512 samples" in python("-m", "mf_lightning", "verify", "datasets/mine", cwd=tmp_path).stdout


def test_files_named_in_documents_exist():
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:mf_lightning|configs|tests|scripts|docs)/[\w./]+\.\w+)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
        for name in re.findall(r"\]\((docs/[\w.]+)\)", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} links {name}"


def test_readme_lists_every_recipe():
    text = (ROOT / "README.md").read_text()
    for recipe in (ROOT / "configs" / "experiment").glob("*.yaml"):
        assert f"`{recipe.name}`" in text


def test_the_error_of_an_unknown_subcommand_is_short():
    result = command_line("train")
    assert result.returncode == 2
    assert len(result.stderr) < 1500
