"""Build the site from the executed chapters, check it, and open it in a browser.

Unchanged pages are kept. In CI, after a failure, and when something has changed that Sphinx does not track,
the build is from clean. A site that was found good and has not changed is not looked at again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import check

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
BUILT = BUILD / ".built"  # digest of what Sphinx does not track, as it was at the last good build
CHECKED = BUILD / ".checked"  # digests of what each test looked at when it was last found good
# The parts of the site that each browser test opens: most edits leave the explorer as it was.
LOOKS_AT = {
    "test_book.py": ["**/*"],
    "test_explorer.py": ["book/explorer.html", "_static/**/*"],
}
IN_CI = os.environ.get("CI") == "true"


def main() -> int:
    return build() or inspect()


def build() -> int:
    # The contents decide which pages exist, an extension draws every page, a page may cite any chapter's number, and
    # static files are copied only where a page is written.
    static = [*ROOT.glob("book/_ext/*.py"), *ROOT.glob("book/_static/*")]
    untracked = [ROOT / "_toc.yml", *static, *BUILD.glob(".execute/*.json")]
    made_from = digest(untracked)
    if IN_CI or recall(BUILT) != made_from:
        for folder in ("html", ".doctrees", "jupyter_execute"):
            shutil.rmtree(BUILD / folder, ignore_errors=True)
    BUILT.unlink(missing_ok=True)  # a build that follows a failed one would not see its warnings again
    jupyter_book = Path(sys.executable).parent / "jupyter-book"
    status = subprocess.run([jupyter_book, "build", ".", "-W", "--keep-going", "-n"], cwd=ROOT).returncode
    if status == 0:
        BUILT.write_text(made_from)
    return status


def inspect() -> int:
    """Check the site, and run the browser tests on what has changed since it was last found good."""
    site = list(check.SITE.rglob("*"))
    seen = {"check": digest([*ROOT.glob("book/check.py"), *site])}
    for suite, patterns in LOOKS_AT.items():
        pages = [page for pattern in patterns for page in check.SITE.glob(pattern)]
        seen[suite] = digest([ROOT / "tests/browser/conftest.py", ROOT / "tests/browser" / suite, *pages])
    good = recall(CHECKED) or ""
    changed = [name for name in seen if seen[name] not in good]
    if not changed:
        print("build: the site is as it was when it was found good")
        return 0
    if "check" in changed and (status := check.main([])):
        return status
    if not browser_is_there():
        print("build: found no Chromium with its driver: the browser test has NOT run", file=sys.stderr)
        return int(IN_CI)
    suites = [f"tests/browser/{suite}" for suite in changed if suite in LOOKS_AT]
    status = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "browser", *suites], cwd=ROOT).returncode
    if status == 0:
        CHECKED.write_text("\n".join(seen.values()))
    return status


def browser_is_there() -> bool:
    """Installs Debian's packages where that is possible without asking anybody."""
    if installed_browser() is None and os.geteuid() == 0 and operating_system() == "debian":
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(["apt-get", "install", "-q", "-y", "chromium", "chromium-driver"], check=True)
    return installed_browser() is not None


def installed_browser() -> str | None:
    browsers = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, browsers)), None) if shutil.which("chromedriver") else None


def operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["ID"]
    except OSError:
        return platform.system()


def recall(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        total.update(f"{path}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
