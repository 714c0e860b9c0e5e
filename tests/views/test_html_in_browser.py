"""The page in a real browser, where one is installed."""

import html
import re
import shutil
import subprocess

import pytest

from tests.views.test_html import kinds_of_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium here"),
    pytest.mark.slow,
]
# The page itself may run nothing, so it is looked at from around it.
AROUND = """<!DOCTYPE html><meta charset="utf-8"><iframe width="{width}" height="900"
srcdoc="{page}" onload="measure(this)"></iframe><p id="found"></p><script>
function measure(frame) {{
  const page = frame.contentDocument, root = page.documentElement, out = [];
  for (const one of page.body.querySelectorAll("*")) {{
    if (one.closest(".scroll, pre, svg")) continue;
    if (one.getBoundingClientRect().right > root.clientWidth + 1) out.push(one.tagName);
  }}
  const small = [...page.querySelectorAll("svg[role=img] text")]
    .filter(one => one.getBoundingClientRect().height < 9).length;
  document.getElementById("found").textContent = JSON.stringify(
    [root.scrollWidth, root.clientWidth, out.length, small, page.querySelectorAll("h2").length]);
}}
</script>"""


def looked_at(page, width, folder):
    """Scroll width, width, elements outside, tiny labels and headings; and complaints."""
    path = folder / "around.html"
    path.write_text(AROUND.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<p id="found">\[(.*?)\]</p>', done.stdout)
    return [int(number) for number in found[1].split(",")], complaints


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("name", "page"), list(kinds_of_page()))
def test_nothing_sticks_out_and_nothing_is_complained_of(name, page, width, tmp_path):
    (scrolled, inside, outside, tiny, headings), complaints = looked_at(page, width, tmp_path)
    assert scrolled <= inside
    assert (outside, tiny) == (0, 0)
    assert headings >= 8
    assert complaints == []


def test_what_it_looks_for_is_found(tmp_path):
    page = dict(kinds_of_page())["conditional"]
    wide = page.replace("<h1>", '<div style="width: 2000px">x</div><script>1</script><h1>', 1)
    (scrolled, inside, outside, _, _), complaints = looked_at(wide, 390, tmp_path)
    assert scrolled > inside
    assert outside == 1
    assert complaints  # the script is refused
