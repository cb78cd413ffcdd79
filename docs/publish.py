"""Adds a built site to the published ones, a folder for each version: ``python docs/publish.py build/docs SITE 0.2.0``.

SITE is a checkout of what is published. Folders of other versions stay as they are, so a link to a version keeps
working; ``SITE/index.html`` lists all of them, the newest first.
"""

import re
import shutil
import sys
from pathlib import Path

from packaging.version import Version


def publish(built: Path, site: Path, version: str) -> None:
    """Copies a built site to ``site/version`` and writes the list of versions.

    Args:
        built: a site that ``make docs`` has built.
        site: the folder of all versions; made if it does not exist.
        version: a release such as ``0.2.0``, or ``main``. Its folder is replaced.

    Raises:
        FileNotFoundError: ``built`` holds no site.
        ValueError: ``version`` is neither ``main`` nor a version.
    """
    if not (built / "index.html").is_file():
        raise FileNotFoundError(f"found no index.html in {built}, expected a built site: run `make docs`")
    if version != "main" and not re.fullmatch(r"\d+(\.\d+)*((a|b|rc)\d+)?", version):
        raise ValueError(f"found the version {version!r}, expected main or a number such as 0.2.0")
    shutil.rmtree(site / version, ignore_errors=True)
    shutil.copytree(built, site / version)
    (site / ".nojekyll").touch()  # folders whose names begin with an underscore are served too
    published = [folder.name for folder in site.iterdir() if (folder / "index.html").is_file()]
    releases = sorted((name for name in published if name != "main"), key=Version, reverse=True)
    names = releases + ["main"] * ("main" in published)
    items = "\n".join(f'<li><a href="{name}/index.html">{name}</a></li>' for name in names)
    (site / "index.html").write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>hesscale_lightning</title>\n'
        f"<h1>hesscale_lightning: documentation by version</h1>\n<ul>\n{items}\n</ul>\n</html>\n"
    )


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
