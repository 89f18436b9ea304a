"""The site in a real browser: every page opened at a phone's width; no broken link, picture or formula, nothing wider than the screen."""
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from bas_repro.site import site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--virtual-time-budget=60000", "--dump-dom"]
# What the browser finds on a page, sent by the page to the one that frames it when all is loaded.
ASK = """<script>addEventListener("load", () => { const all = s => [...document.querySelectorAll(s)], seen = e => e.getBoundingClientRect();
parent.postMessage({page: location.pathname.split("/").pop(), images: all("img").length, broken: all("img").filter(i => !i.naturalWidth).length,
formulas: all("math").length, empty: all("math").filter(m => !m.closest("details") && !(seen(m).width > 0 && seen(m).height > 0)).length,
errors: all("merror").length, tex: /\\\\(frac|sum|sigma|mathrm|lambda)/.test(all("p, li, h2, h3").map(e => e.innerText).join()), wide: document.documentElement.scrollWidth - innerWidth}, "*") })</script>"""
# All pages in one window, one after the other in a frame of a phone's size: a browser starts more slowly than it shows them.
FRAMES = """<iframe width="500" height="900" style="border: 0"></iframe><script>const names = NAMES, found = [], frame = document.querySelector("iframe");
addEventListener("message", e => { found.push(e.data); document.body.setAttribute("data-report", JSON.stringify(found)); if (names.length) frame.src = names.shift() });
frame.src = names.shift()</script>"""


class Links(html.parser.HTMLParser):
    "The targets and the ids of a page."
    def __init__(self, text):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a" and attributes.get("href"): self.targets.append(attributes["href"])
        if "id" in attributes: self.ids.add(attributes["id"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return {page.name: page for page in site(tmp_path_factory.mktemp("site"))}


def test_links(pages, count):
    found = {name: Links(page.read_text()) for name, page in pages.items()}
    assert set(pages) == {f"{target}" for target in found["index.html"].targets if target in pages} | {"index.html"}  # all are in reach
    for name, page in found.items():
        for target in page.targets:
            if target.startswith("https://"): continue
            file, _, anchor = target.partition("#")
            good = (file or name) in pages and (not anchor or anchor in found[file or name].ids)
            count("links working", good)
            assert good, f"{name}: {target}"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")
def test_pages_in_a_browser(pages, count, tmp_path):
    for name, page in pages.items(): (tmp_path/name).write_text(page.read_text().replace("</head>", ASK + "</head>"))
    (tmp_path/"frames.html").write_text("<!doctype html><body>" + FRAMES.replace("NAMES", json.dumps(list(pages))))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path/'profile'}", (tmp_path/"frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    reports = json.loads(html.unescape(re.search(r'data-report="([^"]*)"', done.stdout)[1]))
    assert [report["page"] for report in reports] == list(pages)
    for report in reports:
        good = not (report["broken"] or report["empty"] or report["errors"] or report["tex"] or report["wide"] > 0)
        count("pages whole in a browser", good)
        assert good, report
    assert sum(report["images"] for report in reports) > 10 and sum(report["formulas"] for report in reports) > 100
