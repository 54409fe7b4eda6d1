"""A page read strictly, and what every page must be."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav"),
    *("section", "h1", "h2", "h3", "p", "a", "ul", "ol", "li", "i", "b", "span", "div", "figure"),
    *("figcaption", "svg", "g", "path", "rect", "circle", "text", "details", "summary", "dl"),
    *("dt", "dd", "pre", "table", "thead", "tbody", "tr", "th", "td"),
}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order; keeps elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str, kind: str | None = None) -> int:
        """Elements of that name, and of that class if one is given."""
        return sum(
            found == tag and (kind is None or kind in (attrs.get("class") or "").split())
            for found, attrs in self.elements
        )


def needs_nothing_else(page: Page) -> None:
    """No script, no handler, no style from a run, and no address but the page's own anchors."""
    for tag, attrs in page.elements:
        assert tag in ALLOWED, tag
        assert not any(name.startswith("on") for name in attrs)
        assert not {"src", "style", "srcset", "action", "data"} & set(attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert page.count("style") == 1
    policy = next(attrs for tag, attrs in page.elements if "http-equiv" in attrs)
    assert (policy["content"] or "").startswith("default-src 'none'")
