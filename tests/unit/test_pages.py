"""The files of /ui and /docs: complete, nothing from elsewhere, nothing inline, and the vendored one as published."""

from __future__ import annotations

import hashlib
import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from server.api.status.pages import FILES, HEADERS
from tests.unit.api_fake import FakeEngine, client, make_app

STATIC = Path(str(resources.files("server.api.status"))) / "static"
UPLOT = {  # version 1.6.32 as published on npm
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
OURS = sorted(path.name for path in STATIC.iterdir() if path.name not in UPLOT)


@pytest.mark.parametrize("name", sorted(UPLOT))
def test_the_vendored_library_is_the_published_one(name: str):
    """Not a byte differs from the release that the licence beside it belongs to."""
    assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == UPLOT[name]


@pytest.mark.parametrize("name", OURS)
def test_nothing_is_inline_or_from_elsewhere(name: str):
    """No address with a host, no script or style within a document, no handler or style attribute, no eval."""
    text = (STATIC / name).read_text(encoding="utf-8")
    assert re.findall(r"\w+://[^\s\"']+", text) == (["http://www.w3.org/2000/svg"] if name.endswith(".svg") else [])
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=\"|javascript:|\beval\(|innerHTML", text) == []


def test_every_file_is_served_and_packed():
    """The folder holds what the routes serve and the licence, and goes into the wheel."""
    assert {name for name, _ in FILES.values()} | {"uPlot.LICENSE"} == {path.name for path in STATIC.iterdir()}
    project = tomllib.loads((STATIC.parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["server.api.status"] == ["static/*"]


def test_links_are_relative():
    """So that the page also works behind a prefix: every file that one names is served beside it."""
    for page in ("index.html", "docs.html"):
        text = (STATIC / page).read_text(encoding="utf-8")
        links = set(re.findall(r'(?:href|src)="([^"#]+)"', text))
        assert links
        assert {f"/{link}" for link in links} <= {*FILES, "/status", "/metrics", "/openapi.json"}
    calls = re.findall(
        r'(?:fetch|act)\("([^"]+)"', "".join((STATIC / name).read_text() for name in ("page.js", "docs.js"))
    )
    assert set(calls) == {"status/stream", "v1/cache/clear", "v1/cache/evict", "openapi.json"}


@pytest.mark.parametrize("path", sorted(FILES))
async def test_files_need_no_key_and_are_asked_for_again_by_tag(path: str) -> None:
    """A browser cannot send a key when it opens a page; what it kept is confirmed, and never used unasked."""
    async with client(make_app(FakeEngine(), keys=["one"])) as http:
        answer = await http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(FILES[path][1])
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        again = await http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]


async def test_the_page_can_be_switched_off() -> None:
    """With --no-ui there is no page, the numbers stay; a slash too many leads to the page, wherever it is."""
    async with client(make_app(FakeEngine(), ui=False)) as http:
        assert {(await http.get(path)).status_code for path in FILES} == {404}
        assert (await http.get("/status")).status_code == 200
    async with client(make_app(FakeEngine())) as http:
        answer = await http.get("/ui/")
        assert (answer.status_code, answer.headers["location"]) == (308, "../ui")
