"""Tokens as pictures, and the demo: its functions, and the page in a real browser.

The page needs more than the tests' dependencies; docs/demo.md tells how to run its tests.
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from sklearn.decomposition import PCA
from test_loading import ROOT
from test_simvq_gan import small_model as small_gan_model

from benchmarks.generation import random_generator
from eval.token_maps import code_colors, code_pixels, neighbours, replace_tokens, token_map
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from reading.files import find_images
from reading.models import tokenizer_hash


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def all_codes(model) -> np.ndarray:
    return model.quantizer.get_codebook_entry(torch.arange(64)).detach().double().numpy()


def test_a_token_is_a_square_in_the_colour_of_its_code(tiny_model):
    tokens = torch.arange(12).view(3, 4) % 5
    picture = np.asarray(token_map(tiny_model, tokens))
    assert picture.shape == (3 * 8, 4 * 8, 3)
    squares = picture.reshape(3, 8, 4, 8, 3)
    assert (squares == code_colors(tiny_model)[tokens][:, None, :, None]).all()
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 5


def test_colours_are_places_along_principal_directions(tiny_model):
    """They order the codes as scikit-learn's components do, and two codes at one place have one colour."""
    tiny_model.quantizer.embedding.weight[7] = tiny_model.quantizer.embedding.weight[3]
    colors = code_colors(tiny_model).astype(float)
    places = PCA(3).fit_transform(all_codes(tiny_model))
    for channel in range(3):
        correlation = np.corrcoef(places[:, channel], colors[:, channel])[0, 1]
        order = np.argsort(places[:, channel] * np.sign(correlation))
        assert (np.diff(colors[order, channel]) >= 0).all()
    assert (colors[7] == colors[3]).all()
    assert colors.min() < 30 and colors.max() > 225


@pytest.mark.parametrize("width", [1, 2])
def test_codes_of_few_dimensions_have_colours_too(width):
    colors = code_colors(VQRAEModel(tiny_config(codebook_dim=width)))
    assert colors.shape == (64, 3) and len(np.unique(colors[:, 0])) > 32 and (colors[:, width:] == 128).all()


def test_neighbours_are_those_by_which_the_quantizer_chooses(tiny_model):
    """Brute force over the projected codes; a duplicate comes at distance 0, after the code itself."""
    tiny_model.quantizer.embedding.weight[7] = tiny_model.quantizer.embedding.weight[9]
    codes = all_codes(tiny_model)
    distances = np.linalg.norm(codes - codes[9], axis=1)
    near, found = neighbours(tiny_model, 9, count=5)
    assert near[:2].tolist() == [9, 7] and found[:2].tolist() == [0, 0]
    assert sorted(near.tolist()) == sorted(np.argsort(distances)[:6].tolist())
    np.testing.assert_allclose(found, np.sort(distances)[:6])
    assert len(neighbours(tiny_model, 9, count=100)[0]) == 64


def test_a_code_alone_is_a_grid_filled_with_it(tiny_model):
    tiny_model.eval()
    pixels = code_pixels(tiny_model, torch.tensor([5, 63]))
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels[1:], tiny_model.decode_image_tokens(torch.full((1, 4, 4), 63)))


def test_only_the_rectangle_is_replaced():
    tokens, other = torch.zeros(4, 5, dtype=torch.int64), torch.arange(20).view(4, 5)
    filled, taken = replace_tokens(tokens, (1, 2, 2, 3), 9), replace_tokens(tokens, (1, 2, 2, 3), other)
    assert filled.tolist() == [[0] * 5, [0, 0, 9, 9, 9], [0, 0, 9, 9, 9], [0] * 5]
    assert taken.tolist() == [[0] * 5, [0, 0, 7, 8, 9], [0, 0, 12, 13, 14], [0] * 5]
    assert not tokens.any()


def test_what_cannot_be_done_is_told(tiny_model):
    tokens = torch.zeros(4, 4, dtype=torch.int64)
    for rectangle in ((0, 0, 5, 1), (3, 3, 1, 2), (-1, 0, 1, 1), (0, 0, 0, 1)):
        with pytest.raises(ValueError, match="not inside the grid of 4 x 4: rows go from 0 to 3"):
            replace_tokens(tokens, rectangle, 1)
    with pytest.raises(ValueError, match=r"other image has \(2, 2\) tokens"):
        replace_tokens(tokens, (0, 0, 1, 1), tokens[:2, :2])
    with pytest.raises(ValueError, match=r"of one image, \(h, w\), got \(1, 4, 4\)"):
        token_map(tiny_model, tokens[None])
    for code in (-1, 64):
        with pytest.raises(ValueError, match=f"Code {code} is outside the codebook: choose one from 0 to 63"):
            neighbours(tiny_model, code)
        with pytest.raises(ValueError, match=f"Code {code} is outside"):
            token_map(tiny_model, tokens + code)


# ---------------------------------------------------------------------------------------------------------------------
# The functions of the page
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app():
    pytest.importorskip("gradio", reason="gradio is not installed (pip install '.[demo]')")
    import app

    return app


@pytest.mark.parametrize("model", [lambda: VQRAEModel(tiny_config()), small_gan_model], ids=["vqrae", "simvq_gan"])
def test_steps_of_the_page(app, model, image_folder):
    torch.manual_seed(0)
    model = model().eval()
    side = model.config.image_size
    processor = VQRAEImageProcessor.for_image_size(side)
    files = [str(path) for path in find_images(image_folder)]
    tokenizer = app.Tokenizer(model, processor, files)
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)

    *pictures, text, tokens, before, edited, after, counts = tokenizer.reconstruct(files[0], counts)
    assert all(picture.size == (side, side) for picture in pictures[:3])
    output = model(processor(Image.open(files[0]), return_tensors="pt").pixel_values)
    assert torch.equal(tokens, output.image_tokens[0]) and torch.equal(edited, tokens)
    expected = processor.postprocess(output.decoded_pixel_values)[0]
    assert all(np.abs(np.int16(x) - np.int16(expected)).max() <= 1 for x in (pictures[1], before, after))
    error = 4 * np.abs(np.float32(pictures[0]) - np.float32(pictures[1])).mean(2, keepdims=True)
    assert np.abs(np.float32(pictures[2]) - error.clip(0, 255)).max() <= 4  # of pictures in 8 bits
    mse = np.square(np.float64(pictures[0]) - np.float64(pictures[1])).mean()
    assert f"PSNR **{10 * np.log10(255**2 / mse):.2f} dB** · **{len(tokens.unique())}** distinct" in text
    assert torch.equal(counts, torch.bincount(tokens.flatten(), minlength=len(counts)))

    filled, picture = tokenizer.fill(tokens, 5, 0, 0, 2, 1)
    assert (filled != replace_tokens(tokens, (0, 0, 2, 1), 5)).sum() == 0
    assert picture == processor.postprocess(model.decode_image_tokens(filled[None]))[0]
    taken, _ = tokenizer.transplant(tokens, files[1], 0, 0, *tokens.shape)
    assert torch.equal(taken, tokenizer.encode(files[1])[1])
    frame = np.argwhere((np.asarray(tokenizer.framed(tokens, 1, 0, 1, 2)) == 0).all(2))
    square = tokenizer.square
    assert frame.min(0).tolist() == [square, 0] and frame.max(0).tolist() == [2 * square - 1, 2 * square - 1]


def test_usage_is_over_the_session_or_over_all_examples(app, tiny_model, image_folder):
    (image_folder / "a-0.png").write_bytes(b"no image")
    tiny_model.eval()
    files = [str(path) for path in find_images(image_folder)]
    tokenizer = app.Tokenizer(tiny_model, VQRAEImageProcessor.for_image_size(32), files)
    counts = torch.tensor([5, 3] + [0] * 62)
    text, chart = tokenizer.usage(app.SESSION, counts)
    assert "**2** of 64 codes used (**3.1%**), perplexity **2**, over 8 tokens" in text and "<svg" in chart
    progress = app.gr.Progress()
    assert "over 176 tokens" in tokenizer.usage(app.ALL_EXAMPLES, counts, progress)[0]  # 11 images of 16
    assert "No image yet" in tokenizer.usage(app.SESSION, counts * 0)[0]


def test_two_clicks_span_a_rectangle(app):
    assert app.clicked_rectangle((1, 1, 2, 2), 3, 0) == (3, 0, 1, 1)
    assert app.clicked_rectangle((3, 0, 1, 1), 1, 2) == (1, 0, 3, 3)


def test_bad_input_is_told(app, tmp_path, tiny_model):
    processor = VQRAEImageProcessor.for_image_size(32)
    whole, broken = io.BytesIO(), tmp_path / "broken.png"
    Image.effect_noise((40, 40), 50).save(whole, format="PNG")
    for content in (b"no image", whole.getvalue()[:-600], b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="broken.png cannot be read.*Upload a PNG"):
            app.read_pixels(str(broken), processor)
    for height, message in ((10, "is 900 x 10 px: crop it"), (1, "cannot be read.*too thin")):
        Image.new("RGB", (900, height)).save(tmp_path / "line.png")
        with pytest.raises(ValueError, match=f"line.png {message}"):
            app.read_pixels(str(tmp_path / "line.png"), processor)
    tokenizer, tokens = app.Tokenizer(tiny_model.eval(), processor, []), torch.zeros(4, 4, dtype=torch.int64)
    for message, call in {
        "Code 64 is outside the codebook: choose one from 0 to 63": lambda: tokenizer.fill(tokens, 64, 0, 0, 1, 1),
        "Enter the number of a code": lambda: tokenizer.look_at(None, tokens),
        "There is no image: upload one": lambda: tokenizer.transplant(tokens, None, 0, 0, 1, 1),
        "There are no tokens to replace: open an image": lambda: tokenizer.fill(None, 1, 0, 0, 1, 1),
    }.items():
        with pytest.raises(app.gr.Error, match=message):
            app.told(call)()


def test_pictures_of_a_code_that_is_shown_are_left_alone(app, tiny_model):
    """Opening the page and its tab "Codebook" both ask for code 0. Gradio wrote the same picture into the same file
    twice, and a browser that had just begun to read it showed none (ERR_CONTENT_LENGTH_MISMATCH)."""
    tokenizer = app.Tokenizer(tiny_model.eval(), VQRAEImageProcessor.for_image_size(32), [])
    alone, _, near, shown = tokenizer.look_at(3, None)
    assert isinstance(alone, Image.Image) and len(near) > 1 and shown == 3
    alone, text, near, shown = tokenizer.look_at(3, torch.full((4, 4), 3), shown)
    assert alone == near == app.gr.skip() and "16 of the 16 tokens" in text and shown == 3
    assert isinstance(tokenizer.look_at(4, None, shown)[0], Image.Image)


def test_the_page_is_of_the_model_that_is_named(app, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = VQRAEModel(tiny_config())
    model.save_pretrained(tmp_path / "mine")
    built = []
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(tmp_path / "mine")])
    monkeypatch.setattr(app, "build", lambda *given: built.append(given) or mock.Mock())
    app.main()
    ((tokenizer, name, generator),) = built
    assert name == "mine" and generator is None and not tokenizer.model.training
    assert torch.equal(tokenizer.model.decoder.decoder_pred.weight, model.decoder.decoder_pred.weight)
    assert tokenizer.processor.crop_size.height == 32 and len(tokenizer.examples) > 4


def test_a_missing_checkpoint_is_told(app, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr(app, "DEFAULT_MODEL", tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        app.main()
    assert "nowhere is not there: name a tokenizer with --model" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The page in a browser
# ---------------------------------------------------------------------------------------------------------------------

# a tokenizer to show instead of a tiny one, and the file for a picture of the first tab
MODEL, SCREENSHOT = os.environ.get("VQRAE_DEMO_MODEL"), os.environ.get("VQRAE_DEMO_SCREENSHOT")


@contextlib.contextmanager
def serving(arguments: list[str], folder: Path):
    """The address of a page that Python serves with these arguments, started in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines, ended = [], threading.Timer(300, process.kill)  # which ends the lines
        ended.start()
        while not lines or "Running on" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        ended.cancel()
        yield f"http://127.0.0.1:{port}"
    finally:
        ended.cancel()
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def make_generator(tokenizer: VQRAEModel, folder: Path) -> None:
    """A generator of ten classes with random weights, for the codes of `tokenizer`."""
    model, vocabulary = random_generator(tokenizer.config.grid_size, tokenizer.config.codebook_size, width=64, layers=1)
    model.save_pretrained(folder)
    replace(vocabulary, tokenizer_hash=tokenizer_hash(tokenizer)).save(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model, its processor, and the address of app.py with it and a generator of its codes."""
    pytest.importorskip("gradio", reason="gradio is not installed (pip install '.[demo]')")
    pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium or its driver is not installed (apt-get install chromium chromium-driver)")
    folder = MODEL or tmp_path_factory.mktemp("demo") / "checkpoint"
    if not MODEL:
        torch.manual_seed(0)
        VQRAEModel(tiny_config()).save_pretrained(folder)
        VQRAEImageProcessor.for_image_size(32).save_pretrained(folder)
        for file in folder.glob("*.py"):
            file.write_text("raise RuntimeError('code that comes with a model was run')")
    generator = tmp_path_factory.mktemp("generator")
    make_generator(VQRAEModel.from_pretrained(folder), generator)
    command = [str(ROOT / "app.py"), "--model", str(folder), "--generator", str(generator)]
    with serving(command, ROOT) as address:
        yield VQRAEModel.from_pretrained(folder).eval(), VQRAEImageProcessor.from_pretrained(folder), address


class Page:
    """The page in Chromium, with waits for what it shall show."""

    def __init__(self, driver, address: str) -> None:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self.wait = WebDriverWait(driver, 60, ignored_exceptions=[StaleElementReferenceException])
        driver.get(address)
        self.pixels("#token-map")

    def all(self, selector: str) -> list:
        return [x for x in self.driver.find_elements("css selector", selector) if x.is_displayed()]

    def one(self, selector: str):
        return self.wait.until(lambda _: self.all(selector))[0]

    def source(self, selector: str) -> str:
        return self.one(f"{selector} img").get_attribute("src")

    def pixels(self, selector: str) -> np.ndarray:
        """Of the file that an `<img>` shows."""
        return self.picture(self.source(selector))

    @staticmethod
    def picture(source: str) -> np.ndarray:
        with urllib.request.urlopen(source, timeout=60) as response:
            return np.asarray(Image.open(io.BytesIO(response.read())), dtype=np.int16)

    @contextlib.contextmanager
    def changes(self, selector: str):
        """Waits until an `<img>` shows another file."""
        before = self.source(selector)
        yield
        self.wait.until(lambda _: self.all(f"{selector} img") and self.source(selector) != before)

    def save_screenshot(self, path) -> None:
        picture = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        picture = picture.point(lambda level: min(255, (level + 4) // 8 * 8))  # not seen, and half the bytes
        picture.save(path, optimize=True)

    def upload(self, path) -> None:
        self.driver.find_element("css selector", "#upload input[type=file]").send_keys(str(path))

    def click_token(self, selector: str, row: int, column: int, side: int) -> None:
        from selenium.webdriver import ActionChains

        image = self.one(f"{selector} img")
        square = min(image.size["width"], image.size["height"]) / side
        offsets = (int((place + 0.5 - side / 2) * square) for place in (column, row))
        ActionChains(self.driver).move_to_element_with_offset(image, *offsets).click().perform()

    def tab(self, name: str) -> None:
        buttons = "button[role=tab]"
        if not any(x.text == name for x in self.all(buttons)):  # a phone has them in a menu
            self.one(".overflow-menu > button").click()
            buttons = ".overflow-dropdown button"
        next(x for x in self.all(buttons) if x.text == name).click()

    def gallery(self, selector: str) -> list[np.ndarray]:
        """The pictures of one, when it has some."""
        sources = self.wait.until(lambda _: [x.get_attribute("src") for x in self.all(f"{selector} img")])
        return [self.picture(source) for source in sources]

    def enter(self, selector: str, number: int) -> None:
        field = self.one(f"{selector} input")
        field.clear()
        field.send_keys(f"{number}\t")

    def says(self, message: str) -> None:
        self.wait.until(lambda _: any(message in x.text for x in self.all("[data-testid=toast-body]")), message)


@pytest.fixture
def page(served, request):
    """The page as a desktop shows it, or in a window of other metrics, those of a phone."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    if metrics := getattr(request, "param", None):
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1280,1100"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    try:
        yield Page(driver, served[2])
    finally:
        driver.quit()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.open(ROOT / "examples" / "images" / "coffee.jpg").crop((40, 20, 200, 170)).save(path)
    return path


def test_an_image_in_a_reconstruction_out(page, served, photo):
    model, processor, address = served
    side = model.config.grid_size
    if SCREENSHOT:
        page.save_screenshot(SCREENSHOT)
    with page.changes("#reconstruction"):
        page.upload(photo)
    tokens = model.get_image_tokens(processor(Image.open(photo), return_tensors="pt").pixel_values)
    expected = processor.postprocess(model.decode_image_tokens(tokens))[0]
    assert np.abs(page.pixels("#reconstruction") - np.int16(expected)).max() <= 1
    shown = page.pixels("#token-map")
    square = len(shown) // side
    assert (shown[square // 2 :: square, square // 2 :: square] == code_colors(model)[tokens[0]]).all()
    assert f"{len(tokens.unique())} distinct codes among {side**2} tokens" in page.one("#text").text

    with page.changes("#reconstruction"):  # an example, in place of an upload
        page.all(".gallery-item")[1].click()
    assert np.abs(page.pixels("#reconstruction") - np.int16(expected)).max() > 1

    loaded = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(name.startswith(address) for name in loaded)  # the page needs no other server


PHONE = {"width": 390, "height": 844, "pixelRatio": 2.0, "mobile": True, "touch": True}
BEYOND = """
return [...document.querySelectorAll("button, input, img, svg[width], h1, [data-testid=markdown]")].filter(element => {
    const place = element.getBoundingClientRect();
    const shown = element.checkVisibility() && place.width > 1 && place.height > 1;
    return shown && (place.left < -1 || place.right > document.documentElement.clientWidth + 1)
        && !element.closest("[style*='overflow-x: auto']");
}).map(element => element.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("page", [None, PHONE], ids=["desktop", "phone"], indirect=True)
def test_all_is_within_the_width_of_a_desktop_and_of_a_phone(page, photo):
    """Nothing is cut off or has to be scrolled to from side to side, pictures are large enough to see, and an upload
    works."""
    with page.changes("#reconstruction"):
        page.upload(photo)
    shown = {
        "Reconstruct": ["#upload", "#reconstruction img", "#token-map img"],
        "Codebook": ["#code input", "#alone img", "#near"],
        "Edit": ["#after img", "#edit-map img", "#other", "#transplant", "#top input"],
    }
    for tab, selectors in shown.items():
        page.tab(tab)
        for selector in selectors:
            page.one(selector)
            if "img" in selector:  # which has its size when its file has come
                page.wait.until(lambda _, x=selector: min(page.one(x).size.values()) >= 200, selector)
        assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), tab
        assert page.driver.execute_script(BEYOND) == [], tab
        if SCREENSHOT:
            page.save_screenshot(Path(SCREENSHOT).with_stem(f"{tab}-{page.driver.execute_script('return innerWidth')}"))


@pytest.mark.parametrize("page", [None, PHONE], ids=["desktop", "phone"], indirect=True)
def test_new_images_are_drawn_and_an_image_is_completed(page, served, photo):
    model, processor, _ = served
    page.tab("Generate")
    page.one("button#generate").click()
    images = page.gallery("#generated")
    assert len(images) == 4 and len({image.tobytes() for image in images}) == 4
    assert page.driver.execute_script(BEYOND) == []
    page.tab("Complete")
    page.driver.find_element("css selector", "#complete-upload input[type=file]").send_keys(str(photo))
    page.one("#complete-upload img")
    page.one("button#complete").click()
    images = page.gallery("#completed")
    tokens = model.get_image_tokens(processor(Image.open(photo), return_tensors="pt").pixel_values)
    expected = np.int16(processor.postprocess(model.decode_image_tokens(tokens))[0])
    kept = len(expected) // 2
    for image in images:
        assert np.abs(image - expected)[kept:].mean() > 3 * np.abs(image - expected)[:kept].mean()
    assert page.driver.execute_script(BEYOND) == []


def test_a_bad_file_is_told(page, tmp_path, photo):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with page.changes("#reconstruction"):
        page.upload(tmp_path / "broken.png")
        page.says("broken.png cannot be read: it is damaged, no image, or too thin. Upload a PNG, JPEG or WebP file.")
        page.upload(photo)  # and the page goes on


def test_a_click_on_the_token_map_shows_its_code(page, served, photo):
    model, processor, _ = served
    tokens = model.get_image_tokens(processor(Image.open(photo), return_tensors="pt").pixel_values)[0]
    with page.changes("#token-map"):
        page.upload(photo)
    row, column = next((r, c) for r in range(1, len(tokens)) for c in range(1, len(tokens)) if tokens[r, c] > 0)
    page.click_token("#token-map", row, column, len(tokens))
    code = tokens[row, column]
    page.wait.until(lambda _: page.all("#code input") and page.one("#code input").get_attribute("value") == f"{code}")
    page.wait.until(lambda _: page.one("#code-text").text.startswith(f"Code {code}: {(tokens == code).sum()} of the"))
    alone = processor.postprocess(code_pixels(model, code[None]))[0]
    assert np.abs(page.pixels("#alone") - np.int16(alone)).max() <= 1
    near = neighbours(model, code.item())[0][1].item()
    page.all("#near img")[0].click()
    page.wait.until(lambda _: page.one("#code-text").text.startswith(f"Code {near}:"))
    page.wait.until(lambda _: f"over {2 * tokens.numel()} tokens" in page.one("#usage").text)  # and the first example
    page.enter("#code", model.config.codebook_size)
    page.says(f"Code {model.config.codebook_size} is outside the codebook: choose one from 0")


def test_tokens_are_replaced(page, served, photo):
    model, processor, _ = served
    side = model.config.grid_size
    tokens = model.get_image_tokens(processor(Image.open(photo), return_tensors="pt").pixel_values)[0]
    with page.changes("#token-map"):
        page.upload(photo)
    page.tab("Edit")
    with page.changes("#edit-map"):
        page.click_token("#edit-map", side - 1, side - 1, side)
    with page.changes("#edit-map"):
        page.click_token("#edit-map", 1, side - 2, side)
    page.enter("#new-code", 7)
    with page.changes("#after"):
        page.one("#fill").click()
    filled = replace_tokens(tokens, (1, side - 2, side - 1, 2), 7)
    expected = processor.postprocess(model.decode_image_tokens(filled[None]))[0]
    assert np.abs(page.pixels("#after") - np.int16(expected)).max() <= 1

    page.enter("#new-code", model.config.codebook_size)
    page.one("#fill").click()
    page.says(f"Code {model.config.codebook_size} is outside the codebook: choose one from 0")
    page.one("#transplant").click()
    page.says("There is no image: upload one, or click an example.")
    page.enter("#new-code", 7)
    with page.changes("#edit-map"):
        page.enter("#top", side - 1)
    page.one("#fill").click()
    page.says(f"is not inside the grid of {side} x {side}")
