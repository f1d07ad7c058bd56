"""A headless browser, where there is one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Appended to a page: counts what went wrong, and what was drawn with a size that can be seen.
_WATCH = """<script>
addEventListener("load", () => {
  const seen = (element) => { const box = element.getBoundingClientRect(); return box.width > 20 && box.height > 3; };
  const count = (selector) => [...document.querySelectorAll(selector)].filter(seen).length;
  const all = (selector) => document.querySelectorAll(selector).length;
  const chart = document.querySelector("svg.chart");
  if (chart) {
    const box = chart.getBoundingClientRect();
    chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  }
  // Texts of a drawing that lie on one another, by more than the room around the letters.
  const overlaps = [];
  for (const drawing of document.querySelectorAll("svg.chart, svg.heat")) {
    const texts = [...drawing.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([one, a], at) => texts.slice(at + 1).forEach(([other, b]) => {
      if (a.left + 2 < b.right && b.left + 2 < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
        overlaps.push(one + " / " + other);
    }));
  }
  const labelled = [...document.querySelectorAll("svg.chart, svg.heat")].every(
    (drawing) => drawing.querySelectorAll("text.label").length === 2);
  const report = { overlaps, labelled, errors,
    charts: count("svg.chart"), allCharts: all("svg.chart"), curves: count("svg .curve"),
    heats: count("svg.heat"), maps: [...document.images].filter((i) => i.complete && i.naturalWidth > 1).length,
    allMaps: document.images.length, tip: document.querySelector(".tip")?.textContent ?? "",
    overflow: document.documentElement.scrollWidth > innerWidth };
  document.title = "REPORT" + JSON.stringify(report) + "END";
});
</script>"""
_ERRORS = """<script>const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => errors.push("policy: " + event.blockedURI));</script>"""


def chromium() -> str:
    """The browser, or skip."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(names)} (Debian: apt install chromium)")
    return found


def watched(page: str) -> str:
    """The page with its errors and drawings counted into the title."""
    assert page.count("<head>") == 1 and page.count("</body>") == 1
    return page.replace("<head>", "<head>" + _ERRORS).replace("</body>", _WATCH + "</body>")


def dump(page: Path, profile: Path) -> str:
    """The document of a page after its scripts have run."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--window-size=1200,900", "--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
