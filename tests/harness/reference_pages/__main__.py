"""Write all generated pages: ``python -m tests.harness.reference_pages``."""

from tests.harness.reference_pages import DOCS, PAGES

for name, page in PAGES.items():
    (DOCS / name).parent.mkdir(exist_ok=True)
    (DOCS / name).write_text(page())
