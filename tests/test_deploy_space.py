"""`ccssl-hf space`: the folder that it writes, the page's answers, and the page in a browser."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from sklearn.datasets import load_digits
from transformers import pipeline
from typer.testing import CliRunner

from ccssl_hf import CCSSLForImageClassification
from ccssl_hf.cli import app as cli
from ccssl_hf.deploy.space import thresholds, write_space
from ccssl_hf.deploy.space_page import app
from tiny_runs import LABELED, LABELS, VALIDATION, model_of, trainer_of

REPOSITORY = Path(__file__).parents[1]
SCREENSHOTS = REPOSITORY / "outputs" / "screenshots"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")


def noise(count: int, *, size: int = 16) -> list[Image.Image]:
    """Images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def digit(number: int) -> Image.Image:
    """The first image of a digit that is not a class of the model."""
    images, numbers = load_digits(return_X_y=True)
    first = images[np.flatnonzero(numbers == number)[0]].reshape(8, 8)
    return Image.fromarray((first * 15.9).astype(np.uint8)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)


def save_as_folders(dataset: datasets.Dataset, folder: Path) -> Path:
    for number, row in enumerate(dataset):
        (folder / LABELS[row["label"]]).mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / LABELS[row["label"]] / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of four digits in `model`, and its labeled and validation images as folders."""
    folder = tmp_path_factory.mktemp("space")
    trainer = trainer_of(
        folder / "run",
        model_of(bn_momentum=0.1),
        algorithm="supervised",
        confidence_threshold=None,
        lambda_contrast=0,
        max_steps=60,
        per_device_train_batch_size=16,
        ema_decay=0.9,
        horizontal_flip=False,
        logging_steps=1000,
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    save_as_folders(LABELED, folder / "labeled")
    save_as_folders(VALIDATION, folder / "validation")
    (folder / "validation" / "nothing").mkdir()
    for number, picture in enumerate(noise(8)):
        picture.save(folder / "validation" / "nothing" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def written(work: Path) -> Path:
    out = work / "out"
    sources = dict(labeled=str(work / "labeled"), validation=str(work / "validation"))
    write_space(work / "model", out, title="Four <digits>", **sources)
    return out


@pytest.fixture(scope="module")
def space(written: Path) -> app.Space:
    return app.Space(written)


# --------------------------------------------------------------------------------------------------------------- folder


def test_all_unreadable_images_are_named_before_anything_is_written(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(work / "validation", tmp_path / "open")
    bad = [next(tmp_path.glob("open/*")) / name for name in ("x.png", "y.png")]
    for path in bad:
        path.write_bytes(b"no image")
    out, sources = tmp_path / "out", {"validation": str(tmp_path / "open")}
    with pytest.raises(ValueError, match="The validation split has 2 unreadable images") as error:
        write_space(work / "model", out, **sources)
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == list(map(str, bad))
    assert list(out.iterdir()) == []
    for path in bad:
        path.unlink()
    write_space(work / "model", out, **sources)
    assert "images of the validation split show no class of the model and count as out-of-distribution" in caplog.text


def test_the_folder_is_a_space_with_a_plain_model_and_nothing_of_this_machine(written: Path, work: Path) -> None:
    files = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    examples = {f"examples/{number}.webp" for number in range(6)}  # four classes, two OOD
    own = {"app.py", "requirements.txt", "README.md", "space.json", "wide_resnet_cifar.py"}
    gallery = {"gallery/embeddings.safetensors", "gallery/images.zip"}
    model = {f"model/{name}" for name in ("config.json", "model.safetensors", "wide_resnet_cifar.py")}
    assert files == own | model | examples | gallery
    for name in ("config.json", "model.safetensors"):
        assert (written / "model" / name).read_bytes() == (work / "model" / name).read_bytes()
    data = SpaceCard.load(written / "README.md").data
    assert (data.title, data.sdk, data.app_file, data.models) == ("Four <digits>", "gradio", "app.py", None)
    for path in written.rglob("*.*"):
        if path.is_file():
            assert str(work).encode() not in path.read_bytes()


def test_requirements_have_the_bounds_of_the_package(written: Path) -> None:
    ours = (REPOSITORY / "pyproject.toml").read_text()
    bounds = (written / "requirements.txt").read_text().split()
    missing = [line for line in bounds if f'"{line}"' not in ours and not line.startswith("pillow")]
    assert not missing
    assert '"pillow>=11.3"' in ours and '"pillow<13"' in ours and "pillow>=11.3,<13" in bounds
    gradio = next(Requirement(line) for line in bounds if line.startswith("gradio"))
    assert SpaceCard.load(written / "README.md").data.sdk_version in gradio.specifier


def test_a_second_space_replaces_the_first_and_leaves_hidden_files(work: Path, tmp_path: Path) -> None:
    (tmp_path / ".gitattributes").write_text("*.zip filter=lfs\n")
    model = work / "model"
    write_space(model, tmp_path, labeled=str(work / "labeled"))
    assert len(list((tmp_path / "examples").iterdir())) == 4
    settings = write_space(model, tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    own = ["README.md", "app.py", "model", "requirements.txt", "space.json", "wide_resnet_cifar.py"]
    assert left == [".gitattributes", *own]
    assert settings == app.Settings(title="model", model="model") == app.Settings.load(tmp_path)


def test_images_are_stored_without_what_a_camera_says(tmp_path: Path) -> None:
    model_of("test_resnet").save_pretrained(tmp_path / "model")
    exif = Image.Exif()
    exif[0x010E] = "at home"
    for label in LABELS:
        (tmp_path / "labeled" / label).mkdir(parents=True)
        Image.new("RGB", (900, 500), "teal").save(tmp_path / "labeled" / label / "a.jpg", exif=exif)
    write_space(tmp_path / "model", tmp_path / "out", labeled=str(tmp_path / "labeled"))
    assert b"at home" in (tmp_path / "labeled" / "one" / "a.jpg").read_bytes()
    assert all(b"at home" not in path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file())
    assert Image.open(tmp_path / "out" / "examples" / "0.webp").size == (640, 356)
    [(thumbnail, _, cosine), *_] = app.Gallery(tmp_path / "out").nearest(torch.ones(96))
    assert thumbnail.size == (160, 89) and -1 <= cosine <= 1


def test_wrong_input_is_one_line_before_anything_is_written(work: Path, tmp_path: Path) -> None:
    model, validation = str(work / "model"), str(work / "validation")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    few = save_as_folders(VALIDATION.select(range(5)), tmp_path / "few")
    for arguments, words in (
        ([model, str(tmp_path / "mine")], "thesis.txt"),
        ([str(work), str(tmp_path / "a")], "config.json"),
        ([model, str(tmp_path / "b"), "--validation", str(few)], "at least 20"),
        ([model, str(tmp_path / "c"), "--labeled", validation], "nothing"),
        ([model, str(tmp_path / "d"), "--labeled", str(tmp_path / "absent")], "absent"),
    ):
        result = CliRunner().invoke(cli, ["space", *arguments])
        assert result.exit_code == 2, result.output
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert words in line
        assert not any(path.name != "thesis.txt" for path in Path(arguments[1]).glob("*"))


def test_the_command_says_how_to_try_and_to_publish(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["space", str(work / "model"), str(out), "--title", "Digits"])
    assert result.exit_code == 0, result.output
    assert f"python {out}/app.py" in result.stdout
    assert f"hf upload USER/NAME {out} . --repo-type space" in result.stdout
    assert SpaceCard.load(out / "README.md").data.title == "Digits"


# -------------------------------------------------------------------------------------------------------------- answers


def test_confidences_are_those_of_the_pipeline(space: app.Space, written: Path) -> None:
    classify = pipeline("image-classification", model=str(written / "model"), device="cpu")
    for row in (0, 1, 2, 3):
        image = VALIDATION[row]["image"].resize((40, 30))
        expected = {said["label"]: said["score"] for said in classify(image, top_k=4)}
        answer = space.answer(image)
        assert answer.confidences == pytest.approx(expected, abs=1e-6)
        assert space.model.labels[answer.best] == max(expected, key=expected.__getitem__)


def test_a_labeled_image_is_its_own_nearest(space: app.Space) -> None:
    rows = np.argsort(np.array(LABELED["label"]), kind="stable")  # as folders of classes are read
    names = sorted(LABELS)
    order = sorted(rows.tolist(), key=lambda row: names.index(LABELS[LABELED[row]["label"]]))
    for row in order[::7]:
        _, features = space.model.logits_and_features([LABELED[row]["image"]])
        near = space.gallery.nearest(features[0])
        image, number, cosine = near[0]
        assert np.array_equal(np.asarray(image), np.asarray(LABELED[row]["image"]))
        assert space.model.labels[number] == LABELS[LABELED[row]["label"]]
        assert cosine == pytest.approx(1, abs=1e-3)
        cosines = [cosine for *_, cosine in near]
        assert len(near) == app.NEAREST and cosines == sorted(cosines, reverse=True)


def test_thresholds_are_what_a_loop_over_the_images_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=generator) * torch.linspace(0.1, 6, 60)[:, None]
    labels = np.where(np.arange(60) < 25, -1, np.arange(60) % 4)
    measured = thresholds(logits, labels, source="somewhere")
    confidences, energies, right = [], [], []
    for row in logits[labels >= 0].double():
        weights = [np.exp(value) for value in row.tolist()]
        confidences.append(max(weights) / sum(weights))
        energies.append(np.log(sum(weights)))
    right = [int(row.argmax()) == label for row, label in zip(logits, labels, strict=True) if label >= 0]
    assert measured.confidence == pytest.approx(np.quantile(confidences, 0.05), rel=1e-5)
    assert measured.energy == pytest.approx(np.quantile(energies, 0.05), rel=1e-5)
    both = [c < measured.confidence and e < measured.energy for c, e in zip(confidences, energies, strict=True)]
    assert measured.flagged == pytest.approx(np.mean(both)) and measured.top1 == pytest.approx(np.mean(right))
    assert (measured.images, measured.ood_images) == (35, 25) and 0 < measured.ood_flagged <= 1


def test_only_an_image_below_both_thresholds_may_be_out_of_distribution(space: app.Space) -> None:
    limits = space.settings.thresholds
    assert limits.images == len(VALIDATION) and limits.ood_images == 8 and limits.source == "validation"
    for image in [row["image"] for row in VALIDATION] + noise(8) + [Image.new("RGB", (16, 16), "teal")]:
        logits, _ = space.model.logits_and_features([image])
        confidence, energy = (score.item() for score in app.confidence_and_energy(logits))
        answer = space.answer(image)
        assert answer.out_of_distribution == (confidence < limits.confidence and energy < limits.energy)
        assert answer.reason == f"Confidence {confidence:.2f}, energy score {energy:.1f}. {space.rule}"
    assert space.rule == (
        f"Rule: possibly out of distribution if confidence < {limits.confidence:.2f} and energy score < "
        f"{limits.energy:.1f}; on validation images, this flags {limits.flagged:.0%} of 37 images of the model's "
        f"classes by mistake, and detects {limits.ood_flagged:.0%} of 8 out-of-distribution images."
    )
    assert space.rule.removeprefix("Rule: ") in space.about()
    alone = app.Space.__new__(app.Space)
    alone.settings = replace(space.settings, thresholds=replace(limits, ood_images=0, ood_flagged=None))
    assert alone.rule.endswith("by mistake, and out-of-distribution images were not measured.")


def test_without_validation_images_only_a_floor_is_compared_with_and_the_page_says_so(
    work: Path, tmp_path: Path
) -> None:
    write_space(work / "model", tmp_path)
    space = app.Space(tmp_path)
    for row in range(0, 37, 4):
        answer = space.answer(VALIDATION[row]["image"])
        assert answer.out_of_distribution == (max(answer.confidences.values()) < app.CONFIDENCE_FLOOR)
        assert answer.nearest == [] and "set by hand" in answer.reason
    assert "set by hand and not measured" in space.about() and "Nearest" not in space.about()


def test_a_bad_file_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("text.png", b"no image"), ("empty.jpg", b""), ("cut.png", None)):
        path = tmp_path / name
        if content is None:
            noise(1, size=64)[0].save(path)
            content = path.read_bytes()[:900]
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"can't be read as an image\. Try a JPEG"):
            app.open_upload(str(path))
    monkeypatch.setattr(app, "MAX_PIXELS", 1_000_000)
    Image.new("1", (2000, 2000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="too large \\(2000 x 2000 pixels, at most 1,000,000 are allowed"):
        app.open_upload(str(tmp_path / "huge.png"))


# ------------------------------------------------------------------------------------------------------------- heat map


FAMILIES = {
    "test_resnet": ("layer4", "NCHW"),
    "test_vit": ("blocks.5.norm1", "tokens"),
    "test_vit2": ("norm", "tokens"),  # all patches are pooled
    "test_efficientnet": ("bn2", "NCHW"),
    "test_convnext": ("norm_pre", "NCHW"),
    "test_mambaout": ("stages", "NHWC"),
    "wide_resnet10_1_cifar": ("act", "NCHW"),
    "swin_tiny_patch4_window7_224": ("norm", "NHWC"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_map_is_found_in_any_family_and_lies_as_the_image_does(name: str) -> None:
    torch.manual_seed(0)
    small = dict(embed_dim=24, depths=(1, 1, 2, 1)) if name.startswith("swin") else {}
    network = timm.create_model(name, num_classes=3, **small).eval()
    _, height, width = network.pretrained_cfg["input_size"]
    layer, reader = app.find_map(network, (height, width))
    layers = {found: place for place, found in network.named_modules()}
    assert (layers[layer], reader.keywords["layout"]) == FAMILIES[name]
    maps: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, _, output: maps.append(reader(output)))
    images = torch.zeros(2, 3, height, width)
    images[1, :, : height // 4, -width // 4 :] = 3  # something in the upper right corner
    with torch.no_grad():
        network(images)
    handle.remove()
    changed = (maps[0][1] - maps[0][0]).abs().sum(0)
    rows, columns = changed.shape
    corner = changed[: rows // 2, columns // 2 :].sum() if rows > 1 else changed.sum()
    assert corner > 0.4 * changed.sum()


def test_a_classifier_of_zeros_hides_no_map() -> None:
    """Some timm networks start with one: then no logit depends on the image."""
    network = timm.create_model("test_resnet", num_classes=3).eval()
    for parameter in network.get_classifier().parameters():
        torch.nn.init.zeros_(parameter)
    layer, _ = app.find_map(network, (160, 160))
    assert layer is network.layer4


@pytest.mark.parametrize(("backbone", "size"), [("test_resnet", 160), ("test_vit", 64), ("wide_resnet10_1_cifar", 16)])
def test_the_heat_map_is_grad_cam_of_the_class_that_is_asked_for(backbone: str, size: int, tmp_path: Path) -> None:
    """Compare with the definition: channels weighted by the mean gradient of the class's logit, clipped at 0."""
    torch.manual_seed(0)
    CCSSLForImageClassification.from_timm(backbone, labels=LABELS, image_size=size).save_pretrained(tmp_path)
    model = app.Model(tmp_path)
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    layer, reader = model.feature_map
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, _, output: kept.append(output))
    logits = model.network(model.pixels([image]).requires_grad_())
    handle.remove()
    heats = []
    for number in (0, 2):
        [slope] = torch.autograd.grad(logits[0, number], kept[0], retain_graph=True)
        weights = reader(slope).mean(dim=(2, 3), keepdim=True)
        expected = (weights * reader(kept[0])).sum(1).relu()[0].detach()
        heat = model.heat_map(image, number)
        heats.append(heat)
        assert heat.shape == model.input_image(image).size[::-1] and heat.min() >= 0 and heat.max() <= 1
        coarse = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(heat)[None, None], expected.shape)[0, 0]
        if expected.max() > 0:
            assert np.corrcoef(coarse.flatten(), expected.flatten())[0, 1] > 0.8
    assert not np.allclose(*heats)
    assert not any(module._forward_hooks for module in model.network.modules())
    assert not any(parameter.grad is not None for parameter in model.network.parameters())


def test_a_network_too_coarse_for_a_heat_map_shows_the_image_alone(tmp_path: Path) -> None:
    model = CCSSLForImageClassification.from_timm("test_resnet", labels=LABELS, image_size=6)
    model.save_pretrained(tmp_path / "model")
    write_space(tmp_path / "model", tmp_path / "out")
    space = app.Space(tmp_path / "out")
    image = noise(1, size=6)[0]
    assert space.model.heat_map(image, 0) is None and "no heat map" in space.about()
    assert np.array_equal(np.asarray(space.answer(image).overlay)[::75, ::75], np.asarray(image))


# ----------------------------------------------------------------------------------------------------------------- page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(written: Path, elsewhere: Path) -> Iterator[str]:
    """The page's address. `python app.py` serves it without network and without this package."""
    (elsewhere / "ccssl_hf.py").write_text("raise ImportError('a Space does not have ccssl_hf')\n")
    port = free_port()
    settings = {
        "PYTHONPATH": str(elsewhere),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(elsewhere / "uploads"),
        "HF_HUB_OFFLINE": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with (elsewhere / "log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, str(written / "app.py")],
            cwd=elsewhere,
            env=os.environ | settings,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(3000):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                assert server.poll() is None, (elsewhere / "log").read_text()
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)
    assert "Traceback" not in (elsewhere / "log").read_text()


@pytest.fixture(scope="module")
def address(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(written, tmp_path_factory.mktemp("elsewhere")) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a browser, as large as a desktop or as the test's parameter."""
    width, height = getattr(request, "param", (1280, 900))
    page = browser.new_page(viewport={"width": width, "height": height})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(30_000)
    page.goto(address)
    page.locator("#picture input[type=file]").wait_for(state="attached")
    yield page
    page.close()
    assert not errors


def drop(page: Any, path: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(path)


def photograph(page: Any, name: str) -> None:
    """A screenshot for people; git ignores it."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def pixels_of(page: Any, selector: str) -> np.ndarray:
    """The image that the browser received."""
    body = page.request.get(page.locator(selector).get_attribute("src")).body()
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


@needs_browser
def test_a_visitor_drops_an_image_and_sees_classes_heat_map_and_nearest_images(
    page: Any, space: app.Space, tmp_path: Path
) -> None:
    photograph(page, "start")
    image = VALIDATION[0]["image"]
    image.save(tmp_path / "digit.png")
    answer = space.answer(image)
    assert not answer.out_of_distribution
    drop(page, tmp_path / "digit.png")
    best = space.model.labels[answer.best]
    expect(page.locator("#classes")).to_contain_text(f"{answer.confidences[best]:.0%}")
    expect(page.locator("#classes h2")).to_have_text(best)
    expect(page.locator("#note")).to_contain_text("No sign of an out-of-distribution image.")
    expect(page.locator("#note")).to_contain_text(answer.reason)
    expect(page.locator("#overlay img")).to_be_visible()
    assert np.abs(pixels_of(page, "#overlay img").astype(int) - np.asarray(answer.overlay)).mean() < 3
    captions = page.locator("#nearest .caption-label")
    expect(captions).to_have_text([caption for _, caption in answer.nearest])
    photograph(page, "answer")
    page.get_by_text("What these numbers mean").click()
    expect(page.get_by_text("The map is coarse: it shows where, not why")).to_be_visible()
    photograph(page, "about")
    other = (answer.best + 1) % 4
    page.locator("#chosen input").click()
    page.get_by_role("option", name=space.model.labels[other]).click()
    expected = np.asarray(space.model.explain(image, other)).astype(int)
    deadline = time.monotonic() + 30
    while np.abs(pixels_of(page, "#overlay img") - expected).mean() > 3 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert np.abs(pixels_of(page, "#overlay img") - expected).mean() < 3


@needs_browser
def test_an_out_of_distribution_image_gets_a_note(page: Any, space: app.Space, tmp_path: Path) -> None:
    greys = [Image.new("RGB", (16, 16), (grey, grey, grey)) for grey in range(0, 256, 15)]
    others = [digit(number) for number in range(4, 10)]
    ood = next(image for image in [*others, *greys] if space.answer(image).out_of_distribution)
    ood.save(tmp_path / "ood.png")
    drop(page, tmp_path / "ood.png")
    expect(page.locator("#note .warning")).to_contain_text("Possibly out of distribution.")
    expect(page.locator("#note")).to_contain_text(space.answer(ood).reason)
    photograph(page, "out_of_distribution")


@needs_browser
def test_a_file_that_is_no_image_gets_a_sentence_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    drop(page, tmp_path / "broken.png")
    expect(page.locator("#note .warning")).to_contain_text("This file can't be read as an image. Try a JPEG")
    expect(page.locator("#classes")).to_be_hidden()
    photograph(page, "broken")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    expect(page.locator("#note")).to_contain_text("Drop an image")
    page.locator("#examples img").first.click()
    expect(page.locator("#classes")).to_be_visible()
    expect(page.locator("#note .warning").or_(page.locator("#note"))).not_to_contain_text("can't be read")


@pytest.mark.slow
@needs_browser
def test_class_names_of_somebody_else_are_text_on_the_page(browser: Any, tmp_path: Path) -> None:
    script = "<script>window.harm=1</script><img src=x onerror='window.harm=1'>"
    names = [f"{script}\n# h1 | [a](http://x)", f"</title>{script}", "\u202e" + "x" * 500, "**b** `c` $m$ & &lt;i&gt;"]
    model = CCSSLForImageClassification.from_timm("wide_resnet10_1_cifar", labels=names, image_size=16)
    model.save_pretrained(tmp_path / "model")
    rows = [{"image": image, "label": number % 4} for number, image in enumerate(noise(24))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    data = tmp_path / f"data {script.replace('/', '')} [b](x).parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(data)
    sources = dict(labeled=str(data), validation=str(data))
    write_space(tmp_path / "model", tmp_path / "out", title=f"</title>{script}", **sources)
    card = SpaceCard.load(tmp_path / "out" / "README.md")
    assert card.data.title == f"</title>{script}" and "<script" not in card.text and "<img" not in card.text
    noise(1)[0].save(tmp_path / "image.png")
    (tmp_path / "elsewhere").mkdir()
    with running(tmp_path / "out", tmp_path / "elsewhere") as url:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.goto(url)
        page.locator("#picture input[type=file]").wait_for(state="attached")
        drop(page, tmp_path / "image.png")
        expect(page.locator("#classes")).to_be_visible()
        expect(page.locator("#classes")).to_contain_text("<script>window.harm=1</script>")
        expect(page.locator("#nearest .caption-label").first).to_be_visible()
        page.get_by_label("Class of the heat map").click()
        page.get_by_text("What these numbers mean").click()
        expect(page.get_by_text("is the softmax probability")).to_be_visible()
        assert page.evaluate("window.harm") is None
        assert page.locator("img[src='x'], img[src$='/x'], a[href='http://x']").count() == 0
        assert page.locator("h1").count() == 1
        photograph(page, "hostile")
        page.close()


@needs_browser
@pytest.mark.parametrize("page", [(390, 844)], indirect=True)
def test_the_page_fits_a_telephone(page: Any, tmp_path: Path) -> None:
    page.locator("#examples img").nth(1).click()
    expect(page.locator("#nearest .caption-label").first).to_be_visible()
    expect(page.locator("#overlay img")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for part in ("#picture", "#note", "#classes", "#overlay", "#nearest"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, part
    photograph(page, "narrow")
