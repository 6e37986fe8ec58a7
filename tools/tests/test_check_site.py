"""The check of the built site notices what it is for."""

import pytest
from check_site import faults

HEAD = '<link rel="stylesheet" href="a/style.css"><link rel="canonical" href="https://example.org/">'
BODY = (
    '<a href="https://example.org">x</a><img src="../p%20q.png"><img src="data:image/png;base64,AA"><script>1</script>'
)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "sub" / "a").mkdir(parents=True)
    (tmp_path / "sub" / "page.html").write_text(HEAD + BODY)
    (tmp_path / "sub" / "a" / "style.css").write_text('a { background: url("p.png") }')
    (tmp_path / "p q.png").write_bytes(b"")
    return tmp_path


def test_a_site_that_is_right(site):
    assert list(faults(site)) == []


@pytest.mark.parametrize(
    "html, fault",
    [
        ('<script src="https://cdn.example.org/x.js"></script>', "sub/page.html loads https://cdn.example.org/x.js"),
        ('<img src="//example.org/x.png">', "sub/page.html loads //example.org/x.png"),
        ('<link rel="preconnect" href="https://fonts.example.org">', "sub/page.html loads https://fonts.example.org"),
        ('<img src="gone.png">', "sub/page.html loads gone.png, which is not there"),
    ],
)
def test_what_a_page_loads(site, html, fault):
    (site / "sub" / "page.html").write_text(HEAD + BODY + html)
    assert list(faults(site)) == [fault]


def test_what_a_style_loads_and_no_pages(site):
    (site / "sub" / "a" / "style.css").write_text(
        '@import "https://example.org/f.css"; b { src: url(https://e.org/f) }'
    )
    assert [line.split(" loads ")[1] for line in faults(site)] == ["https://example.org/f.css", "https://e.org/f"]
    assert list(faults(site / "sub" / "a" / "gone")) == [f"{site / 'sub' / 'a' / 'gone'} has no pages"]
