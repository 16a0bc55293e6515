"""The command line: env never raises, bad input is explained in one line, and the demo runs on any kind of image."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from perceiver_kernels.backends.cuda import runtime as cuda
from perceiver_kernels.benchmarking import bars, compare, encoder_bars, measure, providers
from perceiver_kernels.benchmarking.cases import CASES, MODES, Case
from perceiver_kernels.benchmarking.plain import ExactCrossAttention, ExpertCrossAttention
from perceiver_kernels.cli import demo, env, main, photograph
from perceiver_kernels.cli.arguments import UserError, byte_size, grid_size

Image = pytest.importorskip("PIL.Image")

SMALL = Case("small", "for tests", (6, 5), 3, 6.0, 3, 8, 16, head_dim=8)
FAST = compare.Effort(budget=0.0, min_rounds=1)
INSTALLED = [provider for provider in providers.PROVIDERS.values() if not provider.compiled and not provider.missing()]


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", SMALL)
    monkeypatch.setattr(demo, "WHOLE_EFFORT", FAST)
    monkeypatch.setattr(demo, "LAYER_EFFORT", FAST)


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    path = tmp_path / "small.png"
    Image.effect_mandelbrot((12, 9), (-2, -1, 1, 1), 20).convert("RGB").save(path)
    return path


# The way in


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["nothing", "help"])
def test_commands_are_listed(arguments, capsys):
    assert main(arguments) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in ("demo", "bench", "env"))


def test_unknown_command(capsys):
    assert main(["dmeo"]) == 2
    assert "no command 'dmeo'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "12", "0x5", "5x0", "-3x4", "axb", "4x4x4", "12 x 12"])
def test_bad_size(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", f"--size={text}"])
    assert stopped.value.code == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err


def test_sizes():
    assert grid_size("2160x3840") == (2160, 3840)
    assert [byte_size(text) for text in ("12", "600MB", "8g", "1.5kB")] == [12, 600_000_000, 8_000_000_000, 1500]


@pytest.mark.parametrize("arguments", [["bench", "imgenet"], ["bench", "--threads", "0"]], ids=["case", "threads"])
def test_bad_bench(arguments, capsys):
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# env


def test_env(capsys):
    assert main(["env"]) == 0
    report = capsys.readouterr().out
    assert torch.__version__ in report and "separable_attention" in report


def test_env_tells_of_the_cuda_module(monkeypatch):
    def facts():
        return "\n".join(env.report()).partition("compiled CUDA extension")[2].partition("\n\n")[0]

    module = types.SimpleNamespace(__file__="_cuda.so", archs="80;90a", emulated=False)
    monkeypatch.setattr(cuda, "module", lambda: module)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "unusable", lambda shared_memory: None)
    assert all(fact in facts() for fact in ("_cuda.so", "sm_80, sm_90a", "on GPUs"))
    module.emulated = True
    assert "emulated on the CPU, for tests" in facts()
    monkeypatch.setattr(cuda, "unavailable", lambda: "the CUDA module is not built")
    monkeypatch.setattr(cuda, "module", lambda: 1 / 0)
    assert "is not built" in facts() and "division by zero" in facts()


def test_env_reports_a_missing_extension(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "perceiver_kernels._cpu", None)
    assert main(["env"]) == 0
    assert "failed: ModuleNotFoundError" in capsys.readouterr().out


def test_env_reports_a_broken_section(monkeypatch, capsys):
    def broken() -> dict[str, str]:
        raise RuntimeError("out of order")

    monkeypatch.setitem(env.SECTIONS, "peers", broken)
    assert main(["env"]) == 0
    assert "failed: RuntimeError: out of order" in capsys.readouterr().out


def test_env_reports_an_unknown_instruction_set():
    command = [sys.executable, "-m", "perceiver_kernels", "env"]
    environment = os.environ | {"PERCEIVER_KERNELS_CPU_ISA": "abacus"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "failed: " in done.stdout and "abacus" in done.stdout


# demo


@pytest.mark.usefixtures("small_demo")
def test_demo(pixels, tmp_path, capsys):
    picture = tmp_path / "out.png"
    assert main(["demo", str(pixels), "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "9 x 12 = 108 pixels" in out and "| ours" in out
    with Image.open(picture) as image:
        assert image.width > 1000


@pytest.mark.usefixtures("small_demo")
def test_demo_on_the_shipped_photograph(tmp_path, capsys):
    assert main(["demo", "--size", "7x11", "--out", str(tmp_path / "out.png")]) == 0
    assert "7 x 11 = 77 pixels" in capsys.readouterr().out


@pytest.mark.usefixtures("small_demo")
def test_demo_on_one_pixel(tmp_path):
    path = tmp_path / "one.png"
    Image.new("L", (1, 1), 200).save(path)
    assert main(["demo", str(path), "--out", str(tmp_path / "out.png")]) == 0


@pytest.mark.usefixtures("small_demo")
def test_demo_reports_what_would_exceed_memory(pixels, tmp_path, capsys):
    arguments = ["--memory-limit", "1kB", "--out", str(tmp_path / "out.png")]
    assert main(["demo", str(pixels), *arguments]) == 0
    out = capsys.readouterr().out
    assert "expert: would need" in out and "the limit is 1.00 kB" in out


@pytest.mark.usefixtures("small_demo")
def test_demo_without_matplotlib(pixels, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "perceiver_kernels.cli.picture", raising=False)
    monkeypatch.delattr("perceiver_kernels.cli.picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["demo", str(pixels), "--out", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    assert "| ours" in out and "pip install matplotlib" in out


@pytest.mark.parametrize("name", ["out.txt", "out", "no/such/folder.png"])
def test_demo_with_nowhere_to_write(name, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / name)]) == 2
    assert "--out is" in capsys.readouterr().err


def bad_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.png" for name in ("missing", "empty", "text", "truncated")}
    files["empty"].touch()
    files["text"].write_text("a thousand words")
    Image.effect_noise((64, 64), 50).save(files["truncated"])
    files["truncated"].write_bytes(files["truncated"].read_bytes()[:500])
    return files | {"folder": folder}


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "folder"])
def test_bad_image(kind, tmp_path, capsys):
    path = bad_files(tmp_path)[kind]
    assert main(["demo", str(path), "--out", str(tmp_path / "out.png")]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1 and str(path) in message


def test_image_too_large_to_open(pixels, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="more pixels"):
        photograph.read(pixels)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGB", (255, 0, 51), (1.0, 0.0, 0.2)),
        ("L", 51, (0.2, 0.2, 0.2)),
        ("1", 1, (1.0, 1.0, 1.0)),
        ("LA", (0, 0), (1.0, 1.0, 1.0)),
        ("RGBA", (255, 0, 0, 0), (1.0, 1.0, 1.0)),
        ("RGBA", (0, 255, 0, 255), (0.0, 1.0, 0.0)),
        ("CMYK", (0, 255, 255, 0), (1.0, 0.0, 0.0)),
        ("I;16", 13107, (0.2, 0.2, 0.2)),
        ("I", 70000, (1.0, 1.0, 1.0)),
        ("F", 0.5, (1.0, 1.0, 1.0)),
    ],
)
def test_kinds_of_pixels(mode, color, expected, tmp_path):
    path = tmp_path / "image.tiff"
    Image.new(mode, (3, 2), color).save(path)
    pixels = photograph.read(path)
    assert pixels.shape == (2, 3, 3)
    torch.testing.assert_close(pixels[1, 2], torch.tensor(expected), atol=0.01, rtol=0)


def test_palette_with_a_transparent_colour(tmp_path):
    path = tmp_path / "image.png"
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=0)
    torch.testing.assert_close(photograph.read(path), torch.tensor([[[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]]))


def test_orientation_of_a_camera_is_followed(tmp_path):
    path = tmp_path / "image.jpg"
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    image.save(path, exif=exif)
    assert photograph.read(path).shape == (8, 4, 3)


# bench


@pytest.mark.parametrize("mode", MODES)
def test_providers_agree(mode):
    results = compare.compare(SMALL, mode, INSTALLED, FAST)
    for result in results:
        assert result.refused is None
        assert all(distance.rms < 1e-4 for distance in result.errors.values()), result.provider
    if mode == "forward+backward":
        assert len(results[0].errors) == 2 + 8  # the output, the latents and every parameter of the layer


def test_truth_does_not_depend_on_its_chunks(monkeypatch):
    runs = []
    for tokens in (1 << 14, 7):
        monkeypatch.setattr(ExactCrossAttention, "tokens_per_chunk", tokens)
        run = compare.prepare(
            dataclasses.replace(INSTALLED[0], layer=ExactCrossAttention), SMALL, MODES[1], SMALL.image()
        )
        run()
        runs.append(run.values())
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], msg=name)


def test_truth_of_a_large_case_is_that_of_a_few_latents(monkeypatch):
    whole = compare.truth(SMALL, "forward", SMALL.image())
    monkeypatch.setattr(compare, "TRUTH_PAIRS", 1)
    monkeypatch.setattr(compare, "TRUTH_LATENTS", 3)
    few = compare.truth(SMALL, "forward+backward", SMALL.image())
    assert list(few) == ["output"]
    torch.testing.assert_close(few["output"], whole["output"][:, :3])


def test_bench_writes_its_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CASES, "imagenet", SMALL)
    path = tmp_path / "results" / "figures.json"
    assert main(["bench", "--quick", "--modes", "forward", "--providers", "expert", "ours", "--json", str(path)]) == 0
    assert "| ours" in capsys.readouterr().out
    kept = json.loads(path.read_text())
    assert [result["provider"] for result in kept["results"]] == ["expert", "ours"]
    assert kept["results"][0]["timing"]["median"] > 0
    assert kept["machine"]["torch"] == torch.__version__


def test_a_provider_that_fails_leaves_the_others(capsys):
    def broken(case: Case) -> ExpertCrossAttention:
        raise RuntimeError("no such thing")

    failing = dataclasses.replace(providers.PROVIDERS["expert"], name="broken", layer=broken)
    results = compare.compare(SMALL, "forward", [failing, providers.PROVIDERS["expert"]], FAST)
    assert results[0].refused == "failed: RuntimeError: no such thing"
    assert results[1].timing
    assert "broken: failed" in compare.table(results, SMALL.pairs, None)


def test_every_bar_is_measured(monkeypatch):
    for name in CASES:
        monkeypatch.setitem(CASES, name, SMALL)
    monkeypatch.setattr(encoder_bars, "EXPERTS", ("expert",))
    measured = list(bars.measured(encoder_bars.GROUPS, bars.Recorder(FAST, lambda line: None)))
    assert [bar.what for bar in measured if bar.value is None] == []
    assert all(len(bars.row(bar)) == len(bars.HEADER) for bar in measured)


def test_strict_bars(monkeypatch, capsys):
    kept = [bars.Bar("speed", 2.0, 3.0, at_least=True), bars.Bar("error", 1.0, 1.5, at_least=False)]
    monkeypatch.setattr(bars, "measured", lambda groups, recorder: iter(kept))
    assert main(["bench", "--bars"]) == 0
    assert main(["bench", "--bars", "--strict"]) == 1
    out = capsys.readouterr().out
    assert "MISSED" in out and "holds" in out


def test_what_was_not_measured_is_not_passed():
    assert bars.Bar("speed", None, 3.0, at_least=True).passed is None


# Measuring


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark of other systems cannot be reset")
@pytest.mark.parametrize("permitted", [True, False], ids=["mark", "sampled"])
def test_peak_memory_is_seen_though_it_is_freed(permitted, monkeypatch):
    if not permitted:
        monkeypatch.setattr(measure, "_reset_high_water_mark", lambda: False)

    def call() -> None:
        torch.ones(25_000_000).sum()

    assert measure.peak_extra_memory(call) == pytest.approx(100e6, rel=0.2)


def test_ratio_of_timings_is_taken_round_by_round():
    slow = measure.Timing(((2.0,), (20.0,), (2.0,)))
    fast = measure.Timing(((1.0, 1.0), (10.0,), (1.0,)))
    assert slow.ratio(fast) == 2.0
    assert slow.median == 2.0


def test_available_memory_is_plausible():
    assert 1 << 24 < measure.available_memory() < 1 << 50
