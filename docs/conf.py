"""Settings of Sphinx, which builds the documentation site from the pages in this folder (`make docs`).

Warnings are errors, so a broken link, a missing heading or a page outside the navigation fails the build. The pages
load nothing from other sites.
"""

from importlib.metadata import version as installed_version

project = "Zeta"
version = release = installed_version("zeta-train")
project_copyright = "the Zeta authors"

extensions = ["myst_parser"]
root_doc = "index"
nitpicky = True
smartquotes = False  # commands and JSON are copied from the pages
myst_heading_anchors = 3  # the anchors of GitHub, where the same pages are read

html_theme = "furo"
html_title = f"Zeta {release}"
html_copy_source = False
html_show_sourcelink = False
