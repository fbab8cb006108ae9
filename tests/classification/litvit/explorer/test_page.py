"""The page in a browser, opened from its file."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from litvit.attention.maps import AttentionReader
from litvit.commands import explore
from litvit.dtm.offsets import predict_offsets, sampling_locations
from litvit.training.classifier import load

from .conftest import EVIL, SIZE

MERGING = ".view:not(.grey)"
ATTENTION = ".view.grey"


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    """The address of a page of one model and the picture with the name that is HTML."""
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    argv = [str(folder / f"{EVIL}.png"), "--checkpoint", str(folder / "lit.safetensors"), "--device", "cpu"]
    assert explore.main([*argv, "--output", str(path)]) == 0
    return path.as_uri()


@pytest.fixture(scope="module")
def images(folder):
    """What the model gets of that picture."""
    classifier = load(folder / "lit.safetensors", device="cpu")
    return classifier.model, classifier.transform(Image.open(folder / f"{EVIL}.png")).unsqueeze(0)


@pytest.fixture
def opened(browser, page):
    """The browser with the page; nothing went wrong in it, and it asked for nothing but itself, when the test ends."""
    browser.screen()
    browser.open(page)
    browser.wait("document.documentElement.dataset.ready")
    yield browser
    assert browser.problems == []
    assert {address.partition(":")[0] for address in browser.requests} <= {"file", "data", "blob"}


def points(browser, level=64):
    """The places (y, x) in the picture of a level's points, those of the first pixel's centre being (0, 0)."""
    script = f"[...document.querySelectorAll('{MERGING} [data-points=\"{level}\"] path')]"
    found = browser.run(f"{script}.map((mark) => mark.getAttribute('transform'))")
    places = [list(map(float, re.fullmatch(r"translate\((\S+) (\S+)\)", text).groups())) for text in found]
    return np.array(places)[:, ::-1] - 0.5


def at(row, column):
    """The share of the picture's width and height at which a token of the last stage lies."""
    return (column + 0.4) * 32 / SIZE[1], (row + 0.6) * 32 / SIZE[0]


def test_pointing_at_a_token_shows_the_points_that_it_reads(opened, images):
    locations = sampling_locations(predict_offsets(*images))[0].numpy()
    assert locations.shape == (2, 3, 64, 2)
    for row, column in ((0, 0), (1, 2), (0, 1)):
        opened.mouse("mouseMoved", *opened.place(MERGING, *at(row, column)))
        np.testing.assert_allclose(points(opened), locations[row, column], atol=0.01)
        assert [len(points(opened, level)) for level in (4, 16, 64)] == [4, 16, 64]
        said = opened.run("document.querySelector('[aria-live]:not(#busy)').textContent")
        corner = 32 * np.array([row, column]) - 0.5
        outside = ((locations[row, column] < corner) | (locations[row, column] > corner + 32)).any(-1).sum()
        assert f"Token {row + 1}, {column + 1} (row, column) of 2 x 3. {outside} of its 64 points lie outside" in said
    shown = opened.run("[...document.querySelectorAll('.zoom [data-points=\"64\"] path')].length")
    assert shown == 64


def test_the_slider_moves_the_points_to_regular_places(opened, images):
    locations = sampling_locations(predict_offsets(*images))[0, 0, 1].numpy()
    opened.mouse("mouseMoved", *opened.place(MERGING, *at(0, 1)))
    opened.choose("#mix", 0)
    found = points(opened)
    y, x = np.meshgrid(4 * np.arange(8) + 1.5, 32 + 4 * np.arange(8) + 1.5, indexing="ij")
    assert sorted(map(tuple, found)) == sorted(zip(y.ravel(), x.ravel(), strict=True))
    opened.choose("#mix", 50)
    np.testing.assert_allclose(points(opened), (found + locations) / 2, atol=0.01)


def test_arrow_keys_move_the_token_and_escape_releases_it(opened, images):
    locations = sampling_locations(predict_offsets(*images))[0].numpy()
    opened.mouse("mouseMoved", *opened.place(MERGING, *at(0, 0)))
    opened.run(f"document.querySelector('{MERGING}').focus()")
    for key, token in (("ArrowRight", (0, 1)), ("ArrowDown", (1, 1)), ("ArrowDown", (1, 1)), ("ArrowLeft", (1, 0))):
        opened.key(key)
        np.testing.assert_allclose(points(opened), locations[token], atol=0.01)
    opened.mouse("mouseMoved", *opened.place(MERGING, *at(0, 2)))  # held
    np.testing.assert_allclose(points(opened), locations[1, 0], atol=0.01)
    opened.key("Escape")
    opened.mouse("mouseMoved", *opened.place(MERGING, *at(0, 2)))
    np.testing.assert_allclose(points(opened), locations[0, 2], atol=0.01)


def test_a_click_holds_the_token(opened, images):
    locations = sampling_locations(predict_offsets(*images))[0].numpy()
    opened.click(*opened.place(MERGING, *at(1, 2)))
    opened.mouse("mouseMoved", *opened.place(MERGING, *at(0, 0)))
    np.testing.assert_allclose(points(opened), locations[1, 2], atol=0.01)
    opened.click(*opened.place(MERGING, *at(1, 2)))
    opened.mouse("mouseMoved", *opened.place(MERGING, *at(0, 0)))
    np.testing.assert_allclose(points(opened), locations[0, 0], atol=0.01)


def test_touch_on_a_narrow_screen(browser, page, images):
    browser.screen(390, 844, touch=True)
    browser.open(page)
    browser.wait("document.documentElement.dataset.ready")
    locations = sampling_locations(predict_offsets(*images))[0].numpy()
    for token in ((1, 0), (0, 2)):
        browser.tap(*browser.place(MERGING, *at(*token)))
        np.testing.assert_allclose(points(browser), locations[token], atol=0.01)
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.problems == []


def test_all_controls_are_reached_by_tab_and_show_the_focus(opened):
    expected = opened.run(
        """[...document.querySelectorAll('a, button, select, input, [tabindex]')].filter(
            (node) => node.offsetParent && (node.type !== 'radio' || node.checked)).length"""
    )
    opened.run("document.body.focus()")
    reached = []
    for _ in range(expected):
        opened.key("Tab")
        reached.append(
            opened.run(
                """(() => {
                    const node = document.activeElement;
                    const shown = node.type === 'radio' ? node.nextElementSibling : node;
                    const style = getComputedStyle(shown);
                    window.seen = window.seen || new Set();
                    window.seen.add(node);
                    return [node.tagName, node.id, style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0];
                })()"""
            )
        )
    assert opened.run("window.seen.size") == expected
    assert all(visible for *_, visible in reached), reached
    assert {"mix", "density", "block"} <= {name for _, name, _ in reached}


def test_names_are_text(opened):
    assert opened.run("document.querySelectorAll('img[src=x], b').length") == 0
    assert opened.run("document.querySelector('.panel h2').textContent").endswith(f"/{EVIL}.png")
    classes = opened.run("[...document.querySelectorAll('.classes li span:first-of-type')].map((x) => x.textContent)")
    assert sorted(classes) == sorted([EVIL, "</script><b>", "cat"])


def test_the_most_probable_classes(opened, images, folder):
    model, pixels = images
    with torch.inference_mode():
        shares, numbers = model(pixels)[0].softmax(-1).sort(descending=True)
    names = [EVIL, "</script><b>", "cat"]
    texts = "(row) => [...row.querySelectorAll('span')].map((part) => part.textContent)"
    shown = opened.run(f"[...document.querySelectorAll('.classes li')].map({texts})")
    assert [name for name, _ in shown] == [names[i] for i in numbers]
    assert [float(share.rstrip(" %")) for _, share in shown] == pytest.approx((100 * shares).tolist(), abs=0.6)


def test_the_picture_is_the_models(opened, folder):
    source = opened.run(f"document.querySelector('{MERGING} img').src")
    shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    np.testing.assert_allclose(np.asarray(shown), np.asarray(Image.open(folder / f"{EVIL}.png")), atol=1)


@pytest.mark.parametrize(("block", "token"), [("3.1.1", (2, 4)), ("4.0.1", (1, 2))])
def test_the_attention_of_a_token_in_every_head(opened, images, block, token):
    model, pixels = images
    reader, maps = AttentionReader(model, (3, *SIZE)), {}

    def keep(number, p):
        found = reader.attentions[number]
        maps[f"{found.stage}.{found.block}.{found.pass_number}"] = found, found.rows(p, 1)[0]

    reader.read(pixels, keep)
    found, p = maps[block]
    h, w = found.layout.grid
    opened.choose("#block", block)
    opened.mouse("mouseMoved", *opened.place(ATTENTION, (token[1] + 0.5) / w, (token[0] + 0.5) / h))
    shown = opened.run(
        """[...document.querySelectorAll('.head')].map((head) => {
            const canvas = head.querySelector('canvas'), copy = canvas.cloneNode();
            copy.getContext('2d', {willReadFrequently: true}).drawImage(canvas, 0, 0);
            const {data} = copy.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const sums = [];
            for (let i = 0; i < data.length; i += 4) sums.push(data[i] + data[i + 1] + data[i + 2]);
            return [canvas.height, canvas.width, sums, head.textContent];
        })"""
    )
    assert len(shown) == found.heads
    for number, (height, width, brightness, text) in enumerate(shown):
        assert (height, width) == (h, w)
        row = p[number, token[0] * w + token[1]]
        assert np.argmax(brightness) == row.argmax()
        # The darkest to the brightest: the colours rise with the probabilities.
        order = np.argsort(row.numpy())
        assert (np.diff(np.array(brightness)[order]) >= -3).all()
        assert float(re.search(r"max (\S+) %", text)[1]) == pytest.approx(100 * row.max().item(), abs=0.6)
    # Another head, large over the picture.
    opened.run("document.querySelectorAll('.head input')[1].click()")
    text = opened.run("document.querySelectorAll('.views [aria-live]')[1].textContent")
    assert text.startswith(
        f"Head 1 of stage {block[0]}, block {block[2]}. Token {token[0] + 1}, {token[1] + 1} of {h} x {w}"
    )


def test_the_density_of_all_points(opened):
    opened.choose("#mix", 0)
    opened.run("document.querySelector('#density').click()")
    # Regular points are one per patch of 4 x 4 pixels: the same colour everywhere.
    colours = """(() => {
        const canvas = document.querySelector('.view canvas'), copy = canvas.cloneNode();
        copy.getContext('2d', {willReadFrequently: true}).drawImage(canvas, 0, 0);
        const {data} = copy.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        const found = new Set();
        for (let i = 0; i < data.length; i += 4) found.add(data.slice(i, i + 4).join());
        return [canvas.height, canvas.width, found.size];
    })()"""
    assert opened.run(colours) == [SIZE[0] // 4, SIZE[1] // 4, 1]
    opened.choose("#mix", 100)
    assert opened.run(colours)[2] > 10


def test_several_pictures_and_checkpoints_side_by_side(browser, folder, tmp_path):
    path = tmp_path / "page.html"
    weights = [part for name in ("lit", "other") for part in ("--checkpoint", str(folder / f"{name}.safetensors"))]
    assert explore.main([str(folder / "*.png"), *weights, "--device", "cpu", "--output", str(path)]) == 0
    browser.screen()
    browser.open(path.as_uri())
    browser.wait("document.documentElement.dataset.ready")
    labels = (
        "[...document.querySelectorAll('.panel')].map((panel) => panel.getAttribute('aria-label').split('/').pop())"
    )
    assert browser.run(labels) == ["lit.safetensors", "other.safetensors"]
    first = points(browser)
    assert np.abs(first[:64] - first[64:]).max() > 1
    browser.run("document.querySelectorAll('.thumb input')[1].click()")
    assert "plain.png" in browser.run("document.querySelector('.panel h2').textContent")
    browser.run("document.querySelector('#all').click()")
    browser.wait("document.querySelectorAll('.panel .mark').length > 4 * 84")
    assert len(browser.run(labels)) == 4
    assert browser.problems == []
