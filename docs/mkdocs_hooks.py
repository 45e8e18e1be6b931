"""Links from pages to `../examples/...`, which lead there on a forge, lead on the site to copies beside the pages."""

import re
from pathlib import Path

from mkdocs.structure.files import File

_LINK = re.compile(r"\]\(\.\./((?:examples|minikv_jax)/[^)#]+)")


def on_files(files, config):
    """Adds what pages link to."""
    root = Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for path in _LINK.findall((root / "docs" / page.src_uri).read_text(encoding="utf-8")):
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the links to them."""
    return _LINK.sub(r"](\1", markdown)
