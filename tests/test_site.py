"""The built site: every page is there and needs no network; opened in a browser, pages render, pictures load, search answers.

Skipped where `make docs` has not been run (there is no site/) and, for the browser, where no Chromium is found.
"""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.name != "404.html")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

pytestmark = pytest.mark.skipif(not SITE.is_dir(), reason="there is no site/: make docs builds it")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


class Page(HTMLParser):
    """What a page loads, where it links to, and the ids it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.ids.add(attributes.get("id", ""))
        if "src" in attributes:
            self.loads.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loads.append(attributes["href"])
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])


@functools.cache
def read(page: str) -> Page:
    return Page((SITE / page).read_text())


def is_elsewhere(link: str) -> bool:
    return re.match(r"[a-z]+:|//", link) is not None


# ---- the files -------------------------------------------------------------------------------------------------------


def test_every_page_of_docs_is_there() -> None:
    sources = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }
    missing = sources | {"changelog.html", "contributing.html"}
    assert missing <= set(PAGES), f"site/ lacks {sorted(missing - set(PAGES))}: run make docs again"


def test_every_public_name_is_in_the_api() -> None:
    import onepass

    ids = set().union(*(read(page).ids for page in PAGES if page.startswith("api/")))
    names = [f"onepass.{name}" for name in onepass.__all__ if name not in ("__version__", "nn", "optim")]
    for module in (onepass.optim, onepass.nn, onepass.nn.functional):
        names += [f"{module.__name__}.{name}" for name in module.__all__ if name != "functional"]
    assert set(names) <= ids, f"the API pages lack {sorted(set(names) - ids)}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_needs_no_network(page: str) -> None:
    outside = [source for source in read(page).loads if is_elsewhere(source) and not source.startswith("data:")]
    assert not outside, f"{page} loads {outside}"
    missing = [s for s in read(page).loads if not is_elsewhere(s) and not (SITE / page).parent.joinpath(s).exists()]
    assert not missing, f"{page} loads {missing}, which are not there"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page(page: str) -> None:
    for link in filter(lambda link: not is_elsewhere(link), read(page).links):
        path, _, anchor = urllib.parse.unquote(link).partition("#")
        target = ((SITE / page).parent / path).resolve() if path else SITE / page
        assert target.exists(), f"{page} links to {link}"
        if anchor and target.suffix == ".html":
            assert anchor in read(target.relative_to(SITE).as_posix()).ids, f"{page} links to {link}: no such heading"


# ---- in a browser ----------------------------------------------------------------------------------------------------


# Every page in a frame. When all are loaded, it says what became of them in the document, which --dump-dom prints.
FRAME = '<iframe width="1200" height="900" src="{page}"></iframe>'
PROBE = """<!doctype html><body>FRAMES</body><script>
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const article = frame.contentDocument.querySelector("article");
    const pictures = [...article.querySelectorAll("img")];
    found[frame.getAttribute("src")] = {
      height: article.scrollHeight,
      title: article.querySelector("h1").innerText,
      pictures: pictures.length,
      broken: pictures.filter((picture) => !picture.naturalWidth).map((picture) => picture.src),
    };
  }
  document.body.innerText = "found" + JSON.stringify(found) + "end";
};
</script>"""


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the site, and the probe beside it."""

    def do_GET(self) -> None:
        if self.path != "/probe":
            return super().do_GET()
        content = PROBE.replace("FRAMES", "".join(FRAME.format(page=page) for page in PAGES)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=SITE)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def rendered(url: str, folder: Path, *options: str) -> str:
    """The document once it is loaded."""
    command = [BROWSER, *QUIET, *options, f"--user-data-dir={folder}", "--dump-dom", url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_browser
def test_pages_render_with_their_pictures(server: str, tmp_path: Path) -> None:
    document = rendered(f"{server}/probe", tmp_path)
    answer = re.search(r"found(\{.*\})end", document, re.S)
    assert answer is not None, f"the pages did not open: {document[:1000]}"
    found = json.loads(html.unescape(answer[1]))
    assert found.keys() == set(PAGES)
    for page, seen in found.items():
        assert seen["height"] > 100, f"{page} is empty: {seen}"
        assert seen["title"], f"{page} has no title"
        assert not seen["broken"], f"{page}: pictures that do not load: {seen['broken']}"
    assert sum(seen["pictures"] for seen in found.values()) >= 5


@needs_browser
def test_search_answers_without_a_server(tmp_path: Path) -> None:
    """Asked by the address, which opens the search with these words in it. docs/assets/iframe-worker.js makes it possible."""
    address = f"{SITE.as_uri()}/index.html?q=quadratic"
    document = rendered(address, tmp_path, "--virtual-time-budget=30000")  # until the scripts have nothing left to do
    found = re.findall(r'<a href="([^"]*)"[^>]*class="md-search-result__link"', document)
    assert any("lookahead.html" in link for link in found), f"a search for quadratic finds {found}"
