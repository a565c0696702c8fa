"""What `mkdocs` (mkdocs.yml) needs to know beyond docs/: pages and pictures that lie elsewhere.

Links out of docs/ lead to those pages; a link to a file of the code becomes its name.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: file of the repository -> the page that it is
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "playground/README.md": "Playground.md",
    "playground/data/eval/README.md": "Evaluation_data.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for picture in sorted((ROOT / "images").glob("*.png")):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = {page: name for name, page in PAGES.items()}.get(page.file.src_uri)
    folder = ROOT / (Path(source).parent if source else "docs")
    return LINK.sub(lambda link: rewritten(link, folder), markdown)


def rewritten(link: re.Match, folder: Path) -> str:
    """A link of a page in `folder` as it reads on the site, whose pages are all in one place."""
    mark, text, target, anchor = link.groups()
    if re.match(r"[a-z]+:", target):
        return link[0]
    try:
        name = (folder / target).resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return link[0]
    if name in PAGES or name.startswith("images/"):
        return f"{mark}[{text}]({PAGES.get(name, name)}{anchor or ''})"
    if name.startswith("docs/") and name.endswith(".md"):
        return f"{mark}[{text}]({name.removeprefix('docs/')}{anchor or ''})"
    return text  # a file of the code
