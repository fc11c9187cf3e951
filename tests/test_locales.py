"""The words that ComfyUI's page shows, in English and Chinese, against the nodes' schemas: locales and help pages.

The schemas are tests/comfy/object_info.json, which `python -m tests.comfy.snapshot` writes from a running ComfyUI.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from PIL import Image

from tools.make_locales import (
    COMMON_CATEGORIES,
    LOCALES,
    ROOT,
    SNAPSHOT,
    category_words,
    differences,
    inputs_of,
    leaves,
    node_words,
    read,
)

INFO = read(SNAPSHOT)
DOCS = ROOT / "web" / "docs"
LANGUAGES = ("en", "zh")
FILES = ("nodeDefs.json", "main.json")
REMEDY = "run tools/make_locales.py, and write what it says zh lacks"

#: ComfyUI's own nodes that the pages speak of, as its page calls them.
CORE_NODES = {
    "en": {
        "KSampler",
        "Load Checkpoint",
        "Load Diffusion Model",
        "Load VAE",
        "Preview Image",
        "Preview as Text",
        "Save Image",
        "Set Latent Noise Mask",
        "Upscale Image",
        "VAE Decode",
    },
    "zh": {
        "K采样器",
        "Checkpoint加载器（简易）",
        "UNet加载器",
        "加载VAE",
        "预览图像",
        "预览任意",
        "保存图像",
        "设置Latent噪波遮罩",
        "缩放图像",
        "VAE解码",
    },
}
#: What the pages quote besides sockets, options and paths; the last is an option only where nothing was saved yet.
QUOTED = {
    "dcdd calibrate",
    "dcdd captions",
    "hf auth login",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "none yet: fit one and save it",
}
MOST_BYTES = 60_000
CHINESE = re.compile("[\u4e00-\u9fff]")


def words(language: str, file: str = "nodeDefs.json") -> dict:
    return read(LOCALES / language / file)


def page(node: str, language: str) -> Path:
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


def text_of(node: str, language: str) -> str:
    return page(node, language).read_text("utf-8")


def sockets(node: str) -> set[str]:
    return {*inputs_of(INFO[node]), *INFO[node]["output_name"]}


def options_of(spec: list) -> list[str]:
    return spec[1]["options"] if spec[0] == "COMBO" else []


def tables(text: str) -> list[list[str]]:
    """First cells of the rows of each of a page's tables, without the head."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[row.split("|")[1].strip() for row in rows.splitlines()][2:] for rows in found]


every_page = pytest.mark.parametrize("language", LANGUAGES)
every_node = pytest.mark.parametrize("node", INFO)


# --- locales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, made", [("nodeDefs.json", node_words), ("main.json", category_words)])
def test_english_is_what_the_schemas_say(file, made):
    assert words("en", file) == made(INFO), REMEDY


def test_every_name_and_tooltip_is_there():
    assert [key for key, text in leaves(node_words(INFO)) if not text.strip()] == []


@pytest.mark.parametrize("file", FILES)
def test_languages_have_the_same_words(file):
    assert differences(words("en", file), words("zh", file)) == [], REMEDY


def test_what_is_missing_or_too_much_is_noticed():
    english = words("en")
    shorter = copy.deepcopy(english)
    del shorter["DCDD_FluxDecoder"]["inputs"]["steps"]["tooltip"]
    assert [line[:41] for line in differences(english, shorter)] == ["lacks DCDD_FluxDecoder.inputs.steps.toolt"]
    assert differences(shorter, english) == ["has too much: DCDD_FluxDecoder.inputs.steps.tooltip"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", FILES)
def test_no_text_holds_what_the_page_reads_as_a_command(language, file):
    """vue-i18n interpolates {braces}, links @:keys, and takes | for a choice between singular and plural."""
    assert {key: text for key, text in leaves(words(language, file)) if set("{}@|") & set(text)} == {}


def test_sentences_are_translated():
    english, chinese = dict(leaves(words("en"))), dict(leaves(words("zh")))
    sentences = [key for key in english if key.endswith(("tooltip", "description"))]
    assert [key for key in sentences if not CHINESE.search(chinese[key])] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_words_of_all_packs_are_left_alone(language):
    assert COMMON_CATEGORIES.isdisjoint(words(language, "main.json")["nodeCategories"])


def test_every_option_has_a_chinese_name():
    """Of the combos that list no files; web/js names them, for the page has no place for it in the locales."""
    script = (ROOT / "web" / "js" / "chinese_options.js").read_text("utf-8")
    table = script[script.index("{\n  ") : script.index("\n};")]
    named = dict(re.findall(r'^  "?(.+?)"?: "(.+)",$', table, re.M))
    models = {option for option in named if option in QUOTED}
    combos = [
        spec for node, entry in INFO.items() if node != "DCDD_DownloadModel" for spec in inputs_of(entry).values()
    ]
    assert named.keys() == {option for spec in combos for option in options_of(spec)} | models
    plain = {option for option, name in named.items() if not CHINESE.search(name)}
    assert plain == {"float32", "bfloat16", "float16", "CPU"}


def test_names_in_one_node_differ():
    for language in LANGUAGES:
        for node, shown in words(language).items():
            names = [value["name"] for value in shown["inputs"].values()]
            assert len(set(names)) == len(names), f"{language} {node}: {names}"
    for language in LANGUAGES:
        titles = [shown["display_name"] for shown in words(language).values()]
        assert len(set(titles)) == len(titles)


# --- help pages -------------------------------------------------------------------------------------------------------


@every_page
def test_every_node_has_a_page_and_every_page_a_node(language):
    pages = DOCS.glob("*.md") if language == "en" else DOCS.glob(f"*/{language}.md")
    assert {path.stem if language == "en" else path.parent.name for path in pages} == set(INFO)
    assert {path.stem for path in (DOCS / "images").iterdir()} == set(INFO)


@every_page
@every_node
def test_page_begins_with_the_name_and_shows_the_picture(node, language):
    text = text_of(node, language)
    assert text.splitlines()[0] == f"# {words(language)[node]['display_name']}"
    # Both languages' pages are shown with docs/ for a base, so that both say images/NAME.
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)", text)
    assert [path for _, path in pictures] == [f"images/{node}.jpg"]
    assert language == "en" or CHINESE.search(pictures[0][0])


@every_node
def test_picture_is_small_and_whole(node):
    path = DOCS / "images" / f"{node}.jpg"
    assert path.stat().st_size <= MOST_BYTES
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        picture.load()


@every_page
@every_node
def test_tables_list_the_inputs_and_outputs(node, language):
    text, shown = text_of(node, language), words(language)[node]

    def cell(socket: str, name: str) -> str:
        return f"`{socket}`" if name == socket else f"{name} `{socket}`"

    inputs = [cell(key, value["name"]) for key, value in shown["inputs"].items()]
    outputs = zip(INFO[node]["output_name"], shown["outputs"].values())
    wanted = [inputs, [cell(socket, value["name"]) for socket, value in outputs]]
    assert tables(text) == [rows for rows in wanted if rows]


@every_page
@every_node
def test_tables_fit_into_the_panel(node, language):
    """It is 275 pixels wide when first opened, and breaks lines at spaces and Chinese signs: paths go into the text."""
    words = re.findall(r"[!-~]+", " ".join(re.findall(r"^\|.*$", text_of(node, language), re.M)))
    assert [word for word in words if len(word.strip("`*,.;:")) > 16 and "-" not in word] == []


@every_page
@every_node
def test_page_speaks_only_of_what_there_is(node, language):
    """Bold names a node, unless it ends like a sentence; `code` is a socket, an option, a path or a command."""
    text = text_of(node, language)
    titles = {shown["display_name"]: key for key, shown in words(language).items()}
    bold = {found for found in re.findall(r"\*\*(.+?)\*\*", text) if found[-1] not in ".?!:。？！："}
    assert bold <= {*titles, *CORE_NODES[language]}
    assert not bold or words(language)[node]["display_name"] not in bold, "a page calls its own node 'this node'"
    options = {option for entry in INFO.values() for spec in inputs_of(entry).values() for option in options_of(spec)}
    spoken_of = set.union(sockets(node), *(sockets(titles[title]) for title in bold & set(titles)))
    for code in re.findall(r"`(.+?)`", text):
        is_path = re.fullmatch(r"[\w.-]*[./][\w./-]*", code)
        assert code in spoken_of | options | QUOTED or is_path, f"`{code}` is no socket, option, path or command"


@every_node
def test_pages_of_a_node_have_the_same_parts(node):
    parts = [re.findall(r"^(#+ |- |\| )", text_of(node, language), re.M) for language in LANGUAGES]
    assert parts[0] == parts[1]


@every_page
@every_node
def test_links_lead_out(node, language):
    """The page opens links as they are written: a relative one would lead nowhere."""
    for target in re.findall(r"(?<!\!)\[[^]]*\]\((.+?)\)", re.sub(r"!\[.*?\]\(.*?\)", "", text_of(node, language))):
        assert target.startswith("https://arxiv.org/abs/"), target
